"""Columns that a row of a sequence sees, and the tiles of columns that a block of rows needs."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
from cutlass import Boolean, Int32, cute


class Limits(NamedTuple):
    """Parameters of the mask; 0 for none."""

    contextual: Int32  # tokens at the beginning that see the whole history
    window: Int32  # positions back that a row sees


class Interval(NamedTuple):
    """Columns that a row sees: low <= column < high, and the row itself."""

    row: Int32
    low: Int32
    high: Int32


class TileRange(NamedTuple):
    """Neighbouring tiles of columns."""

    first: Int32  # column
    tiles: Int32


class TileRanges(NamedTuple):
    """Tiles that a block of rows needs, in the order of work.

    Columns are tokens. Where some tokens are in pages, the tokens after them begin with a tile of their own:
    a gap of columns without tokens lies between.
    """

    # Every row sees these tiles whole, so they need no mask.
    whole: TileRange
    whole_after_pages: TileRange
    # These tiles need the mask. A warpgroup skips one if none of its own rows sees any of it.
    pages_end: TileRange  # the last tile of pages, if tokens after it follow
    window_start: TileRange  # the first tiles of the history
    history_end: TileRange  # the last tiles of the history
    diagonal: TileRange  # candidates, each of which sees itself alone

    def total(self) -> Int32:
        """Return the number of tiles."""
        return sum(part.tiles for part in self)

    def unmasked(self) -> Int32:
        """Return the number of tiles that need no mask. They come first."""
        return self.whole.tiles + self.whole_after_pages.tiles

    @cute.jit
    def column(self, n: cutlass.Constexpr[int], i: Int32) -> Int32:
        """Return the first column of the i-th tile."""
        column = Int32(0)
        for part in self:
            if i >= 0 and i < part.tiles:
                column = part.first + i * n
            i -= part.tiles
        return column


@cute.jit
def interval(row: Int32, history: Int32, limits: Limits) -> Interval:
    """Return the columns that a row sees. `history`: tokens before the first candidate.

    The closed form of reference.py's mask. History rows see the columns before them. Candidates and contextual tokens
    see the whole history. A window raises `low` unless it reaches the contextual tokens.
    """
    shift = cutlass.max(limits.contextual - 1, 0)
    position = history - shift  # of the candidates
    low = Int32(0)
    high = row + 1
    if row >= history or row < limits.contextual:
        high = history if position > 0 else Int32(0)
    if limits.window > 0 and row >= limits.contextual:
        last = cutlass.min(row, history)
        if last - shift > limits.window:
            low = last - limits.window
    return Interval(row, low, high)


@cute.jit
def ranges_of(
    n: cutlass.Constexpr[int],
    row: Int32,
    rows: Int32,
    history: Int32,
    limits: Limits,
    cached: Int32 | int,
    aligned: cutlass.Constexpr[bool] = False,
) -> TileRanges:
    """Return the tiles of n columns that rows row..row + rows - 1 need. `cached`: tokens in pages.

    aligned: every tile begins at a multiple of n.
    """
    gap = (cached + n - 1) // n * n - cached
    end = row + rows
    low = interval(row, history, limits).low
    low_last = interval(end - 1, history, limits).low
    position = history - cutlass.max(limits.contextual - 1, 0)
    high = history if row < limits.contextual and position > 0 else cutlass.min(end, history)
    whole_high = cutlass.min(row + 1, history) if position > 0 else Int32(0)
    low, low_last = low + (gap if low >= cached else 0), low_last + (gap if low_last >= cached else 0)
    high, whole_high = high + (gap if high > cached else 0), whole_high + (gap if whole_high > cached else 0)

    begin, stop = low // n, (high + n - 1) // n
    whole_begin = cutlass.min((low_last + n - 1) // n, stop)
    whole_stop = cutlass.max(cutlass.min(whole_high // n, stop), whole_begin)
    own = row + gap
    if cutlass.const_expr(aligned):
        own = own // n * n
    diagonal = cutlass.max(own, stop * n)
    diagonals = (cutlass.max(end + gap - diagonal, 0) + n - 1) // n if end > history else Int32(0)
    ragged = cached // n  # the tile that only begins with cached tokens
    split = gap > 0 and ragged >= whole_begin and ragged < whole_stop
    first_stop = ragged if split else whole_stop
    return TileRanges(
        whole=TileRange(whole_begin * n, first_stop - whole_begin),
        whole_after_pages=TileRange((ragged + 1) * n, whole_stop - ragged - 1 if split else Int32(0)),
        pages_end=TileRange(ragged * n, Int32(1) if split else Int32(0)),
        window_start=TileRange(begin * n, whole_begin - begin),
        history_end=TileRange(whole_stop * n, stop - whole_stop),
        diagonal=TileRange(diagonal, diagonals),
    )


class TileView(NamedTuple):
    """Columns of a tile that two rows see."""

    upper: Interval
    lower: Interval
    token: Int32  # of the tile's first column


@cute.jit
def view_of(
    n: cutlass.Constexpr[int],
    paged: cutlass.Constexpr[bool],
    upper: Interval,
    lower: Interval,
    column: Int32,
    cached: Int32 | int,
) -> TileView:
    """Return the columns of the tile at `column` that two rows see.

    Between the last cached token and the next tile, columns hold no token and no row sees them.
    """
    if cutlass.const_expr(not paged):
        return TileView(upper, lower, column)
    begin = (cached + n - 1) // n * n  # where the columns of the tokens after the cached ones begin
    inside = column < begin
    seen = []
    for row, low, high in (upper, lower):
        own = row if not inside or row < cached else Int32(-1)
        seen.append(Interval(own, low, cutlass.min(high, cached) if inside else high))
    return TileView(seen[0], seen[1], column if inside else column - begin + cached)


@cute.jit
def reaches(
    n: cutlass.Constexpr[int],
    paged: cutlass.Constexpr[bool],
    first: Interval,
    last: Interval,
    last_row: Int32,
    column: Int32,
    cached: Int32 | int,
) -> Boolean:
    """Return True if any row of a warpgroup sees any of the tile at `column`.

    `first`, `last`: the intervals of its first and last row. Lows and highs only grow between them, except for
    contextual tokens, which see the whole history. `last_row`: the work item's last row.
    """
    view = view_of(n, paged, first, last, column, cached)
    seen = view.token < cutlass.max(view.upper.high, view.lower.high) and view.token + n > view.upper.low
    own = view.token <= last.row and view.token + n > first.row
    return first.row <= last_row and (seen or own)
