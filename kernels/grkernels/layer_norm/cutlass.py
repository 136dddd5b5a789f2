"""LayerNorm in CuTe DSL: a row in the registers of one warp, or of a few."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, cute
from cutlass.memory import SmemAllocator
from torch import Tensor

from grkernels import capabilities, cute_common, tuning
from grkernels.cute_common import ELEMENTS, WARP, ElementPointer, ahead, load_row, rounded, store_row, wide
from grkernels.cute_launch import Launcher
from grkernels.layer_norm.reference import layer_norm as reference
from grkernels.variant import KernelVariant

MAX_WIDTH = 16384  # a row must fit the registers of one CTA
MAX_THREADS = 1024

# warps: of a row; rows: of a CTA.
CANDIDATES = [
    {"warps": warps, "rows": rows}
    for warps, rows in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1), (16, 1))
]


class Arguments(NamedTuple):
    """Arguments of a launch, in order."""

    x: ElementPointer  # [L, width], rows `stride` elements apart
    weight: ElementPointer  # [width]
    bias: ElementPointer  # [width]
    out: ElementPointer  # [L, width]
    L: Int32
    stride: Int64
    eps: Float32


@dataclass(frozen=True)
class LayerNorm:
    """The kernel for one element type, width and launch configuration."""

    dtype: Any
    width: int
    warps: int
    rows: int

    signature = Arguments

    @cute.jit
    def launch(self, args: Arguments, stream: cuda.CUstream) -> None:
        self._kernel(args).launch(
            grid=((args.L + self.rows - 1) // self.rows, 1, 1), block=(WARP * self.warps, self.rows, 1), stream=stream
        )

    @cute.kernel
    def _kernel(self, args: Arguments) -> None:
        row, place = place_of(self.width, self.warps, self.rows, args.L)
        size = cute_common.vector(self.dtype)
        values = wide(load_row(ahead(args.x, row * args.stride, size), *place))
        y = normed(values, args.weight, args.bias, args.eps, *place)
        store_row(rounded(y, self.dtype), ahead(args.out, row * self.width, 8), *place)


@cute.jit
def place_of(
    width: cutlass.Constexpr[int], warps: cutlass.Constexpr[int], rows: cutlass.Constexpr[int], L: Int32
) -> Any:
    """This thread's row, and what load_row wants to know of its place in it.

    Spare rows of the last CTA are row L - 1 again, written alike: their threads must come to the barriers.
    """
    thread, own, _ = cute.arch.thread_idx()
    row = Int64(cutlass.min(cute.arch.block_idx()[0] * rows + own, L - 1))
    return row, (width, thread, WARP * warps)


@cute.jit
def normed(
    values: Any,
    weight: cute.Pointer,
    bias: cute.Pointer,
    eps: Float32,
    width: cutlass.Constexpr[int],
    thread: Int32,
    threads: cutlass.Constexpr[int],
) -> Any:
    """LayerNorm of a row whose parts, fp32, lie in `threads` threads; that of the same parts.

    The row is in registers, so the exact variance (of differences to the mean) costs no second read.
    """
    weights, biases = (wide(load_row(x, width, thread, threads)) for x in (weight, bias))
    mean = _sum(values, threads) * (1.0 / width)
    centred = [x - mean for x in values]
    size = cute_common.vector(weight.dtype)
    last = (len(centred) - 1) * threads * size
    if cutlass.const_expr(last + threads * size > width):  # zeros past the end stay zeros
        centred[-1] = centred[-1] * Float32(last + thread * size < width)
    scale = cute.math.rsqrt(_sum([x * x for x in centred], threads) * (1.0 / width) + eps, fastmath=True)
    return [x * scale * w + b for x, w, b in zip(centred, weights, biases, strict=True)]


@cute.jit
def _sum(values: Any, threads: cutlass.Constexpr[int]) -> Float32:
    """The sum of all values of a row: in every thread of the row, which is thread_idx.y of the CTA."""
    own = sum(values[1:], values[0]).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
    total = cute.arch.warp_reduction_sum(own)
    if cutlass.const_expr(threads > WARP):
        warps = threads // WARP
        thread, row, _ = cute.arch.thread_idx()
        partial = SmemAllocator().allocate_tensor(Float32, cute.make_layout((warps, MAX_THREADS // threads)))
        if thread % WARP == 0:
            partial[thread // WARP, row] = total
        cute.arch.sync_threads()
        total = Float32(0.0)
        for i in cutlass.range_constexpr(warps):
            total += partial[i, row]
    return total


def tuning_key(width: int) -> str:
    """Rows are many in every use that matters; only their width decides."""
    return tuning.key(width=width)


def default_config(width: int) -> tuning.Config:
    """One warp per row if a row is short enough: its sums then need no shared memory."""
    warps = 1 if width <= 1024 else 4 if width <= 4096 else 16
    return {"warps": warps, "rows": max(4 // warps, 1)}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Compute what reference.py defines. A CUDA graph can capture it."""
    L, E = x.shape
    out = x.new_empty(L, E)
    if L:
        x = cute_common.vector_rows(x)
        config = tuning.choose("layer_norm", "cutlass", tuning_key(E), default_config(E))
        _launcher(x.dtype, E, **config)(
            x.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            L,
            x.stride(0),
            eps,
            cute_common.stream(x.device),
        )
    return out


@cache
def _launcher(dtype: torch.dtype, width: int, warps: int, rows: int) -> Launcher:
    return cute_common.launcher(LayerNorm(ELEMENTS[dtype], width, warps, rows))


def supports(*, device: str, dtype: str, width: int, products: str = "") -> str | None:
    """Return None, or why these arguments are not supported."""
    if missing := capabilities.without_fp8(products):
        return missing
    if width > MAX_WIDTH:
        return f"width {width} is over {MAX_WIDTH} (others: torch, compile, triton)"
    return cute_common.supports(device=device, dtype=dtype, width=width)


VARIANT = KernelVariant("layer_norm", "cutlass", layer_norm, reference, supports)
