"""Reference of jagged_split, one sequence at a time."""

from __future__ import annotations

from torch import Tensor


def jagged_split(
    x: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, first_rows: int, second_rows: int
) -> tuple[Tensor, Tensor]:
    """Return (first, second) whose jagged_concat is x. The family's signature.

    x [rows, W] or [rows, H, d], possibly a strided view; offsets int64 [B + 1], from 0: where each sequence
    begins in the results. Returns first [first_rows, ...] and second [second_rows, ...]; their rows past
    the last sequence are zeros, those of x are ignored.
    """
    parts = x.new_zeros(first_rows, *x.shape[1:]), x.new_zeros(second_rows, *x.shape[1:])
    at = 0
    for b in range(len(first_offsets) - 1):
        for part, offsets in zip(parts, (first_offsets, second_offsets), strict=True):
            begin, end = int(offsets[b]), int(offsets[b + 1])
            part[begin:end] = x[at : at + end - begin]
            at += end - begin
    return parts
