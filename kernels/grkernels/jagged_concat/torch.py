"""Concatenation of sequences in eager PyTorch: the place of each row, then two indexed writes."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.jagged_concat.reference import jagged_concat as reference
from grkernels.variant import KernelVariant


def jagged_concat(first: Tensor, second: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, rows: int) -> Tensor:
    """Compute what reference.py defines, without waiting for the device."""
    out = first.new_zeros(rows + 1, *first.shape[1:])  # padding goes into the last row
    if first_offsets.shape[0] == 1:  # no sequence at all
        return out[:rows]
    row, sequence, real = sequence_of(first_offsets, first.shape[0])
    out.index_copy_(0, torch.where(real, row + second_offsets[sequence], rows), first)
    row, sequence, real = sequence_of(second_offsets, second.shape[0])
    out.index_copy_(0, torch.where(real, row + first_offsets[sequence + 1], rows), second)
    return out[:rows]


def sequence_of(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each row of a stream, its index, its sequence (any for padding), and true for rows of sequences."""
    row = torch.arange(rows, device=offsets.device)
    # It searches all offsets, not offsets[1:]: compiled for a GPU, a search in a view begins at the whole tensor.
    sequence = (torch.searchsorted(offsets, row, right=True) - 1).clamp(max=offsets.shape[0] - 2)
    return row, sequence, row < offsets[-1]


VARIANT = KernelVariant("jagged_concat", "torch", jagged_concat, reference, capabilities.eager)
