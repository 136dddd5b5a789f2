"""The engine `vllm` with the real vLLM: answers equal the fp32 reference's under every schedule."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import vllm_checks
from helpers.command import Grbench
from helpers.items import SIZES
from helpers.vllm_engines import (
    CATALOGUE,
    CLOSE,
    FREEZE,
    GPU_MODEL,
    GPU_REQUESTS,
    IDS,
    LENGTHS,
    MODEL,
    REQUESTS,
    RETRIEVAL,
    UNFREEZE,
    allowed,
    engine_of,
    expect_equal,
    expect_mixed,
    expect_near,
    freeze_imports,
    frozen_imports,
    gpu_engine,
    in_pages,
    request_of,
    requests_of,
)
from helpers.walks import ring

from grbench.config.schema import RetrievalConfig
from grbench.quality.protocol import LeaveOneOut
from grbench.tools.doctor import findings
from grbench.training import loop
from grbench.training.config import TrainConfig, TrainingConfig
from grbench.training.generate import GenerateTask, semantic_ids
from grbench.workloads.config import RecordedConfig
from grengines import registry
from grengines.api import Retrieval, Setup, UnavailableError
from grengines.cache.config import CacheConfig
from grengines.models.hstu.generator import HSTUGenerator, PromptKeys, pack_prompts
from grengines.models.hstu.reference import HSTUReference
from grengines.semantic.search import Beams
from grengines.vllm import install
from grengines.vllm.config import VLLMEngineConfig
from grengines.vllm.engine import VLLMEngine
from grengines.vllm.environment import unchanged_process
from grengines.vllm.folder import ModelFolder
from grkernels.choice import requested
from grkernels.operators import Operators
from grkernels.registry import FAMILIES


@pytest.fixture(scope="module", autouse=True)
def imports() -> Iterator[None]:
    with frozen_imports():
        yield


@pytest.fixture(scope="module")
def reference() -> HSTUReference:
    return HSTUReference(MODEL, 3, RETRIEVAL, "cpu")


@pytest.fixture(scope="module")
def expected(reference: HSTUReference) -> Beams:
    return reference.search(REQUESTS)


@pytest.fixture(scope="class")
def engine() -> Iterator[VLLMEngine]:
    """Share an engine among a class's tests, because a process can hold only one vLLM at a time."""
    made = engine_of()
    yield made
    made.close()
    freeze_imports()


# Agreement


class TestOneEngine:
    def test_items_and_order_are_the_references(self, engine: VLLMEngine, expected: Beams) -> None:
        found = engine.generate(REQUESTS)
        expect_equal(found, expected)
        assert all(items.min() >= 0 and items.max() < 110 for items in found.items)
        assert found.tokens == sum(min(max(3 * n, 1), 90) for n in LENGTHS)

    def test_the_check_can_fail(self, engine: VLLMEngine, reference: HSTUReference) -> None:
        """Answers without attention, and those of another request, are far outside the tolerance."""
        found = engine.generate(REQUESTS)
        blind = reference.search(REQUESTS, blind=True)
        for i in (0, 2, 4):
            assert np.abs(found.scores[i] - blind.scores[i]).max() > 100 * CLOSE
            assert np.abs(found.scores[i] - found.scores[i + 1]).max() > 100 * CLOSE

    def test_a_blind_engine_fails(self, engine: VLLMEngine, expected: Beams, monkeypatch: pytest.MonkeyPatch) -> None:
        """Answers are wrong without the beams' own terms, without the prompt in pages, and with another prompt's."""
        model = engine.core.model
        monkeypatch.setattr(model.generator, "own_term", lambda q, k, v, bias: torch.zeros_like(v))
        with pytest.raises(AssertionError):
            expect_equal(engine.generate(REQUESTS), expected)
        monkeypatch.undo()
        search = model.search

        def others(last: torch.Tensor, prompts: PromptKeys, *given: Any, **options: Any) -> Any:
            table = prompts.page_table.roll(1, dims=0)
            return search(last, dataclasses.replace(prompts, page_table=table), *given, **options)

        monkeypatch.setattr(model, "search", others)
        with pytest.raises(AssertionError):
            expect_equal(engine.generate(REQUESTS), expected)
        monkeypatch.undo()
        monkeypatch.setattr(model.operators, "paged_write", lambda *_, **__: None)
        engine.reset_cache()
        with pytest.raises(AssertionError):
            expect_equal(engine.generate(REQUESTS), expected)
        monkeypatch.undo()
        engine.reset_cache()
        expect_equal(engine.generate(REQUESTS), expected)

    @pytest.mark.parametrize("order", [[4], [7, 2, 0, 5], [3, 3, 1, 6, 4, 0, 2, 5, 7, 3]])
    def test_batch_composition_changes_nothing(self, engine: VLLMEngine, expected: Beams, order: list[int]) -> None:
        engine.reset_cache()
        expect_equal(engine.generate([REQUESTS[i] for i in order]), expected, order)

    def test_one_call_for_all_requests(
        self, engine: VLLMEngine, expected: Beams, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Compute all prompts of a step in one call of the operator, as on a GPU."""
        from grengines.vllm.hstu_attention import HSTUAttention

        monkeypatch.setattr(HSTUAttention, "one_by_one", HSTUAttention.together)
        engine.reset_cache()
        done = {}
        for key, request in enumerate(REQUESTS):  # a new prompt in every step
            engine.admit(key, request)
            done |= {f.key: f for f in engine.step()}
        while engine.unfinished:
            done |= {f.key: f for f in engine.step()}
        assert [done[key].items.tolist() for key in range(len(REQUESTS))] == expected.items.tolist()

    def test_the_last_layer_attends_for_last_tokens_alone(
        self, engine: VLLMEngine, expected: Beams, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Prompts of 60 and 36 tokens in one step: their last layer has two queries, and keys of every token."""
        operators, queries = engine.core.model.operators, list[int]()
        attend, first, second = operators.hstu_attention, *requests_of([20, 12], seed=8)

        def watched(q: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
            queries.append(len(q))
            return attend(q, *given, **options)

        monkeypatch.setattr(operators, "hstu_attention", watched)
        engine.reset_cache()
        engine.generate([first, second])
        step = [60, 36] * (MODEL.layers - 1)  # on a CPU one prompt after another
        assert queries[: len(step)] == step and queries[len(step)] == 2
        assert max(queries[len(step) + 1 :]) <= 2 * RETRIEVAL.beam_width

    def test_arrival_order_changes_nothing(self, engine: VLLMEngine, expected: Beams) -> None:
        """Requests join between steps."""
        rng = np.random.default_rng(2)
        for _ in range(3):
            engine.reset_cache()
            waiting, done = list(rng.permutation(len(REQUESTS))), {}
            while waiting or engine.unfinished:
                for _ in range(min(int(rng.integers(0, 3)), len(waiting))):
                    key = int(waiting.pop())
                    engine.admit(key, REQUESTS[key])
                for finished in engine.step():
                    done[finished.key] = finished
            assert sorted(done) == list(range(len(REQUESTS)))
            for key, finished in done.items():
                assert finished.items.tolist() == expected.items[key].tolist()
                np.testing.assert_allclose(finished.scores, expected.scores[key], atol=CLOSE)

    def test_a_returning_user_hits_the_prefix_cache(self, engine: VLLMEngine, reference: HSTUReference) -> None:
        """The same history, and one with new events, hit whole pages, and the answers are the reference's."""
        engine.reset_cache()
        items = requests_of([20], seed=5)[0].history_items
        first, grown = request_of(0, items[:12]), request_of(1, items)
        cold = engine.generate([first])
        assert cold.details["prefix_hit_tokens"] == 0
        warm, longer = engine.generate([first]), engine.generate([grown])
        assert warm.details["prefix_hit_tokens"] == 32  # 36 tokens fill two pages of 16
        assert longer.details["prefix_hit_tokens"] == 32
        expected = reference.search([first, grown])
        for found, i in ((cold, 0), (warm, 0), (longer, 1)):
            expect_equal(found, expected, [i])
        engine.reset_cache()
        assert engine.generate([first]).details["prefix_hit_tokens"] == 0

    def test_a_step_is_prepared_before_the_last_one_is_waited_for(self, engine: VLLMEngine, expected: Beams) -> None:
        engine.reset_cache()
        pooler, keys, steps = engine.core.model.pooler, [], []
        before = pooler.steps
        for key in (4, 2):
            engine.admit(key, REQUESTS[key])
            keys.append([f.key for f in engine.step()])
            steps.append(pooler.steps - before)
        assert (keys, steps) == ([[], [4]], [1, 2])
        (last,) = engine.step()
        assert last.items.tolist() == expected.items[2].tolist()

    def test_a_search_is_one_vllm_request_and_step(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        client, added = engine.core.client, []
        add = client.add_request
        monkeypatch.setattr(client, "add_request", lambda request: (added.append(request), add(request))[1])
        found = engine.generate(REQUESTS[:2])
        assert len(added) == 2 and found.details["vllm_steps"] == 1


def test_token_ids_are_a_list_that_numpy_takes_as_an_array() -> None:
    from grengines.vllm import compat

    array = np.arange(5, 9)
    ids = compat.TokenIds(array.tolist(), array + 100)  # unlike the list, to see which one is taken
    assert isinstance(ids, list) and ids == [5, 6, 7, 8] and type(ids.copy()) is type(ids[1:]) is list
    there = np.zeros((2, 6), np.int32)
    there[1, :4] = ids
    assert there.tolist() == [[0] * 6, [105, 106, 107, 108, 0, 0]]


def test_a_page_is_hashed_with_all_before_it() -> None:
    from grengines.vllm import compat

    def hashes(ids: np.ndarray) -> list[bytes]:
        return compat.hashes_of_prefixes(SimpleNamespace(prompt_token_ids=compat.TokenIds(ids.tolist(), ids)), page=16)

    ids = np.arange(40) % 8
    first, other = hashes(ids), ids.copy()
    other[3] += 1
    assert len(set(first)) == 2  # full pages of the same ids in other places
    assert hashes(ids[:39]) == first and hashes(ids[:16]) == first[:1] and hashes(ids[:15]) == []
    assert not set(hashes(other)) & set(first)


def test_chunks_of_any_size_change_nothing(expected: Beams) -> None:
    vllm_checks.chunks_of_any_size_change_nothing(engine_of, REQUESTS, lambda found: expect_equal(found, expected))


def test_preemption_changes_nothing(expected: Beams, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_checks.preemption_changes_nothing(
        engine_of, REQUESTS, lambda found: expect_equal(found, expected), monkeypatch, blocks=9
    )


def test_without_prefix_caching_nor_chunks(expected: Beams) -> None:
    vllm_checks.prefix_caching_and_chunks_can_be_off(engine_of, REQUESTS, lambda found: expect_equal(found, expected))


def test_half_precision_differs_among_near_ties_only(reference: HSTUReference, expected: Beams) -> None:
    engine = engine_of(precision="bf16")
    try:
        found = engine.generate(REQUESTS)
    finally:
        engine.close()
    eager = reference.search(REQUESTS, "bf16")
    moved = [
        np.abs(eager.scores[i] - reference.prefix_scores(r, eager.items[i])[:, -1]) for i, r in enumerate(REQUESTS)
    ]
    tie = 2 * float(np.max(moved))  # twice the rounding error of eager PyTorch
    assert tie < 0.5
    for i, (ours, scores) in enumerate(zip(found.items, found.scores, strict=True)):
        theirs, exact = expected.items[i], expected.scores[i]
        assert ours[0] in theirs[exact >= exact[0] - tie]
        assert set(theirs[exact > exact[-1] + tie].tolist()) <= set(ours.tolist())
        own = reference.prefix_scores(REQUESTS[i], ours)[:, -1]
        np.testing.assert_allclose(scores, own, atol=tie)


def test_the_model_serves_ordinary_generation() -> None:
    """vLLM's own LLM.generate returns the greedy tokens that the model gives over the whole sequence."""
    setup = Setup(MODEL, requested("torch"), CATALOGUE, 3, CacheConfig(), RETRIEVAL)
    variants = dict.fromkeys(FAMILIES, "torch")
    folder = ModelFolder(setup, variants, torch.float32, max_tokens=130)
    prompts = [IDS.tokens(r.history_items).reshape(-1) for r in REQUESTS if 0 < len(r.history_items) < 20]
    with unchanged_process():
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(folder.path),
            runner="generate",
            skip_tokenizer_init=True,
            enforce_eager=True,
            kv_cache_memory_bytes=2**24,
            max_model_len=70,
        )
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": p.tolist()} for p in prompts],
                SamplingParams(temperature=0.0, max_tokens=5, detokenize=False),
                use_tqdm=False,
            )
            found = [list(o.outputs[0].token_ids) for o in outputs]
        finally:
            llm.llm_engine.engine_core.shutdown()
            folder.close()
    model = HSTUGenerator.build(MODEL, SIZES, Operators.reference(), seed=3, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, found, strict=True):
            sequence = prompt
            for token in tokens:
                x = model.full(pack_prompts([sequence]).to("cpu"))[-1:]
                y = model.kernels.layer_norm(x, model.norm.weight, model.norm.bias, eps=1e-6)
                assert int((y @ model.token_table.T).argmax()) == token
                sequence = np.append(sequence, token)


# Long-lived operation


def test_close_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, which vLLM froze, and its folder are gone, the process is as before, and another engine starts."""
    before = torch.set_num_threads, torch.get_num_threads(), dict(os.environ)

    def closed() -> VLLMEngine:
        engine = engine_of(REQUESTS[:3])
        model, folder = weakref.ref(engine.core.model), engine.folder.path
        assert (folder / "model.safetensors").is_file()
        engine.close()
        engine.close()
        gc.collect()
        assert model() is None
        assert not folder.exists()
        assert before == (torch.set_num_threads, torch.get_num_threads(), dict(os.environ))
        return engine

    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    closed()
    monkeypatch.undo()
    freeze_imports()
    engine = closed()
    with pytest.raises(RuntimeError, match="not prepared, or closed"):
        engine.admit(0, REQUESTS[0])


@pytest.fixture(scope="class")
def small() -> Iterator[VLLMEngine]:
    """An engine prepared for three requests of up to 9 items."""
    made = engine_of(REQUESTS[:3])
    yield made
    made.close()


class TestSmallEngine:
    """The last test ends the engine's core."""

    def test_vllm_stays_on_this_host(self, small: VLLMEngine) -> None:
        """The engine sends no usage reports, downloads nothing and connects only to localhost."""
        from vllm.usage.usage_lib import is_usage_stats_enabled

        assert not is_usage_stats_enabled()
        assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["VLLM_HOST_IP"] == "127.0.0.1"
        actual = json.loads(json.dumps(small.actual()))
        assert actual["vllm"] and actual["attention_backend"] == "HSTUAttentionBackend"
        assert actual["prefix_caching"] and actual["chunked_prefill"] and actual["cuda_graphs"] == "NONE"

    def test_a_prompt_that_is_too_long_never_reaches_vllm(self, small: VLLMEngine) -> None:
        with pytest.raises(ValueError, match=r"a prompt of 30 tokens; the engine was prepared for up to 27$"):
            small.admit(0, requests_of([10])[0])
        with pytest.raises(ValueError, match="a prompt of 30 tokens"):
            small.generate([REQUESTS[0], requests_of([10])[0]])
        assert small.unfinished == 0
        assert len(small.generate(REQUESTS[:2]).items) == 2  # the batch that was refused left nothing behind

    def test_a_dead_core_says_why(self, small: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            import logging

            logging.getLogger("vllm.worker").error("the device fell off\nthe bus")
            raise RuntimeError("an illegal memory access")

        monkeypatch.setattr(type(small.core.model), "forward", fail)
        small.admit(0, REQUESTS[0])
        with pytest.raises(RuntimeError) as caught:
            while small.unfinished:
                small.step()
        message = str(caught.value)
        assert message.startswith("vLLM's engine core died: RuntimeError: an illegal memory access; ")
        assert "the device fell off the bus" in message and "\n" not in message


@pytest.mark.usefixtures("forked_workers")
def test_a_whole_run(grbench_here: Grbench, tmp_path: Path) -> None:
    """Measure a cell with continuous batching under load: the gate passes, and vLLM logs to the worker's log."""
    small = ["workload=synthetic", "workload.max_requests=64", "workload.max_history=48"]
    small += ["scenario=closed_loop", "scenario.queries=64"]
    done = grbench_here("engine=vllm", "engine.kv_cache_gb=0.1", *small, "tracking=none")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (json.loads(p.read_text()) for p in tmp_path.glob("outputs/runs/*/record.json"))
    assert record["status"] == "OK" and record["gate"]["overlap"] == 1.0
    assert record["actual"]["vllm"] and record["metrics"]["engine/prefix_hit_tokens"] > 0
    (log,) = tmp_path.glob("outputs/runs/*/worker.log")
    assert "Loading safetensors checkpoint shards" in log.read_text()  # INFO lines depend on tests before this one


def test_it_retrieves_in_a_pipeline_that_is_served() -> None:
    serving = pytest.importorskip("helpers.serving", reason="the server's packages are missing")
    serving.items_come_with_their_scores("engine=pipeline")


# Refusals


def test_wrong_options_are_one_line() -> None:
    kernels = requested("torch")

    def make(model: Any = MODEL, **options: Any) -> Any:
        setup = Setup(model, kernels, CATALOGUE, 0, CacheConfig(), RETRIEVAL)
        return registry.make(VLLMEngineConfig(**options), setup, "generate")

    with pytest.raises(ValueError, match=r"qk_dim=8, model\.v_dim=12: engine vllm needs them equal"):
        make(dataclasses.replace(MODEL, v_dim=12))
    with pytest.raises(ValueError, match="block_size=48: must be a power of two"):
        make(block_size=48)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="cuda_graphs=true: a CPU has no CUDA graphs"):
            make(cuda_graphs=True)
    engine = make(chunked_prefill=False, max_num_batched_tokens=32, kv_cache_gb=0.01)
    with pytest.raises(ValueError, match=r"a search of 90 tokens needs engine.max_num_batched_tokens=91 or more"):
        engine.prepare(REQUESTS, 1)
    engine.close()
    engine = make(kv_blocks=3, block_size=16, kv_cache_gb=0.01)
    with pytest.raises(ValueError, match=r"^engine.kv_blocks=3: a search of 90 tokens needs 7 or more$"):
        engine.prepare(REQUESTS, 1)
    engine.close()
    engine = make(kv_cache_gb=0.00001)
    with pytest.raises(ValueError, match=r"^vLLM refuses: [^\n]*$"):
        engine.prepare(REQUESTS, 1)
    engine.close()


def test_doctor_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grengines.spec.find_spec", lambda name: None)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    found = next(f for f in findings(run=False) if (f.kind, f.name) == ("engine", "vllm"))
    assert not found.ok and found.remedy == install.CPU_COMMAND
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"VLLM := {install.CPU_VERSION}\n" in makefile
    for package in ("torchvision", "torchaudio", "torchcodec"):
        assert package in install.CPU_COMMAND and package in makefile


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "precision", "graphs", "stored"),
    [
        ("torch", "fp32", "", ""),
        ("triton", "bf16", "", ""),
        ("triton", "bf16", "FULL", ""),
        ("cutlass", "bf16", "", ""),
        ("cutlass", "bf16", "FULL", ""),
        ("torch", "bf16", "PIECEWISE", ""),
        ("torch", "fp32", "", "fp8"),
        ("triton", "fp16", "", "fp8"),
        *((kernel, "bf16", "FULL", stored) for kernel in ("triton", "cutlass") for stored in ("int8", "fp8")),
        ("cutlass", "bf16", "", "fp8"),
        ("torch", "bf16", "PIECEWISE", "fp8"),
    ],
)
def test_on_a_gpu(kernel: str, precision: str, graphs: str, stored: str) -> None:
    """Answers are correct when cold, from the prefix cache, and when requests join between steps."""
    retrieval = dataclasses.replace(RETRIEVAL, beam_width=64)
    reference = HSTUReference(GPU_MODEL, 3, retrieval, "cuda")
    expected = reference.search(GPU_REQUESTS)
    engine = gpu_engine(
        kernel,
        precision=precision,
        kv_cache_precision=stored or "engine",
        cuda_graphs=bool(graphs),
        graph_tokens=[16, 64, 128, 256, 512] if graphs else [],
    )
    try:
        actual = engine.actual()
        assert actual["attention_backend"] == "HSTUAttentionBackend" and actual["device"] == "cuda"
        assert actual["cuda_graphs"] == (graphs or "NONE")
        assert actual["cache_precision"] == (stored or precision)
        tolerance = allowed(reference, precision, stored)
        expect_near(engine.generate(GPU_REQUESTS), expected, reference, tolerance)
        warm = engine.generate(GPU_REQUESTS)
        assert warm.details["prefix_hit_tokens"] > 3000
        expect_near(warm, expected, reference, tolerance)
        expect_mixed(engine, reference, tolerance)
        if stored:
            in_pages(engine, lambda pages: pages["v_scales"].mul_(2))
            with pytest.raises(AssertionError):
                expect_near(engine.generate(GPU_REQUESTS), expected, reference, tolerance)
    finally:
        engine.close()


@pytest.mark.gpu
def test_a_gpu_has_pages_for_nearly_twice_the_tokens_in_8_bits() -> None:
    """In heads of 64 numbers a key takes 128 bytes in bf16, and 68 with its scale in fp8."""
    pages = {}
    for stored in ("engine", "fp8"):
        engine = gpu_engine("triton", precision="bf16", kv_cache_precision=stored)
        pages[stored] = engine.actual()["kv_blocks"]
        engine.close()
    assert pages["fp8"] / pages["engine"] == pytest.approx(128 / 68, rel=0.01)


@pytest.mark.gpu
def test_a_gpu_has_graphs_by_default() -> None:
    """A batch of prompts of median length finds a captured step, and pages and graphs stay within vLLM's share."""
    before = torch.cuda.mem_get_info()[0]
    engine = gpu_engine("auto", precision="bf16")
    try:
        actual, (free, total) = engine.actual(), torch.cuda.mem_get_info()
        assert actual["cuda_graphs"] == "FULL" and "graph_choice" not in actual
        median = float(np.median([3 * len(r.history_items) for r in GPU_REQUESTS]))
        assert actual["graph_tokens"][-1] >= min(4 * median, actual["max_num_batched_tokens"])
        assert before - free <= 0.35 * total  # 0.3 and the graphs of the levels
        retrieval = dataclasses.replace(RETRIEVAL, beam_width=64)
        reference = HSTUReference(GPU_MODEL, 3, retrieval, "cuda")
        expect_near(
            engine.generate(GPU_REQUESTS), reference.search(GPU_REQUESTS), reference, allowed(reference, "bf16")
        )
    finally:
        engine.close()


@pytest.mark.gpu
def test_close_gives_gpu_memory_back() -> None:
    """The first engine leaves a CUDA context, kernels and workspaces; a second leaves little, and a third nothing."""
    free = []
    for graphs in (True, True, False):
        gpu_engine("triton", cuda_graphs=graphs, graph_tokens=[64, 256] if graphs else []).close()
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] >= free[0] - 64 * 2**20
    assert free[2] >= free[1] - 2 * 2**20
    assert torch.cuda.memory_allocated() < 64 * 2**20


def test_a_trained_generator_finds_the_next_items(tmp_path: Path) -> None:
    """Item vectors and semantic IDs of training events, trained for seconds, answer inside vLLM as in the reference."""
    split = LeaveOneOut(ring(users=40))
    small = dataclasses.replace(MODEL, max_positions=18)
    for levels in (1, 2):
        options = TrainConfig(
            model=small, workload=RecordedConfig("ring", max_history=9), task="generate",
            training=TrainingConfig(epochs=12, batch=8, rate=0.02, dropout=0.0),
            retrieval=RetrievalConfig(levels=levels, beam_width=10),
        )  # fmt: skip
        ids = semantic_ids(options, split)
        task = GenerateTask(options, split, ids, torch.device("cpu"))
        loop.train(task, options.training, torch.device("cpu"), 0, tmp_path, "x", report=lambda epoch: None)
        task.save(tmp_path / "weights.safetensors")
        retrieval = Retrieval(ids, k=5, beam_width=10, weights=str(tmp_path / "weights.safetensors"))
        requests = split.requests(split.users, 9)
        engine = engine_of(requests, small, retrieval)
        try:
            found = engine.generate(requests[:4])
            expect_equal(found, HSTUReference(small, 3, retrieval, "cpu").search(requests[:4]))
        finally:
            engine.close()
        hits = [target in items for target, items in zip(split.targets(split.users)[:4], found.items, strict=True)]
        assert sum(hits) >= 3
