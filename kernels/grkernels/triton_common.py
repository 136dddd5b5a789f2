"""Common parts of the Triton variants: the interpreter's flag, rounding, the check of the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from grkernels import capabilities, fp8
from grkernels.pages import LARGEST, LEAST
from grkernels.triton_launch import INTERPRETED

INTERPRET = tl.constexpr(INTERPRETED)
E4M3 = (LARGEST[fp8.DTYPE], LEAST)  # constants of `quantised` for fp8


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round fp32 to `dtype`, to nearest even. Triton's interpreter would truncate to bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def quantised(
    x: tl.tensor, FP8: tl.constexpr, LARGEST_NUMBER: tl.constexpr, LEAST_SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return rows [R, D] in 8 bits, as the bytes of int8 or e4m3, and their scales [R]."""
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST_SIZE) / LARGEST_NUMBER
    return eight_bits(x, scale, FP8), scale


@triton.jit
def eight_bits(x: tl.tensor, scale: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    """Return fp32 rows [R, D] over their scales [R] in 8 bits, as the bytes of int8 or e4m3."""
    y = tl.div_rn(x, scale[:, None] + tl.zeros_like(x))
    if FP8:
        if INTERPRET:  # it would truncate
            y = to_e4m3_steps(y)
        return y.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    return ((y + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23: to the nearest whole number, ties to even


@triton.jit
def to_e4m3_steps(y: tl.tensor) -> tl.tensor:
    """Round to the numbers of e4m3, ties to even: adding 1.5 * 2^23 steps leaves whole steps."""
    exponent = tl.maximum((y.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)  # below 2^-6 steps are 2^-9
    magic = ((exponent + 20) << 23 | 0x400000).to(tl.float32, bitcast=True)
    return (y + magic) - magic


def supports(
    *, device: str, dtype: str, stored: str = "", products: str = "", width: int = 0, **dims: Any
) -> str | None:
    """Return None for any sizes on an NVIDIA GPU, or in Triton's interpreter, else the reason.

    stored: int8 or fp8, of 8-bit pages. products: fp8, of operands in e4m3. width: of rows that have no padding.
    """
    if not device.startswith("cuda") and not INTERPRETED:
        return "Triton needs an NVIDIA GPU; TRITON_INTERPRET=1 runs it slowly on a CPU for tests"
    if stored == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "pages in fp8: needs an NVIDIA GPU of compute capability 8.9 or higher (int8 runs on every one)"
    if products and width % fp8.STEP:
        return f"operands in {products}: width {width} is no multiple of {fp8.STEP} (torch pads rows)"
    if products == "fp8" and torch.cuda.is_available() and (why := fp8.refusal()):
        return f"operands in fp8: {why}"
    return capabilities.eager(device=device, dtype=dtype)
