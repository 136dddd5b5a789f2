"""The gather of grkernels.parts on a GPU.

Rows are copied in pieces of 16 bytes, of which a warp asks for 512 bytes at a time. Memory of other devices isn't
cached, so two loads of 8 bytes could fetch the same piece twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels.triton_launch import launched

WORDS = 512  # of a program: at least one row
WARPS = 4


@launched(tensors=["addresses", "out"], indices=["rows"], numbers=["L", "length"])
def _kernel(
    addresses: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    L: tl.tensor,
    length: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Copy rows of W words."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_W)[None, :]
    mask = (place < L)[:, None] & (column < W)
    row = tl.load(rows + place, mask=place < L, other=0)
    part = row // length
    begin = tl.load(addresses + part, mask=place < L, other=0).to(tl.pointer_type(tl.int64))
    begin = tl.multiple_of(begin + (row - part * length) * W, 16)
    words = tl.load(begin[:, None] + column, mask=mask, other=0)
    tl.store(out + place[:, None] * W + column, words, mask=mask)


def gather(addresses: Tensor, rows: Tensor, length: int, *, out: Tensor) -> None:
    """Write rows int64 [n] of a table in parts of `length` rows to out [n, E]. addresses: int64, of the parts."""
    if not len(rows):
        return
    words = out.view(torch.int64)
    width = words.shape[1]
    block = triton.next_power_of_2(width)
    count = max(WORDS // block, 1)
    grid = (-(-len(rows) // count), 1, 1)
    _kernel(grid, (addresses, words, rows), (), (len(rows), length), (width, count, block), WARPS)
