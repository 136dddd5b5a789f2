"""Keys and values into their pages in one pass over both, straight from the views of the layer's projection."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.paged_write.reference import paged_write as reference
from grkernels.pages import slotted
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


def tuning_key(width: int) -> str:
    """Return the key of a row's width. The number of rows is large in every use and does not matter."""
    return tuning.key(width=width)


def paged_write(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Compute what reference.py defines. Nothing waits for the device, so a CUDA graph can hold it."""
    n, heads, qk_dim = k.shape
    if n:
        v_dim, k_slots, v_slots = v.shape[2], slotted(k_pages), slotted(v_pages)
        config = tuning.choose("paged_write", "triton", tuning_key(heads * max(qk_dim, v_dim)), DEFAULT)
        rows = config["rows"]
        strides = (k.stride(0), v.stride(0), *k_slots.stride()[:2], *v_slots.stride()[:2])
        constants = heads, qk_dim, v_dim, rows, config["width"]
        _kernel((-(-n // rows), 1, 1), (k, v, k_slots, v_slots, slots), strides, (n,), constants, config["warps"])


VARIANT = KernelVariant("paged_write", "triton", paged_write, reference, triton_common.supports)
