"""The kernel of paged_write.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# A program's share: with 4 warps 64 bytes a thread, several loads under way each.
ROWS, WIDTH = 4, 1024


@triton.jit
def _kernel(
    k: tl.tensor,
    v: tl.tensor,
    slots: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    rows: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    K_WIDTH: tl.constexpr,
    V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < rows, other=-1)[:, None]
    for begin in tl.static_range(0, K_WIDTH, WIDTH):
        column = begin + tl.arange(0, WIDTH)[None, :]
        wanted = (slot >= 0) & (column < K_WIDTH)
        x = tl.load(k + row[:, None] * k_stride + column, mask=wanted)
        tl.store(k_pages + slot * K_WIDTH + column, x, mask=wanted)
    for begin in tl.static_range(0, V_WIDTH, WIDTH):
        column = begin + tl.arange(0, WIDTH)[None, :]
        wanted = (slot >= 0) & (column < V_WIDTH)
        x = tl.load(v + row[:, None] * v_stride + column, mask=wanted)
        tl.store(v_pages + slot * V_WIDTH + column, x, mask=wanted)


def launch(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    """k [n, wk] and v [n, wv], rows contiguous; k_slots [slots, wk] and v_slots [slots, wv], contiguous."""
    n = k.shape[0]
    if n:
        grid = (triton.cdiv(n, ROWS),)
        widths = (k.shape[1], v.shape[1])
        _kernel[grid](k, v, slots, k_slots, v_slots, n, k.stride(0), v.stride(0), *widths, ROWS, WIDTH, num_warps=4)
