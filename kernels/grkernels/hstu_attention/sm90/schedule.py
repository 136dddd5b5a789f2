"""Work items: their order, their sequences, and the tiles of each."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, cute

from grkernels.cute_common import Int32Pointer, Int64Pointer
from grkernels.hstu_attention.sm90.sizes import SCALED_TOKENS, Sizes
from grkernels.hstu_attention.sm90.visible import Limits, TileRanges, ranges_of


class Batch(NamedTuple):
    """Sequences of the batch and what their rows may see."""

    q_offsets: Int64Pointer  # [sequences + 1]
    kv_offsets: Int64Pointer  # [sequences + 1], of keys that are not in pages
    num_targets: Int64Pointer  # [sequences], read only if has_targets
    q_rows: Int32  # of the stream of queries, with padding after the last sequence
    heads: Int32
    sequences: Int32
    limits: Limits
    has_targets: Int32


class PageTable(NamedTuple):
    """Pages of the batch's cached keys. Only kernels with `Sizes.page` read it."""

    pages: Int32Pointer  # [sequences, stride]
    stride: Int64
    lengths: Int64Pointer  # [sequences], in tokens


class Place(NamedTuple):
    """A work item's place in the batch, and where to search for later ones."""

    sequence: Int32  # -1 after the last item
    position: Int32  # among the sequence's items
    group: Int32  # the first sequence of those searched last, ...
    before: Int32  # ... and the number of items before it


class Work(NamedTuple):
    """A work item: m rows of one head of one sequence. Rows and columns count from the sequence's first token."""

    sequence: Int32
    head: Int32
    q_row: Int32  # first row in the stream of queries
    kv_row: Int32  # the sequence's first row in the stream of keys; of e4m3 keys among their rows (fp8.py)
    row: Int32  # first row
    rows: Int32
    history: Int32  # tokens before the first candidate
    cached: Int32 | int  # tokens whose keys are in pages
    ranges: TileRanges
    begin: Int32  # the CTA's own tiles: begin <= i < end
    end: Int32


def first_item() -> tuple[Int32, Place]:
    """Return a CTA's first work item, and a place to begin the search at."""
    return Int32(cute.arch.block_idx()[0]), Place(Int32(-1), Int32(0), Int32(0), Int32(0))


@cute.jit
def fixed_item(turn: Int32) -> Int32:
    """Return a CTA's work item number `turn` of a fixed share.

    Costs fall along a head's items, so every other turn runs backwards: the CTA with the longest item of one round
    has the shortest of the next.
    """
    ctas, own = Int32(cute.arch.grid_dim()[0]), Int32(cute.arch.block_idx()[0])
    return turn * ctas + (own if turn % 2 == 0 else ctas - 1 - own)


@cute.jit
def find(m: cutlass.Constexpr[int], batch: Batch, splits: Int32 | int, item: Int32, last: Place) -> Place:
    """Return the place of work item `item`. Each item counts `splits` times.

    A warp searches 32 sequences at a time, one a lane. It begins where the last search ended, since a CTA's items
    only grow.
    """
    group, before = last.group, last.before
    lane = cute.arch.lane_idx()
    offsets = cute.make_tensor(batch.q_offsets, cute.make_layout(batch.sequences + 1))
    sequence, position = Int32(-1), Int32(0)
    while sequence < 0 and group < batch.sequences:
        items = Int32(0)
        if group + lane < batch.sequences:
            length = Int32(offsets[group + lane + 1] - offsets[group + lane])
            items = (length + m - 1) // m * batch.heads * splits
        upto = items
        for step in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(upto, offset=1 << step, mask_and_clamp=0)
            upto += below if lane >= (1 << step) else 0
        total = cute.arch.shuffle_sync(upto, offset=31)
        if item < before + total:
            past = cute.arch.popc(cute.arch.vote_ballot_sync(before + upto <= item))
            sequence = group + past
            position = item - before - cute.arch.shuffle_sync(upto - items, offset=past)
        else:
            before += total
            group += 32
    return Place(sequence, position, group, before)


@cute.jit
def work_at(sizes: cutlass.Constexpr[Sizes], batch: Batch, table: PageTable, splits: Int32 | int, place: Place) -> Work:
    """Return the work item at `place`, and the share of its tiles that is this CTA's.

    The longest items of a head come first, so that short ones are left for the end.
    """
    m, n, sequence = sizes.tiles.m, sizes.tiles.n, place.sequence
    cached = 0
    if cutlass.const_expr(sizes.page > 0):
        cached = Int32(cute.make_tensor(table.lengths, cute.make_layout(sequence + 1))[sequence])
    position = place.position // splits
    q_offsets = cute.make_tensor(batch.q_offsets, cute.make_layout(sequence + 2))
    kv_offsets = cute.make_tensor(batch.kv_offsets, cute.make_layout(sequence + 2))
    queries = Int32(q_offsets[sequence + 1] - q_offsets[sequence])
    tokens = Int32(kv_offsets[sequence + 1] - kv_offsets[sequence]) + cached
    history = tokens
    if batch.has_targets != 0:
        history = tokens - Int32(cute.make_tensor(batch.num_targets, cute.make_layout(sequence + 1))[sequence])
    items = (queries + m - 1) // m
    head = position // items
    skipped = (items - 1 - position % items) * m
    q_row = Int32(q_offsets[sequence]) + skipped
    kv_row = Int32(kv_offsets[sequence])
    if cutlass.const_expr(sizes.products != ""):
        kv_row = (kv_row // SCALED_TOKENS + sequence) * SCALED_TOKENS
    row, rows = tokens - queries + skipped, cutlass.min(queries - skipped, m)
    ranges = ranges_of(n, row, rows, history, batch.limits, cached, sizes.products != "")
    total = ranges.total()
    split = place.position % splits
    begin, end = total * split // splits, total * (split + 1) // splits
    return Work(sequence, head, q_row, kv_row, row, rows, history, cached, ranges, begin, end)
