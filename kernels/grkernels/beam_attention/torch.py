"""Softmax attention of a decoder's rows, prompts and beams alike, over keys that all lie in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels.paged_write.torch import slotted, variant

_ROWS = 256  # on a CPU so many at once: bounds the memory of the scores


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
    """out[i] = softmax over what row i sees of scale q[i] k, times v, for each head, in place.

    Row i of request b, starts[b] <= i < starts[b + 1], sees the first limits[i] tokens of its request, by the pages
    block_table[b], and the slots own_slots[i]: two sets that share nothing, under one normaliser.

    out and q [n, H, d], rows any distance apart; k_pages and v_pages [pages, page, Hkv, d] as for `paged_write`, Hkv
    divides H; starts int32 [B + 1], block_table int32 [B, most], limits int32 [n], at least 1; own_slots int64
    [n, terms], -1 for none. Rows from starts[B] on are left alone. Scores and sums in fp32. On a GPU Triton
    does it in one launch whose size follows from shapes alone, so a CUDA graph can capture it; on a CPU PyTorch does.
    """
    if variant(q.device.type) == "triton":
        on_gpu(
            out,
            q,
            k_pages,
            v_pages,
            starts=starts,
            block_table=block_table,
            limits=limits,
            own_slots=own_slots,
            scale=scale,
        )
        return
    keys, values = slotted(k_pages), slotted(v_pages)
    heads, page = keys.shape[1], k_pages.shape[1]
    ends = starts.tolist()
    for b, pages in enumerate(block_table.long()):
        for begin in range(ends[b], ends[b + 1], _ROWS):
            rows = slice(begin, min(begin + _ROWS, ends[b + 1]))
            place = torch.arange(int(limits[rows].max()))
            slots, own = pages[place // page] * page + place % page, own_slots[rows]
            mine = own.clamp(min=0)
            query = q[rows].unflatten(1, (heads, -1)).float()  # [rows, Hkv, group, d]
            prompt = torch.einsum("nhgd,khd->nhgk", query, keys[slots].float())
            codes = torch.einsum("nhgd,nkhd->nhgk", query, keys[mine].float())
            hidden = torch.cat([place >= limits[rows, None], own < 0], dim=1)
            scores = torch.cat([prompt, codes], dim=3) * scale
            weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(3)
            of_prompt, of_codes = weights.split([len(place), own.shape[1]], dim=3)
            seen = torch.einsum("nhgk,khd->nhgd", of_prompt, values[slots].float())
            seen += torch.einsum("nhgk,nkhd->nhgd", of_codes, values[mine].float())
            out[rows] = seen.flatten(1, 2).to(out.dtype)


def on_gpu(
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
    """`beam_attention` in Triton, which on a CPU runs in its interpreter only."""
    from grkernels.beam_attention.triton import launch

    page = k_pages.shape[1]
    launch(out, q, slotted(k_pages), slotted(v_pages), starts, block_table, limits, own_slots, page, scale)
