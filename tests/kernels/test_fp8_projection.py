"""The projection that writes the operands of attention in fp8: scales, blocks, zeros, and wrong numbers that fail.

Triton's interpreter runs it without a GPU, and it is compiled for Hopper. On a GPU the kernel itself has the same
cases, reference and tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import kept
from helpers.fp8_attention import attended
from torch import Tensor

from grengines.numerics import relative_error
from grkernels import registry, tuning
from grkernels.fp8 import Scaled
from grkernels.hstu_attention.fp8_operands import BLOCK, Operands, quantised
from grkernels.hstu_attention.fp8_projection import CANDIDATES, blocks_of, project
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.rounding import with_fp8_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """Sequences of these lengths, `padding` rows behind them, and candidates as their last rows."""

    lengths: list[int]
    targets: list[int] | None = None
    heads: int = 2
    qk_dim: int = 64
    v_dim: int = 64
    width: int = 96
    products: str = ""  # fp8: rows and the weight are in e4m3
    dtype: torch.dtype = torch.bfloat16
    padding: int = 0
    pruned: bool = False  # q and u of candidates alone


SMALL = {
    "jagged": Case([300, 1, 0, 128], [20, 1, 0, 0], padding=150),
    "e4m3": Case([130, 256], qk_dim=128, heads=1, products="fp8"),
    "heads that fill no tile": Case([129, 3], heads=3, v_dim=128, width=32, dtype=torch.float16, padding=3),
    "candidates": Case([150, 5, 270], [20, 5, 140], products="fp8", pruned=True),
    "no candidates": Case([150, 5], [0, 0], pruned=True),
    "wide heads": Case([140], heads=1, qk_dim=256, v_dim=256, width=48),
}


@dataclass
class Built:
    given: dict[str, Any]  # arguments of `project`
    exact: dict[str, Tensor]  # u, q, k and v in fp32
    masks: dict[str, Any]  # arguments of attention

    def expected(self, attention: Callable[..., Tensor] = reference) -> Tensor:
        q, k, v = (self.exact[name] for name in "qkv")
        return attention(q, k, v, kv_offsets=self.given["blocks"].offsets, **self.masks)


def build(case: Case, seed: int = 0) -> Built:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(case.dtype).to(DEVICE)

    H, rows = case.heads, sum(case.lengths) + case.padding
    widths = [H * case.v_dim, H * case.v_dim, H * case.qk_dim, H * case.qk_dim]
    x, bias = random(rows, case.width), random(sum(widths), scale=0.1)
    sizes = torch.exp(torch.randn(rows, 1, generator=generator)).to(DEVICE)  # rows and blocks of unequal sizes
    x = (x * sizes).to(case.dtype)
    weight, scales = random(sum(widths), case.width, scale=case.width**-0.5), None
    wide = x.float(), weight.float()
    keys: Tensor | Scaled = x
    if case.products:
        rounded = Scaled.of(weight)
        weight, scales, keys = rounded.values, rounded.scales.t().contiguous(), Scaled.of(x)
        wide = keys.numbers(torch.float32), rounded.numbers(torch.float32)
    u, v, q, k = (wide[0] @ wide[1].T + bias.float()).split(widths, dim=1)
    offsets = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0)], device=DEVICE)
    of_rows, q_offsets, longest = keys, offsets, max(case.lengths)
    targets = None if case.targets is None else torch.tensor(case.targets, device=DEVICE)
    if case.pruned and targets is not None:
        ends = zip(offsets[1:].tolist(), targets.tolist(), strict=True)
        chosen = torch.cat([torch.arange(end - n, end) for end, n in ends]).to(DEVICE)
        of_rows, u, q = keys[chosen], u[chosen], q[chosen]
        q_offsets, longest = torch.nn.functional.pad(targets.cumsum(0), (1, 0)), int(targets.max())
    heads = {name: t.unflatten(1, (H, -1)) for name, t in (("q", q), ("k", k), ("v", v))}
    return Built(
        {
            "x": of_rows,
            "keys": keys,
            "weight": weight,
            "scales": scales,
            "bias": bias,
            "heads": H,
            "qk_dim": case.qk_dim,
            "v_dim": case.v_dim,
            "blocks": blocks_of(offsets, rows),
        },
        {"u": u, **heads},
        {
            "q_offsets": q_offsets,
            "num_targets": targets,
            "max_q_len": longest,
            "max_kv_len": max(case.lengths),
            "scaling_seqlen": 256,
            "alpha": case.qk_dim**-0.5,
            "contextual_seq_len": 0,
            "max_attn_len": 0,
        },
    )


def attention(made: Operands, dtype: torch.dtype, masks: dict[str, Any]) -> Tensor:
    if DEVICE == "cuda":
        out: Tensor = registry.get("hstu_attention", "fp8").projected.attend(made, dtype, **masks)  # type: ignore[union-attr]
        return out
    return attended(made, dtype, **masks)


def check(case: Case, change: Callable[[Operands], Operands] = lambda made: made, seed: int = 0) -> None:
    """Attention of the operands against fp32: at most twice the error of the reference with operands in e4m3.

    The yardstick rounds q, k and v of the exact product: what rows and weights in e4m3 lose is not in it, nor in the
    expected result, whose q, k and v are made of the same rows and weights.
    """
    built = build(case, seed)
    u, made = project(**built.given)
    assert u.dtype == case.dtype
    if u.numel():
        assert relative_error(u, built.exact["u"]) < (0.004 if case.dtype == torch.bfloat16 else 0.0005)
    expected = built.expected()
    rows = int(built.masks["q_offsets"][-1])
    if not rows:
        assert made.q.shape[0] == 0 or not case.pruned
        return
    rounding = relative_error(built.expected(with_fp8_products(reference))[:rows], expected[:rows])
    error = relative_error(attention(change(made), case.dtype, built.masks)[:rows], expected[:rows])
    assert error <= 2 * rounding, f"{error:.2e}, rounding {rounding:.2e}"
    assert 0.02 < rounding < 0.1


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
@pytest.mark.parametrize("name", SMALL)
def test_operands_of_the_interpreter(name: str) -> None:
    check(SMALL[name])


@pytest.mark.parametrize("columns", [64, 128, 256])
def test_operands_are_those_of_the_pass(columns: int) -> None:
    """Same places, scales and zeros as `quantised` writes of the exact product, at every width of tiles."""
    case = SMALL["jagged"]
    built = build(case)
    with tuning.forced("hstu_attention", "fp8_projection", {**CANDIDATES[0], "columns": columns}):
        _, made = project(**built.given)
    ends = built.given["blocks"].offsets
    q, k, v = (built.exact[name] for name in "qkv")
    lengths = {"max_q_len": max(case.lengths), "max_kv_len": max(case.lengths)}
    passed = quantised(q, k, v, q_offsets=ends, kv_offsets=ends, **lengths)
    rows, places = int(ends[-1]), used(case)
    assert same(made.q[:rows], passed.q[:rows]) and same(made.k[places], passed.k[places])
    assert same(made.v[:, :, places], passed.v[:, :, places])
    assert torch.allclose(made.rows[:rows], passed.rows[:rows], rtol=1e-5)
    blocks = places[::BLOCK] // BLOCK
    assert torch.allclose(made.blocks[:, blocks], passed.blocks[:, blocks], rtol=1e-5)
    assert not made.k[300:384].float().any() and made.k[:300].float().any(-1).all()


def used(case: Case) -> Tensor:
    """Rows of K in the blocks of sequences."""
    places, begin = [], 0
    for i, length in enumerate(case.lengths):
        start = (begin // BLOCK + i) * BLOCK
        places += range(start, start + -(-length // BLOCK) * BLOCK)
        begin += length
    return torch.tensor(places, device=DEVICE)


def same(a: Tensor, b: Tensor) -> bool:
    """Say if numbers in e4m3 agree, but for one in a thousand that another order of sums rounds to its neighbour."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a != b).float().mean() < 1e-3) and bool(((a - b).abs() <= b.abs() / 7).all())


def test_blocks_of_many_sequences() -> None:
    """More sequences than a program reads at once, empty ones among them."""
    lengths = [i * 37 % 300 for i in range(600)]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=DEVICE)
    blocks, wanted = blocks_of(offsets, sum(lengths) + 11), []
    for i, (begin, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        for first in range(0, length, BLOCK):
            wanted.append([begin + first, min(length - first, BLOCK), begin // BLOCK + i + first // BLOCK])
    assert blocks.table[: int(blocks.count)].tolist() == wanted and len(blocks.table) >= len(wanted)


WRONG: dict[str, Callable[[Operands], Operands]] = {
    "zeros": lambda made: dataclasses.replace(made, v=torch.zeros_like(made.v.float()).to(made.v.dtype)),
    "rows without scales": lambda made: dataclasses.replace(made, rows=torch.ones_like(made.rows)),
    "scales of other rows": lambda made: dataclasses.replace(made, rows=made.rows.roll(1, 0)),
    "blocks without scales": lambda made: dataclasses.replace(made, blocks=torch.ones_like(made.blocks)),
    "scales of k for v": lambda made: dataclasses.replace(made, blocks=made.blocks.flip(2)),
    "keys of another sequence": lambda made: dataclasses.replace(made, k=rolled(made.k, 0)),
    "values of other tokens": lambda made: dataclasses.replace(made, v=rolled(made.v, 2)),
}


def rolled(x: Tensor, dim: int) -> Tensor:
    return x.view(torch.int8).roll(BLOCK, dim).view(x.dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_fail(name: str) -> None:
    with pytest.raises(AssertionError, match="rounding"):
        check(SMALL["e4m3"], WRONG[name])


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
def test_weights_without_scales_and_stale_operands_fail() -> None:
    case = SMALL["e4m3"]
    built = build(case)
    bare = {**built.given, "scales": torch.ones_like(built.given["scales"])}
    for given in (bare, build(case, seed=1).given):
        with pytest.raises(AssertionError, match="rounding"):
            check(case, lambda _, given=given: project(**given)[1])  # type: ignore[misc]


COMPILE = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from grkernels import tuning
from grkernels.fp8 import Scaled
from grkernels.hstu_attention import fp8_projection

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
run, made = triton.JITFunction.run, []
def only_compile(self, *args, **options):
    made.append(run(self, *args, **{**options, "warmup": True}))
    return made[-1]
triton.JITFunction.run = only_compile
offsets = torch.tensor([0, 100, 300])
blocks = fp8_projection.blocks_of(offsets, 300)
cases = [(bits, config) for bits in (False, True) for config in fp8_projection.CANDIDATES]
for number, (eight_bits, config) in enumerate(cases):
    dim, width = {0: (64, 64), len(cases) - 1: (256, 512)}.get(number, (128, 512))
    x, weight = torch.zeros(300, width, dtype=torch.bfloat16), torch.zeros(16 * dim, width, dtype=torch.bfloat16)
    scales = None
    if eight_bits:
        x, weight = Scaled.of(x), Scaled.of(weight)
        weight, scales = weight.values, weight.scales.t().contiguous()
    bias = torch.zeros(16 * dim, dtype=torch.bfloat16)
    with tuning.forced("hstu_attention", "fp8_projection", config):
        fp8_projection.project(x, x, weight, scales, bias, heads=4, qk_dim=dim, v_dim=dim, blocks=blocks)
    kernel = made[-1]
    words = ("wgmma.mma_async", "cp.async.bulk.tensor", "e4m3x2", "k32.f32.e4m3.e4m3" if eight_bits else "bf16.bf16")
    stages = config["stages"] * (fp8_projection.BLOCK + max(config["columns"], dim)) * fp8_projection.ROW
    print(*(word in kernel.asm["ptx"] for word in words), stages < kernel.metadata.shared <= 227 * 1024)
"""


def test_every_configuration_compiles_for_hopper_and_loads_ahead() -> None:
    """Shared memory holds all stages: a loop in which Triton loads nothing ahead has the space of one."""
    # Triton keeps the first class of descriptors that it sees, which a fork would import anew.
    folder = kept.output_of("triton_fp8_projection", COMPILE, forked=False, TRITON_INTERPRET="0")
    assert (folder / kept.OUTPUT).read_text().split() == ["True"] * 5 * 2 * len(CANDIDATES)


# On a GPU.

ON_GPU = [
    *SMALL.values(),
    Case([500, 1, 0, 333, 128], heads=4, qk_dim=128, v_dim=128, width=512),
    Case([500, 1, 0, 333, 128], heads=4, qk_dim=128, v_dim=128, width=512, products="fp8", padding=333),
    Case([1024, 3072], [0, 2048], heads=4, qk_dim=128, v_dim=128, width=512, products="fp8", pruned=True),
    Case([700, 650, 129], [200, 0, 129], heads=4, qk_dim=256, v_dim=256, width=1024),
    Case([700, 650, 129], [200, 0, 129], heads=4, qk_dim=256, v_dim=256, width=1024, products="fp8", pruned=True),
    Case([100] * 300, [10] * 300, heads=1, width=64),
    Case([2000, 77], heads=3, qk_dim=128, v_dim=64, width=80, dtype=torch.float16),
]


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(ON_GPU)))
def test_on_a_gpu(number: int) -> None:
    check(ON_GPU[number])


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_fail_on_a_gpu(name: str) -> None:
    with pytest.raises(AssertionError, match="rounding"):
        check(SMALL["e4m3"], WRONG[name])


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(CANDIDATES)))
@pytest.mark.parametrize("case", [ON_GPU[6], ON_GPU[7]], ids=["bf16", "e4m3"])
def test_every_configuration(case: Case, number: int) -> None:
    with tuning.forced("hstu_attention", "fp8_projection", CANDIDATES[number]):
        check(case)


@pytest.mark.gpu
def test_other_lengths_compile_nothing_and_a_graph_has_the_launches() -> None:
    case = ON_GPU[7]
    built, other = build(case), build(case, seed=1)
    first = project(**built.given)
    before = len(tuning.compiled())
    check(dataclasses.replace(case, lengths=[77, 900], padding=0))
    assert len(tuning.compiled()) == before or tuning.compiled()[before:] == ["hstu_attention.sm90.kernel"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        blocks = blocks_of(built.given["blocks"].offsets, built.given["keys"].values.shape[0])
        again = project(**{**built.given, "blocks": blocks})
    graph.replay()
    torch.cuda.synchronize()
    rows = int(blocks.offsets[-1])
    assert torch.equal(again[0], first[0]) and torch.equal(again[1].q[:rows].float(), first[1].q[:rows].float())
    for name in ("values", "scales"):
        getattr(built.given["keys"], name).copy_(getattr(other.given["keys"], name))
    graph.replay()
    assert torch.equal(again[0], project(**{**built.given, "blocks": blocks})[0])
    assert not torch.equal(again[0], first[0])
