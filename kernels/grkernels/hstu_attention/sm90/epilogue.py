"""Epilogue: sums of shared work items, scaling, rounding, and stores to global memory."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from grkernels.cute_common import ElementPointer, Float32Pointer, Int32Pointer
from grkernels.hstu_attention.sm90.registers import Thread, flat, round_pair, transpose
from grkernels.hstu_attention.sm90.schedule import Batch, Work
from grkernels.hstu_attention.sm90.sizes import Sizes


class Output(NamedTuple):
    """The result: [rows, heads, v_dim], contiguous."""

    data: ElementPointer
    scale: Float32  # of the sums


class Sharing(NamedTuple):
    """Memory for the sums of work items that several CTAs share. Only kernels with `Tiles.split` use it."""

    partials: Float32Pointer  # [items, splits, m * v_dim], in the threads' order
    arrivals: Int32Pointer  # [items, m / 16], zero at first: for each warp, the CTAs that have written its rows
    splits: Int32


@cute.jit
def add_up(sizes: cutlass.Constexpr[Sizes], o: cute.Tensor, sharing: Sharing, item: Int32, thread: Thread) -> Boolean:
    """Write this warp's sums of a shared item. Return True in the last of the warps that share these rows.

    `o` is then the total. Sums are always added in the same order, so the result does not depend on which is last.
    """
    m, values = sizes.tiles.m, sizes.v_dim // 2  # a thread holds two rows of a quad's columns
    whole = item // sharing.splits
    sums = flat(o)
    word = cute.make_rmem_tensor(cute.make_layout(4), Float32)
    share = 2 * m * values  # elements of one CTA's part
    base = Int64(whole) * sharing.splits
    mine = sharing.partials + (base + item % sharing.splits) * share + thread.index * 4
    for i in cutlass.range_constexpr(values // 4):
        for j in cutlass.range_constexpr(4):
            word[j] = sums[4 * i + j]
        target = mine + cute.assume(Int64(i) * (8 * m), divby=4)
        cute.autovec_copy(word, cute.make_tensor(target, cute.make_layout(4)))
    cute.arch.fence_acq_rel_gpu()
    cute.arch.sync_warp()
    before = Int32(0)
    if thread.lane == 0:
        arrived = sharing.arrivals + whole * (m // 16) + thread.index // 32
        before = cute.arch.atomic_add(arrived, Int32(1), sem="acq_rel", scope="gpu")
    last = cute.arch.shuffle_sync(before, offset=0) == sharing.splits - 1
    if last:
        cute.arch.fence_acq_rel_gpu()
        o.fill(0.0)
        for split in cutlass.range(sharing.splits, unroll=1):
            theirs = sharing.partials + (base + split) * share + thread.index * 4
            for i in cutlass.range_constexpr(values // 4):
                source = theirs + cute.assume(Int64(i) * (8 * m), divby=4)
                cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), word)
                for j in cutlass.range_constexpr(4):
                    sums[4 * i + j] = sums[4 * i + j] + word[j]
    return last


@cute.jit
def store(
    sizes: cutlass.Constexpr[Sizes], o: cute.Tensor, output: Output, heads: Int32, work: Work, thread: Thread
) -> None:
    """Scale, round and write this thread's two rows.

    A thread of a quad holds 2 of each 8 columns. Four such blocks are transposed within the quad, so that each
    thread writes 8 columns, 16 bytes, at once.
    """
    blocks = sizes.v_dim // 8
    sums = flat(o)
    pairs = [  # [2 * block + row half]
        round_pair(sums[2 * i] * output.scale, sums[2 * i + 1] * output.scale, sizes.dtype) for i in range(2 * blocks)
    ]
    quad = thread.lane % 4
    word = cute.make_rmem_tensor(cute.make_layout(4), Int32)
    for half in cutlass.range_constexpr(2):
        row = thread.row + 8 * half
        base = output.data + ((Int64(work.q_row) + row) * heads + work.head) * sizes.v_dim
        for four in cutlass.range_constexpr(blocks // 4):
            x = transpose([pairs[2 * (4 * four + i) + half] for i in range(4)], thread.lane)
            for i in cutlass.range_constexpr(4):
                word[i] = x[i]
            if row < work.rows:
                target = cute.recast_ptr((base + 8 * (4 * four + quad)).align(16), dtype=Int32)
                cute.autovec_copy(word, cute.make_tensor(target, cute.make_layout(4)))
        for block in cutlass.range_constexpr(blocks // 4 * 4, blocks):
            if row < work.rows:
                target = cute.recast_ptr((base + 8 * block + 2 * quad).align(4), dtype=Int32)
                cute.make_tensor(target, cute.make_layout(1))[0] = pairs[2 * block + half]


@cute.jit
def fill(sizes: cutlass.Constexpr[Sizes], output: Output, batch: Batch, thread: Thread) -> None:
    """Write zeros into the rows after the last sequence: the next layer's keys and values must be finite."""
    ctas = Int32(cute.arch.grid_dim()[0])
    ends = cute.make_tensor(batch.q_offsets, cute.make_layout(batch.sequences + 1))
    row = Int32(ends[batch.sequences]) + Int32(cute.arch.block_idx()[0])
    words = batch.heads * sizes.v_dim // 2
    while row < batch.q_rows:
        target = cute.recast_ptr((output.data + Int64(row) * (batch.heads * sizes.v_dim)).align(4), dtype=Int32)
        line = cute.make_tensor(target, cute.make_layout(words))
        for i in cutlass.range(thread.index, words, 2 * sizes.tiles.m):
            line[i] = Int32(0)
        row += ctas
