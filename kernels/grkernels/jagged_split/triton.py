"""Split of sequences in one launch: each row of either result finds its sequence by binary search."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grkernels import tuning
from grkernels.jagged_concat.triton import CANDIDATES as CANDIDATES
from grkernels.jagged_concat.triton import default_config, flat_rows, sequence_of, supports, tuning_key
from grkernels.jagged_split.reference import jagged_split as reference
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant


@triton.jit
def _take(
    x: tl.tensor,
    out: tl.tensor,
    own_offsets: tl.tensor,
    other_offsets: tl.tensor,
    block: tl.tensor,
    rows: tl.tensor,
    B: tl.tensor,
    x_stride: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Copy rows of one result: row r of sequence b is row r + other_offsets[b] of x."""
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    b = sequence_of(row, own_offsets, None, B, STEPS)
    source = row + tl.load(other_offsets + b)
    real = row < tl.load(own_offsets + B)
    values = tl.load(x + (source * x_stride)[:, None] + column, mask=real[:, None] & (column < W), other=0.0)
    tl.store(out + row[:, None] * W + column, values, mask=(row < rows)[:, None] & (column < W))


@launched(
    tensors=["x", "first", "second"],
    indices=["first_offsets", "second_offsets"],
    numbers=["first_rows", "second_rows", "B"],
)
def _kernel(
    x: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    first_offsets: tl.tensor,
    second_offsets: tl.tensor,
    x_stride: tl.tensor,
    first_rows: tl.tensor,
    second_rows: tl.tensor,
    B: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    first_blocks = tl.cdiv(first_rows, ROWS)
    if block < first_blocks:
        _take(x, first, first_offsets, second_offsets, block, first_rows, B, x_stride, W, ROWS, BLOCK_W, STEPS)
    else:
        # In x, the first part of sequence b comes before its second part: b + 1 of them in all.
        block -= first_blocks
        _take(x, second, second_offsets, first_offsets + 1, block, second_rows, B, x_stride, W, ROWS, BLOCK_W, STEPS)


def jagged_split(
    x: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, first_rows: int, second_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute what reference.py defines."""
    batch = first_offsets.shape[0] - 1
    make = x.new_zeros if batch == 0 else x.new_empty
    first, second = make(first_rows, *x.shape[1:]), make(second_rows, *x.shape[1:])
    if batch and first.numel() + second.numel():
        x = flat_rows(x)
        W = x.shape[1]
        config = tuning.choose("jagged_split", "triton", tuning_key(W), default_config(W))
        blocks = -(-first_rows // config["rows"]) - (-second_rows // config["rows"])
        grid = blocks, -(-W // config["block_w"]), 1
        constants = W, config["rows"], config["block_w"], (batch - 1).bit_length()
        tensors, numbers = (x, first, second, first_offsets, second_offsets), (first_rows, second_rows, batch)
        _kernel(grid, tensors, (x.stride(0),), numbers, constants, config["warps"])
    return first, second


VARIANT = KernelVariant("jagged_split", "triton", jagged_split, reference, supports)
