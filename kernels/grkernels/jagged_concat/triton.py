"""Concatenation of sequences in one pass: each row of the result finds its sequence by binary search."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.jagged_concat.reference import jagged_concat as reference
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

CANDIDATES = [
    {"rows": rows, "block_w": block_w, "warps": warps}
    for rows, block_w, warps in (
        (1, 512, 1),
        (1, 1024, 2),
        (2, 512, 2),
        (2, 1024, 4),
        (4, 512, 4),
        (4, 1024, 4),
        (8, 256, 4),
        (8, 512, 4),
    )
]


@triton.jit
def sequence_of(
    row: tl.tensor, offsets: tl.tensor, more_offsets: tl.tensor, B: tl.tensor, STEPS: tl.constexpr
) -> tl.tensor:
    """Return the last b < B with offsets[b] + more_offsets[b] <= row. more_offsets may be None. B <= 2 ** STEPS."""
    low = tl.zeros_like(row).to(tl.int32)
    high = low + B
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        begin = tl.load(offsets + middle)
        if more_offsets is not None:
            begin += tl.load(more_offsets + middle)
        low = tl.where(begin <= row, middle, low)
        high = tl.where(begin <= row, high, middle)
    return low


@launched(tensors=["first", "second", "out"], indices=["first_offsets", "second_offsets"], numbers=["rows", "B"])
def _kernel(
    first: tl.tensor,
    second: tl.tensor,
    out: tl.tensor,
    first_offsets: tl.tensor,
    second_offsets: tl.tensor,
    first_stride: tl.tensor,
    second_stride: tl.tensor,
    rows: tl.tensor,
    B: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    b = sequence_of(row, first_offsets, second_offsets, B, STEPS)
    # Row `row` of sequence b comes after all rows of both streams of the sequences before b.
    first_end = tl.load(first_offsets + b + 1)
    second_begin = tl.load(second_offsets + b)
    from_first = row < first_end + second_begin
    real = row < tl.load(first_offsets + B) + tl.load(second_offsets + B)
    at_first = first + ((row - second_begin) * first_stride)[:, None] + column
    at_second = second + ((row - first_end) * second_stride)[:, None] + column
    inside = column < W
    x = tl.load(at_first, mask=(real & from_first)[:, None] & inside, other=0.0)
    y = tl.load(at_second, mask=(real & ~from_first)[:, None] & inside, other=0.0)
    values = tl.where(from_first[:, None], x, y)
    tl.store(out + row[:, None] * W + column, values, mask=(row < rows)[:, None] & inside)


def tuning_key(width: int) -> str:
    """Return the key of a row's width. The number of rows is large in every use and does not matter."""
    return tuning.key(width=width)


def default_config(width: int) -> tuning.Config:
    """Return a few thousand values a program, in whole rows if possible. One warp, since every warp searches."""
    block_w = min(max(tuning.bucket(width), 16), 1024)
    return {"rows": 2048 // block_w, "block_w": block_w, "warps": 1}


def jagged_concat(first: Tensor, second: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, rows: int) -> Tensor:
    """Compute what reference.py defines."""
    batch = first_offsets.shape[0] - 1
    out = first.new_zeros(rows, *first.shape[1:]) if batch == 0 else first.new_empty(rows, *first.shape[1:])
    if batch and out.numel():
        first, second = flat_rows(first), flat_rows(second)
        W = first.shape[1]
        config = tuning.choose("jagged_concat", "triton", tuning_key(W), default_config(W))
        grid = -(-rows // config["rows"]), -(-W // config["block_w"]), 1
        constants = W, config["rows"], config["block_w"], (batch - 1).bit_length()
        tensors, strides = (first, second, out, first_offsets, second_offsets), (first.stride(0), second.stride(0))
        _kernel(grid, tensors, strides, (rows, batch), constants, config["warps"])
    return out


def flat_rows(x: Tensor) -> Tensor:
    """Return [rows, ...] as [rows, W] with the values of a row adjacent. Copies only if necessary."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 else x.contiguous()


def supports(*, device: str, dtype: str, width: int) -> str | None:
    """Return None if Triton runs on this device, else the reason. Any width is accepted."""
    return triton_common.supports(device=device, dtype=dtype)


VARIANT = KernelVariant("jagged_concat", "triton", jagged_concat, reference, supports)
