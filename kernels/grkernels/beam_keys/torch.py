"""Keys that each token of a step sees, in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.beam_keys.reference import beam_keys as reference
from grkernels.beam_rows.torch import beam_rows
from grkernels.variant import KernelVariant


def beam_keys(
    ids: Tensor,
    places: Tensor,
    starts: Tensor,
    block_table: Tensor,
    *,
    sizes: tuple[int, ...],
    max_rows: int,
    page: int,
    first: int,
    terms: int,
) -> tuple[Tensor, Tensor]:
    """Compute what reference.py defines."""
    _, rows, levels, _ = beam_rows(ids, places, sizes=sizes, max_rows=max_rows)
    places = places.long()
    limits = torch.where(rows >= 0, places - rows, places + 1).int()
    request = torch.searchsorted(starts.long(), torch.arange(len(ids), device=ids.device), right=True) - 1
    request = request.clamp(max=len(starts) - 2)
    ago = torch.arange(first, first + terms, device=ids.device)
    there = (ago <= levels[:, None]) & (rows >= 0)[:, None]
    place = torch.where(there, places[:, None] - ago, 0)
    block = block_table[request[:, None], place // page].long()
    return limits, torch.where(there, block * page + place % page, -1)


VARIANT = KernelVariant("beam_keys", "torch", beam_keys, reference, capabilities.eager)
