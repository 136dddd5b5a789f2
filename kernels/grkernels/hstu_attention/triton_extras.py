"""HSTU attention in Triton with the options of other HSTU models (extras.py): every tile of keys is masked.

The kernel of triton.py is the fast one, and has none of these options.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from grkernels import tuning
from grkernels.hstu_attention.eight_bits import dequantised, kind_of
from grkernels.hstu_attention.extras import LOG_STEP, Extras
from grkernels.triton_common import INTERPRET, rounded
from grkernels.triton_launch import launched

INVERSE_STEP = tl.constexpr(1.0 / LOG_STEP)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    num_targets: Tensor | None,
    max_q_len: int,
    scaling_seqlen: int,
    alpha: float,
    contextual_seq_len: int,
    max_attn_len: int,
    k_pages: Tensor | None,
    v_pages: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    page_table: Tensor | None,
    paged_lengths: Tensor | None,
    extras: Extras,
) -> Tensor:
    """Compute what reference.py specifies for `extras`. There is at least one query."""
    heads, batch, qk_dim, v_dim = q.shape[1], q_offsets.shape[0] - 1, q.shape[2], v.shape[2]
    out = v.new_empty(q.shape[0], heads, v_dim)
    page, table_stride = 0, 0
    page_strides: tuple[int, ...] = (0,) * 6
    if k_pages is None or v_pages is None or page_table is None or paged_lengths is None:
        k_pages, v_pages, page_table, paged_lengths = k, v, q_offsets, q_offsets  # never read
    else:
        page, table_stride = k_pages.shape[1], page_table.stride(0)
        page_strides = k_pages.stride()[:3] + v_pages.stride()[:3]
    kind = 0
    if k_scales is None or v_scales is None:
        k_scales, v_scales = k, v  # never read
    else:
        kind, k_pages, v_pages = kind_of(k_pages), k_pages.view(torch.int8), v_pages.view(torch.int8)
    targets = q_offsets if num_targets is None else num_targets
    contextuals = q_offsets if extras.num_contextuals is None else extras.num_contextuals
    position_bias, time_bias = (q if table is None else table for table in (extras.position_bias, extras.time_bias))
    row_times, column_times = (q_offsets if t is None else t for t in (extras.row_times, extras.column_times))
    sizes = [0 if table is None else table.shape[0] for table in (extras.position_bias, extras.time_bias)]
    m = 16 if max_q_len <= 16 else 64 if q.dtype != torch.float32 else 32
    blocks = tuning.bucket(max(qk_dim, 16)), tuning.bucket(max(v_dim, 16)), m, 32
    masks = num_targets is not None, extras.num_contextuals is not None
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *page_strides
    tensors = q, k, v, out, k_pages, v_pages, k_scales, v_scales, position_bias, time_bias
    offsets = q_offsets, kv_offsets, targets, contextuals
    indices = *offsets, page_table, paged_lengths, row_times, column_times
    attention_kernel(
        (-(-max_q_len // m), heads, batch + 1),
        (*tensors, *indices),
        (*strides, heads, contextual_seq_len, max_attn_len, extras.min_full_attn_seq_len, *sizes),
        (table_stride, q.shape[0], alpha, 1.0 / scaling_seqlen),
        (*masks, extras.target_group_size, page, kind, sizes[0] > 0, sizes[1] > 0, qk_dim, v_dim, *blocks),
        4,
    )
    return out


@launched(
    tensors=["q", "k", "v", "out", "k_pages", "v_pages", "k_scales", "v_scales", "position_bias", "time_bias"],
    indices=[
        "q_offsets",
        "kv_offsets",
        "num_targets",
        "num_contextuals",
        "page_table",
        "paged_lengths",
        "row_times",
        "column_times",
    ],
    numbers=["table_stride", "total_rows", "alpha", "scale"],
)
def attention_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    position_bias: tl.tensor,
    time_bias: tl.tensor,
    q_offsets: tl.tensor,
    kv_offsets: tl.tensor,
    num_targets: tl.tensor,
    num_contextuals: tl.tensor,
    page_table: tl.tensor,
    paged_lengths: tl.tensor,
    row_times: tl.tensor,
    column_times: tl.tensor,
    q_stride: tl.int64,
    q_head_stride: tl.int64,
    k_stride: tl.int64,
    k_head_stride: tl.int64,
    v_stride: tl.int64,
    v_head_stride: tl.int64,
    k_page_stride: tl.int64,
    k_slot_stride: tl.int64,
    k_pages_head_stride: tl.int64,
    v_page_stride: tl.int64,
    v_slot_stride: tl.int64,
    v_pages_head_stride: tl.int64,
    heads: tl.tensor,
    contextual: tl.tensor,
    window: tl.tensor,
    full: tl.tensor,
    biases: tl.tensor,
    buckets: tl.tensor,
    table_stride: tl.int64,
    total_rows: tl.tensor,
    alpha: tl.tensor,
    scale: tl.tensor,
    TARGETS: tl.constexpr,
    CONTEXTUALS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    STORED: tl.constexpr,
    POSITION_BIAS: tl.constexpr,
    TIME_BIAS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Compute one tile of M query rows of one head of one sequence.

    The last program along the sequences writes zeros into the rows after them.
    """
    alpha, scale = tl.cast(alpha, tl.float32), tl.cast(scale, tl.float32)
    sequence, head = tl.program_id(2), tl.program_id(1)
    q_begin = tl.load(q_offsets + sequence)
    qk_dims, v_dims = tl.arange(0, QK_BLOCK)[None, :], tl.arange(0, V_BLOCK)[None, :]
    if sequence == tl.num_programs(2) - 1:
        for first in range(q_begin + tl.program_id(0) * M, total_rows, tl.num_programs(0) * M):
            past = first + tl.arange(0, M)[:, None]
            zeros = tl.zeros([M, V_BLOCK], out.dtype.element_ty)
            tl.store(out + (past * heads + head) * V + v_dims, zeros, mask=(past < total_rows) & (v_dims < V))
        return
    queries = (tl.load(q_offsets + sequence + 1) - q_begin).to(tl.int32)
    skipped = tl.program_id(0) * M
    if skipped >= queries:
        return
    kv_begin = tl.load(kv_offsets + sequence)
    n = (tl.load(kv_offsets + sequence + 1) - kv_begin).to(tl.int32)
    paged = 0
    if PAGE:
        paged = tl.load(paged_lengths + sequence).to(tl.int32)
        n += paged
    targets = 0
    if TARGETS:
        targets = tl.load(num_targets + sequence).to(tl.int32)
    if CONTEXTUALS:
        contextual = tl.load(num_contextuals + sequence).to(tl.int32)
    shift = tl.maximum(contextual - 1, 0)
    m = n - targets - shift  # the candidates' position
    row = n - queries + skipped
    end = tl.minimum(row + M, n)
    rows = row + tl.arange(0, M)[:, None]
    row_place = tl.minimum(tl.maximum(rows - shift, 0), m)

    stream = q_begin + skipped + tl.arange(0, M)[:, None]
    inside = rows < end
    q_tile = tl.load(q + stream * q_stride + head * q_head_stride + qk_dims, mask=inside & (qk_dims < QK), other=0.0)
    if INTERPRET:
        q_tile = q_tile.to(tl.float32)
    if TIME_BIAS:
        own_times = tl.load(row_times + stream, mask=inside, other=0)
    k += kv_begin * k_stride + head * k_head_stride
    v += kv_begin * v_stride + head * v_head_stride
    stop = end
    if row < contextual:  # they see the whole history
        stop = tl.maximum(end, n - targets)
    acc = tl.zeros([M, V_BLOCK], tl.float32)
    for i in range(tl.cdiv(stop, N)):
        columns = i * N + tl.arange(0, N)[:, None]
        k_rows = k + (columns - paged) * k_stride
        v_rows = v + (columns - paged) * v_stride
        if PAGE:
            cached = columns < paged
            slots = page_table + sequence * table_stride + columns // PAGE
            number = tl.load(slots, mask=cached, other=0).to(tl.int64)
            slot = columns % PAGE
            k_cached = k_pages + number * k_page_stride + slot * k_slot_stride + head * k_pages_head_stride
            v_cached = v_pages + number * v_page_stride + slot * v_slot_stride + head * v_pages_head_stride
            if not STORED:
                k_rows, v_rows = tl.where(cached, k_cached, k_rows), tl.where(cached, v_cached, v_rows)
        here = columns < n
        if STORED:
            here &= columns >= paged
        k_tile = tl.load(k_rows + qk_dims, mask=here & (qk_dims < QK), other=0.0)
        v_tile = tl.load(v_rows + v_dims, mask=here & (v_dims < V), other=0.0)
        if INTERPRET:
            k_tile, v_tile = k_tile.to(tl.float32), v_tile.to(tl.float32)
        if STORED:
            at = (number * PAGE + slot) * heads + head
            k_stored = dequantised(k_cached, k_scales + at, cached, qk_dims, QK, STORED, k.dtype.element_ty)
            v_stored = dequantised(v_cached, v_scales + at, cached, v_dims, V, STORED, v.dtype.element_ty)
            k_tile, v_tile = tl.where(cached, k_stored, k_tile), tl.where(cached, v_stored, v_tile)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * alpha

        j = i * N + tl.arange(0, N)[None, :]
        place = tl.minimum(tl.maximum(j - shift, 0), m)
        distance = row_place - place
        seen = (j == rows) | (distance > 0)
        if GROUP > 1:
            h = n - targets
            seen |= (j >= h) & (rows >= j) & ((rows - h) // GROUP == (j - h) // GROUP)
        if window > 0:
            seen &= (distance <= window) | ((full > 0) & (row_place >= m - full))
        seen |= (rows < contextual) & (row_place == 0) & (place < m)
        seen &= j < n
        if POSITION_BIAS:
            nearest = tl.minimum(tl.maximum(distance, 0), biases - 1)
            s += tl.load(position_bias + nearest).to(tl.float32)
        if TIME_BIAS:
            times = tl.load(column_times + kv_begin + j, mask=j < n, other=0)
            gap = tl.maximum(tl.abs(own_times - times), 1).to(tl.float64)
            bucket = tl.minimum((tl.log(gap) * INVERSE_STEP).to(tl.int32), buckets - 1)
            s += tl.load(time_bias + bucket).to(tl.float32)
        s = tl.where(seen, s / (1.0 + tl.exp(-s)), 0.0)
        acc = tl.dot(s.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    tl.store(
        out + (stream * heads + head) * V + v_dims,
        rounded(acc * scale, out.dtype.element_ty),
        mask=inside & (v_dims < V),
    )
