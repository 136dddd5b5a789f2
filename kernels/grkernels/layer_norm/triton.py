"""LayerNorm in one pass: each program holds whole rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.fp8 import Scaled
from grkernels.layer_norm.reference import layer_norm as reference
from grkernels.triton_common import E4M3, quantised, rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

MAX_WIDTH = 65536  # a row must fit the registers of one program

CANDIDATES = [
    {"rows": rows, "warps": warps} for rows, warps in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
]


@launched(tensors=["x", "weight", "bias", "out"], numbers=["L", "eps"])
def _kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    L: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = (row < L) & (column < E)
    y = _normed(x + row * x_stride, weight, bias, eps, column, mask, E)
    tl.store(out + row * E + column, rounded(y, out.dtype.element_ty), mask=mask)


@launched(tensors=["x", "weight", "bias", "out", "scales"], numbers=["L", "eps"])
def _quantising_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    x_stride: tl.tensor,
    L: tl.tensor,
    eps: tl.tensor,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Write the bytes of e4m3. The row is in registers, so its scale costs no second pass."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], tl.arange(0, BLOCK_E)[None, :]
    mask = (row < L) & (column < E)
    y = _normed(x + row * x_stride, weight, bias, eps, column, mask, E)
    numbers, scale = quantised(y, True, LARGEST_NUMBER, LEAST_SIZE)
    tl.store(out + row * E + column, numbers, mask=mask)
    tl.store(scales + rows, scale, mask=rows < L)


@triton.jit
def _normed(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    E: tl.constexpr,
) -> tl.tensor:
    """Return LayerNorm of rows that begin at x, in fp32, with zeros behind them."""
    w = tl.load(weight + column, mask=column < E, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < E, other=0.0).to(tl.float32)
    values = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(column < E, values - tl.sum(values, axis=1, keep_dims=True) / E, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / E
    # AOTInductor passes eps in fp64.
    return centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * w + b


def tuning_key(width: int) -> str:
    """Return the key of a row's width. The number of rows is large in every use and does not matter."""
    return tuning.key(width=width)


def default_config(block: int) -> dict[str, int]:
    """Return a launch configuration for rows in blocks of this width.

    Short rows take one warp, so that their sums need no shared memory.
    """
    return {"rows": max(1024 // block, 1), "warps": min(max(block // 1024, 1), 16)}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, to: str = "") -> Tensor | Scaled:
    """Compute what reference.py defines."""
    L, E = x.shape
    out = Scaled.empty(L, E, x.device) if to else x.new_empty(L, E)
    if L:
        x = x if x.stride(1) == 1 else x.contiguous()
        block = tuning.bucket(E)
        config = tuning.choose("layer_norm", "triton", tuning_key(E), default_config(block))
        rows = config["rows"]
        grid = -(-L // rows), 1, 1
        numbers, constants = (L, eps), (E, rows, block)
        if isinstance(out, Scaled):
            tensors = x, weight, bias, out.values.view(torch.int8), out.scales
            _quantising_kernel(grid, tensors, (x.stride(0),), numbers, (*constants, *E4M3), config["warps"])
        else:
            _kernel(grid, (x, weight, bias, out), (x.stride(0),), numbers, constants, config["warps"])
    return out


def supports(*, device: str, dtype: str, width: int, products: str = "") -> str | None:
    """Return None if the variant can run this size, else the reason."""
    if width > MAX_WIDTH:
        return f"width {width} is over {MAX_WIDTH}"
    return triton_common.supports(device=device, dtype=dtype, products=products, width=width)


VARIANT = KernelVariant("layer_norm", "triton", layer_norm, reference, supports)
