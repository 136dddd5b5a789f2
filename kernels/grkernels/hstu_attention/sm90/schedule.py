"""Work items: their order, their sequences, the tiles of each, and the CTA's own of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, cute

from grkernels.cute_common import Int32Pointer, Int64Pointer
from grkernels.hstu_attention.sm90.sizes import SCALED_TOKENS, TILES_A_SPLIT, Sizes
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


class Stretch(NamedTuple):
    """The rest of a CTA's stretch of tiles. The tiles of all items stand in a row, in the order of the items."""

    sequence: Int32  # of the next work item; -1 after the last
    position: Int32  # of that item among the sequence's items
    before: Int32  # tiles of that item that belong to earlier CTAs
    left: Int32  # the CTA's own tiles, of this item and later ones
    length: Int32  # of a whole stretch; only the last ones may be shorter, or empty


class Lengths(NamedTuple):
    """Rows and tokens of a sequence."""

    queries: Int32
    tokens: Int32
    history: Int32  # tokens before the first candidate
    cached: Int32 | int  # tokens whose keys are in pages


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
        upto = _running_sum(items, lane)
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
def _running_sum(values: Int32, lane: Int32) -> Int32:
    """Return the sum of the values of this lane and all lanes before it."""
    upto = values
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(upto, offset=1 << step, mask_and_clamp=0)
        upto += below if lane >= (1 << step) else 0
    return upto


@cute.jit
def cached_in(sizes: cutlass.Constexpr[Sizes], table: PageTable, sequence: Int32) -> Int32 | int:
    """Return the number of a sequence's tokens that are in pages."""
    cached = 0
    if cutlass.const_expr(sizes.page > 0):
        cached = Int32(cute.make_tensor(table.lengths, cute.make_layout(sequence + 1))[sequence])
    return cached


@cute.jit
def lengths_of(batch: Batch, sequence: Int32, cached: Int32 | int) -> Lengths:
    """Return the lengths of a sequence with `cached` tokens in pages."""
    q_offsets = cute.make_tensor(batch.q_offsets, cute.make_layout(sequence + 2))
    kv_offsets = cute.make_tensor(batch.kv_offsets, cute.make_layout(sequence + 2))
    queries = Int32(q_offsets[sequence + 1] - q_offsets[sequence])
    tokens = Int32(kv_offsets[sequence + 1] - kv_offsets[sequence]) + cached
    history = tokens
    if batch.has_targets != 0:
        history = tokens - Int32(cute.make_tensor(batch.num_targets, cute.make_layout(sequence + 1))[sequence])
    return Lengths(queries, tokens, history, cached)


@cute.jit
def rows_at(
    sizes: cutlass.Constexpr[Sizes], batch: Batch, lengths: Lengths, skipped: Int32
) -> tuple[Int32, Int32, TileRanges]:
    """Return the first row, the number of rows and the tiles of a work item, after `skipped` queries of a sequence."""
    row, rows = lengths.tokens - lengths.queries + skipped, cutlass.min(lengths.queries - skipped, sizes.tiles.m)
    aligned = sizes.products != ""
    return row, rows, ranges_of(sizes.tiles.n, row, rows, lengths.history, batch.limits, lengths.cached, aligned)


@cute.jit
def work_at(sizes: cutlass.Constexpr[Sizes], batch: Batch, table: PageTable, splits: Int32 | int, place: Any) -> Work:
    """Return the work item at `place`, and the share of its tiles that is this CTA's. place: Place or Stretch.

    The longest items of a head come first, so that short ones are left for the end.
    """
    m, sequence = sizes.tiles.m, place.sequence
    cached = cached_in(sizes, table, sequence)
    position = place.position // splits
    lengths = lengths_of(batch, sequence, cached)
    items = (lengths.queries + m - 1) // m
    head = position // items
    skipped = (items - 1 - position % items) * m
    q_row = Int32(cute.make_tensor(batch.q_offsets, cute.make_layout(sequence + 2))[sequence]) + skipped
    kv_row = Int32(cute.make_tensor(batch.kv_offsets, cute.make_layout(sequence + 2))[sequence])
    if cutlass.const_expr(sizes.products != ""):
        kv_row = (kv_row // SCALED_TOKENS + sequence) * SCALED_TOKENS
    row, rows, ranges = rows_at(sizes, batch, lengths, skipped)
    total = ranges.total()
    if cutlass.const_expr(sizes.tiles.stream):
        begin, end = place.before, cutlass.min(place.before + place.left, total)
    else:
        split = place.position % splits
        begin, end = total * split // splits, total * (split + 1) // splits
    return Work(sequence, head, q_row, kv_row, row, rows, lengths.history, cached, ranges, begin, end)


@cute.jit
def next_place(
    sizes: cutlass.Constexpr[Sizes], batch: Batch, splits: Int32 | int, item: Int32, last: Any, work: Work
) -> Any:
    """Return the place of this CTA's work item after `work`, which is at `last`. `item` is its number in a Place."""
    if cutlass.const_expr(sizes.tiles.stream):
        return following(sizes.tiles.m, batch, last, work.ranges.total())
    return find(sizes.tiles.m, batch, splits, item, last)


def stretch_length(tiles: Int32, ctas: Int32) -> Int32:
    """Return the tiles of each CTA's stretch, the last ones excepted: equally many, but not too few."""
    return cutlass.max((tiles + ctas - 1) // ctas, TILES_A_SPLIT)


def parts_of(stretch: Stretch, tiles: Int32) -> tuple[Int32, Int32]:
    """Return how many CTAs before this one and after it have some of the `tiles` tiles of the next work item."""
    after = cutlass.max(tiles - stretch.before - stretch.left, 0)
    up = stretch.length - 1
    return (stretch.before + up) // stretch.length, (after + up) // stretch.length


def slot_of(cta: Int32, part: Int32) -> Int32:
    """Return where a CTA writes its sums of the part-th part of an item, or reads those of another CTA.

    A CTA's tiles are the first part of at most one shared item, its last, and a later part of at most one, its first.
    So two places for each CTA suffice.
    """
    return 2 * cta + cutlass.min(part, 1)


@cute.jit
def write_stretch(sizes: cutlass.Constexpr[Sizes], batch: Batch, table: PageTable, slot: cute.Tensor) -> None:
    """Find this CTA's stretch with one warp, not the first, and write it to shared memory.

    The first warp initialises the barriers meanwhile. A stretch that all warps found would be in registers before the
    producers give theirs away, too many for what they keep.
    """
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 1:
        stretch = first_stretch(sizes, batch, table)
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(len(stretch)):
                slot[i] = stretch[i]


@cute.jit
def read_stretch(slot: cute.Tensor) -> Stretch:
    """Read what `write_stretch` wrote. Its numbers are the same in the whole warp, and the compiler learns so."""
    return Stretch(*(cute.arch.make_warp_uniform(slot[i]) for i in range(len(Stretch._fields))))


@cute.jit
def first_stretch(sizes: cutlass.Constexpr[Sizes], batch: Batch, table: PageTable) -> Stretch:
    """Return this CTA's stretch, with its first work item. A warp counts 32 sequences at a time, one a lane."""
    m = sizes.tiles.m
    lane = cute.arch.lane_idx()
    total, tiles = Int32(0), Int32(0)
    group = (batch.sequences + 31) // 32 * 32
    while group > 0:  # the first group last: most searches end there, and then its counts are there
        group -= 32
        tiles = _tiles_of(sizes, batch, table, group + lane)
        total += cute.arch.shuffle_sync(_running_sum(tiles, lane), offset=31)
    length = stretch_length(total, Int32(cute.arch.grid_dim()[0]))
    begin = Int32(cute.arch.block_idx()[0]) * length
    end = cutlass.min(begin + length, total)
    sequence, position, first = Int32(-1), Int32(0), Int32(0)
    while sequence < 0 and begin < end:
        upto = _running_sum(tiles, lane)
        here = cute.arch.shuffle_sync(upto, offset=31)
        if begin < first + here:
            past = cute.arch.popc(cute.arch.vote_ballot_sync(first + upto <= begin))
            sequence = group + past
            first += cute.arch.shuffle_sync(upto - tiles, offset=past)
            a_head = cute.arch.shuffle_sync(tiles, offset=past) // batch.heads
            lengths = lengths_of(batch, sequence, cached_in(sizes, table, sequence))
            items = (lengths.queries + m - 1) // m
            head = (begin - first) // a_head
            first += head * a_head
            block = items - 1
            count = rows_at(sizes, batch, lengths, block * m)[2].total()
            while first + count <= begin:
                first += count
                block -= 1
                count = rows_at(sizes, batch, lengths, block * m)[2].total()
            position = head * items + items - 1 - block
        else:
            first += here
            group += 32
            tiles = _tiles_of(sizes, batch, table, group + lane)
    return Stretch(sequence, position, begin - first, end - begin, length)


@cute.jit
def _tiles_of(sizes: cutlass.Constexpr[Sizes], batch: Batch, table: PageTable, sequence: Int32) -> Int32:
    """Return the tiles of all items of a sequence, 0 past the last sequence. Each item has at least one."""
    tiles = Int32(0)
    if sequence < batch.sequences:
        lengths = lengths_of(batch, sequence, cached_in(sizes, table, sequence))
        for skipped in cutlass.range(0, lengths.queries, sizes.tiles.m, unroll=1):
            tiles += rows_at(sizes, batch, lengths, skipped)[2].total()
    return tiles * batch.heads


@cute.jit
def following(m: cutlass.Constexpr[int], batch: Batch, stretch: Stretch, tiles: Int32) -> Stretch:
    """Return the rest of a stretch after its next work item, which has `tiles` tiles."""
    sequence, position = stretch.sequence, stretch.position + 1
    left = stretch.left - (tiles - stretch.before)
    if left <= 0:
        sequence = Int32(-1)
    else:
        offsets = cute.make_tensor(batch.q_offsets, cute.make_layout(batch.sequences + 1))
        queries = Int32(offsets[sequence + 1] - offsets[sequence])
        if position == (queries + m - 1) // m * batch.heads:
            position = Int32(0)
            sequence += 1
            while offsets[sequence + 1] == offsets[sequence]:
                sequence += 1
    return Stretch(sequence, position, Int32(0), left, stretch.length)
