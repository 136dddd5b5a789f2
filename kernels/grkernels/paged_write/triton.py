"""New keys and values into their pages, in Triton."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from grkernels.triton_launch import launched

# A program's share: with 4 warps 64 bytes a thread, several loads under way each.
ROWS, WIDTH = 4, 1024


@launched(tensors=["k", "v", "k_pages", "v_pages"], indices=["slots"], numbers=["rows"])
def _kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    slots: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    v_head_stride: tl.tensor,
    rows: tl.tensor,
    HEADS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < rows, other=-1)[:, None]
    for begin in tl.static_range(0, HEADS * QK, WIDTH):
        column = begin + tl.arange(0, WIDTH)[None, :]
        wanted = (slot >= 0) & (column < HEADS * QK)
        x = tl.load(k + row[:, None] * k_stride + column, mask=wanted)
        place = column // QK * k_head_stride + column % QK
        tl.store(k_pages + slot * k_slot_stride + place, x, mask=wanted)
    for begin in tl.static_range(0, HEADS * V, WIDTH):
        column = begin + tl.arange(0, WIDTH)[None, :]
        wanted = (slot >= 0) & (column < HEADS * V)
        x = tl.load(v + row[:, None] * v_stride + column, mask=wanted)
        place = column // V * v_head_stride + column % V
        tl.store(v_pages + slot * v_slot_stride + place, x, mask=wanted)


def launch(k: Tensor, v: Tensor, slots: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
    """k [n, H, dqk] and v [n, H, dv], a row's heads adjacent; k_slots [slots, H, dqk] and v_slots [slots, H, dv]."""
    n, heads, qk_dim = k.shape
    if n:
        strides = (k.stride(0), v.stride(0), *k_slots.stride()[:2], *v_slots.stride()[:2])
        constants = heads, qk_dim, v.shape[2], ROWS, WIDTH
        _kernel((-(-n // ROWS), 1, 1), (k, v, k_slots, v_slots, slots), strides, (n,), constants, num_warps=4)
