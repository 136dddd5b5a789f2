"""Attention of rows of beams and prompts over pages: one launch, whose size follows from shapes alone."""

from __future__ import annotations

import math

import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.beam_attention.reference import beam_attention as reference
from grkernels.pages import slotted
from grkernels.triton_common import INTERPRET, rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

# rows: queries of a tile. keys: of a step.
CANDIDATES = [
    {"rows": rows, "keys": keys, "warps": warps, "stages": stages}
    for rows, keys, warps, stages in (
        (16, 32, 2, 2),
        (16, 64, 4, 2),
        (16, 64, 4, 3),
        (32, 32, 4, 2),
        (32, 64, 4, 2),
        (32, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (128, 64, 8, 2),
    )
]


@launched(
    tensors=["out", "q", "k_slots", "v_slots"],
    indices=["starts", "table", "limits", "own_slots"],
    numbers=["requests", "table_stride", "scale"],
)
def _kernel(
    out: tl.tensor,
    q: tl.tensor,
    k_slots: tl.tensor,
    v_slots: tl.tensor,
    starts: tl.tensor,
    table: tl.tensor,
    limits: tl.tensor,
    own_slots: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    requests: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    TERMS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
) -> None:
    # Tiles of request b begin at starts[b] // ROWS + b, which leaves enough tiles for each. Find this tile's request.
    tile, head = tl.program_id(0), tl.program_id(1)
    request, beyond = 0, requests
    while beyond - request > 1:
        middle = (request + beyond) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            request = middle
        else:
            beyond = middle
    begin, end = tl.load(starts + request), tl.load(starts + request + 1)
    begin += (tile - begin // ROWS - request) * ROWS
    if begin < end:
        rows = begin + tl.arange(0, ROWS)
        inside = rows < end
        rows = rows.to(tl.int64)
        dims = tl.arange(0, DIM_BLOCK)
        there = inside[:, None] & (dims < DIM)[None, :]
        query = tl.load(q + rows[:, None] * q_stride + head * q_head_stride + dims[None, :], mask=there, other=0.0)
        if INTERPRET:  # the interpreter multiplies no bf16
            query = query.to(tl.float32)
        k_slots += head // GROUP * k_head_stride
        v_slots += head // GROUP * v_head_stride
        table += request * table_stride
        limit = tl.load(limits + rows, mask=inside, other=1)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)

        # The request's first tokens. Every row sees at least one.
        last = tl.max(limit)
        for first in range(0, last, KEYS):
            place = first + tl.arange(0, KEYS)
            slot = tl.load(table + place // PAGE, mask=place < last, other=0).to(tl.int64) * PAGE + place % PAGE
            wanted = (place < last)[:, None] & (dims < DIM)[None, :]
            key = tl.load(k_slots + slot[:, None] * k_stride + dims[None, :], mask=wanted, other=0.0)
            value = tl.load(v_slots + slot[:, None] * v_stride + dims[None, :], mask=wanted, other=0.0)
            if INTERPRET:
                key, value = key.to(tl.float32), value.to(tl.float32)
            s = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            s = tl.where(place[None, :] < limit[:, None], s, float("-inf"))
            above = tl.maximum(top, tl.max(s, axis=1))
            weight, kept = tl.exp2(s - above[:, None]), tl.exp2(top - above)
            total = total * kept + tl.sum(weight, axis=1)
            acc = acc * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            top = above

        # The codes of the row's beam. Rows of prompts have none.
        for j in tl.static_range(TERMS):
            own = tl.load(own_slots + rows * TERMS + j, mask=inside, other=-1)
            if tl.max(own) >= 0:
                used = tl.maximum(own, 0)[:, None]  # slot 0 holds finite numbers, which get no weight
                own_key = tl.load(k_slots + used * k_stride + dims[None, :], mask=there, other=0.0)
                own_value = tl.load(v_slots + used * v_stride + dims[None, :], mask=there, other=0.0)
                t = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), axis=1) * scale
                t = tl.where(own >= 0, t, float("-inf"))
                higher = tl.maximum(top, t)
                share, left = tl.exp2(t - higher), tl.exp2(top - higher)
                total = total * left + share
                acc = acc * left[:, None] + share[:, None] * own_value.to(tl.float32)
                top = higher

        made = rounded(acc / total[:, None], out.dtype.element_ty)
        tl.store(out + rows[:, None] * out_stride + head * out_head_stride + dims[None, :], made, mask=there)


def tuning_key(dim: int, page: int, itemsize: int) -> str:
    """Return the key of the sizes of a key and a page. The number of rows varies within one workload."""
    return tuning.key(dim=dim, page=page, itemsize=itemsize)


def default_config(dim_block: int, itemsize: int) -> tuning.Config:
    """Tiles of keys of 16 KiB: two stages of keys and values fit beside the queries, and the sums in registers."""
    tile = max(16, min(64, 16384 // (dim_block * itemsize)))
    return {"rows": tile, "keys": tile, "warps": 4, "stages": 2}


def beam_attention(
    out: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    starts: Tensor,
    block_table: Tensor,
    limits: Tensor,
    own_slots: Tensor,
    scale: float,
) -> None:
    """Compute what reference.py defines. A CUDA graph can capture it."""
    n, heads, dim = len(limits), q.shape[1], q.shape[2]
    if not n:
        return
    k_slots, v_slots, page = slotted(k_pages), slotted(v_pages), k_pages.shape[1]
    dim_block, itemsize = max(16, tuning.bucket(dim)), q.element_size()
    key, default = tuning_key(dim, page, itemsize), default_config(dim_block, itemsize)
    config = tuning.choose("beam_attention", "triton", key, default)
    rows, keys, requests = config["rows"], config["keys"], len(starts) - 1
    _kernel(
        (n // rows + requests, heads, 1),
        (out, q, k_slots, v_slots, starts, block_table, limits, own_slots),
        out.stride()[:2] + q.stride()[:2] + k_slots.stride()[:2] + v_slots.stride()[:2],
        (requests, block_table.stride(0), scale * math.log2(math.e)),
        (own_slots.shape[1], heads // k_slots.shape[1], dim, page, rows, keys, dim_block),
        config["warps"],
        config["stages"],
    )


VARIANT = KernelVariant("beam_attention", "triton", beam_attention, reference, triton_common.supports)
