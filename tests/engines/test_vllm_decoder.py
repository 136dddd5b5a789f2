"""A decoder in the real vLLM: all levels of a search in the step that ends its prompt, equal to the fp32 reference."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import forks, vllm_checks
from helpers.vllm_engines import (
    CATALOGUE,
    GPU_MODEL,
    GPU_REQUESTS,
    IDS,
    REQUESTS,
    RETRIEVAL,
    allowed,
    engine_of,
    expect_equal,
    expect_mixed,
    expect_near,
    freeze_imports,
    frozen_imports,
    gpu_engine,
    request_of,
    requests_of,
)
from torch import Tensor

from grengines.api import Setup
from grengines.cache.config import CacheConfig
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.reference import DecoderReference
from grengines.models.decoder.weights import shapes
from grengines.models.hstu import beam
from grengines.models.hstu.generator import HSTUGenerator, PromptKeys, pack_prompts
from grengines.runtime import team
from grengines.runtime.kernels import choose
from grengines.semantic.search import Beams
from grengines.semantic.trie import TensorTrie, Trie
from grengines.vllm import ranks as vllm_ranks
from grengines.vllm.config import VLLMEngineConfig
from grengines.vllm.engine import VLLMEngine
from grengines.vllm.folder import ModelFolder
from grengines.vllm.levels import Levels
from grkernels import choice
from grkernels.choice import KernelChoice, requested
from grkernels.operators import Operators

# Every key serves two queries.
DECODER = DecoderConfig(layers=2, embedding_dim=64, heads=4, kv_heads=2, head_dim=16, mlp_dim=64, max_positions=90)
GPU_DECODER = DecoderConfig(
    layers=3, embedding_dim=256, heads=4, kv_heads=2, head_dim=64, mlp_dim=512, max_positions=1500
)

# Agreement


@pytest.fixture(scope="module", autouse=True)
def imports() -> Iterator[None]:
    with frozen_imports():
        yield


@pytest.fixture(scope="module")
def reference() -> DecoderReference:
    return DecoderReference(DECODER, 3, RETRIEVAL, "cpu")


@pytest.fixture(scope="module")
def expected(reference: DecoderReference) -> Beams:
    return reference.search(REQUESTS)


def decoder_engine(**options: Any) -> VLLMEngine:
    return engine_of(model=DECODER, **options)


@pytest.fixture(scope="class")
def engine() -> Iterator[VLLMEngine]:
    made = decoder_engine()
    yield made
    made.close()
    freeze_imports()


def failing(engine: VLLMEngine, expected: Beams) -> None:
    engine.reset_cache()
    with pytest.raises(AssertionError):
        expect_equal(engine.generate(REQUESTS), expected)


class TestOneEngine:
    def test_items_and_order_are_the_references(self, engine: VLLMEngine, expected: Beams) -> None:
        found = engine.generate(REQUESTS)
        expect_equal(found, expected)
        actual = engine.actual()
        assert actual["beams"] == "in the step that ends the prompt"
        assert actual["attention_backend"] == "SoftmaxAttentionBackend"
        assert actual["kernels"]["beam_attention"] == actual["kernels"]["attention of prompts alone"] == "torch"

    def test_a_search_is_one_vllm_request_and_step(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        client, added = engine.core.client, []
        add = client.add_request
        monkeypatch.setattr(client, "add_request", lambda request: (added.append(request), add(request))[1])
        found = engine.generate(REQUESTS[:2])
        assert len(added) == 2 and found.details["vllm_steps"] == 1

    @pytest.mark.parametrize("order", [[4], [7, 2, 0, 5], [3, 3, 1, 6, 4, 0, 2, 5, 7, 3]])
    def test_batch_composition_changes_nothing(self, engine: VLLMEngine, expected: Beams, order: list[int]) -> None:
        engine.reset_cache()
        expect_equal(engine.generate([REQUESTS[i] for i in order]), expected, order)

    def test_arrival_order_changes_nothing(self, engine: VLLMEngine, expected: Beams) -> None:
        """Requests join between steps."""
        rng = np.random.default_rng(2)
        engine.reset_cache()
        waiting, done = list(rng.permutation(len(REQUESTS))), {}
        while waiting or engine.unfinished:
            for _ in range(min(int(rng.integers(0, 3)), len(waiting))):
                key = int(waiting.pop())
                engine.admit(key, REQUESTS[key])
            done |= {f.key: f for f in engine.step()}
        assert [done[key].items.tolist() for key in range(len(REQUESTS))] == expected.items.tolist()

    def test_a_returning_user_hits_the_prefix_cache(self, engine: VLLMEngine, reference: DecoderReference) -> None:
        engine.reset_cache()
        items = requests_of([20], seed=5)[0].history_items
        first, grown = request_of(0, items[:12]), request_of(1, items)
        found = [engine.generate([r]) for r in (first, first, grown)]
        assert [f.details["prefix_hit_tokens"] for f in found] == [0, 32, 32]
        expected = reference.search([first, grown])
        for made, i in zip(found, (0, 0, 1), strict=True):
            expect_equal(made, expected, [i])

    def test_a_wrong_engine_fails(self, engine: VLLMEngine, expected: Beams, monkeypatch: pytest.MonkeyPatch) -> None:
        """Check that faults show.

        They are zeros, a normaliser for each of the two sets of keys, beams without their own codes, stale keys, and
        wrong positions.
        """
        operators = engine.core.model.operators
        right = operators.beam_attention

        def split(out: Tensor, *a: Any, own_slots: Tensor, **k: Any) -> None:
            right(out, *a, own_slots=own_slots, **k)
            of_prompt = torch.empty_like(out)
            right(of_prompt, *a, own_slots=own_slots[:, :0], **k)
            out[own_slots[:, 0] >= 0] = 0.5 * (out + of_prompt)[own_slots[:, 0] >= 0]

        def blind(out: Tensor, *a: Any, own_slots: Tensor, **k: Any) -> None:
            right(out, *a, own_slots=own_slots[:, :0], **k)

        for wrong in (lambda out, *_, **__: out.zero_(), split, blind):
            monkeypatch.setattr(operators, "beam_attention", wrong)
            failing(engine, expected)
        monkeypatch.undo()
        monkeypatch.setattr(operators, "paged_write", lambda *_, **__: None)
        failing(engine, expected)
        monkeypatch.undo()
        model = engine.core.model.model
        encode = model.forward

        def by_place(ids: Tensor, positions: Tensor, *given: Any) -> Tensor:
            return encode(ids, positions + torch.arange(len(ids)) % 2, *given)

        monkeypatch.setattr(model, "forward", by_place)
        failing(engine, expected)
        monkeypatch.undo()
        engine.reset_cache()
        expect_equal(engine.generate(REQUESTS), expected)


def test_chunks_of_any_size_change_nothing(expected: Beams) -> None:
    vllm_checks.chunks_of_any_size_change_nothing(decoder_engine, REQUESTS, lambda found: expect_equal(found, expected))


def test_preemption_changes_nothing(expected: Beams, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_checks.preemption_changes_nothing(
        decoder_engine, REQUESTS, lambda found: expect_equal(found, expected), monkeypatch
    )


def test_without_prefix_caching_nor_chunks(expected: Beams) -> None:
    vllm_checks.prefix_caching_and_chunks_can_be_off(
        decoder_engine, REQUESTS, lambda found: expect_equal(found, expected)
    )


def test_a_vocabulary_of_more_than_the_codes() -> None:
    """The softmax is over 75 tokens: not a multiple of 64, the rows to which vLLM fills a table up."""
    model = dataclasses.replace(DECODER, vocabulary=75)
    expected = DecoderReference(model, 3, RETRIEVAL, "cpu").search(REQUESTS)
    engine = engine_of(model=model)
    try:
        expect_equal(engine.generate(REQUESTS), expected)
        engine.core.model.vocabulary = 76
        failing(engine, expected)
        engine.core.model.vocabulary = None
        failing(engine, expected)
    finally:
        engine.close()


# Several ranks


def test_arguments_of_ranks_are_vllms_own() -> None:
    for ranks, theirs in (
        (1, {}),
        (2, {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}),
    ):
        setup = Setup(DECODER, requested("torch"), CATALOGUE, 3, CacheConfig(), RETRIEVAL)
        engine = VLLMEngine(VLLMEngineConfig(tensor_parallel=ranks, device="cpu"), setup)
        arguments = engine.core_arguments(cast(ModelFolder, SimpleNamespace(path="folder")), 90, 4)
        assert {name: arguments[name] for name in arguments if name in vllm_ranks.arguments_of(2)} == theirs


def test_kernels_are_chosen_for_the_heads_of_a_rank_and_the_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def choose(*asked: Any, **options: Any) -> KernelChoice:
        seen.append((options["sizes"].heads, options["sizes"].kv_heads, options["sizes"].beams))
        return KernelChoice({}, {})

    monkeypatch.setattr(choice, "choose", choose)
    setup = Setup(DECODER, requested("torch"), CATALOGUE, 3, CacheConfig(), RETRIEVAL)
    VLLMEngine(VLLMEngineConfig(tensor_parallel=2, device="cpu"), setup)
    assert seen == [(DECODER.heads // 2, DECODER.kv_heads // 2, RETRIEVAL.beam_width)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="its ranks are forks; test_two_gpus has real ones")
def test_two_ranks_find_what_the_reference_finds(
    expected: Beams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose attention is zeros shows, and one that is killed ends the engine with the reason."""
    from grengines.vllm.softmax_attention import SoftmaxAttention  # imports vLLM, which one worker alone needs

    monkeypatch.chdir(tmp_path)
    forks.fork_ranks(monkeypatch)
    attend, fault = SoftmaxAttention.attend, tmp_path / "fault"

    def planted(self: SoftmaxAttention, out: Tensor, *given: Any) -> None:
        attend(self, out, *given)
        if fault.exists() and os.environ.get("RANK") == "1":
            out.zero_()

    monkeypatch.setattr(SoftmaxAttention, "attend", planted)

    def work() -> None:
        engine = decoder_engine(tensor_parallel=2)
        try:
            for hits in (0, 272):
                found = engine.generate(REQUESTS)
                expect_equal(found, expected)
                assert found.details["prefix_hit_tokens"] == hits
            facts = engine.actual()
            assert (facts["tensor_parallel"], facts["parallel_backend"]) == (2, "gloo")
            assert facts["rank_memory_mib"][0] > 0
            assert facts["parameters"] == sum(math.prod(shape) for shape in shapes(DECODER, IDS.sizes).values())
            engine.admit(0, REQUESTS[0])
            with pytest.raises(RuntimeError, match="requests are in flight"):
                engine.reset_cache()
            assert [done.key for done in engine.step()] == [0]  # both ranks go on
            fault.touch()
            failing(engine, expected)
            assert isinstance(engine.team, team.Team)
            os.kill(engine.team.pids[0], signal.SIGKILL)
            engine.generate(REQUESTS)
        finally:
            engine.close()

    done = forks.in_fork(work, tmp_path, timeout=60)  # the loss of a rank may end the whole process
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("rank 1 of engine.tensor_parallel=2 ended by SIGKILL"), done.stderr


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "cutlass"])
def test_captured_levels(kernel: str) -> None:
    """Graphs for up to 3 searches find what the same operations find without graphs, for 1 to 7 searches."""
    trie = Trie.of(RETRIEVAL.ids).on("cuda")
    operators = Operators.of(choose(requested(kernel), GPU_MODEL, "cuda", "bf16", page=64, captured=True).variants)
    model = HSTUGenerator.build(GPU_MODEL, trie.sizes, operators, seed=3, device="cuda", dtype=torch.bfloat16)
    prompts = [IDS.tokens(r.history_items).reshape(-1)[-1500:] for r in GPU_REQUESTS if len(r.history_items)]
    pool = beam.pool_for(model, 1500, len(prompts))

    class Model:
        def search(self, last: Tensor, prompts: PromptKeys, trie: TensorTrie, *, width: int, k: int) -> Any:
            return beam.levels(model, trie, last, prompts, pool, width=width, k=k)

    with torch.inference_mode(), beam.borrowed(pool, [len(p) for p in prompts]) as pages:
        batch = pack_prompts(prompts, pages, pool).to("cuda")
        last = model.full(batch, pool)[batch.last_rows]
        eager, graphs = (Levels(Model(), trie, width=20, k=10) for _ in range(2))
        graphs.capture(3, torch.zeros_like(last[:1]), PromptKeys(batch.lengths[:1] * 0, batch.page_table[:1] * 0, 1500))
        for count in (1, 2, 3, 7, 1):
            keys = PromptKeys(batch.lengths[:count], batch.page_table[:count], batch.longest)
            expected, found = eager(last[:count], keys), graphs(last[:count], keys)
            torch.testing.assert_close(found[..., 1], expected[..., 1], atol=2e-2, rtol=2e-2)
            assert (found[..., 0] == expected[..., 0]).float().mean() > 0.8  # the rest are near ties


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_gpus(precision: str) -> None:
    retrieval = dataclasses.replace(RETRIEVAL, beam_width=64)
    reference = DecoderReference(GPU_DECODER, 3, retrieval, "cuda")
    expected, tolerance = reference.search(GPU_REQUESTS), allowed(reference, precision)
    engine = gpu_engine("torch", GPU_DECODER, precision=precision, tensor_parallel=2, max_num_seqs=16)
    try:
        for _ in range(2):
            expect_near(engine.generate(GPU_REQUESTS), expected, reference, tolerance)
        assert engine.actual()["parallel_backend"] == "nccl"
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "graphs", "vocabulary"),
    [
        ("bf16", False, None),
        ("bf16", True, None),
        ("fp32", False, None),
        ("fp32", True, None),
        ("bf16", True, 30_000),
        ("fp32", True, 30_000),
    ],
)
def test_on_a_gpu(precision: str, graphs: bool, vocabulary: int | None) -> None:
    """Answers are correct when cold, from the prefix cache, and when requests join between steps.

    FlashAttention reads prompts alone, except in fp32.
    """
    model = dataclasses.replace(GPU_DECODER, vocabulary=vocabulary)
    reference = DecoderReference(model, 3, dataclasses.replace(RETRIEVAL, beam_width=64), "cuda")
    expected = reference.search(GPU_REQUESTS)
    tokens = [16, 64, 128, 256, 512] if graphs else []
    engine = gpu_engine("torch", model, precision=precision, cuda_graphs=graphs, graph_tokens=tokens, max_num_seqs=16)
    try:
        actual = engine.actual()
        assert actual["cuda_graphs"] == ("FULL" if graphs else "NONE") and actual["compilation"] == "NONE"
        assert actual["kernels"]["beam_attention"] == "triton"
        alone = actual["kernels"]["attention of prompts alone"]
        assert alone.startswith("FlashAttention") if precision == "bf16" else alone == "triton"
        tolerance = allowed(reference, precision)
        expect_near(engine.generate(GPU_REQUESTS), expected, reference, tolerance)
        warm = engine.generate(GPU_REQUESTS)
        assert warm.details["prefix_hit_tokens"] > 3000
        expect_near(warm, expected, reference, tolerance)
        expect_mixed(engine, reference, tolerance)
    finally:
        engine.close()
