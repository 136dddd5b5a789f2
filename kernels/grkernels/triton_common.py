"""Common parts of the Triton variants: the interpreter's flag, rounding, the check of the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from grkernels import capabilities
from grkernels.triton_launch import INTERPRETED

INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round fp32 to `dtype`, to nearest even. Triton's interpreter would truncate to bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


def supports(*, device: str, dtype: str, stored: str = "", **dims: Any) -> str | None:
    """Return None for any sizes on an NVIDIA GPU, or in Triton's interpreter, else the reason.

    stored: int8 or fp8, of 8-bit pages.
    """
    if not device.startswith("cuda") and not INTERPRETED:
        return "Triton needs an NVIDIA GPU; TRITON_INTERPRET=1 runs it slowly on a CPU for tests"
    if stored == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "pages in fp8: needs an NVIDIA GPU of compute capability 8.9 or higher (int8 runs on every one)"
    return capabilities.eager(device=device, dtype=dtype)
