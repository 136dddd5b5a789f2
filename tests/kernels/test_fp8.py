"""Products in fp8: the rows that norms write, the products of them, and wrong numbers and scales that must fail.

Without a GPU, Triton's interpreter runs the Triton kernels, they are compiled for Hopper, and products are emulated.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import kept
from helpers.kernel_cases import Arguments, converted, layer_norm, norm_gate
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grbench.gate.kernel import KernelGate
from grbench.kernelbench import products
from grengines.numerics import IncorrectError, relative_error
from grkernels import choice, fp8, registry, triton_common
from grkernels.families import Sizes
from grkernels.fp8 import Scaled, product
from grkernels.rounding import rounded, through_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16


def quantise(rows: int, width: int) -> Arguments:
    """Rows of very different sizes, one of them of zeros."""
    x = torch.randn(rows, width + 8)[:, 8:] * torch.exp(3 * torch.randn(rows, 1))
    x[rows // 2 :: 5] = 0
    return {"x": x}


CASES: dict[str, list[Callable[[], Arguments]]] = {
    "layer_norm": [
        lambda: layer_norm(5, 48),
        lambda: layer_norm(3, 112, scale=1e-2, mean=20.0),
        lambda: layer_norm(2, 4112),
        lambda: layer_norm(0, 16),
    ],
    "norm_gate": [
        lambda: norm_gate(5, 2, 24),
        lambda: norm_gate(3, 1, 48, scale=1e-5),
        lambda: norm_gate(2, 4, 1024),
        lambda: norm_gate(4, 3, 16) | {"concat": False},
        lambda: norm_gate(4, 3, 16) | {"groups": 3},
        lambda: norm_gate(0, 1, 16),
    ],
    "quantise": [lambda: quantise(7, 48), lambda: quantise(3, 38), lambda: quantise(2, 4100), lambda: quantise(0, 16)],
}
EACH = [pytest.param(family, case, id=f"{family}{i}") for family in CASES for i, case in enumerate(CASES[family])]
VARIANTS = ["torch", "triton"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("family", "case"), EACH)
def test_rows_are_those_of_the_reference(family: str, case: Callable[[], Arguments], name: str, poisoned: None) -> None:
    """At most twice as far from them as the reference that is rounded to bf16 and then, row by row, to e4m3."""
    torch.manual_seed(1)
    arguments = converted(case(), HALF, DEVICE)
    out = registry.get(family, name).fn(**arguments, to="fp8")
    reference = registry.get(family, "torch").reference
    exact = reference(**converted(arguments, torch.float32), to="fp8")
    assert out.values.dtype is fp8.DTYPE and out.values.is_contiguous() and out.values.shape[1] % fp8.STEP == 0
    assert out.scales.dtype is torch.float32 and out.scales.shape == (len(exact), 1)
    width = exact.shape[1]
    numbers = out.numbers(torch.float32)
    assert not numbers[:, width:].any()
    rounding = relative_error(rounded(reference, HALF)(**arguments, to="fp8"), exact)
    assert relative_error(numbers[:, :width], exact) <= 2 * rounding
    if len(exact):
        assert 0 < rounding < 0.05
    torch.testing.assert_close(out.scales[:, 0] * 448, exact.abs().amax(1).clamp(min=1e-30), rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_is_the_same_beside_any_others(name: str) -> None:
    """Users in one batch, padding and cached visits change no operand."""
    for family, cases in CASES.items():
        arguments = converted(cases[0](), HALF, DEVICE)
        fn = partial(registry.get(family, name).fn, to="fp8")
        together = fn(**arguments)
        rows = {key for key in ("x", "u", "a") if key in arguments}
        for i in range(len(together.scales)):
            alone = fn(**{key: x[i : i + 1] if key in rows else x for key, x in arguments.items()})
            assert torch.equal(alone.numbers(torch.float32)[0], together.numbers(torch.float32)[i])


def test_gathered_rows_keep_their_scales() -> None:
    made = Scaled.of(torch.randn(6, 32) * torch.arange(1.0, 7.0)[:, None])
    order = torch.tensor([4, 0, 4])
    assert torch.equal(made[order].numbers(torch.float32), made.numbers(torch.float32)[order])


@examples(20)
@given(
    rows=st.integers(0, 9),
    inner=st.sampled_from([16, 48, 80]),
    outputs=st.sampled_from([16, 64]),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_product_is_that_of_its_operands(rows: int, inner: int, outputs: int, bias: bool, seed: int) -> None:
    """Against fp64, with scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def operand(n: int) -> Scaled:
        size = torch.exp(3 * torch.randn(n, 1, generator=generator))
        return Scaled.of(torch.randn(n, inner, generator=generator) * size)

    x, weight = operand(rows), operand(outputs)
    added = torch.randn(outputs, generator=generator).to(HALF) if bias else None
    out = product(x, weight.values, weight.scales.t().contiguous(), added)
    a, b = (y.values.double() * y.scales.double() for y in (x, weight))
    expected = a @ b.T + (0 if added is None else added.double())
    assert out.shape == (rows, outputs) and out.dtype is HALF
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5 * float(a.norm() * b.norm() + 1))


def test_the_emulation_is_what_the_operator_of_a_gpu_computes() -> None:
    """PyTorch has that operator on a CPU too: the layouts and scales that it takes are the same."""
    x, weight = Scaled.of(torch.randn(33, 64) * 5), Scaled.of(torch.randn(48, 64))
    scales, bias = weight.scales.t().contiguous(), torch.randn(48).to(HALF)
    theirs = torch._scaled_mm(x.values, weight.values.t(), scale_a=x.scales, scale_b=scales, bias=bias, out_dtype=HALF)
    assert relative_error(product(x, weight.values, scales, bias), theirs) < 2**-8


def summed_in_steps(a: Tensor, b: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply a [M, K] with b [N, K] as Hopper's tensor cores are known to (DeepSeek-V3, section 3.3.2).

    In steps of 32 products: these and the sum so far are shifted to the exponent of the largest of them, and what lies
    14 bits below it is cut off before they are added.
    """
    total = a.new_zeros(len(a), len(b), 1)
    for k in range(0, a.shape[1], 32):
        terms = torch.cat([a[:, None, k : k + 32] * b[None, :, k : k + 32], total], 2)
        _, exponent = torch.frexp(terms.abs().amax(2, keepdim=True))
        unit = torch.exp2((exponent - 14).double())
        total = (cut(terms / unit) * unit).sum(2, keepdim=True)
    return total[..., 0]


@pytest.mark.parametrize("cut", [torch.trunc, torch.floor])
@pytest.mark.parametrize("inner", [512, 1536, 4096])
def test_sums_of_14_bits_stay_within_the_tolerance(inner: int, cut: Callable[[Tensor], Tensor]) -> None:
    """They are what `FAST_ACCUMULATION` takes. Whether bits are cut off towards zero is not known."""
    torch.manual_seed(0)
    x, weight = torch.randn(24, inner), torch.randn(24, inner)
    a, b = Scaled.of(x), Scaled.of(weight)
    exact = x.double() @ weight.double().T
    rounding = relative_error(through_pages(x, "fp8").double() @ through_pages(weight, "fp8").double().T, exact)
    sums = a.values.double() @ b.values.double().T
    made = summed_in_steps(a.values.double(), b.values.double(), cut)
    assert 1e-4 < relative_error(made, sums) < (0.004 if cut is torch.trunc else 0.05)
    assert relative_error(made * a.scales.double() * b.scales.double().T, exact) <= 2 * rounding


def test_the_record_says_how_a_gpu_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the argument that the product gets."""
    passed = inspect.signature(product).parameters["fast"].default
    for fast in (True, False):
        monkeypatch.setattr(fp8, "FAST_ACCUMULATION", fast)
        assert fp8.runs_as("cuda").endswith(", use_fast_accum") is fast
        assert fp8.runs_as("cpu") == fp8.EMULATED
    monkeypatch.undo()
    assert fp8.runs_as("cuda").endswith(", use_fast_accum") is passed


TINY = [name for name in products.SHAPES if name.startswith("tiny")]


def wrong_products(faulty: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Products with one fault each. faulty: the right one."""

    def of_other_rows(x: Scaled) -> Scaled:
        return Scaled(x.values.view(torch.uint8).roll(1, 0).view(fp8.DTYPE), x.scales.roll(1, 0))

    stale: list[Tensor] = []

    def earlier(x: Scaled, weight: Tensor, **options: Any) -> Tensor:
        stale.append(faulty(x, weight, **options))
        return stale[-2 if len(stale) > 1 else -1].clone()

    return {
        "zeros": lambda x, weight, **options: torch.zeros_like(faulty(x, weight, **options)),
        "stale": earlier,
        "rows of others": lambda x, weight, **options: faulty(of_other_rows(x), weight, **options),
        "scales of other rows": lambda x, weight, **options: faulty(
            Scaled(x.values, x.scales.roll(1, 0)), weight, **options
        ),
        "scales of another weight": lambda x, weight, scales, **options: faulty(
            x, weight, scales=scales.roll(1, 1), **options
        ),
        "rows without scales": lambda x, weight, **options: faulty(
            Scaled(x.values, torch.ones_like(x.scales)), weight, **options
        ),
        "weights without scales": lambda x, weight, scales, **options: faulty(
            x, weight, scales=torch.ones_like(scales), **options
        ),
        "one scale for all rows": lambda x, weight, **options: faulty(
            Scaled(x.values, x.scales.amax().expand_as(x.scales).contiguous()), weight, **options
        ),
    }


def uneven(name: str, seed: int) -> dict[str, Any]:
    """Inputs of a shape with rows and channels of different sizes, so that scales differ from each other."""
    given = products.inputs(products.SHAPES[name], dtype=HALF, device=DEVICE, seed=seed)
    sizes = {
        key: 2.0 ** torch.arange(len(given[key]), device=DEVICE).remainder(5)[:, None]
        for key in ("weight", "u")
        if key in given
    }
    given |= {key: (given[key] * size).to(HALF) for key, size in sizes.items()}
    if not given["norm"]:
        given["x"] = (given["x"] * 2.0 ** torch.arange(len(given["x"]), device=DEVICE).remainder(5)[:, None]).to(HALF)
    if given["norm"] == "layer_norm":  # its rows are all about equally large but for outliers
        given["x"][::2, 3] += 40
    return given


@pytest.mark.parametrize("variant", ["torch+fp8", "triton+fp8", "triton+fp8+apart"])
@pytest.mark.parametrize("shape", TINY)
def test_wrong_products_fail_the_gate(shape: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, others = uneven(shape, 0), uneven(shape, 1)
    gate = KernelGate(products.reference, inputs, others, HALF, yardstick=products.yardstick(variant))
    right = gate.check(products.bind(variant, **inputs), 2.0)
    assert 0 < right.error <= right.tolerance <= 2 * right.rounding_error
    assert right.rounding_error > 4 * KernelGate(products.reference, inputs, others, HALF)._rounding[0]
    for name, wrong in wrong_products(product).items():
        monkeypatch.setattr(fp8, "product", wrong)
        products.bind(variant, **others)()  # what a stale answer is of
        with pytest.raises(IncorrectError, match="differs from the fp32 reference"):
            gate.check(products.bind(variant, **inputs), 2.0)
            pytest.fail(name)


def test_the_yardstick_of_an_operator_that_writes_fp8_rounds_its_rows() -> None:
    arguments = converted(layer_norm(4, 32), HALF)
    reference = registry.get("layer_norm", "torch").reference
    in_bf16 = rounded(reference, HALF)(**arguments)
    assert torch.equal(rounded(reference, HALF)(**arguments, to="fp8"), through_pages(in_bf16, "fp8"))


# What can't write or multiply fp8 says so.


def test_variants_without_fp8_refuse_and_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "device_kind", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    asked = dict.fromkeys(("layer_norm", "norm_gate"), "auto")
    for family in asked:
        for name in ("compile", "cutlass"):
            if registry.availability(family, name) is None:
                why = registry.unsupported(family, name, device="cuda", dtype="bf16", width=512, products="fp8")
                assert why == "operands in fp8: it writes its own dtype only (torch and triton write fp8)"
    made = choice.choose(asked, device=DEVICE, dtype="bf16", sizes=Sizes(products="fp8", users=1, events=16))
    assert made.variants["layer_norm"] == "triton" and made.variants["norm_gate"] in ("triton", "torch")
    if registry.availability("norm_gate", "cutlass") is None:
        assert re.search(r"by a timing of 2 variants: triton .*; cutlass: operands in fp8", made.reasons["norm_gate"])
    with pytest.raises(choice.RefusedError, match=r"kernel\.norm_gate=compile: operands in fp8: .*: torch, triton"):
        choice.choose(choice.requested("compile"), device="cuda", dtype="bf16", sizes=Sizes(products="fp8"))


@pytest.mark.parametrize("family", ["layer_norm", "norm_gate"])
def test_triton_leaves_rows_that_need_padding_to_pytorch(family: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, width, why in (
        ("triton", 40, "operands in fp8: width 40 is no multiple of 16 (torch pads rows)"),
        ("triton", 48, None),
        ("torch", 40, None),
    ):
        supports = registry.get(family, name).supports
        assert supports(device=device, dtype="bf16", width=width, products="fp8") == why
        assert supports(device=device, dtype="bf16", width=width) is None
    case = layer_norm(5, 40) if family == "layer_norm" else norm_gate(5, 1, 40)
    arguments = converted(case, HALF, DEVICE)
    made = registry.get(family, "torch").fn(**arguments, to="fp8")
    exact = registry.get(family, "torch").reference(**converted(arguments, torch.float32))
    assert relative_error(made.numbers(torch.float32)[:, : exact.shape[1]], exact) < 0.05


def test_a_gpu_without_e4m3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    assert fp8.refusal() == "NVIDIA A100 has compute capability 8.0, and products of fp8 numbers need 8.9 or higher"
    for family in CASES:
        dims = {"width": 512} if family != "quantise" else {}
        supports = registry.get(family, "triton").supports
        assert fp8.refusal() in supports(device="cuda", dtype="bf16", products="fp8", **dims)
        assert supports(device="cuda", dtype="bf16", **dims) is None
    assert products.refusal("triton+fp8", device="cuda", dtype="bf16", width=512) == fp8.refusal()
    assert products.refusal("triton", device="cuda", dtype="bf16", width=512) is None
    assert "dtype=fp16" in (products.refusal("triton+fp8", device="cuda", dtype="fp16", width=512) or "")


COMPILE_FOR_HOPPER = """
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from helpers.kernel_cases import converted, layer_norm, norm_gate
from grkernels import registry

here = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in here.items()}))
run = triton.JITFunction.run
triton.JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "warmup": True})
cases = {"layer_norm": layer_norm(5, 512), "norm_gate": norm_gate(5, 4, 128), "quantise": {"x": torch.randn(5, 518)}}
for family, arguments in cases.items():
    registry.get(family, "triton").fn(**converted(arguments, torch.bfloat16), to="fp8")
    print(family)
registry.get("norm_gate", "triton").fn(**converted(cases["norm_gate"], torch.bfloat16), to="fp8", concat=False)
"""


def test_kernels_compile_for_hopper() -> None:
    """The interpreter takes Python that the compiler refuses; compiling, unlike running, needs no GPU."""
    folder = kept.output_of("triton_fp8", COMPILE_FOR_HOPPER, TRITON_INTERPRET="0")
    assert (folder / kept.OUTPUT).read_text().split() == list(CASES)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner, outputs", [(512, 2048), (512, 512), (1536, 512), (1024, 4096), (528, 512)])
def test_products_on_a_gpu_are_the_emulated_ones(inner: int, outputs: int, bias: bool, fast: bool) -> None:
    """For any number of rows, of which none is a multiple of 16 but by chance."""
    weight = Scaled.of(torch.randn(outputs, inner, device="cuda"))
    scales, added = weight.scales.t().contiguous(), torch.randn(outputs, device="cuda").to(HALF) if bias else None
    for rows in (1, 3, 16, 257, 4099):
        x = Scaled.of(torch.randn(rows, inner, device="cuda") * torch.exp(3 * torch.randn(rows, 1, device="cuda")))
        out = product(x, weight.values, scales, added, fast=fast)
        there = Scaled(x.values.cpu(), x.scales.cpu())
        expected = product(there, weight.values.cpu(), scales.cpu(), None if added is None else added.cpu())
        assert out.dtype is HALF
        # The tensor cores' own sums keep 14 bits or so.
        assert relative_error(out.cpu(), expected) < (2**-6 if fast else 2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_graph_holds_rows_and_product_without_a_wait(family: str, name: str) -> None:
    """Nothing waits for the device, and a replay computes anew what its inputs have become."""
    torch.manual_seed(0)
    arguments = converted(CASES[family][0](), HALF, "cuda")
    fn = partial(registry.get(family, name).fn, to="fp8")
    inner = fn(**arguments).values.shape[1]
    weight = Scaled.of(torch.randn(64, inner, device="cuda"))
    scales = weight.scales.t().contiguous()
    product(fn(**arguments), weight.values, scales, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        product(fn(**arguments), weight.values, scales, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(fn(**arguments), weight.values, scales, None)
    key = "u" if family == "norm_gate" else "x"
    arguments[key].mul_(-3).add_(0.5)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, product(fn(**arguments), weight.values, scales, None))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["uvqk_4x128_16384", "out_4x128_16384", "out_4x256_16384", "one_4x128_16384"])
def test_benchmarked_products_pass_their_gate_on_a_gpu(shape: str) -> None:
    make = partial(products.inputs, products.SHAPES[shape], dtype=HALF, device="cuda")
    inputs, others = make(seed=0), make(seed=1)
    for variant in products.VARIANTS:
        gate = KernelGate(products.reference, inputs, others, HALF, yardstick=products.yardstick(variant))
        assert gate.check(products.bind(variant, **inputs), 2.0).passed


def test_interpreted_numbers_are_those_of_pytorch() -> None:
    """The interpreter's own conversion to e4m3 would truncate (grkernels.triton_common)."""
    if not triton_common.INTERPRETED:
        pytest.skip("a GPU converts by itself")
    x = torch.randn(16, 512)
    made = registry.get("quantise", "triton").fn(x, to="fp8")
    assert torch.equal(made.numbers(torch.float32), Scaled.of(x).numbers(torch.float32))
