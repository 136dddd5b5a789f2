"""A norm and the product behind it as one more family of the benchmark: bf16 beside fp8.

It measures them together, because in fp8 the norm also rounds, and moves half of the bytes to the product. Variants:

    torch, triton          the norm in that variant, and PyTorch's product in the dtype
    torch+fp8, triton+fp8  the norm writes e4m3 with scales, and the product is of e4m3 numbers (grkernels.fp8)
    triton+fp8+apart       the norm writes its dtype, and a pass of its own rounds to e4m3
    triton+fp8+promoted    partial sums move from the tensor cores to fp32 registers (use_fast_accum=False)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels import fp8, registry
from grkernels.fp8 import Scaled
from grkernels.hstu_attention.spec import BYTES
from grkernels.operators import Operators
from grkernels.rounding import through_pages
from grkernels.variant import Cost

FAMILY = "norm_product"
NORMS = ("layer_norm", "norm_gate", "quantise")
VARIANTS = ("torch", "triton", "torch+fp8", "triton+fp8", "triton+fp8+apart", "triton+fp8+promoted")


@dataclass(frozen=True)
class Shape:
    """`rows` tokens of `width` numbers, and a product with `outputs` channels.

    norm: layer_norm, norm_gate (the product then reads 3 x width numbers, and adds to x), or "" for the product alone:
    its operand is there already, in the dtype or in e4m3.
    """

    rows: int
    width: int
    outputs: int
    norm: str = "layer_norm"

    @property
    def inner(self) -> int:
        return (3 if self.norm == "norm_gate" else 1) * self.width


def _of_layer(heads: str, rows: int, width: int) -> dict[str, Shape]:
    """Return the products of a layer whose embedding is as wide as its heads together."""
    return {
        f"uvqk_{heads}_{rows}": Shape(rows, width, 4 * width),
        f"out_{heads}_{rows}": Shape(rows, width, width, "norm_gate"),
    }


SHAPES = {
    **_of_layer("4x128", 16384, 512),
    **_of_layer("4x128", 99328, 512),
    **_of_layer("4x256", 16384, 1024),
    **_of_layer("4x256", 99328, 1024),
    "one_4x128_16384": Shape(16384, 512, 512),  # of u, v, q and k alone, as in the last layer
    "one_4x128_99328": Shape(99328, 512, 512),
    "alone_16384x512x2048": Shape(16384, 512, 2048, ""),
    "alone_99328x512x2048": Shape(99328, 512, 2048, ""),
    "alone_99328x512x512": Shape(99328, 512, 512, ""),
    "alone_99328x1536x512": Shape(99328, 1536, 512, ""),
    "alone_99328x1024x4096": Shape(99328, 1024, 4096, ""),
    "tiny": Shape(40, 32, 64),
    "tiny_gate": Shape(40, 32, 48, "norm_gate"),
    "tiny_alone": Shape(40, 32, 64, ""),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return x [L, width], of norm_gate also u, a [L, width] and what its product adds to, norm and product."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    L, W = shape.rows, shape.width
    given = {
        "norm": shape.norm,
        "x": random(L, W),
        "norm_weight": 1 + 0.1 * random(W),
        "norm_bias": 0.1 * random(W),
        "weight": random(shape.outputs, shape.inner) * shape.inner**-0.5,
        "bias": 0.1 * random(shape.outputs),
    }
    if shape.norm == "norm_gate":
        given |= {"u": random(L, 4 * W)[:, :W], "x": random(L, W) * 1e-3, "added": random(L, shape.outputs)}
    return given


def cost(shape: Shape, dtype: str, variant: str = "") -> Cost:
    """Count the product, the operands of what comes first, and the results. dtype: fp32, fp16 or bf16.

    A variant in fp8 reads the weight in e4m3, with a scale for each channel, and so each row that is there in e4m3.
    """
    wide, scale, in_fp8 = BYTES[dtype], BYTES["fp32"], bool(_parts(variant)[1])
    ready = in_fp8 and not shape.norm and not variant.endswith("+apart")
    weight = shape.outputs * (shape.inner + scale if in_fp8 else shape.inner * wide)
    row = (shape.width + scale if ready else shape.width * wide) + shape.outputs * wide
    if shape.norm == "norm_gate":
        row += (shape.width + shape.outputs) * wide
    return Cost(2 * shape.rows * shape.inner * shape.outputs, shape.rows * row + weight)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `refusal` other than device and dtype."""
    return {"width": shape.width}


def refusal(variant: str, *, device: str, dtype: str, width: int) -> str | None:
    """Return None if the variant can run here, else the reason."""
    name, products = _parts(variant)
    if products and dtype != "bf16":
        return f"dtype={dtype}: products in fp8 give bf16; set dtype=bf16"
    if products and device == "cuda" and (why := fp8.refusal()):
        return why
    dims = {"layer_norm": {"width": width}, "norm_gate": {"width": width}, "quantise": {}}
    for family in NORMS:
        if why := registry.unsupported(family, name, device=device, dtype=dtype, products=products, **dims[family]):
            return why
    return None


def reference(*, norm: str, **given: Any) -> Tensor:
    """Compute the norm and the product in fp32."""
    wide = {name: x.float() for name, x in given.items()}
    return _product(_operand(Operators.reference(), norm, wide), wide)


def yardstick(variant: str) -> Callable[..., Tensor] | None:
    """Return the reference with the rounding of a variant's operands; None for one that rounds to its dtype only."""
    return _rounded if _parts(variant)[1] else None


def _rounded(*, norm: str, **given: Any) -> Tensor:
    wide = {name: x.float() for name, x in given.items()}
    wide["weight"] = through_pages(wide["weight"], "fp8")
    return _product(through_pages(_operand(Operators.reference(), norm, wide), "fp8"), wide)


def bind(variant: str, *, norm: str, **given: Any) -> Callable[[], Tensor]:
    """Return the call that is timed. The weight is in e4m3 before, and so is the operand of a product alone."""
    name, products = _parts(variant)
    kernels = Operators.of(dict.fromkeys(NORMS, name))
    if not products:
        return lambda: _product(_operand(kernels, norm, given), given)
    weight = Scaled.of(given["weight"])
    bias, added = (None, given["added"]) if norm == "norm_gate" else (given["bias"], None)
    multiply = partial(
        fp8.product,
        weight=weight.values,
        scales=weight.scales.t().contiguous(),
        bias=bias,
        fast=not variant.endswith("+promoted"),
    )
    apart, ready = variant.endswith("+apart"), None
    if not norm and not apart:
        ready = kernels.quantise(given["x"], to="fp8")

    def call() -> Tensor:
        if ready is not None:
            operand = ready
        elif apart:
            operand = kernels.quantise(_operand(kernels, norm, given), to="fp8")
        else:
            operand = _operand(kernels, norm, given, to="fp8")
        out = multiply(operand)
        return out if added is None else out.add_(added)

    return call


def _parts(variant: str) -> tuple[str, str]:
    """Return the variant of the norm, and "fp8" for products in e4m3."""
    name, *how = variant.split("+")
    return name, "fp8" if how else ""


def _operand(kernels: Operators, norm: str, given: dict[str, Tensor], **to: str) -> Any:
    """Return what the product reads."""
    x, weight, bias = given["x"], given["norm_weight"], given["norm_bias"]
    if norm == "norm_gate":
        return kernels.norm_gate(given["u"], x, weight, bias, eps=1e-6, **to)
    return kernels.layer_norm(x, weight, bias, eps=1e-6, **to) if norm else x


def _product(operand: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Multiply as a layer does: with a bias, or added to what was there."""
    if "added" in given:
        return torch.addmm(given["added"], operand, given["weight"].t())
    return F.linear(operand, given["weight"], given["bias"])
