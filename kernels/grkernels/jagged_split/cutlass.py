"""Splitting of sequences in CuTe DSL: one launch for both results, one warp per row as in jagged_concat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Int32, Int64, cute
from torch import Tensor

from grkernels import cute_common, tuning
from grkernels.cute_common import ELEMENTS, WARP, ElementPointer, Int64Pointer, ahead
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


class Arguments(NamedTuple):
    """Arguments of a launch, in order."""

    x: ElementPointer
    first: ElementPointer  # [first_rows, width]
    second: ElementPointer  # [second_rows, width]
    first_offsets: Int64Pointer  # [B + 1]
    second_offsets: Int64Pointer  # [B + 1]
    first_rows: Int32
    second_rows: Int32
    B: Int32
    stride: Int64  # of x


@dataclass(frozen=True)
class Split:
    """The kernel for one element type, width, launch configuration and number of search steps."""

    dtype: Any
    width: int
    steps: int  # at most 32 ** steps sequences
    rows: int
    warps: int

    signature = Arguments

    @cute.jit
    def launch(self, args: Arguments, stream: cuda.CUstream) -> None:
        own = self.rows * self.warps
        self._kernel(args).launch(
            grid=((args.first_rows + args.second_rows + own - 1) // own, 1, 1),
            block=(WARP, self.warps, 1),
            stream=stream,
        )

    @cute.kernel
    def _kernel(self, args: Arguments) -> None:
        lane, begin = place_of(self.rows, self.warps)
        sources, targets, real = [], [], []
        for i in cutlass.range_constexpr(self.rows):
            # In x, the first part of sequence b comes before its second part: b + 1 of them in all.
            row, own, other, out = Int64(begin + i), args.first_offsets, args.second_offsets, args.first
            if begin + i >= args.first_rows:
                row, own, other, out = row - args.first_rows, args.second_offsets, args.first_offsets + 1, args.second
            source = row + other[sequence_of(row, (own,), args.B, lane, self.steps)]
            sources.append(ahead(args.x, source * args.stride, cute_common.vector(self.dtype)))
            targets.append(ahead(out, row * self.width, 8))
            real.append(row < own[args.B])
        copy_rows(sources, targets, real, self.width, lane, args.first_rows + args.second_rows - begin)


def jagged_split(
    x: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, first_rows: int, second_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute what reference.py defines. A CUDA graph can capture it."""
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
