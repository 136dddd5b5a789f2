"""Token, row, level and position of each token of a step in eager PyTorch."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.beam_rows.reference import beam_rows as reference
from grkernels.variant import KernelVariant


def beam_rows(
    ids: Tensor, places: Tensor, *, sizes: tuple[int, ...], max_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what reference.py defines."""
    ids, places = ids.long(), places.long()
    vocabulary = sum(sizes) + 1
    tokens, rows = ids % vocabulary, ids // vocabulary - 1
    rows = torch.where(rows >= max_rows, 0, rows)
    levels = torch.zeros_like(tokens)
    for end in list(accumulate(sizes))[:-1]:
        levels += tokens >= end
    levels = torch.where(rows >= 0, levels, 0)
    return tokens, rows, levels, torch.where(rows >= 0, places - rows + levels, places)


VARIANT = KernelVariant("beam_rows", "torch", beam_rows, reference, capabilities.eager)
