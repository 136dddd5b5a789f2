"""Values that WGMMA keeps in registers, and the thread that holds them.

A warp holds 16 rows of a product, a quad of its lanes two of them, 8 rows apart. Of each 8 columns a thread of the
quad holds two neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cutlass import BFloat16, Float32, Int32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op, select_

from grkernels.hstu_attention.sm90.sizes import PRODUCER_THREADS, WARPGROUP


class Thread(NamedTuple):
    """A consumer thread and the values that it holds."""

    index: Int32  # among the consumers
    warpgroup: Int32
    lane: Int32
    row: Int32  # the first of its two rows of a work item


def consumer_thread() -> Thread:
    """Return the thread that runs this."""
    index = cute.arch.thread_idx()[0] - PRODUCER_THREADS
    warpgroup = cute.arch.make_warp_uniform(index // WARPGROUP)
    lane = index % 32
    return Thread(index, warpgroup, lane, row=index // 32 * 16 + lane // 4)


def flat(x: cute.Tensor) -> cute.Tensor:
    """Return a register tensor as a vector: column pair, row half, then blocks of 8 columns."""
    return cute.make_tensor(x.iterator, cute.make_layout(cute.size(x)))


@dsl_user_op
def round_pair(low: Float32, high: Float32, dtype: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """Return two values, rounded to 16-bit elements, as one word."""
    name = "bf16x2" if dtype is BFloat16 else "f16x2"
    values = [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)]
    return Int32(llvm.inline_asm(T.i32(), values, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f", loc=loc, ip=ip))


def transpose(x: list[Int32], lane: Int32) -> list[Int32]:
    """Transpose 4 x 4 words within each quad of lanes: lane i's x[j] becomes lane j's x[i]."""
    for step in (1, 2):
        upper = (lane & step) != 0
        for i in range(4):
            if not i & step:
                a, b = x[i], x[i | step]
                received = cute.arch.shuffle_sync_bfly(select_(upper, a, b), offset=step)
                x[i], x[i | step] = select_(upper, received, a), select_(upper, b, received)
    return x
