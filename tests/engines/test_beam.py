"""Generation in the native engine: beams that share one prefill find what encoding each beam from scratch finds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.items import SIZES, catalogue

from grengines.cache.pool import PagePool, PoolFullError
from grengines.last_layer import LastLayer
from grengines.models.hstu import beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator, pack_prompts
from grengines.runtime.batch import Bucket
from grengines.semantic.ids import SemanticIds
from grengines.semantic.trie import Trie
from grkernels import registry
from grkernels.hstu_attention.extras import Extras
from grkernels.operators import Operators
from grkernels.registry import FAMILIES

CONFIG = HSTUConfig(
    embedding_dim=24, layers=2, heads=2, qk_dim=8, v_dim=12, scaling_seqlen=16, max_positions=30, head_dim=4
)


def model_of(
    seed: int = 1, dtype: torch.dtype = torch.float32, sizes: Sequence[int] = SIZES, **changes: Any
) -> HSTUGenerator:
    config = dataclasses.replace(CONFIG, **changes)
    return HSTUGenerator.build(config, sizes, Operators.eager(), seed=seed, device="cpu", dtype=dtype)


def pool_for(model: HSTUGenerator, pages: int = 60, page: int = 4) -> PagePool:
    c = model.config
    sizes = {"layers": c.layers, "heads": c.heads, "qk_dim": c.qk_dim, "v_dim": c.v_dim}
    return PagePool(pages=pages, page=page, dtype=model.token_table.dtype, device="cpu", **sizes)


def prompts_of(ids: SemanticIds, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [ids.tokens(rng.integers(0, len(ids.codes), n)).reshape(-1) for n in lengths]


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3, 20, 200])
@pytest.mark.parametrize("items", [120, 40, 3])
def test_beams_are_those_of_the_reference(width: int, items: int) -> None:
    """Search with ragged, empty and truncated prompts, and with fewer items than beams."""
    ids, model = catalogue(items), model_of()
    trie, pool = Trie.of(ids).on("cpu"), pool_for(model)
    prompts = prompts_of(ids, [5, 0, 9, 1, 25])
    k = min(width, 10)
    found = beam.search(model, trie, prompts, pool, width=width, k=k)
    expected = beam.reference(model, trie, prompts, width=width, k=k)
    assert found.items.tolist() == expected.items.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.cuts, expected.cuts, atol=1e-5)
    assert pool.used == 0
    for row in found.items:
        real = row[row >= 0]
        assert len(set(real.tolist())) == len(real) and (real < items).all()
    if width >= 20:
        assert ((found.items >= 0).sum(1) == min(k, items)).all()


@torch.inference_mode()
@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize(("sizes", "positions"), [(SIZES[:2], 30), (SIZES, 30), (SIZES, 2)])
def test_biases_of_beams_are_those_of_whole_sequences(sizes: Sequence[int], positions: int, kernel: str) -> None:
    """A table of 30 distances is shorter than the sequence of the longest prompt, one of 2 than a beam's codes."""
    ids = catalogue(20, sizes=sizes)
    model = model_of(seed=6, sizes=sizes, position_bias=True, max_positions=positions)
    trie, prompts = Trie.of(ids).on("cpu"), prompts_of(ids, [5, 0, 9, 1, 25])
    for width in (3, 20):
        model.kernels = Operators.reference()
        expected = beam.reference(model, trie, prompts, width=width, k=width)
        model.kernels = Operators.of(dict.fromkeys(FAMILIES, kernel))
        found = beam.search(model, trie, prompts, pool_for(model), width=width, k=width)
        assert found.items.tolist() == expected.items.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)  # scores down to -30


@torch.inference_mode()
def test_a_bias_that_is_missing_or_of_another_distance_is_noticed() -> None:
    """Give attention the same table for every level, and leave out the biases of the own codes, or all of them."""
    ids, model = catalogue(120), model_of(seed=7, position_bias=True)
    trie, prompts = Trie.of(ids).on("cpu"), prompts_of(ids, [6, 3])

    def scores() -> np.ndarray:
        return beam.search(model, trie, prompts, pool_for(model), width=120, k=120).scores

    expected, kernels, own_term = scores(), model.kernels, model.own_term
    tables = [table for name, table in model.named_parameters() if name.endswith("position_bias")]
    of_layers = itertools.cycle(tables)

    def unshifted(*given: Any, extras: Extras, **options: Any) -> torch.Tensor:
        whole = dataclasses.replace(extras, position_bias=next(of_layers))
        return kernels.hstu_attention(*given, extras=whole, **options)

    model.kernels = kernels.replace(hstu_attention=unshifted)
    assert np.abs(scores() - expected).max() > 1e-3
    model.kernels = kernels
    model.own_term = lambda q, k, v, bias: own_term(q, k, v, 0.0)  # type: ignore[method-assign]
    assert np.abs(scores() - expected).max() > 1e-3
    model.own_term = own_term  # type: ignore[method-assign]
    assert np.array_equal(scores(), expected)
    for table in tables:
        table.zero_()
    assert np.abs(scores() - expected).max() > 1e-2


@torch.inference_mode()
def test_wide_enough_beams_rank_every_item_exactly() -> None:
    ids, model = catalogue(70), model_of(seed=2)
    trie = Trie.of(ids).on("cpu")
    (prompt,) = prompts_of(ids, [6])
    found = beam.search(model, trie, [prompt], pool_for(model), width=120, k=70)
    scores = np.zeros(70)
    for item, tokens in enumerate(ids.tokens(np.arange(70))):
        for level in range(3):
            last = model.full(pack_prompts([np.concatenate([prompt, tokens[:level]])]).to("cpu"))[-1:]
            scores[item] += torch.log_softmax(model.logits(last, level), -1)[0, ids.codes[item, level]].item()
    assert found.items[0].tolist() == np.argsort(-scores).tolist()
    np.testing.assert_allclose(found.scores[0], np.sort(scores)[::-1], atol=1e-5)
    prefixes = beam.prefix_scores(model, prompt, ids.codes, pool_for(model))
    np.testing.assert_allclose(prefixes[:, -1], scores, atol=1e-5)
    assert (prefixes[:, 0] > prefixes[:, 1]).all()


@torch.inference_mode()
def test_neither_batch_nor_pages_change_the_answer() -> None:
    ids, model = catalogue(100), model_of(seed=3)
    trie, prompts = Trie.of(ids).on("cpu"), prompts_of(ids, [4, 8, 2, 7])
    together = beam.search(model, trie, prompts, pool_for(model), width=12, k=12)
    for page, order in ((1, [3, 1, 0, 2]), (16, [2, 0]), (7, [1])):
        pool = pool_for(model, pages=200, page=page)
        pool.allocate(3)  # pages that other users hold
        again = beam.search(model, trie, [prompts[i] for i in order], pool, width=12, k=12)
        assert again.items.tolist() == together.items[order].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_last_layer_of_a_prefill_computes_last_tokens_alone_and_keeps_every_key(
    kernel: str, padded: bool, biased: bool
) -> None:
    ids, model = catalogue(100), model_of(seed=5, layers=3, position_bias=biased)
    prompts = [model.prompt(p) for p in prompts_of(ids, [4, 0, 9])]
    tokens, calls, kernels = 12 + 1 + 27, list[tuple[int, int]](), Operators.of(dict.fromkeys(FAMILIES, kernel))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((len(q), len(k)))
        return kernels.hstu_attention(q, k, v, **options)

    whole, pruned = pool_for(model), pool_for(model)
    with beam.borrowed(pruned, list(map(len, prompts))) as pages:
        packed = pack_prompts(prompts, pages, pruned, bucket=Bucket.even(4, 30) if padded else None).to("cpu")
    expected = model.full(packed, whole)[packed.last_rows[:3]]
    model.kernels = kernels.replace(hstu_attention=attend)
    found = model.prefill(packed, pruned)
    assert calls == ([(120, 120)] * 2 + [(4, 120)] if padded else [(tokens, tokens)] * 2 + [(3, tokens)])
    np.testing.assert_allclose(found[:3], expected, atol=1e-5)
    assert torch.isfinite(found).all()
    for ours, all_rows in zip([*pruned.k, *pruned.v], [*whole.k, *whole.v], strict=True):
        np.testing.assert_allclose(ours, all_rows, atol=1e-5)
    assert min(x.abs().amax().item() for x in (*whole.k, *whole.v)) > 0
    model.computed = LastLayer.EVERY
    np.testing.assert_allclose(model.prefill(packed)[:3], expected, atol=1e-5)
    assert calls[-1] == calls[0]
    if biased:
        return
    # Apart from the rest, as vLLM's step leaves it. Sequences of padding have no keys in pages.
    last, model.layers = model.layers[-1], model.layers[:-1]
    taken = model.full(packed)[packed.last_rows]
    model.layers.append(last)
    calls.clear()
    apart = model.last_layer(taken, packed, pruned)
    assert calls == [(len(taken), len(taken))] and torch.isfinite(apart).all()
    np.testing.assert_allclose(apart[:3], expected, atol=1e-5)


@torch.inference_mode()
def test_own_codes_and_prompt_matter() -> None:
    """Scores differ from the reference without the beams' own codes, and with another request's prompt."""
    ids, model = catalogue(120), model_of(seed=4)
    trie, prompts = Trie.of(ids).on("cpu"), prompts_of(ids, [6, 6])
    expected = beam.reference(model, trie, prompts, width=30, k=30)
    swapped = beam.search(model, trie, prompts[::-1], pool_for(model), width=30, k=30)
    assert np.abs(swapped.scores - expected.scores).max() > 1e-3
    model.own_term = lambda q, k, v, bias: torch.zeros_like(v)  # type: ignore[method-assign]
    blind = beam.search(model, trie, prompts, pool_for(model), width=30, k=30)
    assert np.abs(blind.scores - expected.scores).max() > 1e-3


@torch.inference_mode()
def test_wrong_use_is_refused_and_takes_nothing() -> None:
    ids, model = catalogue(20), model_of()
    trie, pool = Trie.of(ids).on("cpu"), pool_for(model, pages=2)
    with pytest.raises(ValueError, match="k=5 items from 4 beams: allowed is 1 to 4"):
        beam.search(model, trie, prompts_of(ids, [1]), pool, width=4, k=5)
    with pytest.raises(PoolFullError, match="7 pages asked for; 2 of 2 are free"):
        beam.search(model, trie, prompts_of(ids, [9]), pool, width=4, k=4)
    assert pool.used == 0


@torch.inference_mode()
def test_half_precision_finds_nearly_the_same() -> None:
    ids = catalogue(120)
    exact, half = model_of(seed=5), model_of(seed=5, dtype=torch.bfloat16)
    trie, prompts = Trie.of(ids).on("cpu"), prompts_of(ids, [6, 3, 8, 1])
    expected = beam.reference(exact, trie, prompts, width=20, k=10)
    found = beam.search(half, trie, prompts, pool_for(half), width=20, k=10)
    overlap = [len(set(a) & set(b)) / 10 for a, b in zip(found.items.tolist(), expected.items.tolist(), strict=True)]
    assert np.mean(overlap) >= 0.9
    np.testing.assert_allclose(found.scores[:, 0], expected.scores[:, 0], atol=0.1)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize(
    ("kernel", "biased"), [("torch", False), ("torch", True), ("triton", False), ("triton", True), ("cutlass", False)]
)
def test_on_a_gpu(kernel: str, biased: bool) -> None:
    """In half precision against the fp32 search: the best item or a near-tie of it, and nearly all of the ten best."""
    ids = catalogue(120)
    changes = {"embedding_dim": 64, "qk_dim": 32, "v_dim": 32, "max_positions": 3000, "scaling_seqlen": 512}
    config = dataclasses.replace(CONFIG, position_bias=biased, **changes)
    having = {family: kernel if kernel in registry.variants(family) else "torch" for family in FAMILIES}
    kernels = Operators.of(having)
    half = HSTUGenerator.build(config, SIZES, kernels, seed=6, device="cuda", dtype=torch.bfloat16)
    exact = HSTUGenerator.build(config, SIZES, Operators.eager(), seed=6, device="cuda", dtype=torch.float32)
    trie, prompts = Trie.of(ids).on("cuda"), prompts_of(ids, [600, 0, 70, 1])
    sizes = {"layers": 2, "pages": 60, "page": 64, "heads": 2, "qk_dim": 32, "v_dim": 32, "device": "cuda"}
    pool = PagePool(dtype=torch.bfloat16, **sizes)
    expected = beam.search(exact, trie, prompts, PagePool(dtype=torch.float32, **sizes), width=64, k=10)
    found = beam.search(half, trie, prompts, pool, width=64, k=10)
    assert pool.used == 0
    for ours, theirs, scores in zip(found.items, expected.items, expected.scores, strict=True):
        assert ours[0] in theirs[scores >= scores[0] - 0.05]
        assert set(theirs[scores > scores[-1] + 0.05]) <= set(ours)
