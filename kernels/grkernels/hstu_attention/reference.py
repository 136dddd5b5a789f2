"""HSTU attention, obviously right: fp32, one sequence and one head at a time, a plain dense mask."""

from __future__ import annotations

import torch
from torch import Tensor


def hstu_mask(
    n: int, num_targets: int, contextual_seq_len: int, max_attn_len: int, device: torch.device | str = "cpu"
) -> Tensor:
    """bool [n, n]: True where row i may see column j. spec.py says it in words."""
    i = torch.arange(n, device=device)
    m = n
    if contextual_seq_len > 0:
        i = (i - contextual_seq_len + 1).clamp(min=0)
        m = n - contextual_seq_len + 1
    if num_targets > 0:
        m -= num_targets
        i = i.clamp(max=m)
    row, column = i[:, None], i[None, :]
    mask = torch.eye(n, dtype=torch.bool, device=device) | (row > column)
    if max_attn_len > 0:
        mask = mask & (row - column <= max_attn_len)
    if contextual_seq_len > 0:
        mask = mask | ((row == 0) & (column < m))
    return mask


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
) -> Tensor:
    """(SiLU(alpha q k^T) * M / scaling_seqlen) v for every sequence and head; the family's signature.

    q [Lq, H, dqk], k [Lkv, H, dqk], v [Lkv, H, dv]: tokens of all sequences one after another, possibly
    strided views of one projection. q_offsets and kv_offsets int64 [B + 1] say where each sequence begins.
    Full form: the two are equal. Delta form: a sequence's queries are its last rows. num_targets int64 [B],
    or None for no candidates. max_q_len and max_kv_len: upper bounds of the lengths, Python ints.

    Returns [Lq, H, dv] in v's dtype, computed in fp32; rows past q_offsets[B] are zeros. On a GPU the
    caller sees to it that fp32 products are exact (no TF32). Source: as spec.py. Raises ValueError for a
    sequence longer than the bounds or with more queries than keys.
    """
    out = torch.zeros(q.shape[0], v.shape[1], v.shape[2], dtype=torch.float32, device=v.device)
    q_bounds, kv_bounds = q_offsets.tolist(), kv_offsets.tolist()
    targets = [0] * (len(q_bounds) - 1) if num_targets is None else num_targets.tolist()
    for b, sequence_targets in enumerate(targets):
        rows, columns = slice(q_bounds[b], q_bounds[b + 1]), slice(kv_bounds[b], kv_bounds[b + 1])
        queries, n = rows.stop - rows.start, columns.stop - columns.start
        if queries > min(n, max_q_len) or n > max_kv_len:
            raise ValueError(
                f"sequence {b}: {queries} queries, {n} keys; allowed is queries <= keys, "
                f"at most max_q_len={max_q_len} and max_kv_len={max_kv_len}"
            )
        mask = hstu_mask(n, sequence_targets, contextual_seq_len, max_attn_len, q.device)[n - queries :]
        for h in range(q.shape[1]):
            scores = alpha * (q[rows, h].float() @ k[columns, h].float().T)
            weights = torch.nn.functional.silu(scores) * mask / scaling_seqlen
            out[rows, h] = weights @ v[columns, h].float()
    return out.to(v.dtype)
