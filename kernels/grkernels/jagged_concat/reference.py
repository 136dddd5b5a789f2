"""Reference of jagged_concat, one sequence at a time."""

from __future__ import annotations

from torch import Tensor


def jagged_concat(first: Tensor, second: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, rows: int) -> Tensor:
    """Return each sequence's rows of `first`, then its rows of `second`. The family's signature.

    first, second [rows, W] or [rows, H, d] of one dtype, possibly strided views: rows of all sequences, one sequence
    after another. first_offsets, second_offsets int64 [B + 1]: the first row of each sequence in them, from 0. Returns
    [rows, ...]. Rows past the last sequence are padding, since a CUDA graph fixes shapes: they are ignored in the
    inputs and zeros in the result. `rows` may not be less than the sum.
    """
    out = first.new_zeros(rows, *first.shape[1:])
    at = 0
    for b in range(len(first_offsets) - 1):
        for x, offsets in (first, first_offsets), (second, second_offsets):
            part = x[int(offsets[b]) : int(offsets[b + 1])]
            out[at : at + len(part)] = part
            at += len(part)
    return out
