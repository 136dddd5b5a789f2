"""HSTU attention with products in e4m3: the operands, the order of P in registers, sums, and wrong numbers that fail.

Without a GPU, Triton's interpreter writes the operands, PyTorch multiplies them as the kernel for Hopper does, and that
kernel is compiled. On a GPU the kernel itself has the same cases, reference and tolerance.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from helpers import kept
from helpers.attention_cases import Case
from helpers.fp8_attention import check, emulated, operands, order
from torch import Tensor

from grbench.gate.kernel import KernelGate
from grengines.numerics import IncorrectError, relative_error
from grkernels import registry, tuning
from grkernels.hstu_attention.fp8_operands import BLOCK, LONGEST, Operands
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.rounding import rounded, with_fp8_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16
SMALL = [
    Case([300, 1, 0, 128], [20, 1, 0, 0], qk_dim=64, v_dim=128),
    Case([290, 140], [20, 4], [100, 7], qk_dim=128, v_dim=64, contextual=3, window=50),
    Case([70, 140], contextual=40, qk_dim=64, v_dim=64),
    Case([290, 140, 3], [20, 4, 0], [100, 7, 3], qk_dim=128, v_dim=64, page=16),
    Case([290, 1, 140], None, [1, 1, 7], qk_dim=64, v_dim=128, page=32, stored="fp8"),
    Case([270], [9], [20], qk_dim=64, v_dim=64, page=16, stored="int8", window=100),
]


def from_operands(change: Callable[[Operands], Operands] = lambda made: made, **options: Any) -> Callable[..., Tensor]:
    """The kernel on a CPU, with operands that `change` may spoil."""
    return lambda **o: emulated(o, change(operands(o)), **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
@pytest.mark.parametrize("case", SMALL, ids=["targets", "append", "contextual", "pages", "fp8 pages", "int8 pages"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_formulas(case: Case, dtype: torch.dtype) -> None:
    check(from_operands(), case.build(dtype))


def test_what_the_yardstick_rounds() -> None:
    """Three bits after the first: four operands lose 2.6% each, and nothing comes of exponents."""
    o = SMALL[0].build(HALF).options
    exact = reference(**o)
    errors = [relative_error(f(**o), exact) for f in (with_fp8_products(reference), rounded(reference, HALF))]
    assert 0.04 < errors[0] < 0.07 and errors[1] < 0.006
    tiny = {**o, "v": o["v"] * 2.0**-40}
    assert relative_error(with_fp8_products(reference)(**tiny), reference(**tiny)) == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize("sizes", [1e-6, 1.0, 1e4])
def test_rows_and_blocks_use_the_range_of_e4m3(sizes: float) -> None:
    case = SMALL[0].build(torch.float32)
    o = {**case.options, **{x: case.options[x] * sizes for x in "qkv"}}
    for name in ("q_offsets", "kv_offsets"):
        o[name] = o[name].to(DEVICE)
    o |= {x: o[x].to(DEVICE) for x in "qkv"}
    made = operands(o)
    lengths = made.q[: int(o["q_offsets"][-1])].float().norm(dim=-1)
    assert (lengths / LONGEST - 1).abs().max() < 0.06
    assert made.v[:, :, :384].float().abs().amax() == 448
    back = made.q[:429].float() * made.rows[:429, :, None]
    assert relative_error(back, o["q"][:429].float()) < 0.03
    assert not made.k[300:384].float().any() and not made.v[:, :, 384 - 80 : 384].float()[:, :, 16:].any()


def wrong(name: str, x: Callable[[Tensor], Tensor]) -> Callable[[Operands], Operands]:
    return lambda made: dataclasses.replace(made, **{name: x(getattr(made, name))})


WRONG = {
    "zeros": wrong("v", lambda x: torch.zeros_like(x.float()).to(x.dtype)),
    "rows without scales": wrong("rows", torch.ones_like),
    "blocks without scales": wrong("blocks", torch.ones_like),
    "scales of other rows": wrong("rows", lambda x: x.roll(1, 0)),
    "scales of other heads": wrong("blocks", lambda x: x.flip(0)),
    "scales of other blocks": wrong("blocks", lambda x: x.roll(1, 1)),
    "values in their own order": wrong("v", lambda x: in_groups(x, SWAPPED)),
    "values of other dimensions": wrong("v", lambda x: x.view(torch.int8).roll(1, 1).view(x.dtype)),
}
SWAPPED = [4 * (i % 8 // 2) + 2 * (i // 8) + i % 2 for i in range(16)]  # place of each token


def in_groups(x: Tensor, places: list[int]) -> Tensor:
    return x.view(torch.int8).unflatten(-1, (-1, 16))[..., places].flatten(-2).view(x.dtype)


def uneven() -> Case:
    """Rows, heads and blocks of very different sizes, so that the scales of others are wrong ones."""
    case = Case([300, 150], [20, 4], qk_dim=64, v_dim=64).build(HALF)
    for x, seed in zip("qkv", range(3), strict=True):
        at = torch.Generator().manual_seed(seed)
        size = torch.exp(torch.randn(case.options[x].shape[:2], generator=at))
        size[128:300] *= 4
        case.options[x] = case.options[x] * size[..., None].to(HALF)
    return case


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
@pytest.mark.parametrize("name", ["k_scales", "v_scales"])
def test_pages_without_scales_fail(name: str) -> None:
    case = Case([290, 1, 140], None, [1, 1, 7], qk_dim=64, v_dim=128, page=32, stored="int8").build(HALF)
    fn = from_operands()
    check(fn, case)
    with pytest.raises(AssertionError, match="rounding"):
        check(lambda **o: fn(**{**o, name: torch.ones_like(o[name])}), case)


def outliers() -> Case:
    """One key in 128 is 30 times as long as the others, which therefore have few bits below them in e4m3."""
    case = Case([512], heads=1, qk_dim=64, v_dim=64).build(HALF)
    case.options["k"][::128] *= 30
    return case


@pytest.fixture(scope="module")
def right() -> tuple[Case, Operands]:
    """Return a case, and operands that pass its check. The interpreter takes a second for them."""
    case = uneven()
    made = operands(case.options)
    check(lambda **o: emulated(o, made), case)
    return case, made


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
@pytest.mark.parametrize("change", WRONG)
def test_wrong_operands_fail(change: str, right: tuple[Case, Operands]) -> None:
    case, made = right
    with pytest.raises(AssertionError, match="rounding"):
        check(lambda **o: emulated(o, WRONG[change](made)), case)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
def test_one_divided_by_n_before_p_is_rounded_fails() -> None:
    """Numbers of P over N = 16384 are nearly all smaller than those of e4m3."""
    case = SMALL[0].build(HALF)
    with pytest.raises(AssertionError, match="rounding"):
        check(from_operands(scale_of_p=1 / 16384), case)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel itself is tested below")
def test_outliers_of_a_block_leave_its_other_keys() -> None:
    check(from_operands(), outliers())


def truncated(x: Tensor, steps: Tensor) -> Tensor:
    """Sum of `steps` [n, ...] in the way of Hopper's tensor cores: the sum keeps 14 bits, and what is below is cut."""
    for step in steps:
        x = x + step
        _, exponent = torch.frexp(x)
        unit = torch.ldexp(torch.ones_like(x), exponent - 14)
        x = (x / unit).trunc() * unit
    return x


def test_sums_in_two_levels_do_not_lose_with_length() -> None:
    """P V of 1,024 and 16,384 keys by such sums: in one level the error grows with the keys, in two it does not."""
    torch.manual_seed(0)
    errors: dict[tuple[int, str], float] = {}
    for keys in (1024, 16384):
        p = torch.nn.functional.silu(torch.randn(8, keys)) * 16
        v = torch.randn(keys, 8) + 0.5
        p, v = (x.to(torch.float8_e4m3fn).float() for x in (p, v))
        exact = p.double() @ v.double()
        steps = torch.stack([p[:, i : i + 32] @ v[i : i + 32] for i in range(0, keys, 32)])
        zero = torch.zeros_like(steps[0])
        errors[keys, "one"] = relative_error(truncated(zero, steps), exact)
        tiles = [truncated(zero, tile) for tile in steps.split(BLOCK // 32)]
        errors[keys, "two"] = relative_error(torch.stack(tiles).sum(0), exact)
    assert errors[16384, "one"] > 4 * errors[1024, "one"] > 4 * errors[1024, "two"]
    assert errors[16384, "two"] < 1.2 * errors[1024, "two"] < 1e-3


def test_supports_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    supports = registry.get("hstu_attention", "fp8").supports
    given: dict[str, Any] = {"device": "cuda", "dtype": "bf16", "qk_dim": 128, "v_dim": 256}
    assert supports(**given) is supports(**given, page=64, stored="int8") is None
    refusals = {
        "allowed are 64, 128 and 256": {"qk_dim": 96},
        "neither fp16 nor bf16": {"dtype": "fp32"},
        "grbench's own layer only": {"extras": ["a=1"]},
        "compute capability 9.0": {"device": "cpu"},
    }
    for reason, change in refusals.items():
        assert reason in (supports(**given | change) or "")


@pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
@pytest.mark.parametrize("widths", [*itertools.product((64, 128, 256), repeat=2)], ids=str)
def test_default_launches_fit_and_are_among_those_that_a_gpu_checks(
    widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cutlass import BFloat16

    from grkernels import cute_common
    from grkernels.hstu_attention import fp8
    from grkernels.hstu_attention.sm90.sizes import Sizes, Tiles

    monkeypatch.setattr(cute_common, "processors", lambda device: 132)
    for batch, rows in ((1, 100), (8, 3000), (32, 100_000)):  # tiles of 64 rows, of 128, and of 128 from a counter
        q, v = (torch.empty(rows, 4, width, device="meta") for width in widths)
        config = fp8._default(q, v, batch, rows // batch)
        assert config in fp8.CANDIDATES
        assert (config["take_turns"], config["stages"]) == ((0, 3) if 256 in widths else (int(batch > 1), 2))
        for split in (False, True):
            Sizes(BFloat16, *widths, Tiles(**config, split=split), products="fp8")  # raises if it doesn't fit


@pytest.mark.skipif(find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed")
def test_launch_values_are_those_of_the_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    from grkernels import cute_common
    from grkernels.hstu_attention import cutlass, fp8

    launches: list[tuple[float, ...]] = []
    made: list[Operands] = []
    whole = fp8.quantised
    monkeypatch.setattr(cute_common, "launcher", lambda kernel: lambda *values: launches.append((kernel, *values)))
    monkeypatch.setattr(cute_common, "processors", lambda device: 132)
    monkeypatch.setattr(cute_common, "stream", lambda device: 99)
    monkeypatch.setattr(fp8, "quantised", lambda *a, **o: made.append(whole(*a, **o)) or made[0])
    cutlass.compiled.cache_clear()
    o = Case([300, 140], [20, 4], [100, 7], qk_dim=64, v_dim=128).build(HALF, device=DEVICE).options
    fp8.hstu_attention(**o)
    cutlass.compiled.cache_clear()
    [(kernel, *values)], [x] = launches, made
    assert (kernel.products, kernel.tiles.chunk, kernel.qk_dim, kernel.v_dim) == ("fp8", 64, 64, 128)
    rows = (440 + 3) // BLOCK * BLOCK + 2 * BLOCK
    assert values[:10] == [x.q.data_ptr(), 128, 64, x.k.data_ptr(), 128, 64, x.v.data_ptr(), rows, 128 * rows, rows]
    assert values[-4:] == [x.rows.data_ptr(), x.blocks.data_ptr(), rows // BLOCK, 99]


LAYOUTS = """
from cutlass import Float8E4M3FN, Float32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

FOUND = {}

@cute.jit
def find():
    kinds = (*[Float8E4M3FN] * 2, *[OperandMajorMode.K] * 2, Float32, (1, 1, 1))
    a = make_trivial_tiled_mma(*kinds, (64, 64), a_source=warpgroup.OperandSource.RMEM).tv_layout_A_tiled
    c = make_trivial_tiled_mma(*kinds, (64, 128)).tv_layout_C_tiled
    for name, layout, values in (("a", a, 16), ("c", c, 64)):
        FOUND[name] = [[int(cute.crd2idx((t, i), layout)) for i in range(values)] for t in range(128)]

cute.compile(find)
"""
COMPILE = f"""
import json, sys
from pathlib import Path
import torch
from grkernels.cute_common import ELEMENTS, compile_kernel
from grkernels.hstu_attention.sm90 import fp8
from grkernels.hstu_attention.sm90.kernel import Attention
from grkernels.hstu_attention.sm90.sizes import Tiles
for number, (dtype, dim, tiles) in enumerate((
    (torch.bfloat16, 128, Tiles(128, 128, 2, True, True, chunk=64)),
    (torch.float16, 256, Tiles(128, 64, 3, False, False, True, chunk=64)),
)):
    kernel = Attention(ELEMENTS[dtype], dim, dim, tiles, products="fp8")
    made = compile_kernel(kernel, options="--keep-ptx --keep-cubin --dump-dir " + sys.argv[1])
    Path(sys.argv[1], str(number) + ".ptx").write_text(made.__ptx__)
Path(sys.argv[1], "fp8_layouts.py").write_text({LAYOUTS!r})
sys.path.insert(0, sys.argv[1])
from fp8_layouts import FOUND
FOUND["words"] = [fp8.scores_of(word) for word in range(16)]
Path(sys.argv[1], "layouts.json").write_text(json.dumps(FOUND))
"""


@pytest.fixture(scope="module")
def compiled() -> Any:
    if find_spec("cutlass") is None:
        pytest.skip("nvidia-cutlass-dsl is not installed")
    return kept.output_of("cute_fp8_attention", COMPILE, CUTE_DSL_ARCH="sm_90a")


def test_kernels_compile_for_hopper(compiled: Any) -> None:
    wanted = ("k32.f32.e4m3.e4m3", "cp.async.bulk.tensor", "tanh.approx", "cvt.rn.satfinite.e4m3x2.f32")
    for number in range(2):
        ptx = (compiled / f"{number}.ptx").read_text()
        assert all(words in ptx for words in wanted)
        assert "bf16.bf16" not in ptx and "f16.f16 " not in ptx


def test_p_in_registers_meets_the_values_in_their_order(compiled: Any) -> None:
    """Each number of P's register is the score of the token whose value stands at that place of V.

    The layouts are CuTe's own: of S as the first product leaves it, and of P as the second one reads it.
    """
    found, tokens = json.loads((compiled / "layouts.json").read_text()), order()
    assert sorted(tokens) == list(range(BLOCK)) and tokens != sorted(tokens)
    for thread, step in itertools.product(range(128), range(4)):
        for i, at in enumerate(found["a"][thread]):
            score = found["words"][4 * step + i // 4][i % 4]
            row, column = found["c"][thread][score] % 64, found["c"][thread][score] // 64
            assert (row, column) == (at % 64, tokens[32 * step + at // 64])


COMPILE_TRITON = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from grkernels.hstu_attention import fp8_operands
from grkernels.hstu_attention.bench import Shape, inputs

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
for given in ({}, {"cached": 90, "page": 64}, {"cached": 90, "page": 64, "stored": "fp8"}):
    o = inputs(Shape(2, 300, 20, qk_dim=256, v_dim=256, **given), dtype=torch.bfloat16, device="cpu", seed=0)
    others = ("num_targets", "scaling_seqlen", "alpha")
    fp8_operands.quantised(**{name: x for name, x in o.items() if name not in others})
    print(len(given))
"""


def test_the_operands_compile_for_hopper() -> None:
    folder = kept.output_of("triton_fp8_operands", COMPILE_TRITON, TRITON_INTERPRET="0")
    assert (folder / kept.OUTPUT).read_text().split() == ["0", "2", "3"]


# On a GPU.

ON_GPU = [
    Case([500, 1, 0, 333, 128]),
    Case([700, 1, 0, 650, 129], [200, 1, 0, 0, 129]),
    Case([1024, 3072], [0, 2048]),
    Case([700, 300, 64], [200, 100, 3], contextual=5, window=64),
    Case([700, 300, 64], contextual=70),
    Case([900, 800, 1, 0, 300], [300, 20, 1, 0, 10], [350, 100, 1, 0, 300]),
    Case([900, 640, 77], [16, 5, 77], [16, 5, 77]),
    Case([100] * 300, [10] * 300, heads=1),
    Case([6000, 2100], None, [1, 70]),
    Case([3000], [40], [700], contextual=3, window=900, heads=1),
    Case([900, 800, 300, 5], [100, 20, 0, 5], [350, 100, 300, 5], page=64),
    Case([900, 801, 300], None, [1, 16, 1], page=128, stored="fp8"),
    Case([900, 800, 300], [3, 2, 0], [20, 17, 1], page=32, contextual=4, window=100, stored="int8"),
]
SIZES = [(128, 128), (256, 256), (64, 128), (256, 64)]


def kernel(**o: Any) -> Tensor:
    out: Tensor = registry.get("hstu_attention", "fp8").fn(**o)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_on_a_gpu(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    for i, case in enumerate(ON_GPU):
        case.qk_dim, case.v_dim = sizes
        built = case.build(dtype, seed=i, device="cuda")
        check(kernel, built)
        assert torch.equal(kernel(**built.options), kernel(**built.options))


@pytest.mark.gpu
def test_the_operands_are_those_of_the_interpreter() -> None:
    """The emulation by the operands that the GPU wrote: near what the kernel makes of them."""
    for case in SMALL:
        o = case.build(HALF, device="cuda").options
        made = operands(o)
        here = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in o.items()}
        moved = Operands(**{f.name: getattr(made, f.name).cpu() for f in dataclasses.fields(made)})
        assert relative_error(kernel(**o).cpu(), emulated(here, moved)) < 0.02  # tanh.approx moves some roundings of P


@pytest.mark.gpu
@pytest.mark.parametrize("change", WRONG)
def test_wrong_operands_fail_on_a_gpu(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from grkernels.hstu_attention import fp8

    case, other = uneven(), outliers()
    for x in case, other:
        x.options = {name: t.cuda() if isinstance(t, Tensor) else t for name, t in x.options.items()}
        check(kernel, x)
    whole = fp8.quantised
    monkeypatch.setattr(fp8, "quantised", lambda *a, **o: WRONG[change](whole(*a, **o)))
    with pytest.raises(AssertionError, match="rounding"):
        check(kernel, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 256])
def test_the_error_at_16384_keys_is_no_larger_than_at_1024(dim: int) -> None:
    errors = []
    for n in (1024, 16384):
        case = Case([n], heads=1, qk_dim=dim, v_dim=dim).build(HALF, device="cuda")
        case.options["v"] = case.options["v"] + 0.5  # sums of one sign, where cut bits add up
        errors.append(check(kernel, case))
    assert errors[1] <= 1.1 * errors[0], errors


@pytest.mark.gpu
def test_the_gate_of_the_benchmark_and_a_graph() -> None:
    from grkernels.hstu_attention.bench import Shape, inputs

    variant = registry.get("hstu_attention", "fp8")
    given, others = (
        inputs(Shape(3, 700, 100, qk_dim=256, v_dim=256), dtype=HALF, device="cuda", seed=seed) for seed in range(2)
    )
    gate = KernelGate(reference, given, others, HALF, yardstick=variant.yardstick)
    gate.check(lambda: variant.fn(**given), variant.max_error_ratio)
    for bad in (lambda: torch.zeros_like(variant.fn(**given)), lambda: variant.fn(**others)):
        with pytest.raises(IncorrectError):
            gate.check(bad, variant.max_error_ratio)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = variant.fn(**given)
    for x in "qkv":
        given[x].copy_(others[x])
    graph.replay()
    assert torch.equal(out, variant.fn(**others))


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dim", [128, 256])
def test_every_configuration(dim: int) -> None:
    from grkernels.hstu_attention import fp8

    case = Case([1500, 0, 900, 260], [256, 0, 0, 10], qk_dim=dim, v_dim=dim).build(HALF, device="cuda")
    ran = 0
    for config in fp8.CANDIDATES:
        with tuning.forced("hstu_attention", "fp8", config):
            try:
                check(kernel, case)
                ran += 1
            except ValueError as e:  # tiles that don't fit
                assert str(e).startswith(("m=", "chunk="))
    assert ran > 5
