"""HSTU attention in eager PyTorch: padded to [H, B, N, d] and computed in tiles of query rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels.hstu_attention.extras import NONE, Extras
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.reference import score_bias
from grkernels.pages import dequantised
from grkernels.variant import KernelVariant

# Memory for one tile's scores. It bounds the extra memory for any lengths, and the products of one tile fill a GPU.
TILE_BYTES = 256 * 2**20
BYTES_A_SCORE = 10  # fp32 scores, their product in the operands' dtype, and the mask


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
    tiles: int = 0,
) -> Tensor:
    """Compute what reference.py specifies, in fp32, fp16 or bf16, with SiLU in fp32.

    Nothing waits for the device, and every shape follows from the arguments' shapes and Python ints. So the call can
    be captured in a CUDA graph. It does not notice lengths beyond max_q_len or max_kv_len.

    tiles: number of tiles of rows, a divisor of max_q_len. The operations then do not depend on the lengths and can be
    traced with symbolic ones. `tiles_needed` returns the number that bounds the memory. 0: the number that these
    lengths need.
    """
    heads, batch = v.shape[1], q_offsets.shape[0] - 1
    out_shape = (q.shape[0], heads, v.shape[2])
    if 0 in (q.shape[0], batch, max_q_len, max_kv_len) or (k_pages is None and k.shape[0] == 0):
        return v.new_zeros(out_shape)
    columns = torch.arange(max_kv_len, device=q.device)
    lengths = kv_offsets.diff()[:, None]
    if k_pages is None or v_pages is None or page_table is None or paged_lengths is None:
        k_padded = _pad(k, kv_offsets, columns)
        v_padded = _pad(v, kv_offsets, columns)  # [H, B, N, dv]
    else:
        k_padded = _pad_paged(k, kv_offsets, k_pages, k_scales, page_table, paged_lengths, columns)
        v_padded = _pad_paged(v, kv_offsets, v_pages, v_scales, page_table, paged_lengths, columns)
        lengths = lengths + paged_lengths[:, None]
    k_padded = k_padded.transpose(2, 3)  # [H, B, dqk, N]

    first_row = lengths - q_offsets.diff()[:, None]  # row, in its sequence, of the first query
    contextual = contextual_seq_len if extras.num_contextuals is None else extras.num_contextuals[:, None]
    shift = max(contextual - 1, 0) if isinstance(contextual, int) else (contextual - 1).clamp(min=0)
    m = lengths - shift
    if num_targets is not None:
        m = m - num_targets[:, None]
    column_positions = _positions(columns, m, shift)  # [B, N]
    biased = extras.position_bias is not None or extras.time_bias is not None

    # In half precision, dividing the weights by N would lose bits. The weights get half of the bits of N (an exact
    # power of two), so sums can't overflow fp16. The fp32 result gets the rest.
    pre_scale = 2.0 ** -(scaling_seqlen.bit_length() // 2)
    full = q_offsets is kv_offsets and k_pages is None  # one tensor for both: row i of a sequence is also its key i
    tile = max_q_len // tiles if tiles else _tile_rows(batch * heads * max_kv_len, max_q_len)
    begins = [i * tile for i in range(tiles)] if tiles else range(0, max_q_len, tile)
    padded = v.new_empty(heads, batch, max_q_len, v.shape[2])
    for begin, end in pairwise([*begins, max_q_len]):
        low, high = 0, max_kv_len
        if full and not (tiles and contextual_seq_len):
            window = 0 if extras.min_full_attn_seq_len else max_attn_len
            low, high = _columns_seen(begin, end, max_kv_len, num_targets is None, contextual_seq_len, window)
        local = torch.arange(begin, end, device=q.device)
        rows = first_row + local  # [B, tile]
        row_positions = _positions(rows, m, shift)
        seen = column_positions[:, low:high]
        hidden = _hidden(rows, columns[low:high], row_positions, seen, m, contextual, max_attn_len, extras)
        if extras.target_group_size > 1 and num_targets is not None:
            hidden = hidden & ~_same_group(rows, columns[low:high], lengths, num_targets, extras.target_group_size)
        scores = torch.matmul(_pad(q, q_offsets, local), k_padded[..., low:high]).float().mul_(alpha)
        if biased:
            row_times = _pad_times(extras.row_times, q_offsets, local)
            column_times = _pad_times(extras.column_times, kv_offsets, columns[low:high])
            scores = scores + score_bias(row_positions, seen, row_times, column_times, extras)
        weights = F.silu(scores, inplace=True).masked_fill_(hidden, 0.0).mul_(pre_scale).to(v.dtype)
        summed = torch.matmul(weights, v_padded[:, :, low:high])
        padded[:, :, begin:end] = summed.float().mul_(1.0 / (scaling_seqlen * pre_scale)).to(v.dtype)

    # Back to the jagged stream: the sequence of each row, and the row within it.
    stream = torch.arange(q.shape[0], device=q.device)
    # Searched among all offsets, not q_offsets[1:]: compiled for a GPU, a view's first element is overlooked.
    sequence = (torch.searchsorted(q_offsets, stream, right=True) - 1).clamp(max=batch - 1)
    row = (stream - q_offsets[sequence]).clamp(max=max_q_len - 1)
    beyond = (stream >= q_offsets[-1])[:, None, None]
    return padded[:, sequence, row].transpose(0, 1).masked_fill(beyond, 0.0)


def _pad(x: Tensor, offsets: Tensor, local: Tensor) -> Tensor:
    """Return rows `local` of every sequence: [L, H, d] -> [H, B, len(local), d], contiguous.

    Past the end of a sequence the result holds any row.
    """
    index = (offsets[:-1, None] + local).clamp(max=x.shape[0] - 1)
    padded: Tensor = x.transpose(0, 1).index_select(1, index.flatten()).unflatten(1, index.shape)
    return padded


def _pad_paged(
    x: Tensor,
    offsets: Tensor,
    pages: Tensor,
    scales: Tensor | None,
    page_table: Tensor,
    paged_lengths: Tensor,
    columns: Tensor,
) -> Tensor:
    """Return [H, B, len(columns), d] as `_pad` does, of sequences with their first paged_lengths[b] rows in pages.

    Pages with scales are in 8 bits.
    """
    page = pages.shape[1]
    slots = (columns // page).clamp(max=page_table.shape[1] - 1)
    index = page_table[:, slots].long() * page + columns % page
    # Rows first, then heads: the reverse order would copy the whole pool.
    rows = pages.flatten(0, 1).index_select(0, index.flatten())
    if scales is not None:
        rows = dequantised(rows, scales.flatten(0, 1).index_select(0, index.flatten()), x.dtype)
    cached: Tensor = rows.unflatten(0, index.shape).permute(2, 0, 1, 3).contiguous()
    if x.shape[0] == 0:
        return cached
    rest = (offsets[:-1, None] + columns - paged_lengths[:, None]).clamp(0, x.shape[0] - 1)
    new = x.transpose(0, 1).index_select(1, rest.flatten()).unflatten(1, rest.shape)
    return torch.where((columns < paged_lengths[:, None])[:, :, None], cached, new)


def _positions(index: Tensor, m: Tensor, shift: int | Tensor) -> Tensor:
    """Convert an index in the sequence to a position of the mask (spec.py). Returns int64 [B, ...].

    m: int64 [B, 1]. shift: contextual tokens less one, or 0; int64 [B, 1] if sequences differ.
    """
    return torch.minimum((index - shift).clamp(min=0), m)


def _pad_times(times: Tensor | None, offsets: Tensor, local: Tensor) -> Tensor | None:
    """Return times int64 [L] of rows `local` of every sequence, [B, len(local)]; any time past a sequence's end."""
    return None if times is None else times[(offsets[:-1, None] + local).clamp(max=times.shape[0] - 1)]


def _same_group(rows: Tensor, columns: Tensor, lengths: Tensor, num_targets: Tensor, size: int) -> Tensor:
    """Return bool [B, rows, columns]: both are candidates of one group, and the row does not come first."""
    first = lengths - num_targets[:, None]
    row, column = (rows - first)[:, :, None], (columns - first)[:, None, :]
    return (row >= column) & (column >= 0) & (row // size == column // size)


def _hidden(
    rows: Tensor,
    columns: Tensor,
    row_positions: Tensor,
    column_positions: Tensor,
    m: Tensor,
    contextual: int | Tensor,
    max_attn_len: int,
    extras: Extras = NONE,
) -> Tensor:
    """Return bool [B, rows, columns]: True if the mask is 0, groups of candidates aside.

    A place past the sequence's end is at position m or later, so no row of the sequence sees it. contextual: tokens of
    every sequence, or int64 [B, 1].
    """
    row, column = row_positions[:, :, None], column_positions[:, None, :]
    visible = row > column
    if max_attn_len and extras.min_full_attn_seq_len:
        visible &= (row - column <= max_attn_len) | (row >= m[:, :, None] - extras.min_full_attn_seq_len)
    elif max_attn_len:
        visible &= row - column <= max_attn_len
    visible |= rows[:, :, None] == columns
    if isinstance(contextual, Tensor):
        visible |= (row == 0) & (column < m[:, :, None]) & (contextual > 0)[:, :, None]
    elif contextual:
        visible |= (row == 0) & (column < m[:, :, None])
    return visible.logical_not_()


def _tile_rows(scores_a_row: int, max_q_len: int) -> int:
    """Return the query rows of a tile: TILE_BYTES holds their scores. At least one."""
    return max(min(TILE_BYTES // (scores_a_row * BYTES_A_SCORE), max_q_len), 1)


def tiles_needed(batch: int, heads: int, max_q_len: int, max_kv_len: int) -> int:
    """Return the number of tiles that keep the memory of this call within TILE_BYTES."""
    return -(-max_q_len // _tile_rows(batch * heads * max_kv_len, max_q_len))


def _columns_seen(
    begin: int, end: int, max_kv_len: int, no_targets: bool, contextual_seq_len: int, max_attn_len: int
) -> tuple[int, int]:
    """Return the range of columns that rows begin..end-1 of a prefill see: no row sees any column outside it."""
    if begin < contextual_seq_len:  # a contextual token sees the whole history
        return 0, max_kv_len
    low = begin - max_attn_len if max_attn_len and no_targets else 0  # a candidate's window starts further back
    # torch.compile of torch 2.11 can't trace sym_min, torch.export can't compare symbolic lengths.
    high = torch.sym_min(end, max_kv_len) if isinstance(end, torch.SymInt) else min(end, max_kv_len)
    # A window that reaches a contextual token reaches all of them.
    return (low if low >= max(contextual_seq_len, 1) else 0), high


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
    """Return None for fp32, fp16 and bf16, else the reason. Any head size, page, option and device will do."""
    if dtype not in ("fp32", "fp16", "bf16"):
        return f"dtype {dtype} is none of fp32, fp16, bf16"
    return None


VARIANT = KernelVariant("hstu_attention", "torch", hstu_attention, reference, supports)
