"""HSTU attention in Triton: one program for each tile of query rows, two loops over tiles of keys.

The first loop takes the tiles that need the mask: the candidates' diagonal and the ends of the history. The second
takes those that every row sees whole. Tiles that no row sees are in neither. SiLU(s) = t tanh(t) + t with t = s / 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.hstu_attention import triton_extras
from grkernels.hstu_attention.eight_bits import dequantised, kind_of
from grkernels.hstu_attention.extras import NONE, Extras
from grkernels.hstu_attention.keys import tuning_key
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.triton_common import INTERPRET, rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

CANDIDATES = [
    {"m": m, "n": n, "warps": warps, "stages": stages}
    for m, n, warps, stages in (
        (16, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (128, 32, 8, 3),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    )
]


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    num_targets: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    scaling_seqlen: int,
    alpha: float,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    page_table: Tensor | None = None,
    paged_lengths: Tensor | None = None,
    extras: Extras = NONE,
) -> Tensor:
    """Compute what reference.py specifies, in fp32, fp16 or bf16 with fp32 scores and sums.

    The call can be captured in a CUDA graph.
    """
    heads, batch, qk_dim, v_dim = q.shape[1], q_offsets.shape[0] - 1, q.shape[2], v.shape[2]
    if 0 in (q.shape[0], batch, max_q_len):
        return v.new_zeros(q.shape[0], heads, v_dim)
    if extras is not NONE:
        return triton_extras.hstu_attention(
            q,
            k,
            v,
            q_offsets=q_offsets,
            kv_offsets=kv_offsets,
            num_targets=num_targets,
            max_q_len=max_q_len,
            scaling_seqlen=scaling_seqlen,
            alpha=alpha,
            contextual_seq_len=contextual_seq_len,
            max_attn_len=max_attn_len,
            k_pages=k_pages,
            v_pages=v_pages,
            k_scales=k_scales,
            v_scales=v_scales,
            page_table=page_table,
            paged_lengths=paged_lengths,
            extras=extras,
        )
    out = v.new_empty(q.shape[0], heads, v_dim)
    key = tuning_key(
        q=q,
        v=v,
        q_offsets=q_offsets,
        num_targets=num_targets,
        max_q_len=max_q_len,
        max_kv_len=max_kv_len,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len,
        k_pages=k_pages,
    )
    default = default_config(max(qk_dim, v_dim), tuning.example(max_q_len), q.dtype)
    config = tuning.choose("hstu_attention", "triton", key, default)
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
    masks = num_targets is not None, contextual_seq_len > 0, max_attn_len > 0
    blocks = tuning.bucket(max(qk_dim, 16)), tuning.bucket(max(v_dim, 16)), config["m"], config["n"]
    streams = q, k, v, out
    attention_kernel(
        (-(-max_q_len // config["m"]), heads, batch + 1),
        (*streams, k_pages, v_pages, k_scales, v_scales, q_offsets, kv_offsets, targets, page_table, paged_lengths),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *page_strides, heads, contextual_seq_len, max_attn_len),
        (table_stride, q.shape[0], alpha / 2, 1.0 / scaling_seqlen),
        (*masks, page, kind, qk_dim, v_dim, *blocks),
        config["warps"],
        config["stages"],
    )
    return out


@launched(
    tensors=["q", "k", "v", "out", "k_pages", "v_pages", "k_scales", "v_scales"],
    indices=["q_offsets", "kv_offsets", "num_targets", "page_table", "paged_lengths"],
    numbers=["table_stride", "total_rows", "half_alpha", "scale"],
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
    q_offsets: tl.tensor,
    kv_offsets: tl.tensor,
    num_targets: tl.tensor,
    page_table: tl.tensor,
    paged_lengths: tl.tensor,
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
    table_stride: tl.int64,
    total_rows: tl.tensor,
    half_alpha: tl.tensor,
    scale: tl.tensor,
    TARGETS: tl.constexpr,
    CONTEXTUAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    STORED: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Compute one tile of M query rows of one head of one sequence, the longest tiles first.

    The last program along the sequences writes zeros into the rows after them.
    """
    half_alpha, scale = tl.cast(half_alpha, tl.float32), tl.cast(scale, tl.float32)  # AOTInductor passes them in fp64
    sequence, head = tl.program_id(2), tl.program_id(1)
    q_begin = tl.load(q_offsets + sequence)
    if sequence == tl.num_programs(2) - 1:
        dims = tl.arange(0, V_BLOCK)[None, :]
        for first in range(q_begin + tl.program_id(0) * M, total_rows, tl.num_programs(0) * M):
            past = first + tl.arange(0, M)[:, None]
            zeros = tl.zeros([M, V_BLOCK], out.dtype.element_ty)
            tl.store(out + (past * heads + head) * V + dims, zeros, mask=(past < total_rows) & (dims < V))
        return
    queries = (tl.load(q_offsets + sequence + 1) - q_begin).to(tl.int32)
    skipped = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    if skipped >= queries:
        return
    kv_begin = tl.load(kv_offsets + sequence)
    n = (tl.load(kv_offsets + sequence + 1) - kv_begin).to(tl.int32)
    paged = 0
    if PAGE:
        paged = tl.load(paged_lengths + sequence).to(tl.int32)
        n += paged
    h = n  # the first candidate
    if TARGETS:
        h -= tl.load(num_targets + sequence).to(tl.int32)
    row = n - queries + skipped
    end = tl.minimum(row + M, n)

    # Each row sees itself and the columns low <= j < high: reference.py's mask in closed form.
    rows = row + tl.arange(0, M)
    low = tl.zeros([M], tl.int32)
    high = rows + 1
    shift = 0
    if CONTEXTUAL:
        shift = contextual - 1
    m = h - shift  # the candidates' position
    history = h if m > 0 else 0
    if TARGETS:
        high = tl.where(rows >= h, history, high)
    if CONTEXTUAL:
        high = tl.where(rows < contextual, history, high)
    if WINDOW:
        last = tl.minimum(rows, h)
        low = tl.where((rows >= contextual) & (last - shift > window), last - window, 0)

    # Tiles of columns: begin..stop are seen by some row, whole_begin..whole_stop by every row.
    begin, whole_begin = 0, 0
    stop = tl.cdiv(tl.minimum(end, h), N)
    whole_stop = tl.minimum(row + 1, history) // N
    if CONTEXTUAL:  # noqa: SIM102, known when compiling
        if (row < contextual) & (m > 0):
            stop = tl.cdiv(h, N)
    if WINDOW:
        first, last = tl.minimum(row, h), tl.minimum(end - 1, h)
        if (row >= contextual) & (first - shift > window):
            begin = (first - window) // N
        if (end - 1 >= contextual) & (last - shift > window):
            whole_begin = tl.minimum(tl.cdiv(last - window, N), stop)
    whole_stop = tl.maximum(tl.minimum(whole_stop, stop), whole_begin)
    # The candidates see themselves: the part of the diagonal that the history's last tile does not reach.
    diagonal = tl.maximum(row, stop * N)
    diagonals = 0
    if TARGETS:  # noqa: SIM102
        if end > h:
            diagonals = tl.cdiv(tl.maximum(end - diagonal, 0), N)

    qk_dims, v_dims = tl.arange(0, QK_BLOCK), tl.arange(0, V_BLOCK)
    stream = q_begin + skipped + tl.arange(0, M)
    inside = rows < end
    q_tile = tl.load(
        q + stream[:, None] * q_stride + head * q_head_stride + qk_dims[None, :],
        mask=inside[:, None] & (qk_dims < QK)[None, :],
        other=0.0,
    )
    if INTERPRET:
        q_tile = q_tile.to(tl.float32)
    k += kv_begin * k_stride + head * k_head_stride
    v += kv_begin * v_stride + head * v_head_stride
    if PAGE:
        k_pages += head * k_pages_head_stride
        v_pages += head * v_pages_head_stride
        page_table += sequence * table_stride
    if STORED:
        k_scales += head
        v_scales += head
    acc = tl.zeros([M, V_BLOCK], tl.float32)
    tails = stop - whole_stop
    for i in range(diagonals + tails + whole_begin - begin):
        column = (begin + i - diagonals - tails) * N
        if i < diagonals + tails:
            column = (whole_stop + i - diagonals) * N
        if i < diagonals:
            column = diagonal + i * N
        columns = column + tl.arange(0, N)
        k_tile, v_tile = _load(
            k, v, k_pages, v_pages, k_scales, v_scales, page_table, columns, n, paged, k_stride, v_stride,
            k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, heads, True, False, PAGE, STORED, QK, V,
            QK_BLOCK, V_BLOCK,
        )  # fmt: skip
        s = _silu(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * half_alpha)
        j = columns[None, :]
        s = tl.where(((low[:, None] <= j) & (j < high[:, None])) | (j == rows[:, None]), s, 0.0)
        acc = tl.dot(s.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    rest_begin = whole_begin
    if STORED:  # tiles that are wholly in pages have no other keys to load
        rest_begin = tl.minimum(tl.maximum(paged // N, whole_begin), whole_stop)
        for i in range(whole_begin, rest_begin):
            columns = i * N + tl.arange(0, N)
            k_tile, v_tile = _load(
                k, v, k_pages, v_pages, k_scales, v_scales, page_table, columns, n, paged, k_stride, v_stride,
                k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, heads, False, True, PAGE, STORED, QK, V,
                QK_BLOCK, V_BLOCK,
            )  # fmt: skip
            s = _silu(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * half_alpha)
            acc = tl.dot(s.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    for i in range(rest_begin, whole_stop):
        columns = i * N + tl.arange(0, N)
        k_tile, v_tile = _load(
            k, v, k_pages, v_pages, k_scales, v_scales, page_table, columns, n, paged, k_stride, v_stride,
            k_page_stride, k_slot_stride, v_page_stride, v_slot_stride, heads, False, False, PAGE, STORED, QK, V,
            QK_BLOCK, V_BLOCK,
        )  # fmt: skip
        s = _silu(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * half_alpha)
        acc = tl.dot(s.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    tl.store(
        out + (stream[:, None] * heads + head) * V + v_dims[None, :],
        rounded(acc * scale, out.dtype.element_ty),
        mask=inside[:, None] & (v_dims < V)[None, :],
    )


@triton.jit
def _load(
    k: tl.tensor,
    v: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    page_table: tl.tensor,
    columns: tl.tensor,
    n: tl.tensor,
    paged: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    k_page_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_page_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    heads: tl.tensor,
    MASKED: tl.constexpr,
    IN_PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    STORED: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return K [N, QK_BLOCK] and V [N, V_BLOCK] of some columns. Pages hold the first `paged` of n keys.

    STORED: pages are in 8 bits, and loaded apart from the stream. IN_PAGES: all columns are in them.
    """
    qk_dims, v_dims = tl.arange(0, QK_BLOCK), tl.arange(0, V_BLOCK)
    inside = columns < n
    if PAGE:
        cached = columns < paged
        page = tl.load(page_table + columns // PAGE, mask=cached, other=0).to(tl.int64)
        slot = columns % PAGE
        k_cached = k_pages + page * k_page_stride + slot * k_slot_stride
        v_cached = v_pages + page * v_page_stride + slot * v_slot_stride
        if STORED:
            here, at = cached[:, None], ((page * PAGE + slot) * heads)[:, None]
            k_stored = dequantised(
                k_cached[:, None], k_scales + at, here, qk_dims[None, :], QK, STORED, k.dtype.element_ty
            )
            v_stored = dequantised(
                v_cached[:, None], v_scales + at, here, v_dims[None, :], V, STORED, v.dtype.element_ty
            )
            inside &= columns >= paged
    if IN_PAGES:
        k_tile, v_tile = k_stored, v_stored
    else:
        k_rows = k + (columns - paged) * k_stride
        v_rows = v + (columns - paged) * v_stride
        if PAGE and not STORED:
            k_rows, v_rows = tl.where(cached, k_cached, k_rows), tl.where(cached, v_cached, v_rows)
        k_at, v_at = k_rows[:, None] + qk_dims[None, :], v_rows[:, None] + v_dims[None, :]
        if MASKED or STORED:
            k_tile = tl.load(k_at, mask=inside[:, None] & (qk_dims < QK)[None, :], other=0.0)
            v_tile = tl.load(v_at, mask=inside[:, None] & (v_dims < V)[None, :], other=0.0)
        else:
            k_tile = tl.load(k_at, mask=(qk_dims < QK)[None, :], other=0.0) if QK != QK_BLOCK else tl.load(k_at)
            v_tile = tl.load(v_at, mask=(v_dims < V)[None, :], other=0.0) if V != V_BLOCK else tl.load(v_at)
        if INTERPRET:
            k_tile, v_tile = k_tile.to(tl.float32), v_tile.to(tl.float32)
        if STORED:
            k_tile, v_tile = tl.where(here, k_stored, k_tile), tl.where(here, v_stored, v_tile)
    return k_tile, v_tile


@triton.jit
def _silu(t: tl.tensor) -> tl.tensor:
    """Return SiLU(2 t) = t tanh(t) + t, with the GPU's own tanh (relative error 2^-11)."""
    if INTERPRET:
        return t * (1.0 - 2.0 / (tl.exp(2.0 * t) + 1.0)) + t
    tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [t], tl.float32, is_pure=True, pack=1)
    return t * tanh + t


def supports(
    *,
    device: str,
    dtype: str,
    qk_dim: int,
    v_dim: int,
    page: int = 0,
    stored: str = "",
    extras: Sequence[str] = (),
) -> str | None:
    """Return None for a GPU (or the interpreter) and head sizes up to 256, else the reason."""
    if max(qk_dim, v_dim) > 256:
        return f"head sizes {qk_dim} and {v_dim}: at most 256 (any size: torch)"
    return triton_common.supports(device=device, dtype=dtype, stored=stored)


def default_config(widest: int, max_q_len: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the tiles for sizes that are not in the table."""
    if max_q_len <= 16:
        return {"m": 16, "n": 64, "warps": 4, "stages": 3}
    if dtype == torch.float32:
        return {"m": 32, "n": 32, "warps": 4, "stages": 2}
    n = 128 if widest <= 64 else 64
    return {"m": 128, "n": n, "warps": 8, "stages": 3 if widest <= 128 else 2}


VARIANT = KernelVariant("hstu_attention", "triton", hstu_attention, reference, supports)
