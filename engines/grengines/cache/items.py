"""The cache of item vectors: a table too large for the device, with its hot rows on the device.

A lookup turns table rows into slots of a smaller table on the device, and fetches missing rows. Traffic is skewed, so a
small share of the rows serves most tokens. A batch asks for each distinct row once. The evicted row is the one with the
least decayed count of batches among the slots that a clock hand passes. With independent draws the best set never
changes: it is the most frequent rows. Counts find it, recency alone does not (experiments/item_cache.py). The decay
follows a drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64Array = npt.NDArray[np.int64]

WINDOW = 8  # slots that the hand passes for each row to evict
HALF_LIFE = 16  # a count halves while this many times `slots` distinct rows are looked up
STAGING_BYTES = 8 << 20  # of each of two buffers: one is filled while the other is copied
FREE, IN_USE = -np.inf, np.inf  # counts: slots without a row are taken first, rows of the current lookup never
_SCALE = 2.0**60  # counts are divided by it once a single use counts more


@dataclass
class RowCounters:
    """Counts since the cache was made. distinct == hits + misses."""

    tokens: int = 0  # rows asked for, repeats included
    token_hits: int = 0  # those whose row was on the device before its lookup
    distinct: int = 0  # different rows of each lookup
    hits: int = 0  # distinct rows that were on the device before
    misses: int = 0  # distinct rows that were fetched
    evictions: int = 0  # rows that made room for others
    bytes: int = 0  # of vectors, from the host to the device


class Snapshot(NamedTuple):
    """Maps and counts of the cache at one moment."""

    slot_of: npt.NDArray[np.int32]  # [R]: slot of each table row, -1: not on the device
    row_of: Int64Array  # [slots]: row in each slot, R: none
    counts: npt.NDArray[np.float32]  # [slots]: decayed count of the row in each slot
    unit: float  # count of one use now


class HotRows:
    """Rows of a host table on the device, at most `slots` of them.

    host: [R, E] on the CPU, contiguous; pageable, page-locked or memory-mapped. It is read at every miss and must not
    change. slots: rows on the device. dtype: of the device's rows; values are rounded as `Tensor.to` does.

    Kernels read `table` [slots, E]. It keeps its address, so captured CUDA graphs can read it. It starts as zeros. Rows
    of a lookup keep their slots until the next lookup.

    Besides the host table this takes 8 bytes per row and 12 per slot on the host. Not thread-safe.

    Raises ValueError for a host table of another form or slots below 1, torch.OutOfMemoryError for no room.
    """

    def __init__(self, host: Tensor, *, slots: int, device: torch.device | str, dtype: torch.dtype) -> None:
        if host.ndim != 2 or host.device.type != "cpu" or not host.is_contiguous() or not host.numel():
            raise ValueError(f"the host table must be [rows, width], contiguous, on the CPU: got {host.shape}")
        if slots < 1:
            raise ValueError(f"{slots} slots for rows on the device; at least 1")
        self.host, self.slots = host, slots
        self.table = torch.zeros(slots, host.shape[1], dtype=dtype, device=device)
        self.counters = RowCounters()
        rows = len(host)
        # Row number `rows` means no row: its entry in the maps is written when a free slot is taken, never read.
        self._slot_of = np.full(rows + 1, -1, np.int32)
        self._row_of = np.full(slots, rows, np.int64)
        self._filled = 0  # slots from here on were never used
        self._hand = 0
        # Counts of lookups. All counts decay in relation: the weight of one use rises.
        self._unit = 1.0
        self._count = np.full(slots, FREE, np.float32)
        self._left_with = np.zeros(rows + 1, np.float32)  # a row's count when it was evicted, restored when it returns
        self._staging = [_Staging(self.table) for _ in range(2)]
        self._next_staging = 0

    @classmethod
    def within(cls, budget_bytes: int, host: Tensor, *, device: torch.device | str, dtype: torch.dtype) -> HotRows:
        """Make a cache of as many rows as fit in `budget_bytes`. Raises ValueError if not one does."""
        one = host.shape[1] * dtype.itemsize
        if budget_bytes < one:
            raise ValueError(f"cache.item_memory_gb: a row takes {one} bytes, the budget has {budget_bytes}; raise it")
        return cls(host, slots=min(budget_bytes // one, len(host)), device=device, dtype=dtype)

    def lookup(self, rows: Int64Array, readers: torch.cuda.Event | None = None) -> Int64Array:
        """Return slots int64 [n] of table rows int64 [n], repeats allowed.

        The rows are in `table` for all work that is queued on the device's current stream from now on, until the next
        lookup. Waits for the device only if both staging buffers are still being copied. readers: rows are replaced
        after this event, where those who read `table` are on other streams.

        Raises IndexError for a row that the table lacks, and RuntimeError for more distinct rows than slots. Neither
        changes anything. If fetching fails, the missing rows stay absent, and the error is passed on.
        """
        if not len(rows):
            return np.empty(0, np.int64)
        # Sorting is the fastest way to find distinct rows, and reads the maps and the host table in order.
        ordered = np.sort(rows)
        first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        distinct = ordered[first]
        self._check(distinct)
        slots = self._slot_of.take(distinct, mode="clip")
        absent = slots < 0
        missing, hits = distinct[absent], slots[~absent]
        counts = self._count[hits] + np.float32(self._unit)
        self._count[hits] = IN_USE
        try:
            if len(missing):
                self._fetch(missing, readers)
        finally:
            self._count[hits] = counts
        repeats = np.diff(first, append=len(rows))
        count = self.counters
        count.tokens += len(rows)
        count.token_hits += len(rows) - int(repeats[absent].sum())
        count.distinct += len(distinct)
        count.hits += len(hits)
        count.misses += len(missing)
        count.bytes += len(missing) * self.table.shape[1] * self.table.itemsize
        self._age(len(distinct))
        return self._slot_of.take(rows, mode="clip").astype(np.int64)

    def place(self, parts: Sequence[Int64Array]) -> None:
        """Replace the table rows in `parts`, int64 arrays, by their slots. One lookup, with its errors."""
        slots = self.lookup(np.concatenate(parts))
        for part, placed in zip(parts, np.split(slots, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
            part[:] = placed

    def snapshot(self) -> Snapshot:
        """Return copies of the maps and counts."""
        return Snapshot(self._slot_of[:-1].copy(), self._row_of.copy(), self._count.copy(), self._unit)

    def _check(self, distinct: Int64Array) -> None:
        if distinct[0] < 0 or distinct[-1] >= len(self.host):
            wrong = distinct[0] if distinct[0] < 0 else distinct[-1]
            raise IndexError(f"row {wrong} of a table of {len(self.host)} rows")
        if len(distinct) > self.slots:
            needed = len(distinct) * self.table.shape[1] * self.table.itemsize / 1e9
            raise RuntimeError(
                f"a batch needs {len(distinct)} different rows of the embedding table ({needed:.3g} GB), and "
                f"cache.item_memory_gb holds {self.slots}; give it more, or run smaller batches"
            )

    def _fetch(self, rows: Int64Array, readers: torch.cuda.Event | None) -> None:
        """Put distinct missing rows into slots. They count as present once their copies are queued."""
        slots = self._take(len(rows))
        gone = self._row_of[slots]
        self._slot_of[gone] = -1
        self._left_with[gone] = self._count[slots]
        self._row_of[slots], self._count[slots] = len(self.host), FREE
        self.counters.evictions += int(np.count_nonzero(gone < len(self.host)))

        most = self._staging[0].rows
        for begin in range(0, len(rows), most):
            part = slice(begin, begin + most)
            self._staging[self._next_staging].write(self.host, rows[part], slots[part], self.table, readers)
            self._next_staging ^= 1

        self._slot_of[rows], self._row_of[slots] = slots, rows
        self._count[slots] = self._left_with[rows] + np.float32(self._unit)

    def _take(self, count: int) -> Int64Array:
        """Return slots for new rows: unused ones, then those of evicted rows, except rows that this lookup uses."""
        fresh = np.arange(self._filled, min(self._filled + count, self.slots))
        self._filled += len(fresh)
        self._count[fresh] = IN_USE
        count -= len(fresh)
        if not count:
            return fresh
        window = WINDOW * count
        while True:  # ends: with all slots in the window there are enough, since `_check` let the lookup pass
            window = min(window, self.slots)
            begin = min(self._hand, self.slots - window)
            counts = self._count[begin : begin + window]
            least = np.argpartition(counts, count - 1)[:count]
            if counts[least[-1]] < IN_USE:  # the largest of them
                self._hand = (begin + window) % self.slots
                return np.concatenate([fresh, begin + least])
            window *= 2

    def _age(self, distinct: int) -> None:
        self._unit *= 2.0 ** (distinct / (HALF_LIFE * self.slots))
        if self._unit > _SCALE:
            for counts in (self._count, self._left_with):
                counts *= 1 / _SCALE
            self._unit /= _SCALE


class _Staging:
    """Host memory for slots and rows: one copy to the device moves both."""

    def __init__(self, table: Tensor) -> None:
        self._row_bytes = table.shape[1] * table.itemsize
        self.rows = max(min(STAGING_BYTES // self._row_bytes, len(table)), 1)
        cuda = table.device.type == "cuda"
        self._buffer = torch.empty(self.rows * (8 + self._row_bytes), dtype=torch.uint8, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None

    def write(
        self, host: Tensor, rows: Int64Array, slots: Int64Array, table: Tensor, readers: torch.cuda.Event | None
    ) -> None:
        """Queue table[slots] = host[rows] on the current stream. The copy to the device doesn't wait for readers."""
        if self._copied is not None:
            self._copied.synchronize()  # the earlier copy from this buffer
        n = len(rows)
        part = self._buffer[: n * (8 + self._row_bytes)]
        self._views(part, n, table)[0].copy_(torch.from_numpy(slots))
        gather_rows(host, torch.from_numpy(rows), out=self._views(part, n, table)[1])
        moved = part.to(table.device, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(table.device))
        if readers is not None:
            torch.cuda.current_stream(table.device).wait_event(readers)
        table.index_copy_(0, *self._views(moved, n, table))

    @staticmethod
    def _views(buffer: Tensor, n: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots int64 [n] and the rows [n, E] in a buffer."""
        return buffer[: 8 * n].view(torch.int64), buffer[8 * n :].view(table.dtype).view(n, -1)


def gather_rows(table: Tensor, rows: Tensor, *, out: Tensor) -> None:
    """Write table[rows] to `out`, rounded to its dtype."""
    if out.dtype == table.dtype:
        torch.index_select(table, 0, rows, out=out)
    else:
        out.copy_(table[rows])
