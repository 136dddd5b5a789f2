"""Keys and values into their pages in one pass over both, straight from the views of the layer's projection."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.paged_write.reference import paged_write as reference
from grkernels.pages import LARGEST, LEAST, slotted
from grkernels.triton_common import quantised
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

# rows and columns of a step of a program. The default gives each thread 64 bytes, several loads under way.
DEFAULT = {"rows": 4, "width": 1024, "warps": 4}
CANDIDATES = [
    DEFAULT,
    *(
        {"rows": rows, "width": width, "warps": warps}
        for rows, width, warps in (
            (1, 512, 1),
            (1, 1024, 2),
            (2, 512, 2),
            (2, 1024, 4),
            (4, 512, 4),
            (8, 512, 4),
            (8, 1024, 8),
        )
    ),
]


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


@launched(tensors=["k", "v", "k_pages", "v_pages", "k_scales", "v_scales"], indices=["slots"], numbers=["rows"])
def _quantising_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
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
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Quantise and store ROWS rows of one head."""
    row, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    scale_at = slot * HEADS + head
    dims = tl.arange(0, QK_BLOCK)[None, :]
    wanted = (slot >= 0)[:, None] & (dims < QK)
    x = tl.load(k + row[:, None] * k_stride + head * QK + dims, mask=wanted, other=0.0)
    q, scale = quantised(x, FP8, LARGEST_NUMBER, LEAST_SIZE)
    tl.store(k_pages + slot[:, None] * k_slot_stride + head * k_head_stride + dims, q, mask=wanted)
    tl.store(k_scales + scale_at, scale, mask=slot >= 0)
    dims = tl.arange(0, V_BLOCK)[None, :]
    wanted = (slot >= 0)[:, None] & (dims < V)
    x = tl.load(v + row[:, None] * v_stride + head * V + dims, mask=wanted, other=0.0)
    q, scale = quantised(x, FP8, LARGEST_NUMBER, LEAST_SIZE)
    tl.store(v_pages + slot[:, None] * v_slot_stride + head * v_head_stride + dims, q, mask=wanted)
    tl.store(v_scales + scale_at, scale, mask=slot >= 0)


def tuning_key(width: int) -> str:
    """Return the key of a row's width. The number of rows is large in every use and does not matter."""
    return tuning.key(width=width)


def paged_write(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Compute what reference.py defines. Nothing waits for the device, so a CUDA graph can hold it."""
    n, heads, qk_dim = k.shape
    if not n:
        return
    v_dim, k_slots, v_slots = v.shape[2], slotted(k_pages), slotted(v_pages)
    strides = (k.stride(0), v.stride(0), *k_slots.stride()[:2], *v_slots.stride()[:2])
    if k_scales is not None and v_scales is not None:
        blocks = tuning.bucket(qk_dim), tuning.bucket(v_dim)
        rows = max(2048 // max(blocks), 1)  # 16 numbers of each thread
        kind = k_pages.dtype.is_floating_point, LARGEST[k_pages.dtype], LEAST
        _quantising_kernel(
            (-(-n // rows), heads, 1),
            (k, v, k_slots.view(torch.int8), v_slots.view(torch.int8), k_scales, v_scales, slots),
            strides,
            (n,),
            (heads, qk_dim, v_dim, *blocks, rows, *kind),
            4,
        )
        return
    config = tuning.choose("paged_write", "triton", tuning_key(heads * max(qk_dim, v_dim)), DEFAULT)
    rows = config["rows"]
    constants = heads, qk_dim, v_dim, rows, config["width"]
    _kernel((-(-n // rows), 1, 1), (k, v, k_slots, v_slots, slots), strides, (n,), constants, config["warps"])


VARIANT = KernelVariant("paged_write", "triton", paged_write, reference, triton_common.supports)
