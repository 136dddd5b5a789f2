"""Attention with the options of other HSTU models: each variant against loops in fp64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers import kept
from helpers.hstu_oracle import Peculiar, attend, visible
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grengines.numerics import relative_error
from grkernels import registry
from grkernels.hstu_attention import spec
from grkernels.hstu_attention.extras import Extras
from grkernels.hstu_attention.reference import hstu_mask
from grkernels.rounding import rounded

ATTENTION = registry.get("hstu_attention", "torch")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FNS = {
    "reference": ATTENTION.reference,
    "torch": ATTENTION.fn,
    "triton": registry.get("hstu_attention", "triton").fn,
}


@dataclasses.dataclass
class Problem:
    """Arguments of a call, what it should return (fp64), and the norm of that without cancellation."""

    options: dict[str, Any]
    expected: np.ndarray
    magnitude: float


def problem(
    lengths: list[int],
    targets: list[int],
    contextuals: list[int],
    queries: list[int] | None = None,
    *,
    G: int = 1,
    F: int = 0,
    W: int = 0,
    positions: int = 0,
    buckets: int = 0,
    seed: int = 0,
    d: int = 8,
) -> Problem:
    """queries: last rows of each sequence that are queries; None: all."""
    rng = np.random.default_rng(seed)
    H, alpha, N, total = 2, 0.5, 64, sum(lengths)
    rows = lengths if queries is None else queries
    q, k, v = (rng.standard_normal((n, H, d)) for n in (sum(rows), total, total))
    position_bias = rng.standard_normal(positions) if positions else None
    time_bias = rng.standard_normal(buckets) if buckets else None
    times = [np.cumsum(rng.integers(0, 2 ** rng.integers(1, 20, n + 1))) for n in lengths]
    until = [t[1:] for t in times]  # of each token the time of the next
    q_starts, kv_starts = np.cumsum([0, *rows]), np.cumsum([0, *lengths])
    expected, magnitude = [], 0.0
    for b, n in enumerate(lengths):
        own, keys = slice(q_starts[b], q_starts[b + 1]), slice(kv_starts[b], kv_starts[b + 1])
        p = Peculiar(G, F, position_bias, time_bias, until[b][n - rows[b] :], times[b])
        mask = targets[b], contextuals[b], W, alpha, N
        expected.append(attend(q[own], k[keys], v[keys], *mask, p))
        magnitude += float(np.linalg.norm(attend(abs(q[own]), abs(k[keys]), abs(v[keys]), *mask)))

    def tensor(x: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(x).to(DEVICE, dtype)

    def ints(x: Any) -> Tensor:
        return tensor(np.asarray(x, dtype=np.int64), torch.int64)

    kv_offsets = ints(kv_starts)
    options = {
        "q": tensor(q),
        "k": tensor(k),
        "v": tensor(v),
        "q_offsets": kv_offsets if queries is None else ints(q_starts),
        "kv_offsets": kv_offsets,
        "num_targets": ints(targets),
        "max_q_len": max(rows),
        "max_kv_len": max(lengths),
        "scaling_seqlen": N,
        "alpha": alpha,
        "contextual_seq_len": max(contextuals),
        "max_attn_len": W,
        "extras": Extras(
            G,
            F,
            ints(contextuals),
            None if position_bias is None else tensor(position_bias),
            None if time_bias is None else tensor(time_bias),
            ints(np.concatenate([u[len(u) - r :] for u, r in zip(until, rows, strict=True)])) if buckets else None,
            ints(np.concatenate([t[:-1] for t in times])) if buckets else None,
        ),
    }
    return Problem(options, np.concatenate(expected), magnitude)


@st.composite
def problems(draw: st.DrawFn, longest: int = 9) -> Problem:
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=3))
    return problem(
        lengths,
        [draw(st.integers(0, n)) for n in lengths],
        [draw(st.integers(0, 3)) for _ in lengths],
        [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None,
        G=draw(st.sampled_from([1, 2, 3])),
        F=draw(st.sampled_from([0, 1, 4])),
        W=draw(st.sampled_from([0, 1, 3])),
        positions=draw(st.sampled_from([0, 3, 20])),
        buckets=draw(st.sampled_from([0, 4, 60])),
        seed=draw(st.integers(0, 2**20)),
    )


def off(name: str, p: Problem, **changes: Any) -> float:
    out = FNS[name](**(p.options | changes)).double().cpu().numpy()
    assert out.shape == p.expected.shape
    return float(np.linalg.norm(out - p.expected))


@pytest.mark.parametrize("name", ["reference", "torch"])
@examples(120)
@given(p=problems())
def test_every_option_equals_the_loops(name: str, p: Problem) -> None:
    assert off(name, p) <= 5e-6 * p.magnitude


@examples(30)
@given(p=problems(40))
def test_triton_equals_the_loops(p: Problem) -> None:
    assert off("triton", p) <= 1e-5 * p.magnitude


WHOLE = {"G": 2, "F": 2, "W": 3, "positions": 9, "buckets": 30}


@pytest.mark.parametrize("name", FNS)
def test_wrong_outputs_are_noticed(name: str) -> None:
    """Leave out one option at a time, and return zeros or the answer of other inputs."""
    p = problem([14, 9], [5, 3], [2, 0], **WHOLE)
    most = 1e-5 * p.magnitude
    assert off(name, p) <= most
    extras = p.options["extras"]
    without = {"target_group_size": 1, "min_full_attn_seq_len": 0, "position_bias": None, "time_bias": None}
    for option, value in without.items():
        assert off(name, p, extras=dataclasses.replace(extras, **{option: value})) > 10 * most, option
    assert off(name, p, extras=dataclasses.replace(extras, num_contextuals=None)) > 10 * most
    assert np.linalg.norm(p.expected) > 10 * most  # zeros
    other = problem([14, 9], [5, 3], [2, 0], **WHOLE, seed=1)
    assert off(name, p, **{x: other.options[x] for x in "qkv"}) > 10 * most


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_pages(name: str, dtype: torch.dtype) -> None:
    """Compare with the reference: keys of the cached tokens are in pages of 8 tokens, in another order."""
    lengths, queries = [30, 21], [9, 12]
    p = problem(lengths, [4, 6], [2, 1], queries, G=2, F=3, W=6, positions=12, d=16)
    options = {n: x.to(dtype) if n in "qkv" else x for n, x in p.options.items()}
    bias = options["extras"].position_bias
    options["extras"] = dataclasses.replace(options["extras"], position_bias=bias.to(dtype))
    expected = ATTENTION.reference(**options)
    allowed = 2 * relative_error(rounded(ATTENTION.reference, dtype)(**options), expected)
    assert relative_error(FNS[name](**options), expected) <= allowed
    cached = [n - r for n, r in zip(lengths, queries, strict=True)]
    pages: dict[str, Tensor] = {"paged_lengths": torch.tensor(cached, device=DEVICE)}
    pages["page_table"] = torch.tensor([[3, 0, 4], [1, 2, 0]], dtype=torch.int32, device=DEVICE)
    for x in "kv":
        store = options[x].new_full((5, 8, *options[x].shape[1:]), float("nan"))
        for b, (begin, many) in enumerate(zip([0, 30], cached, strict=True)):
            for t in range(many):
                store[pages["page_table"][b, t // 8], t % 8] = options[x][begin + t]
        pages[f"{x}_pages"] = store.nan_to_num(1e3)
        new = [options[x][begin + many : begin + n] for begin, many, n in zip([0, 30], cached, lengths, strict=True)]
        options[x] = torch.cat(new)
    options["kv_offsets"] = options["q_offsets"]
    assert relative_error(ATTENTION.reference(**options, **pages), expected) < 1e-5
    assert relative_error(FNS[name](**options, **pages), expected) <= allowed


def test_the_mask_and_its_count_equal_the_formula() -> None:
    for n, T, C, W, G, F in np.ndindex(8, 8, 3, 4, 4, 4):
        if n < T or not G:
            continue
        p = Peculiar(G, F)
        seen = np.array([[visible(i, j, n, T, C, W, p) for j in range(n)] for i in range(n)]).reshape(n, n)
        case = (n, T, C, W, G, F)
        assert (hstu_mask(n, T, C, W, extras=Extras(G, F)).numpy() == seen).all(), case
        options = {"target_group_size": G, "min_full_attn_seq_len": F}
        for delta in (None, *range(n + 1)):
            count = seen.sum() if delta is None else seen[n - delta :].sum()
            assert spec.visible_pairs(n, T, C, W, delta=delta, **options) == count, (*case, delta)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_norm_gate_by_head_and_without_concatenation(name: str, groups: int, concat: bool) -> None:
    rng = np.random.default_rng(3)
    u, a = rng.standard_normal((5, 24)), 1e-2 * rng.standard_normal((5, 24))
    weight, bias = rng.standard_normal(24), rng.standard_normal(24)
    gate = u / (1 + np.exp(-u))
    parts = a.reshape(5, groups, -1)
    normed = (parts - parts.mean(2, keepdims=True)) / np.sqrt(parts.var(2, keepdims=True) + 1e-5)
    gated = gate * (normed.reshape(5, 24) * weight + bias)
    expected = np.concatenate([gate, a, gated], 1) if concat else gated
    variant = registry.get("norm_gate", "torch" if name == "reference" else name)
    fn = variant.reference if name == "reference" else variant.fn
    arguments = [torch.tensor(x, dtype=torch.float32, device=DEVICE) for x in (u, a, weight, bias)]
    out = fn(*arguments, eps=1e-5, groups=groups, concat=concat).cpu().numpy()
    assert out.shape == expected.shape
    assert np.abs(out - expected).max() < 1e-5
    assert np.abs(expected).max() > 1e-2


def test_variants_without_the_options_refuse_them() -> None:
    dims: dict[str, dict[str, Any]] = {
        "hstu_attention": {"qk_dim": 32, "v_dim": 32, "extras": ("model.target_group_size=2",)},
        "norm_gate": {"width": 64, "extras": ("model.output=gate",)},
    }
    for family, args in dims.items():
        why = registry.refusal(family, "compile", device="cpu", dtype="fp32", **args)
        assert why is not None and args["extras"][0] in why and "supported here: torch" in why
        if registry.availability(family, "cutlass") is None:
            why = registry.refusal(family, "cutlass", device="cpu", dtype="fp32", **args)
            assert why is not None and args["extras"][0] in why


COMPILE_FOR_HOPPER = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from grkernels.hstu_attention.triton_extras import attention_kernel
kernel = attention_kernel.kernel
indices = ("q_offsets", "kv_offsets", "num_targets", "num_contextuals", "paged_lengths", "row_times", "column_times")
sizes = dict(TARGETS=True, QK=64, V=64, QK_BLOCK=64, V_BLOCK=64, M=32, N=32, POSITION_BIAS=True)
paged = dict(CONTEXTUALS=False, GROUP=1, PAGE=16, TIME_BIAS=False, contextual=1, window=1, full=1)
for more in (dict(CONTEXTUALS=True, GROUP=2, PAGE=0, TIME_BIAS=True, STORED=0), paged | dict(STORED=0),
             paged | dict(STORED=1)):
    constants = {name: value for name, value in (sizes | more).items()}
    kinds = {name: "*i64" if name in indices else "*bf16" for name in kernel.arg_names}
    kinds |= dict.fromkeys(("heads", "contextual", "window", "full", "biases", "buckets", "total_rows"), "i32")
    kinds |= {name: "i64" for name in kernel.arg_names if name.endswith("stride")}
    kinds |= dict(page_table="*i32", alpha="fp32", scale="fp32", k_scales="*fp32", v_scales="*fp32")
    kinds |= dict.fromkeys(("k_pages", "v_pages"), "*i8" if more["STORED"] else "*bf16")
    kinds |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32))
    print(len(made.asm["ptx"]) > 1000)
"""


def test_the_kernel_compiles_for_hopper() -> None:
    """The interpreter takes Python that the compiler refuses; integers of 1 become constants there."""
    folder = kept.output_of("attention_extras", COMPILE_FOR_HOPPER, TRITON_INTERPRET="0")
    assert (folder / kept.OUTPUT).read_text().split() == ["True"] * 3


@pytest.mark.gpu
@examples(60)
@given(p=problems(200))
def test_triton_on_a_gpu(p: Problem) -> None:
    assert off("triton", p) <= 1e-5 * p.magnitude
