"""HSTU attention against loops in fp64, its mask against the formula, its cost against counting."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hstu_oracle import attend, visible
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grengines.numerics import relative_error
from grengines.options import violations
from grkernels import registry
from grkernels.config import KernelConfig
from grkernels.hstu_attention import reference, spec
from grkernels.hstu_attention import torch as variant
from grkernels.hstu_attention.reference import hstu_mask

ATTENTION = registry.get("hstu_attention", "torch")
FNS = {"torch": ATTENTION.fn, "reference": ATTENTION.reference}


@dataclass
class Problem:
    """Arguments of an attention call, what it should return (fp64), and how large rounding errors may be."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    expected: np.ndarray
    magnitude: float  # norm of the result, were all numbers positive and nothing to cancel

    def error(self, fn: Any) -> float:
        return relative_error(fn(self.q, self.k, self.v, **self.options).double().cpu(), self.expected)


def problem(
    lengths: list[int],
    targets: list[int] | None = None,
    queries: list[int] | None = None,
    *,
    heads: int = 2,
    qk_dim: int = 4,
    v_dim: int = 4,
    C: int = 0,
    W: int = 0,
    alpha: float = 0.5,
    N: int = 64,
    seed: int = 0,
    scale: float = 1.0,
) -> Problem:
    """Return a problem. `queries`: the number of last rows of each sequence that are queries (append); None: all."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    # q, k and v are strided views of one projection, as the model makes them.
    fused = scale * rng.standard_normal((total, heads * (2 * qk_dim + v_dim)))
    fused = torch.from_numpy(fused.astype(np.float32))
    q, k, v = fused.split([heads * qk_dim, heads * qk_dim, heads * v_dim], dim=1)
    q, k, v = q.unflatten(1, (heads, qk_dim)), k.unflatten(1, (heads, qk_dim)), v.unflatten(1, (heads, v_dim))
    kv_offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64)
    q_offsets = kv_offsets
    if queries is not None:
        q_offsets = torch.tensor([0, *np.cumsum(queries)], dtype=torch.int64)
        ends = kv_offsets[1:].tolist()
        rows = [r for end, count in zip(ends, queries, strict=True) for r in range(end - count, end)]
        q = q[torch.tensor(rows, dtype=torch.int64)]
    expected, magnitude, at = [], [], 0
    for b, n in enumerate(lengths):
        own = slice(at, at + n)
        at += n
        count = n if queries is None else queries[b]
        q_b = fused[own, : heads * qk_dim].unflatten(1, (heads, qk_dim))[n - count :]
        arrays = [x.double().numpy() for x in (q_b, k[own], v[own])]
        mask = (0 if targets is None else targets[b], C, W, alpha, N)
        expected.append(attend(*arrays, *mask))
        magnitude.append(attend(*map(np.abs, arrays), *mask))
    options: dict[str, Any] = {
        "q_offsets": q_offsets,
        "kv_offsets": kv_offsets,
        "num_targets": None if targets is None else torch.tensor(targets, dtype=torch.int64),
        "max_q_len": max(lengths if queries is None else queries),
        "max_kv_len": max(lengths),
        "scaling_seqlen": N,
        "alpha": alpha,
        "contextual_seq_len": C,
        "max_attn_len": W,
    }
    return Problem(q, k, v, options, np.concatenate(expected), float(np.linalg.norm(np.concatenate(magnitude))))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    with_targets = draw(st.booleans())
    return problem(
        lengths,
        [draw(st.integers(0, n)) for n in lengths] if with_targets else None,
        [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None,
        heads=draw(st.integers(1, 3)),
        qk_dim=draw(st.integers(1, 5)),
        v_dim=draw(st.integers(1, 5)),
        C=draw(st.integers(0, 3)),
        W=draw(st.integers(0, 5)),
        alpha=draw(st.sampled_from([0.1, 0.5, 2.0])),
        N=draw(st.sampled_from([1, 7, 1024])),
        seed=draw(st.integers(0, 2**20)),
    )


@pytest.mark.parametrize("name", FNS)
@examples(120)
@given(p=problems(), tile=st.integers(1, 4), slack=st.integers(0, 3), past=st.integers(0, 3))
def test_every_mask_and_form_equals_the_loops(name: str, p: Problem, tile: int, slack: int, past: int) -> None:
    """Cover small tiles, bounds above the sequences' lengths, and rows past the last sequence."""
    p.options["max_q_len"] += slack
    p.options["max_kv_len"] += slack
    p.q = torch.cat([p.q, torch.ones(past, *p.q.shape[1:])])
    p.expected = np.concatenate([p.expected, np.zeros((past, *p.expected.shape[1:]))])
    if p.options["q_offsets"] is p.options["kv_offsets"]:
        p.k, p.v = (torch.cat([x, torch.ones(past, *x.shape[1:])]) for x in (p.k, p.v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "_tile_rows", lambda scores, rows: min(tile, rows))
        patch.setattr(reference, "ROWS", tile)
        out = FNS[name](p.q, p.k, p.v, **p.options).double().numpy()
    assert np.linalg.norm(out - p.expected) <= 5e-6 * p.magnitude


@pytest.mark.parametrize("name", FNS)
def test_nothing_to_do(name: str) -> None:
    p = problem([0, 0], [0, 0])
    assert FNS[name](p.q, p.k, p.v, **p.options).shape == (0, 2, 4)
    one = problem([1], [1])
    assert one.error(FNS[name]) < 1e-6
    none_asked = problem([3, 2], None, [0, 0])
    assert FNS[name](none_asked.q, none_asked.k, none_asked.v, **none_asked.options).shape == (0, 2, 4)


def test_the_mask_and_its_count_equal_the_formula() -> None:
    """Every combination of small sizes, degenerate ones included, and every delta."""
    for n in range(8):
        for T in range(n + 1):
            for C in range(4):
                for W in range(5):
                    seen = np.array([[visible(i, j, n, T, C, W) for j in range(n)] for i in range(n)]).reshape(n, n)
                    assert (hstu_mask(n, T, C, W).numpy() == seen).all(), (n, T, C, W)
                    assert spec.visible_pairs(n, T, C, W) == seen.sum(), (n, T, C, W)
                    for delta in range(n + 1):
                        assert spec.visible_pairs(n, T, C, W, delta=delta) == seen[n - delta :].sum()


@examples(40)
@given(st.data())
def test_the_count_of_longer_sequences(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 300))
    T, delta = data.draw(st.integers(0, n)), data.draw(st.integers(0, n))
    C, W = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 400))
    assert spec.visible_pairs(n, T, C, W, delta=delta) == int(hstu_mask(n, T, C, W)[n - delta :].sum())


def test_cost() -> None:
    assert spec.visible_pairs(4096) == 4096 * 4097 // 2
    assert spec.flops(10, heads=4, qk_dim=128, v_dim=64) == 10 * 4 * 2 * 192
    assert spec.bytes_moved(3, 5, heads=2, qk_dim=8, v_dim=4, dtype="bf16") == 2 * 2 * (3 * 8 + 5 * 8 + 5 * 4 + 3 * 4)
    for wrong in ({"num_targets": 5}, {"delta": 5}, {"delta": -1}):
        with pytest.raises(ValueError, match="allowed is 0 to n=4"):
            spec.visible_pairs(4, **wrong)
    with pytest.raises(ValueError, match="max_attn_len=-1"):
        spec.visible_pairs(4, max_attn_len=-1)


@examples(200)
@given(st.data())
def test_skipped_columns_are_hidden(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24))
    begin = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(begin + 1, n))
    C, W = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 8))
    T = data.draw(st.none() | st.integers(0, n))
    low, high = variant._columns_seen(begin, end, n, T is None, C, W)
    seen = hstu_mask(n, T or 0, C, W)[begin:end].any(0)
    assert not seen[:low].any() and not seen[high:].any()
    if C == 0 and W and T is None:
        assert high - low <= W + end - begin + 1


def test_tiles_bound_memory() -> None:
    for batch, heads, length in [(1, 1, 16), (16, 4, 18432), (64, 8, 4096)]:
        rows = variant._tile_rows(batch * heads * length, length)
        assert 1 <= rows <= length
        assert rows == 1 or rows * batch * heads * length * 4 <= variant.TILE_BYTES


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def same_dtype(p: Problem, dtype: torch.dtype) -> Tensor:
    """Naive attention: one sequence at a time, every step in the dtype except the division by N."""
    bounds, N = p.options["kv_offsets"].tolist(), p.options["scaling_seqlen"]
    out = torch.zeros(p.q.shape[0], p.v.shape[1], p.v.shape[2])
    for b, (begin, end) in enumerate(pairwise(bounds)):
        q, k, v = (x[begin:end].to(dtype).transpose(0, 1) for x in (p.q, p.k, p.v))
        T = int(p.options["num_targets"][b])
        mask = hstu_mask(end - begin, T, p.options["contextual_seq_len"], p.options["max_attn_len"])
        weights = torch.nn.functional.silu(p.options["alpha"] * (q @ k.transpose(1, 2))) * mask
        out[begin:end] = ((weights @ v).float() / N).to(dtype).float().transpose(0, 1)
    return out


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("N", [64, 18432])
@pytest.mark.parametrize(("C", "W"), [(0, 0), (2, 9)])
def test_half_precision_is_within_twice_eager_torch(name: str, N: int, C: int, W: int) -> None:
    p = problem([40, 1, 0, 25], [8, 1, 0, 0], qk_dim=16, v_dim=8, N=N, C=C, W=W, alpha=0.25)
    eager = relative_error(same_dtype(p, DTYPES[name]), p.expected)
    assert 0 < eager < 0.05
    out = ATTENTION.fn(*(x.to(DTYPES[name]) for x in (p.q, p.k, p.v)), **p.options)
    assert out.dtype is DTYPES[name]
    assert relative_error(out.float(), p.expected) <= ATTENTION.max_error_ratio * eager


def test_fp16_neither_underflows_nor_overflows() -> None:
    """Outputs of 1e-5 (N = 16384), and sums past fp16's largest number before they are divided by N."""
    small = problem([30], [4], N=16384, qk_dim=8, v_dim=8, scale=0.5)
    assert np.abs(small.expected).mean() < 3e-5
    half = [x.half() for x in (small.q, small.k, small.v)]
    exact = ATTENTION.reference(*(x.float() for x in half), **small.options)
    assert relative_error(ATTENTION.fn(*half, **small.options).float(), exact) < 2e-2
    # Weights of 1e-3 / N alone would lose their bits; with values of 1e3 the result has all of them.
    faint = problem([30], [4], N=16384, qk_dim=8, v_dim=8, alpha=1e-3)
    half = [faint.q.half(), faint.k.half(), (1e3 * faint.v).half()]
    exact = ATTENTION.reference(*(x.float() for x in half), **faint.options)
    assert exact.abs().mean() > 6e-5
    assert relative_error(ATTENTION.fn(*half, **faint.options).float(), exact) < 2e-3
    n = 700
    ones = torch.ones(n, 1, 8)
    offsets = torch.tensor([0, n])
    options: dict[str, Any] = dict.fromkeys(("q_offsets", "kv_offsets"), offsets)
    options |= {"num_targets": None, "max_q_len": n, "max_kv_len": n, "scaling_seqlen": 16384, "alpha": 1.0}
    large = ATTENTION.fn((5 * ones).half(), (5 * ones).half(), ones.half(), **options)  # sums to 700 * 200
    expected = ATTENTION.reference(5 * ones, 5 * ones, ones, **options)
    assert expected.max() * 16384 > 65504
    assert relative_error(large.float(), expected) < 2e-3


@pytest.mark.parametrize("queries", [None, [2, 1]])
def test_no_value_is_read_on_the_host(queries: list[int] | None) -> None:
    """A CUDA graph needs this: tensors without values (device meta) suffice for the variant."""
    p = problem([5, 3], [2, 0], queries, C=1, W=2)
    moved = {id(x): x.to("meta") for x in p.options.values() if isinstance(x, Tensor)}
    options = {key: moved.get(id(x), x) for key, x in p.options.items()}
    out = ATTENTION.fn(*(x.to("meta") for x in (p.q, p.k, p.v)), **options)
    assert out.shape == p.expected.shape and out.dtype is torch.float32


def test_wrong_outputs_fail_the_same_check() -> None:
    p, other = problem([12, 7], [3, 0], seed=1), problem([12, 7], [3, 0], seed=2)
    assert p.error(ATTENTION.fn) < 1e-5
    assert p.error(lambda q, k, v, **_: torch.zeros_like(v)) > 0.9
    assert p.error(lambda *_, **__: ATTENTION.fn(other.q, other.k, other.v, **other.options)) > 0.9
    assert p.error(lambda q, k, v, **o: ATTENTION.fn(q, k, v, **{**o, "num_targets": None})) > 1e-3
    assert p.error(lambda q, k, v, **o: ATTENTION.fn(q, k, v, **{**o, "max_attn_len": 8})) > 1e-3


def test_the_reference_refuses_wrong_bounds() -> None:
    p = problem([5], [2])
    with pytest.raises(ValueError, match="sequence 0: 5 queries, 5 keys"):
        ATTENTION.reference(p.q, p.k, p.v, **{**p.options, "max_kv_len": 4})


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown operator family 'conv'; known: hstu_attention, norm_gate"):
        registry.get("conv", "torch")
    with pytest.raises(
        ValueError, match="unknown variant 'tortch' of hstu_attention; nearest: torch; known: torch, compile"
    ):
        registry.get("hstu_attention", "tortch")
    assert ("hstu_attention", "cutlass") in registry.names()
    assert all(registry.availability(family, "torch") is None for family in registry.FAMILIES)
    assert {field.name for field in dataclasses.fields(KernelConfig)} == {"name", *registry.FAMILIES}
    [problem_line] = violations(KernelConfig(hstu_attention="tortch"))
    assert (
        problem_line
        == "hstu_attention=tortch: nearest: torch; allowed is one of auto, torch, compile, triton, cutlass, fp8"
    )


def test_supports_says_why_not() -> None:
    assert ATTENTION.supports(device="cpu", dtype="bf16", qk_dim=32, v_dim=16) is None
    assert "fp8" in (ATTENTION.supports(device="cpu", dtype="fp8", qk_dim=32, v_dim=16) or "")


def test_registries_and_configurations_import_no_torch() -> None:
    code = (
        "import sys, grkernels.registry, grkernels.config, grkernels.hstu_attention.spec, grengines.registry, "
        "grengines.models.hstu.config; grengines.registry.availability('hstu'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("delta", [False, True])
def test_on_a_gpu_and_in_a_graph(dtype: torch.dtype, delta: bool) -> None:
    torch.set_float32_matmul_precision("highest")
    lengths, targets = [90, 1, 0, 130], [17, 1, 0, 0]
    p = problem(lengths, targets, [20, 1, 0, 7] if delta else None, qk_dim=32, v_dim=16, alpha=0.2, C=2, W=50)
    moved: dict[int, Tensor] = {}  # a prefill stays a prefill: equal offsets stay one object
    for x in p.options.values():
        if isinstance(x, Tensor):
            moved[id(x)] = x.cuda()
    options = {key: moved.get(id(x), x) for key, x in p.options.items()}
    q, k, v = (x.cuda().to(dtype) for x in (p.q, p.k, p.v))
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    eager = ATTENTION.fn(q, k, v, **options)
    assert relative_error(eager.float().cpu(), p.expected) < tolerance
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ATTENTION.fn(q, k, v, **options)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)
