"""Splitting of sequences in CuTe DSL: one launch for both results, a warp a row as in jagged_concat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Int32, Int64, cute
from torch import Tensor

from grkernels import cute_common, tuning
from grkernels.cute_common import ELEMENTS, WARP, ahead
from grkernels.cute_launch import Launcher
from grkernels.jagged_concat.cutlass import CANDIDATES as CANDIDATES
from grkernels.jagged_concat.cutlass import (
    copy_rows,
    default_config,
    place_of,
    search_steps,
    sequence_of,
    supports,
    tuning_key,
)
from grkernels.jagged_split.reference import jagged_split as reference
from grkernels.variant import KernelVariant


@dataclass(frozen=True)
class Split:
    """The kernel for one element type, width, launch configuration and number of search steps."""

    dtype: Any
    width: int
    steps: int  # at most 32 ** steps sequences
    rows: int
    warps: int

    numbers = (Int32, Int32, Int32, Int64)

    @property
    def pointers(self) -> tuple[Any, ...]:
        return (self.dtype, self.dtype, self.dtype, Int64, Int64)

    @cute.jit
    def launch(
        self,
        x: cute.Pointer,
        first: cute.Pointer,
        second: cute.Pointer,
        first_offsets: cute.Pointer,
        second_offsets: cute.Pointer,
        first_rows: Int32,
        second_rows: Int32,
        B: Int32,
        stride: Int64,
        stream: cuda.CUstream,
    ) -> None:
        own = self.rows * self.warps
        self._kernel(x, first, second, first_offsets, second_offsets, first_rows, second_rows, B, stride).launch(
            grid=((first_rows + second_rows + own - 1) // own, 1, 1), block=(WARP, self.warps, 1), stream=stream
        )

    @cute.kernel
    def _kernel(
        self,
        x: cute.Pointer,
        first: cute.Pointer,
        second: cute.Pointer,
        first_offsets: cute.Pointer,
        second_offsets: cute.Pointer,
        first_rows: Int32,
        second_rows: Int32,
        B: Int32,
        stride: Int64,
    ) -> None:
        lane, begin = place_of(self.rows, self.warps)
        sources, targets, real = [], [], []
        for i in cutlass.range_constexpr(self.rows):
            # In x, the first part of sequence b comes before its second part: b + 1 of them in all.
            row, own, other, out = Int64(begin + i), first_offsets, second_offsets, first
            if begin + i >= first_rows:
                row, own, other, out = row - first_rows, second_offsets, first_offsets + 1, second
            source = row + other[sequence_of(row, (own,), B, lane, self.steps)]
            sources.append(ahead(x, source * stride, cute_common.vector(self.dtype)))
            targets.append(ahead(out, row * self.width, 8))
            real.append(row < own[B])
        copy_rows(sources, targets, real, self.width, lane, first_rows + second_rows - begin)


def jagged_split(
    x: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, first_rows: int, second_rows: int
) -> tuple[Tensor, Tensor]:
    """As reference.py says; can be captured in a CUDA graph."""
    batch = first_offsets.shape[0] - 1
    make = x.new_zeros if batch == 0 else x.new_empty
    first, second = make(first_rows, *x.shape[1:]), make(second_rows, *x.shape[1:])
    if batch and first.numel() + second.numel():
        x = cute_common.vector_rows(x)
        W = x.shape[1]
        config = tuning.choose("jagged_split", "cutlass", tuning_key(W), default_config(W))
        _launcher(x.dtype, W, search_steps(batch), **config)(
            x.data_ptr(),
            first.data_ptr(),
            second.data_ptr(),
            first_offsets.data_ptr(),
            second_offsets.data_ptr(),
            first_rows,
            second_rows,
            batch,
            x.stride(0),
            cute_common.stream(x.device),
        )
    return first, second


@cache
def _launcher(dtype: torch.dtype, width: int, steps: int, rows: int, warps: int) -> Launcher:
    return cute_common.launcher(Split(ELEMENTS[dtype], width, steps, rows, warps))


VARIANT = KernelVariant("jagged_split", "cutlass", jagged_split, reference, supports)
