"""Reference of beam_attention: one row after another, in fp32."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from grkernels.pages import slotted


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
    """Write out[i] = softmax over the keys that row i sees of scale q[i] k, times v, for each head. In place.

    Row i of request b, starts[b] <= i < starts[b + 1], sees the first limits[i] tokens of its request, by the pages
    block_table[b], and the slots own_slots[i]. The two sets share nothing and have one normaliser.

    out and q [n, H, d]: rows any distance apart. k_pages and v_pages [pages, page, Hkv, d]: as for paged_write; Hkv
    divides H. starts int32 [B + 1]; block_table int32 [B, most]; limits int32 [n], at least 1; own_slots int64
    [n, terms], -1 for none; limits and own_slots contiguous. Rows from starts[B] on stay as they are. Scores and sums
    in fp32. The family's signature.
    """
    keys, values, page = slotted(k_pages), slotted(v_pages), k_pages.shape[1]
    group = q.shape[1] // keys.shape[1]  # heads that share a key
    ends = starts.tolist()
    for b, (begin, end) in enumerate(pairwise(ends)):
        for i in range(begin, end):
            place = torch.arange(int(limits[i]), device=q.device)
            own = own_slots[i]
            seen = torch.cat([block_table[b, place // page] * page + place % page, own[own >= 0]])
            k, v = (x[seen].float().repeat_interleave(group, dim=1) for x in (keys, values))  # [seen, H, d]
            weights = (scale * torch.einsum("hd,khd->hk", q[i].float(), k)).softmax(1)
            out[i] = torch.einsum("hk,khd->hd", weights, v).to(out.dtype)
