"""A decoder in the real vLLM, its beams as rows of one request: the kernel, and agreement with the fp32 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import vllm_checks
from helpers.vllm_engines import (
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
from grengines.vllm.beam_selector import BeamSelector
from grengines.vllm.engine import VLLMEngine
from grengines.vllm.rows import BeamAttentionMetadata, BeamRows, StepRequests, StepRows
from grkernels.operators import Operators

# Every key serves two queries.
DECODER = DecoderConfig(layers=2, embedding_dim=64, heads=4, kv_heads=2, head_dim=16, mlp_dim=64, max_positions=90)

# What rows see


def test_beam_metadata_of_chunks() -> None:
    """Requests may end anywhere, and padding follows them, as in a captured graph."""
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
    requests = StepRequests(
        torch.tensor(np.concatenate(ids + padding)).int(),
        torch.tensor(np.concatenate([*places, np.array([1, 0])])),
        torch.tensor([*starts, starts[-1]]).int(),
        torch.tensor(np.stack([*tables, np.zeros(3)])).int(),
        page,
    )
    seen = BeamAttentionMetadata.of(beams, Operators.eager(), requests)
    assert seen.limits[:-2].tolist() == limits
    assert seen.own_slots[:-2].tolist() == slots
    assert seen.starts.tolist() == [*starts, starts[-1]]


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
        assert actual["kernels"]["beam_attention"] == actual["kernels"]["attention of prompts alone"] == "torch"

    def test_a_search_is_one_vllm_request_a_level(self, engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        client, added = engine.core.client, []
        add = client.add_request
        monkeypatch.setattr(client, "add_request", lambda request: (added.append(request), add(request))[1])
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
        """Check that faults show.

        They are zeros, a normaliser for each of the two sets of keys, beams without their own codes, stale keys, and
        positions by the place in the sequence.
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
        monkeypatch.setattr(operators, "paged_write", lambda *_: None)
        failing(engine, expected)
        monkeypatch.undo()
        of = StepRows.of

        def by_place(beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor) -> StepRows:
            return dataclasses.replace(of(beams, kernels, ids, places), positions=places)

        monkeypatch.setattr(StepRows, "of", by_place)
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
    """Graphs for up to 3 searches choose the same codes as their operations without graphs, for 1 to 7 searches."""
    trie, W = Trie.of(RETRIEVAL.ids).on("cuda"), 20
    torch.manual_seed(0)
    table = torch.randn(sum(trie.sizes), 16, device="cuda")

    class Model:
        def level_logits(self, hidden: Tensor, level: int) -> Tensor:
            return level_logits(hidden, table, trie.sizes, level)

    eager = BeamSelector(Model(), trie, width=W, k=10)
    graphs = BeamSelector(Model(), trie, width=W, k=10, graphs=3, embedding_dim=16)
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
    """Answers are correct when cold, from the prefix cache, and when prompts and beams share steps.

    FlashAttention reads prompts alone, except in fp32.
    """
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
