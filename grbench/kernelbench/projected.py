"""The input projection and the attention behind it as one more family of the benchmark: bf16 beside fp8.

It measures them together, because the projection can write the operands of attention in fp8. Its own operand, the rows
behind the norm, is there already. A variant is one of attention, and what else is in fp8:

    cutlass, triton, torch   PyTorch's product in the dtype, and attention in that variant
    fp8                      the projection writes q, k and v in e4m3 (hstu_attention/fp8_projection.py)
    fp8+apart                PyTorch's product in the dtype, and a pass that rounds q, k and v
    ...+product              the projection multiplies rows and weights in e4m3 (grkernels.fp8)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels import fp8, registry
from grkernels.fp8 import STEP, Scaled
from grkernels.hstu_attention import spec
from grkernels.hstu_attention.reference import hstu_attention as attention
from grkernels.rounding import through_pages, with_fp8_products
from grkernels.variant import Cost

FAMILY = "projected_attention"
PRODUCT = "+product"
VARIANTS = (
    *("torch", "triton", "cutlass", "fp8+apart", "fp8"),
    *("torch+product", "cutlass+product", "fp8+apart+product", "fp8+product"),
)


@dataclass(frozen=True)
class Shape:
    """`batch` users of `new + targets` tokens each, whose rows are as wide as all heads together."""

    batch: int
    new: int
    targets: int = 0
    heads: int = 4
    dim: int = 128  # of a head

    @property
    def length(self) -> int:
        return self.new + self.targets

    @property
    def width(self) -> int:
        return self.heads * self.dim


SHAPES = {
    "4x128_b32_s4096": Shape(32, 4096),
    "4x128_b4_s16384": Shape(4, 16384),
    "4x128_b32_1024+2048": Shape(32, 1024, 2048),
    "4x256_b32_s4096": Shape(32, 4096, dim=256),
    "tiny": Shape(2, 150, 20, heads=2, dim=64),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return rows x [L, E], the weight of u, v, q and k [4 E, E] with its bias, and the arguments of attention.

    q, k and v have unit scale, so scores are of order 1.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    B, E = shape.batch, shape.width
    targets = torch.full((B,), shape.targets, device=device, dtype=torch.int64) if shape.targets else None
    return {
        "x": random(B * shape.length, E),
        "weight": random(4 * E, E) * E**-0.5,
        "bias": 0.1 * random(4 * E),
        "heads": shape.heads,
        "q_offsets": torch.arange(B + 1, device=device, dtype=torch.int64) * shape.length,
        "num_targets": targets,
        "max_q_len": shape.length,
        "max_kv_len": shape.length,
        "scaling_seqlen": shape.length,
        "alpha": 1.0 / math.sqrt(shape.dim),
    }


def cost(shape: Shape, dtype: str, variant: str = "") -> Cost:
    """Count the product and the visible pairs, the rows and the weight read once, u and the result written once.

    dtype: fp32, fp16 or bf16. A variant whose product is in fp8 reads e4m3 with scales.
    """
    wide, scale = spec.BYTES[dtype], spec.BYTES["fp32"]
    rows, E = shape.batch * shape.length, shape.width
    line = E + scale if variant.endswith(PRODUCT) else E * wide
    pairs = shape.batch * spec.visible_pairs(shape.length, shape.targets)
    flops = 8 * rows * E * E + spec.flops(pairs, shape.heads, shape.dim, shape.dim)
    return Cost(flops, (rows + 4 * E) * line + 2 * rows * E * wide)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `refusal` other than device and dtype."""
    return {"dim": shape.dim, "width": shape.width}


def refusal(variant: str, *, device: str, dtype: str, dim: int, width: int) -> str | None:
    """Return None if the variant can run here, else the reason."""
    if variant.endswith(PRODUCT):
        if dtype != "bf16":
            return f"dtype={dtype}: products in fp8 give bf16; set dtype=bf16"
        if device == "cuda" and (why := fp8.refusal()):
            return why
    if variant.startswith("fp8") and width % STEP:
        return f"width {width} is no multiple of {STEP}"
    dims = {"qk_dim": dim, "v_dim": dim, "page": 0, "stored": "", "extras": ()}
    return registry.refusal("hstu_attention", variant.partition("+")[0], device=device, dtype=dtype, **dims)


def reference(*, x: Tensor, weight: Tensor, bias: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Compute u and attention in fp32."""
    return _by_parts(attention, F.linear(x.float(), weight.float(), bias.float()), **given)


def yardstick(variant: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the reference with the rounding of a variant's operands; None for one that rounds to its dtype only."""
    kinds = {(True, True): _both, (True, False): _of_attention, (False, True): _of_product}
    return kinds.get((variant.startswith("fp8"), variant.endswith(PRODUCT)))


def _of_product(*, x: Tensor, weight: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return reference(x=through_pages(x.float(), "fp8"), weight=through_pages(weight.float(), "fp8"), **given)


def _of_attention(*, x: Tensor, weight: Tensor, bias: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    made = F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return _by_parts(with_fp8_products(attention), made, **given)


def _both(*, x: Tensor, weight: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return _of_attention(x=through_pages(x.float(), "fp8"), weight=through_pages(weight.float(), "fp8"), **given)


def _by_parts(attend: Callable[..., Tensor], made: Tensor, *, heads: int, **masks: Any) -> tuple[Tensor, Tensor]:
    """Return u and the attention of q, k and v, which are parts of `made` [L, 4 E]."""
    u, v, q, k = (part.unflatten(1, (heads, -1)) for part in made.chunk(4, dim=1))
    return u.flatten(1), attend(q, k, v, kv_offsets=masks["q_offsets"], **masks)


def bind(
    variant: str, *, x: Tensor, weight: Tensor, bias: Tensor, heads: int, **masks: Any
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return the call that is timed. Rows and weight are in e4m3 before, where the product is."""
    chosen = registry.get("hstu_attention", variant.partition("+")[0])
    rows: Tensor | Scaled = x
    scales = None
    if variant.endswith(PRODUCT):
        rows, rounded = Scaled.of(x), Scaled.of(weight)
        weight, scales = rounded.values, rounded.scales.t().contiguous()
    projected, dim = chosen.projected, x.shape[1] // heads
    if projected is not None and "+apart" not in variant:
        sizes = {"heads": heads, "qk_dim": dim, "v_dim": dim}

        def fused() -> tuple[Tensor, Tensor]:
            blocks = projected.blocks_of(masks["q_offsets"], x.shape[0])
            u, operands = projected.project(rows, rows, weight, scales, bias, **sizes, blocks=blocks)
            return u, projected.attend(operands, x.dtype, **masks)

        return fused

    def call() -> tuple[Tensor, Tensor]:
        if isinstance(rows, Scaled) and scales is not None:
            return _by_parts(chosen.fn, fp8.product(rows, weight, scales, bias), heads=heads, **masks)
        return _by_parts(chosen.fn, F.linear(x, weight, bias), heads=heads, **masks)

    return call
