"""Attention of rows of beams and prompts in eager PyTorch: a request at a time, some of its rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.beam_attention.reference import beam_attention as reference
from grkernels.pages import slotted
from grkernels.variant import KernelVariant

_ROWS = 256  # at once: bounds the memory of the scores


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
    """Compute what reference.py defines. Waits for the device."""
    keys, values = slotted(k_pages), slotted(v_pages)
    heads, page = keys.shape[1], k_pages.shape[1]
    ends = starts.tolist()
    for b, pages in enumerate(block_table.long()):
        for begin in range(ends[b], ends[b + 1], _ROWS):
            rows = slice(begin, min(begin + _ROWS, ends[b + 1]))
            place = torch.arange(int(limits[rows].max()), device=q.device)
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


VARIANT = KernelVariant("beam_attention", "torch", beam_attention, reference, capabilities.eager_waiting)
