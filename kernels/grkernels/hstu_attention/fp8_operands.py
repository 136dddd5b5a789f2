"""Q, K and V in e4m3 as fp8 attention on Hopper reads them (sm90/fp8.py), in one pass of Triton.

A sequence's keys lie in whole blocks of BLOCK tokens: sequence b begins at row (offset // BLOCK + b) * BLOCK, which
leaves room for the tokens of all sequences before it. Behind its last token are zeros up to the end of the block.
Tokens in pages, which may be in 8 bits, are gathered from there, and lie before those of the stream.

- Each row of Q has the scale a = |q| / LONGEST, by its Euclidean length.
- Each block of K has b = max |k| / LONGEST, by its longest row. So no q k exceeds LONGEST^2.
- Each block of V has c = max |v| / 448, by its largest number.
- V is transposed, [H, dv, rows], since the tensor cores of Hopper read both operands of e4m3 along the sum. Of each 16
  tokens, 8 b + 2 t + e (b, e of 2; t of 4) is in place 4 t + 2 b + e.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels import fp8
from grkernels.hstu_attention.eight_bits import dequantised, kind_of
from grkernels.pages import LARGEST, LEAST
from grkernels.triton_common import INTERPRET, to_e4m3_steps
from grkernels.triton_launch import launched

BLOCK = 128  # tokens that share a scale of K and one of V
PART = 32  # tokens of a block that are in registers at once
LONGEST = 14.0  # of a row of Q or K in e4m3: P is at most 2 * 14^2 = 392 of 448, which leaves room for rounding
SHORTEST = 1e-18  # of a row that is not rounded to zeros: its square is a normal number of fp32


@dataclass(frozen=True)
class Operands:
    """Q, K and V of a call. Rows of K and columns of V that belong to no block are unwritten."""

    q: Tensor  # float8_e4m3fn [Lq, H, dqk]
    k: Tensor  # float8_e4m3fn [rows, H, dqk]
    v: Tensor  # float8_e4m3fn [H, dv, rows]
    rows: Tensor  # fp32 [Lq, H]: a
    blocks: Tensor  # fp32 [H, rows / BLOCK, 2]: b and c
    offsets: Tensor  # int64 [B + 1], of the sequences' tokens, those in pages among them


def quantised(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    max_q_len: int,
    max_kv_len: int,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    page_table: Tensor | None = None,
    paged_lengths: Tensor | None = None,
) -> Operands:
    """Round the arguments of an attention call. Head sizes are powers of two. A CUDA graph can hold the launches."""
    batch, heads, device = q_offsets.shape[0] - 1, q.shape[1], q.device
    offsets, blocks, page, table_stride, kind = kv_offsets, k.shape[0] // BLOCK + batch, 0, 0, 0
    page_strides: tuple[int, ...] = (0,) * 6
    if k_pages is None or v_pages is None or page_table is None or paged_lengths is None:
        k_pages, v_pages, page_table, paged_lengths = k, v, q_offsets, q_offsets  # never read
    else:
        offsets = kv_offsets + torch.nn.functional.pad(paged_lengths.cumsum(0), (1, 0))
        blocks = batch * (-(-max_kv_len // BLOCK) + 1)  # the lengths are on the device
        page, table_stride = k_pages.shape[1], page_table.stride(0)
        page_strides = *k_pages.stride()[:3], *v_pages.stride()[:3]
    if k_scales is None or v_scales is None:
        k_scales, v_scales = k, v  # never read
    else:
        kind, k_pages, v_pages = kind_of(k_pages), k_pages.view(torch.int8), v_pages.view(torch.int8)

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=fp8.DTYPE, device=device)

    made = Operands(
        empty(q.shape[0], heads, q.shape[2]),
        empty(blocks * BLOCK, heads, k.shape[2]),
        empty(heads, v.shape[2], blocks * BLOCK),
        torch.empty(q.shape[0], heads, dtype=torch.float32, device=device),
        torch.empty(heads, blocks, 2, dtype=torch.float32, device=device),
        offsets,
    )
    inputs = q, k, v, k_pages, v_pages, k_scales, v_scales
    outputs = made.q.view(torch.int8), made.k.view(torch.int8), made.v.view(torch.int8), made.rows, made.blocks
    _kernel(
        (-(-max(max_q_len, max_kv_len) // BLOCK), 3 * heads, batch),
        (*inputs, *outputs, q_offsets, kv_offsets, offsets, page_table, paged_lengths),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *page_strides, heads),
        (table_stride, blocks),
        (page, kind, q.shape[2], v.shape[2], BLOCK, PART, LONGEST, SHORTEST, LARGEST[fp8.DTYPE], LEAST),
        max(q.shape[2], v.shape[2]) // 32,
    )
    return made


@launched(
    tensors=[
        *("q", "k", "v", "k_pages", "v_pages", "k_scales", "v_scales"),
        *("q_out", "k_out", "v_out", "rows_out", "blocks_out"),
    ],
    indices=["q_offsets", "kv_offsets", "offsets", "page_table", "paged_lengths"],
    numbers=["table_stride", "blocks"],
)
def _kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    v_out: tl.tensor,
    rows_out: tl.tensor,
    blocks_out: tl.tensor,
    q_offsets: tl.tensor,
    kv_offsets: tl.tensor,
    offsets: tl.tensor,
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
    table_stride: tl.int64,
    blocks: tl.tensor,
    PAGE: tl.constexpr,
    STORED: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    PART: tl.constexpr,
    LONGEST_ROW: tl.constexpr,
    SHORTEST_ROW: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Write TOKENS rows of one head of one sequence: of Q, of K or of V, as the program's second number says.

    PART tokens at a time are in registers, so that several programs fit on a processor and one loads while another one
    computes. K and V are read twice, first for the scale: the second time they come from a cache of the GPU.
    """
    sequence, head, part = tl.program_id(2), tl.program_id(1) // 3, tl.program_id(1) % 3
    first = tl.program_id(0) * TOKENS
    token, dims = tl.arange(0, PART)[:, None], tl.arange(0, QK)[None, :]
    if part == 0:
        begin, end = tl.load(q_offsets + sequence) + first, tl.load(q_offsets + sequence + 1)
        there = q + head * q_head_stride + dims
        for i in range(0, TOKENS, PART):
            row = begin + i + token
            x = tl.load(there + row * q_stride, mask=row < end, other=0.0)
            scale = lengths(x, SHORTEST_ROW)[:, None] / LONGEST_ROW
            at = row * heads + head
            tl.store(q_out + at * QK + dims, e4m3(x, scale), mask=row < end)
            tl.store(rows_out + at, scale, mask=row < end)
        return
    begin = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    if first >= length:
        return
    block = begin // TOKENS + sequence + tl.program_id(0)
    scales = blocks_out + (head * blocks + block) * 2
    paged = 0
    if PAGE:
        paged = tl.load(paged_lengths + sequence).to(tl.int32)
        page_table += sequence * table_stride
        k_pages += head * k_pages_head_stride
        v_pages += head * v_pages_head_stride
    stream = tl.load(kv_offsets + sequence) - paged  # the row that the sequence's first token would have
    k += stream * k_stride + head * k_head_stride
    v += stream * v_stride + head * v_head_stride
    k_scales += head
    v_scales += head
    if part == 1:
        longest = 0.0
        for i in range(first, first + TOKENS, PART):
            x = _tokens(
                k, k_pages, k_scales, page_table, i + token, length, paged, dims, k_stride, k_page_stride,
                k_slot_stride, heads, PAGE, STORED, QK,
            )  # fmt: skip
            longest = tl.maximum(longest, tl.max(lengths(x, SHORTEST_ROW), axis=0))
        k_scale = longest / LONGEST_ROW
        k_out += ((block * TOKENS - first) * heads + head) * QK
        for i in range(first, first + TOKENS, PART):
            x = _tokens(
                k, k_pages, k_scales, page_table, i + token, length, paged, dims, k_stride, k_page_stride,
                k_slot_stride, heads, PAGE, STORED, QK,
            )  # fmt: skip
            tl.store(k_out + (i + token) * heads * QK + dims, e4m3(x, k_scale))
        tl.store(scales, k_scale)
    else:
        v_dims, largest = tl.arange(0, V), LEAST_SIZE
        for i in range(first, first + TOKENS, PART):
            y = _tokens(
                v, v_pages, v_scales, page_table, i + token, length, paged, v_dims[None, :], v_stride, v_page_stride,
                v_slot_stride, heads, PAGE, STORED, V,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.max(tl.abs(y), axis=1), axis=0))
        v_scale = largest / LARGEST_NUMBER
        columns = v_out + (head * V + v_dims[:, None]).to(tl.int64) * (blocks * TOKENS) + (block * TOKENS - first)
        for i in range(first, first + TOKENS, PART):
            y = _tokens(
                v, v_pages, v_scales, page_table, i + token, length, paged, v_dims[None, :], v_stride, v_page_stride,
                v_slot_stride, heads, PAGE, STORED, V,
            )  # fmt: skip
            places = i + tl.arange(0, PART)[None, :]
            tl.store(columns + places, transposed(e4m3(y, v_scale), PART, V))
        tl.store(scales + 1, v_scale)


@triton.jit
def transposed(numbers: tl.tensor, TOKENS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Return V [TOKENS, D] as [D, TOKENS], with token 8 b + 2 t + e of each 16 in place 4 t + 2 b + e."""
    split = tl.reshape(numbers, [TOKENS // 16, 2, 4, 2, D])
    return tl.reshape(tl.permute(split, [4, 0, 2, 1, 3]), [D, TOKENS])


@triton.jit
def _tokens(
    x: tl.tensor,
    pages: tl.tensor,
    scales: tl.tensor,
    page_table: tl.tensor,
    token: tl.tensor,
    length: tl.tensor,
    paged: tl.tensor,
    dims: tl.tensor,
    stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    heads: tl.tensor,
    PAGE: tl.constexpr,
    STORED: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Return numbers of some tokens of a sequence in fp32, zeros past its end: [tokens, D].

    Pages hold the first `paged` tokens. x: where the first would be in the stream. STORED: pages are in 8 bits.
    """
    inside, rows = token < length, x + token * stride
    if PAGE:
        cached = token < paged
        number = tl.load(page_table + token // PAGE, mask=cached, other=0).to(tl.int64)
        slot = token % PAGE
        there = pages + number * page_stride + slot * slot_stride
        if STORED:
            at = (number * PAGE + slot) * heads
            values = dequantised(there, scales + at, cached, dims, D, STORED, tl.float32)
            values += tl.load(rows + dims, mask=inside & (token >= paged), other=0.0).to(tl.float32)
        else:
            rows = tl.where(cached, there, rows)
            values = tl.load(rows + dims, mask=inside, other=0.0).to(tl.float32)
    else:
        values = tl.load(rows + dims, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def lengths(x: tl.tensor, SHORTEST_ROW: tl.constexpr) -> tl.tensor:
    """Return the Euclidean lengths of rows [R, D], at least SHORTEST_ROW."""
    x = x.to(tl.float32)
    return tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), SHORTEST_ROW)


@triton.jit
def e4m3(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return x over its scales as the bytes of e4m3."""
    y = x.to(tl.float32) * (1.0 / scale)
    if INTERPRET:  # it would truncate
        y = to_e4m3_steps(y)
    return y.to(tl.float8e4nv).to(tl.int8, bitcast=True)
