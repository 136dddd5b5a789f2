"""Reference of HSTU attention: fp32, one sequence at a time, a dense mask of 1024 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels.hstu_attention.extras import LOG_STEP, NONE, Extras

ROWS = 1024  # of a dense mask at a time: one of 16384 x 16384 takes gigabytes, and half of it is masked
SCORES = 2**26  # at a time, if a head has fewer: short sequences need few launches


def positions(n: int, num_targets: int, contextual_seq_len: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the position of each token, int64 [n]. spec.py describes positions in words."""
    shift = max(contextual_seq_len - 1, 0)
    i = (torch.arange(n, device=device) - shift).clamp(min=0)
    return i.clamp(max=n - shift - num_targets) if num_targets > 0 else i


def hstu_mask(
    n: int,
    num_targets: int,
    contextual_seq_len: int,
    max_attn_len: int,
    device: torch.device | str = "cpu",
    rows: slice = slice(None),
    extras: Extras = NONE,
) -> Tensor:
    """Return bool [n, n]: True if row i may see column j. spec.py describes the mask in words. rows: only these."""
    index = torch.arange(n, device=device)
    i = positions(n, num_targets, contextual_seq_len, device)
    m = n - max(contextual_seq_len - 1, 0) - num_targets
    row, column = i[rows, None], i[None, :]
    mask = (index[rows, None] == index[None, :]) | (row > column)
    if extras.target_group_size > 1:
        group = (index - (n - num_targets)) // extras.target_group_size  # negative: no candidate
        later = index[rows, None] >= index[None, :]
        mask = mask | ((group[rows, None] == group[None, :]) & (group[None, :] >= 0) & later)
    if max_attn_len > 0:
        near = row - column <= max_attn_len
        if extras.min_full_attn_seq_len > 0:
            near = near | (row >= m - extras.min_full_attn_seq_len)
        mask = mask & near
    if contextual_seq_len > 0:
        mask = mask | ((row == 0) & (column < m))
    return mask


def score_bias(
    row_positions: Tensor,
    column_positions: Tensor,
    row_times: Tensor | None,
    column_times: Tensor | None,
    extras: Extras,
) -> Tensor | float:
    """Return the fp32 bias of scores of these rows and columns, [..., rows, columns], or 0 without tables."""
    bias: Tensor | float = 0.0
    if extras.position_bias is not None:
        distance = (row_positions[..., :, None] - column_positions[..., None, :]).clamp(min=0)
        bias = bias + extras.position_bias.float()[distance.clamp(max=extras.position_bias.shape[0] - 1)]
    if extras.time_bias is not None and row_times is not None and column_times is not None:
        gap = (row_times[..., :, None] - column_times[..., None, :]).abs().clamp(min=1)
        bucket = (gap.double().log() / LOG_STEP).long().clamp(max=extras.time_bias.shape[0] - 1)
        bias = bias + extras.time_bias.float()[bucket]
    return bias


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
    """Compute (SiLU(alpha q k^T) * M / scaling_seqlen) v for every sequence and head. The family's signature.

    q [Lq, H, dqk], k [Lkv, H, dqk], v [Lkv, H, dv]: tokens of all sequences one after another. They may be strided
    views of one projection.
    q_offsets, kv_offsets: int64 [B + 1], the first row of each sequence. A prefill passes one tensor for both, which
    variants may rely on. In an append, the queries of a sequence are its last rows.
    num_targets: int64 [B], or None for no candidates.
    max_q_len, max_kv_len: upper bounds of the lengths, Python ints.

    Append to pages: the first paged_lengths[b] keys and values of a sequence are in pages. None of them are
    candidates.
    k_pages [pages, page size, H, dqk], v_pages [pages, page size, H, dv], paged_lengths int64 [B].
    page_table: int32 [B, most pages], the i-th page of sequence b.
    k_scales and v_scales, fp32 [pages, page size, H], contiguous: those of int8 or float8_e4m3fn pages
    (grkernels.pages); None for pages in the dtype of k and v.
    k, v and kv_offsets hold the other tokens. max_kv_len bounds both together.

    extras: masks and biases of other HSTU models. A time bias and pages exclude each other.

    Returns [Lq, H, dv] in v's dtype, computed in fp32. Rows after q_offsets[B] are zeros. On a GPU the caller must
    make fp32 products exact (no TF32). Raises ValueError for a sequence that is longer than the bounds or has more
    queries than keys. Source: as spec.py.
    """
    out = torch.zeros(q.shape[0], v.shape[1], v.shape[2], dtype=torch.float32, device=v.device)
    q_bounds, kv_bounds = q_offsets.tolist(), kv_offsets.tolist()
    targets = [0] * (len(q_bounds) - 1) if num_targets is None else num_targets.tolist()
    for b, sequence_targets in enumerate(targets):
        rows, columns = slice(q_bounds[b], q_bounds[b + 1]), slice(kv_bounds[b], kv_bounds[b + 1])
        keys, values = k[columns], v[columns]
        if k_pages is not None and v_pages is not None and page_table is not None and paged_lengths is not None:
            paged, page = int(paged_lengths[b]), k_pages.shape[1]
            mine = page_table[b, : -(-paged // page)].long()
            keys = torch.cat([_rows(k_pages, k_scales, mine)[:paged], keys])
            values = torch.cat([_rows(v_pages, v_scales, mine)[:paged], values])
        queries, n = rows.stop - rows.start, keys.shape[0]
        if queries > min(n, max_q_len) or n > max_kv_len:
            raise ValueError(
                f"sequence {b}: {queries} queries, {n} keys; allowed is queries <= keys, "
                f"at most max_q_len={max_q_len} and max_kv_len={max_kv_len}"
            )
        contextual = contextual_seq_len if extras.num_contextuals is None else int(extras.num_contextuals[b])
        place = positions(n, sequence_targets, contextual, q.device)
        times = None if extras.column_times is None else extras.column_times[columns]
        for first in range(0, queries, ROWS):
            some = slice(rows.start + first, min(rows.start + first + ROWS, rows.stop))
            at = n - queries + first
            here = slice(at, at + some.stop - some.start)
            mask = hstu_mask(n, sequence_targets, contextual, max_attn_len, q.device, here, extras)
            seen = mask.any(dim=0)  # what no row sees would only add zeros
            own = None if extras.row_times is None else extras.row_times[some]
            bias = score_bias(place[here], place[seen], own, None if times is None else times[seen], extras)
            mask, seen_keys, seen_values = mask[:, seen], keys[seen], values[seen]
            for heads in torch.arange(q.shape[1]).split(max(SCORES // mask.numel(), 1)):
                h = slice(int(heads[0]), int(heads[-1]) + 1)
                scores = alpha * (q[some, h].float().transpose(0, 1) @ seen_keys[:, h].float().permute(1, 2, 0)) + bias
                weights = torch.nn.functional.silu(scores) * mask / scaling_seqlen
                out[some, h] = (weights @ seen_values[:, h].float().transpose(0, 1)).transpose(0, 1)
    return out.to(v.dtype)


def _rows(pages: Tensor, scales: Tensor | None, mine: Tensor) -> Tensor:
    """Return the tokens of pages `mine`, [tokens, H, d]; those of 8-bit pages in fp32."""
    rows = pages[mine].flatten(0, 1)
    return rows if scales is None else rows.float() * scales[mine].flatten(0, 1)[..., None]
