"""A decoder in the real vLLM, its beams as rows of one request: the kernel, and agreement with the fp32 reference."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import vllm_checks
from test_vllm import (
    GPU_REQUESTS,
    REQUESTS,
    RETRIEVAL,
    allowed,
    engine_of,
    expect_equal,
    expect_mixed,
    expect_near,
    gpu_engine,
    request_of,
    requests_of,
)
from torch import Tensor

from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.model import level_logits
from grengines.models.decoder.reference import DecoderReference
from grengines.semantic.search import Beams
from grengines.semantic.trie import Trie
from grengines.vllm import rows_triton
from grengines.vllm.choice import Choice
from grengines.vllm.engine import VLLMEngine
from grengines.vllm.rows import BeamRows, Sight, Step, sight
from grkernels.beam_attention import torch as beam_attention

# Every key serves two queries.
DECODER = DecoderConfig(layers=2, embedding_dim=64, heads=4, kv_heads=2, head_dim=16, mlp_dim=64, max_positions=90)

# The kernel

Arguments = dict[str, Any]


def case(
    lengths: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    page: int = 16,
    terms: int = 2,
    padding: int = 0,
) -> Arguments:
    """Requests of so many rows, cut anywhere; keys and values side by side in pages, in an order of their own. padding:
    rows behind the last request, as in a captured graph."""
    torch.manual_seed(sum(lengths))
    starts = torch.tensor([0, *np.cumsum(lengths)]).int()
    n, most = int(starts[-1]) + padding, 9
    pages = torch.randn(len(lengths) * most, page, kv_heads, 2 * dim)
    own = torch.randint(0, len(pages) * page, (n, terms))
    own[torch.arange(terms) >= torch.randint(0, terms + 1, (n, 1))] = -1
    return {
        "q": 2 * torch.randn(n, heads, dim),
        "k_pages": pages[..., :dim],
        "v_pages": pages[..., dim:],
        "starts": starts,
        "block_table": torch.randperm(len(pages)).view(len(lengths), most).int(),
        "limits": torch.randint(1, most * page + 1, (n,)).int(),
        "own_slots": own,
        "scale": dim**-0.5,
    }


CASES = {
    "ragged": lambda: case([70, 1, 0, 150, 3]),
    "one head, large pages": lambda: case([65], heads=1, kv_heads=1, dim=8, page=64, terms=1),
    "no codes before": lambda: case([5, 9], terms=0),
    "padding": lambda: case([20, 80, 0, 0], padding=40),
    "wide": lambda: case([40, 33], heads=6, kv_heads=2, dim=72, terms=3),
}


def naive(q: Tensor, k_pages: Tensor, v_pages: Tensor, **a: Any) -> Tensor:
    """fp64, a row and a head at a time."""
    starts, page, group = a["starts"].tolist(), k_pages.shape[1], q.shape[1] // k_pages.shape[2]
    out = torch.zeros(starts[-1], *q.shape[1:], dtype=torch.float64)
    for b in range(len(starts) - 1):
        for i in range(starts[b], starts[b + 1]):
            seen = [(int(a["block_table"][b, p // page]), p % page) for p in range(int(a["limits"][i]))]
            seen += [(slot // page, slot % page) for slot in a["own_slots"][i].tolist() if slot >= 0]
            at = torch.tensor(seen).T
            for h in range(q.shape[1]):
                keys, values = (x[at[0], at[1], h // group].double() for x in (k_pages, v_pages))
                out[i, h] = torch.softmax(a["scale"] * keys @ q[i, h].double(), 0) @ values
    return out


def converted(arguments: Arguments, dtype: torch.dtype, device: str) -> Arguments:
    """In `dtype` on the device, keys and values still side by side in memory."""
    pages = torch.cat([arguments["k_pages"], arguments["v_pages"]], dim=3).to(device, dtype)
    dim = arguments["q"].shape[2]
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return moved | {"q": moved["q"].to(dtype), "k_pages": pages[..., :dim], "v_pages": pages[..., dim:]}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [beam_attention.on_gpu] if DEVICE == "cuda" else [beam_attention.beam_attention, beam_attention.on_gpu]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels(name: str, dtype: torch.dtype) -> None:
    """PyTorch's and Triton's against a loop in fp64. fp32 differs in its order of summation. In bf16 inputs are exact,
    the result is rounded once, to 2^-9, and Triton's weights too: outputs are means of values, 3 at most."""
    arguments = converted(CASES[name](), dtype, DEVICE)
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    expected = naive(**on_cpu)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
    for fn in KERNELS:
        out = torch.full_like(arguments["q"], 7.0)
        fn(out, **arguments)
        torch.testing.assert_close(out[: len(expected)].double().cpu(), expected, atol=tolerance, rtol=0)
        assert (out[len(expected) :] == 7).all()
        if arguments["own_slots"].numel():
            assert expected.abs().max() > 10 * tolerance  # zeros would fail, and so would rows without their codes:
            blind = naive(**on_cpu | {"own_slots": torch.full_like(on_cpu["own_slots"], -1)})
            assert (expected - blind).abs().max() > 10 * tolerance


COMPILE_FOR_HOPPER = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from test_vllm_decoder import BeamRows, case, converted
from grengines.vllm import rows_triton
from grkernels.beam_attention import torch as beam_attention

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
for dtype in (torch.bfloat16, torch.float32):
    arguments = converted(case([70, 1], heads=16, kv_heads=8, dim=128, page=64), dtype, "cpu")
    beam_attention.on_gpu(torch.empty_like(arguments["q"]), **arguments)
beams, n = BeamRows((40, 50, 60), 300), torch.zeros(9, dtype=torch.int64)
rows_triton.step(beams, n.int(), n)
rows_triton.sight(beams, n.int(), n, torch.tensor([0, 9]).int(), torch.zeros(1, 9).int(), 64, range(1, 2))
"""


def test_kernels_compile_for_hopper() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    code = [sys.executable, "-c", COMPILE_FOR_HOPPER]
    subprocess.run(code, check=True, cwd=Path(__file__).parent, env=environment, timeout=240)


# What rows see


def test_sight_of_chunks() -> None:
    """Requests cut anywhere, and padding behind them, as in a captured graph."""
    beams, page = BeamRows((4, 5, 6), max_rows=40), 4
    rng = np.random.default_rng(0)
    cuts = [(5, 6, 0, 5), (5, 6, 3, 9), (5, 6, 8, 9), (7, 0, 2, 7)]
    ids, places, starts, tables, limits, slots = [], [], [0], [], [], []
    for b, (prompt, rows, begin, end) in enumerate(cuts):
        tokens = np.stack([rng.integers(0, 4, rows // 2), 4 + rng.integers(0, 5, rows // 2)], 1).reshape(-1)
        ids.append(np.concatenate([rng.integers(0, 15, prompt), beams.ids(tokens, b)])[begin:end])
        places.append(np.arange(begin, end))
        starts.append(starts[-1] + end - begin)
        table = rng.permutation(20)[:3]
        tables.append(table)
        slot = [int(table[p // page]) * page + p % page for p in range(prompt + rows)]
        for p in range(begin, end):
            limits.append(min(p + 1, prompt))
            mine = [] if p < prompt else [p] if (p - prompt) % 2 == 0 else [p, p - 1]
            slots.append([slot[m] for m in mine] + [-1] * (2 - len(mine)))
    padding = [np.array([3, 99])]
    seen = Sight.of(
        beams,
        torch.tensor(np.concatenate(ids + padding)).int(),
        torch.tensor(np.concatenate([*places, np.array([1, 0])])),
        torch.tensor([*starts, starts[-1]]).int(),
        torch.tensor(np.stack([*tables, np.zeros(3)])).int(),
        page,
    )
    assert seen.limits[:-2].tolist() == limits
    assert seen.own_slots[:-2].tolist() == slots
    assert seen.starts.tolist() == [*starts, starts[-1]]


@pytest.mark.parametrize("levels", [1, 3, 4])
def test_rows_of_both_kernels(levels: int) -> None:
    """Triton's against PyTorch's, for both models, over requests with and without rows of beams, and padding."""
    beams, page, rng = BeamRows((40, 50, 60, 70)[:levels], max_rows=300), 16, np.random.default_rng(levels)
    ids, places, starts = [], [], [0]
    for b, prompt in enumerate((40, 1, 90, 33, 20)):
        tokens = rng.integers(0, 40, (30, levels - 1)) + np.cumsum([0, *beams.sizes])[: levels - 1]
        whole = np.concatenate([rng.integers(0, beams.vocabulary, prompt), beams.ids(tokens.reshape(-1), b)])
        begin = int(rng.integers(0, len(whole)))
        ids.append(whole[begin:])
        places.append(np.arange(begin, len(whole)))
        starts.append(starts[-1] + len(whole) - begin)
    given = [torch.tensor(np.concatenate([*x, [3, 4, 5]])) for x in (ids, places)]
    given = [given[0].int(), given[1], torch.tensor([*starts, starts[-1]]).int()]
    table = torch.tensor(rng.permutation(6 * 20).reshape(6, 20)).int()
    n = starts[-1]
    expected = Step.of(beams, *given[:2])
    moved = [x.to(DEVICE) for x in (*given, table)]
    for name, found in zip(
        ("tokens", "rows", "levels", "positions"), rows_triton.step(beams, *moved[:2]).cpu(), strict=True
    ):
        assert torch.equal(found, getattr(expected, name))
    for back in (range(levels - 1), range(1, max(levels - 1, 1))):
        for one, other in zip(
            sight(beams, *given, table, page, back), rows_triton.sight(beams, *moved, page, back), strict=True
        ):
            assert one.dtype == other.dtype and torch.equal(one[:n], other[:n].cpu())


# Agreement


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


def failing(engine: VLLMEngine, expected: Beams) -> None:
    engine.reset_cache()
    with pytest.raises(AssertionError):
        expect_equal(engine.generate(REQUESTS), expected)


class TestOneEngine:
    def test_items_and_order_are_the_references(self, engine: VLLMEngine, expected: Beams) -> None:
        found = engine.generate(REQUESTS)
        expect_equal(found, expected)
        actual = engine.actual()
        assert actual["beams"] == "rows of one vLLM request"
        assert actual["attention_backend"] == "SoftmaxAttentionBackend"
        assert actual["kernels"]["attention"] == actual["kernels"]["attention of prompts alone"] == "torch"

    def test_a_search_is_one_vllm_request_a_level(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        core, added = engine._core, []
        add = core.add_request
        monkeypatch.setattr(core, "add_request", lambda request: (added.append(request), add(request))[1])
        engine.generate(REQUESTS[:2])
        assert len(added) == 2 * 3

    @pytest.mark.parametrize("order", [[4], [7, 2, 0, 5], [3, 3, 1, 6, 4, 0, 2, 5, 7, 3]])
    def test_batch_composition_changes_nothing(self, engine: VLLMEngine, expected: Beams, order: list[int]) -> None:
        engine.reset_cache()
        expect_equal(engine.generate([REQUESTS[i] for i in order]), expected, order)

    def test_arrival_order_changes_nothing(self, engine: VLLMEngine, expected: Beams) -> None:
        """Requests join between steps: prompts and beams of different levels share steps."""
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
        """Zeros; stale keys; a normaliser for each of the two sets of keys; beams without their own codes; positions by
        the place in the sequence."""
        from grengines.vllm import softmax

        right = beam_attention.beam_attention

        def split(out: Tensor, *a: Any, own_slots: Tensor, **k: Any) -> None:
            right(out, *a, own_slots=own_slots, **k)
            of_prompt = torch.empty_like(out)
            right(of_prompt, *a, own_slots=own_slots[:, :0], **k)
            out[own_slots[:, 0] >= 0] = 0.5 * (out + of_prompt)[own_slots[:, 0] >= 0]

        def blind(out: Tensor, *a: Any, own_slots: Tensor, **k: Any) -> None:
            right(out, *a, own_slots=own_slots[:, :0], **k)

        for wrong in (lambda out, *_, **__: out.zero_(), split, blind):
            monkeypatch.setattr(softmax, "beam_attention", wrong)
            failing(engine, expected)
        monkeypatch.undo()
        monkeypatch.setattr(softmax, "paged_write", lambda *_: None)
        failing(engine, expected)
        monkeypatch.undo()
        of = Step.of

        def by_place(beams: BeamRows, ids: Tensor, places: Tensor) -> Step:
            return dataclasses.replace(of(beams, ids, places), positions=places)

        monkeypatch.setattr(Step, "of", by_place)
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


# On a GPU


@pytest.mark.gpu
def test_captured_choices() -> None:
    """Graphs for up to 3 searches, of 1 to 7: what they choose is what the same operations choose without them."""
    trie, W = Trie.of(RETRIEVAL.ids).on("cuda"), 20
    torch.manual_seed(0)
    table = torch.randn(sum(trie.sizes), 16, device="cuda")

    class Model:
        def level_logits(self, hidden: Tensor, level: int) -> Tensor:
            return level_logits(hidden, table, trie.sizes, level)

    eager = Choice(Model(), trie, width=W, k=10)
    graphs = Choice(Model(), trie, width=W, k=10, graphs=3, embedding_dim=16)
    for count in (1, 2, 3, 7, 1):
        root = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.zeros(1, device="cuda")
        nodes, scores = ([x] * count for x in root)
        for level in range(len(trie.sizes)):
            hidden = [torch.randn(len(n), 16, device="cuda") for n in nodes]
            expected, found = eager(level, hidden, nodes, scores), graphs(level, hidden, nodes, scores)
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b)
            nodes, scores = list(found[1]), list(found[2])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "graphs"), [("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True)])
def test_on_a_gpu(precision: str, graphs: bool) -> None:
    """Cold, from the prefix cache, and in an order of arrival that mixes prompts and beams. FlashAttention reads
    prompts alone where it can, which is never in fp32."""
    model = DecoderConfig(
        layers=3, embedding_dim=256, heads=4, kv_heads=2, head_dim=64, mlp_dim=512, max_positions=1500
    )
    reference = DecoderReference(model, 3, dataclasses.replace(RETRIEVAL, beam_width=64), "cuda")
    expected = reference.search(GPU_REQUESTS)
    tokens = [16, 64, 128, 256, 512] if graphs else []
    engine = gpu_engine("torch", model, precision=precision, cuda_graphs=graphs, graph_tokens=tokens, max_num_seqs=16)
    try:
        actual = engine.actual()
        assert actual["cuda_graphs"] == ("FULL" if graphs else "NONE") and actual["compilation"] == "NONE"
        assert actual["kernels"]["attention"] == "triton"
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
