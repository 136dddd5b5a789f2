"""Concatenation of sequences in CuTe DSL: one warp per row, which finds its sequence with 32 probes per step."""

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
from grkernels.cute_common import ELEMENTS, WARP, ElementPointer, Int64Pointer, ahead, load_row, store_row
from grkernels.cute_launch import Launcher
from grkernels.jagged_concat.reference import jagged_concat as reference
from grkernels.variant import KernelVariant

MAX_WIDTH = 4096  # a row must fit the registers of one warp

# rows: of a warp, all under way at once; warps: of a CTA.
CANDIDATES = [{"rows": rows, "warps": warps} for rows in (1, 2, 4) for warps in (1, 2, 4, 8)]


class Arguments(NamedTuple):
    """Arguments of a launch, in order."""

    first: ElementPointer
    second: ElementPointer
    out: ElementPointer  # [rows, width]
    first_offsets: Int64Pointer  # [B + 1]
    second_offsets: Int64Pointer  # [B + 1]
    rows: Int32  # of out
    B: Int32
    first_stride: Int64
    second_stride: Int64


@dataclass(frozen=True)
class Concat:
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
        self._kernel(args).launch(grid=((args.rows + own - 1) // own, 1, 1), block=(WARP, self.warps, 1), stream=stream)

    @cute.kernel
    def _kernel(self, args: Arguments) -> None:
        lane, begin = place_of(self.rows, self.warps)
        end = args.first_offsets[args.B] + args.second_offsets[args.B]
        sources, targets, real = [], [], []
        for i in cutlass.range_constexpr(self.rows):
            row = Int64(begin + i)
            b = sequence_of(row, (args.first_offsets, args.second_offsets), args.B, lane, self.steps)
            # Before row `row`, of sequence b, lie all rows of `second` of the sequences before b, and so on.
            first_end, second_begin = args.first_offsets[b + 1], args.second_offsets[b]
            source = ahead(args.second, (row - first_end) * args.second_stride, cute_common.vector(self.dtype))
            if row < first_end + second_begin:
                source = ahead(args.first, (row - second_begin) * args.first_stride, cute_common.vector(self.dtype))
            sources.append(source)
            targets.append(ahead(args.out, row * self.width, 8))
            real.append(row < end)
        copy_rows(sources, targets, real, self.width, lane, args.rows - begin)


@cute.jit
def place_of(rows: cutlass.Constexpr[int], warps: cutlass.Constexpr[int]) -> Any:
    """(lane, first row of this warp)."""
    lane, own, _ = cute.arch.thread_idx()
    return lane, (cute.arch.block_idx()[0] * warps + cute.arch.make_warp_uniform(own)) * rows


@cute.jit
def sequence_of(row: Int64, offsets: Any, B: Int32, lane: Int32, steps: cutlass.Constexpr[int]) -> Int32:
    """The last b < B that begins, by the sum of its offsets, at or before `row`; 0 < B <= 32 ** steps."""
    b = Int32(0)
    for step in cutlass.range_constexpr(steps):
        distance = WARP ** (steps - 1 - step)
        probe = b + lane * distance
        begin = row + 1
        if probe < B:
            begin = sum((x[probe] for x in offsets), Int64(0))
        # Offsets only grow, so the lanes that find a beginning are the first ones, lane 0 among them.
        b += (cute.arch.popc(cute.arch.vote_ballot_sync(begin <= row)) - 1) * distance
    return b


@cute.jit
def copy_rows(sources: Any, targets: Any, real: Any, width: cutlass.Constexpr[int], lane: Int32, count: Int32) -> None:
    """The first `count` of a warp's rows, all loads before the stores; zeros if a row isn't real."""
    parts = [load_row(source, width, lane, WARP, there) for source, there in zip(sources, real, strict=True)]
    for i in cutlass.range_constexpr(len(sources)):
        if i < count:
            store_row(parts[i], targets[i], width, lane, WARP)


def tuning_key(width: int) -> str:
    """Rows are many in every use that matters; only their width decides."""
    return tuning.key(width=width)


def default_config(width: int) -> tuning.Config:
    """Shared memory of a warp: a few KiB."""
    return {"rows": 2 if width <= 512 else 1, "warps": 4}


def search_steps(batch: int) -> int:
    """Return the steps of a search among `batch` sequences, 32 probes each."""
    return max(-(-(batch - 1).bit_length() // 5), 1)


def jagged_concat(first: Tensor, second: Tensor, *, first_offsets: Tensor, second_offsets: Tensor, rows: int) -> Tensor:
    """Compute what reference.py defines. A CUDA graph can capture it."""
    batch, shape = first_offsets.shape[0] - 1, (rows, *first.shape[1:])
    out = first.new_zeros(shape) if batch == 0 else first.new_empty(shape)
    if batch and out.numel():
        first, second = cute_common.vector_rows(first), cute_common.vector_rows(second)
        W = first.shape[1]
        config = tuning.choose("jagged_concat", "cutlass", tuning_key(W), default_config(W))
        _launcher(first.dtype, W, search_steps(batch), **config)(
            first.data_ptr(),
            second.data_ptr(),
            out.data_ptr(),
            first_offsets.data_ptr(),
            second_offsets.data_ptr(),
            rows,
            batch,
            first.stride(0),
            second.stride(0),
            cute_common.stream(first.device),
        )
    return out


@cache
def _launcher(dtype: torch.dtype, width: int, steps: int, rows: int, warps: int) -> Launcher:
    return cute_common.launcher(Concat(ELEMENTS[dtype], width, steps, rows, warps))


def supports(*, device: str, dtype: str, width: int) -> str | None:
    """Return None, or why these arguments are not supported."""
    if width > MAX_WIDTH:
        return f"width {width} is over {MAX_WIDTH} (others: torch, compile, triton)"
    return cute_common.supports(device=device, dtype=dtype, width=width)


VARIANT = KernelVariant("jagged_concat", "cutlass", jagged_concat, reference, supports)
