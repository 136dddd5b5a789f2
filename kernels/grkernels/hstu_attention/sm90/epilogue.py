"""Epilogue: sums of shared work items, scaling, rounding, and stores to global memory."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, cute

from grkernels.cute_common import ElementPointer, Float32Pointer, Int32Pointer
from grkernels.hstu_attention.sm90.registers import Thread, flat, round_pair, transpose
from grkernels.hstu_attention.sm90.schedule import Batch, Stretch, Work, parts_of, slot_of
from grkernels.hstu_attention.sm90.sizes import Sizes


class Output(NamedTuple):
    """The result: [rows, heads, v_dim], contiguous."""

    data: ElementPointer
    scale: Float32  # of the sums


class Sharing(NamedTuple):
    """Memory for the sums of work items that several CTAs share.

    Only kernels with `Tiles.split` or `Tiles.stream` use it. With `stream`, `partials` is [CTAs, 2, m * v_dim] and
    `arrivals` is [CTAs, m / 16], of the item whose first part the CTA has.
    """

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
    _write(sums, word, sharing.partials + (base + item % sharing.splits) * share + thread.index * 4, 8 * m)
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
            _add(sums, word, sharing.partials + (base + split) * share + thread.index * 4, 8 * m)
    return last


@cute.jit
def add_parts(
    sizes: cutlass.Constexpr[Sizes], o: cute.Tensor, sharing: Sharing, stretch: Stretch, tiles: Int32, thread: Thread
) -> Boolean:
    """Return True in the warp that has the sums of these rows over all tiles of the stretch's next work item in `o`.

    Of an item that several stretches share, that is the last of their warps. Parts are always added in the same order.
    A warp that finds all others done keeps one of the first two parts in registers, since a + b = b + a. Other warps
    write their part.
    """
    m = sizes.tiles.m
    sums = flat(o)
    word = cute.make_rmem_tensor(cute.make_layout(4), Float32)
    cta = Int32(cute.arch.block_idx()[0])
    own, later = parts_of(stretch, tiles)
    parts = own + 1 + later
    complete = parts == 1
    if parts > 1:
        first = cta - own
        partials, share = sharing.partials + thread.index * 4, Int64(m * sizes.v_dim)
        arrivals = sharing.arrivals + first * (m // 16) + thread.index // 32
        others = Int32(0)
        if thread.lane == 0:
            others = cute.arch.atomic_add(arrivals, Int32(0), sem="acq_rel", scope="gpu")
        others = cute.arch.shuffle_sync(others, offset=0)
        keeps = own < 2 and others == parts - 1
        if not keeps:
            _write(sums, word, partials + slot_of(cta, own) * share, 8 * m)
            cute.arch.fence_acq_rel_gpu()
            cute.arch.sync_warp()
            if thread.lane == 0:
                others = cute.arch.atomic_add(arrivals, Int32(1), sem="acq_rel", scope="gpu")
            others = cute.arch.shuffle_sync(others, offset=0)
        complete = others == parts - 1
        if complete:
            cute.arch.fence_acq_rel_gpu()
            if not keeps:
                o.fill(0.0)
            for part in cutlass.range(parts, unroll=1):
                if not (keeps and part == own):
                    _add(sums, word, partials + slot_of(first + part, part) * share, 8 * m)
    return complete


def _write(sums: cute.Tensor, word: cute.Tensor, target: cute.Pointer, stride: int) -> None:
    """Write a thread's sums, each four of them `stride` elements after the last four. `word`: registers for four."""
    for i in range(cute.size(sums) // 4):
        for j in range(4):
            word[j] = sums[4 * i + j]
        cute.autovec_copy(word, cute.make_tensor(target + cute.assume(Int64(i) * stride, divby=4), cute.make_layout(4)))


def _add(sums: cute.Tensor, word: cute.Tensor, source: cute.Pointer, stride: int) -> None:
    """Add what `_write` wrote."""
    for i in range(cute.size(sums) // 4):
        cute.autovec_copy(cute.make_tensor(source + cute.assume(Int64(i) * stride, divby=4), cute.make_layout(4)), word)
        for j in range(4):
            sums[4 * i + j] = sums[4 * i + j] + word[j]


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
