"""Split of sequences in eager PyTorch: the source of each row, then two indexed reads."""

from __future__ import annotations

from torch import Tensor

from grkernels import capabilities
from grkernels.jagged_concat.torch import sequence_of
from grkernels.jagged_split.reference import jagged_split as reference
from grkernels.variant import KernelVariant


def jagged_split(
    x: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, first_rows: int, second_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute what reference.py defines, without waiting for the device."""
    if first_offsets.shape[0] == 1:  # no sequence at all
        return x.new_zeros(first_rows, *x.shape[1:]), x.new_zeros(second_rows, *x.shape[1:])
    row, sequence, real = sequence_of(first_offsets, first_rows)
    first = _take(x, row + second_offsets[sequence], real)
    row, sequence, real = sequence_of(second_offsets, second_rows)
    return first, _take(x, row + first_offsets[sequence + 1], real)


def _take(x: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Return rows `index` of x if `real`, else zeros."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    taken = x.index_select(0, index.clamp(max=x.shape[0] - 1))
    return taken.masked_fill_(~real.view(-1, *(1,) * (x.dim() - 1)), 0.0)


VARIANT = KernelVariant("jagged_split", "torch", jagged_split, reference, capabilities.eager)
