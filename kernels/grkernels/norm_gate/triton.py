"""Norm and gate in one pass: each program holds whole rows of u and a in registers."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.norm_gate.reference import norm_gate as reference
from grkernels.triton_common import rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

MAX_WIDTH = 32768  # a row must fit the registers of one program

CANDIDATES = [
    {"rows": rows, "warps": warps} for rows, warps in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8))
]


@launched(tensors=["u", "a", "weight", "bias", "out"], numbers=["L", "eps"])
def _kernel(
    u: tl.tensor,
    a: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    u_stride: tl.tensor,
    a_stride: tl.tensor,
    L: tl.tensor,
    eps: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUPS: tl.constexpr,
    CONCAT: tl.constexpr,
) -> None:
    """Compute L rows of W values, each of which is a group of a whole row of GROUPS * W."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_W)[None, :]
    mask = (row < L) & (column < W)
    whole, first = row, 0
    if GROUPS > 1:
        whole, first = row // GROUPS, (row % GROUPS) * W
    w = tl.load(weight + first + column, mask=column < W, other=0.0).to(tl.float32)
    b = tl.load(bias + first + column, mask=column < W, other=0.0).to(tl.float32)
    gate = tl.load(u + whole * u_stride + first + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(a + whole * a_stride + first + column, mask=mask, other=0.0)
    place = out + whole * (GROUPS * W) + first + column
    if CONCAT:
        place = out + whole * (3 * GROUPS * W) + first + column
        tl.store(place + GROUPS * W, x, mask=mask)
    x = x.to(tl.float32)
    # The row is in registers, so the exact variance (of differences to the mean) costs no second read.
    centred = tl.where(column < W, x - tl.sum(x, axis=1, keep_dims=True) / W, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / W
    # AOTInductor passes eps in fp64.
    normed = centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * w + b
    gate = gate / (1.0 + tl.exp(-gate))
    if CONCAT:
        tl.store(place, rounded(gate, out.dtype.element_ty), mask=mask)
        place += 2 * GROUPS * W
    tl.store(place, rounded(gate * normed, out.dtype.element_ty), mask=mask)


def tuning_key(width: int) -> str:
    """Return the key of a row's width. The number of rows is large in every use and does not matter."""
    return tuning.key(width=width)


def norm_gate(
    u: Tensor, a: Tensor, weight: Tensor, bias: Tensor, *, eps: float, groups: int = 1, concat: bool = True
) -> Tensor:
    """Compute what reference.py defines."""
    (L, W), a = u.shape, a.flatten(1)
    out = a.new_empty(L, 3 * W if concat else W)
    L, W = L * groups, W // groups
    if L:
        u, a = (x if x.stride(1) == 1 else x.contiguous() for x in (u, a))
        block = tuning.bucket(W)
        # Short rows take one warp, so that their sums need no shared memory.
        default = {"rows": max(1024 // block, 1), "warps": min(max(block // 1024, 1), 16)}
        config = tuning.choose("norm_gate", "triton", tuning_key(W), default)
        rows = config["rows"]
        grid, strides = (-(-L // rows), 1, 1), (u.stride(0), a.stride(0))
        _kernel(grid, (u, a, weight, bias, out), strides, (L, eps), (W, rows, block, groups, concat), config["warps"])
    return out


def supports(*, device: str, dtype: str, width: int, extras: Sequence[str] = ()) -> str | None:
    """Return None if the variant can run this size, else the reason."""
    if width > MAX_WIDTH:
        return f"width {width} is over {MAX_WIDTH}"
    return triton_common.supports(device=device, dtype=dtype)


VARIANT = KernelVariant("norm_gate", "triton", norm_gate, reference, supports)
