"""The storage tier: KV caches that the host evicted, in one file on a disk.

A state is written from the host's page-locked memory when the host evicts it, and read back into such memory when the
user returns, each layer before the computation needs it. Threads do both, so the engine goes on meanwhile. The memory
of what is on its way is `HostTier.reserve`. Each page of each layer has a checksum, which is compared at every read.

A record is in the index on disk only while its pages are on the disk as they were written: it is removed before they
are overwritten, and added once they are synchronised.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from grengines.cache.extents import Extent, Extents, cut
from grengines.cache.host import HostState, HostTier
from grengines.cache.storage_file import Folder, RowFile, Rows, disk_of
from grengines.cache.storage_index import DiskIndex, Record
from grengines.runtime.timing import Mark

RESERVE_SHARE = 0.125  # pages of the host on their way to the disk and back, as a share of the host tier
AHEAD_SHARE = 0.5  # most of them for states that are read before they are asked for
THREADS = min(max(2 * len(os.sched_getaffinity(0)), 4), 16)  # that read: half wait for the disk, half compute checksums
PROBE_BYTES = 64 << 20  # read to measure the disk


class ReadError(RuntimeError):
    """Pages that the disk does not have as they were written. broken: the disk can't be read at all."""

    def __init__(self, user: int, pages: int, broken: bool, what: str) -> None:
        super().__init__(what)
        self.user, self.pages, self.broken = user, pages, broken


@dataclass(eq=False)
class StoredState(Record):
    """State of one user on the disk."""

    now: float  # time of the user's last visit
    written: Future[None] | None = None  # None: an earlier process wrote it


@dataclass(frozen=True)
class _Piece:
    """Adjacent pages both in the file and on the host."""

    page: int  # of the state
    row: int  # of the file
    host: int
    pages: int


@dataclass(eq=False)
class _Write:
    """A state to write."""

    user: int
    stored: StoredState
    old: StoredState | None  # of the same user: its first `keep` pages stay where they are
    keep: int
    pieces: list[_Piece]
    there: Mark | None  # end of the copy from the device
    dropped: set[int]  # users whose records are to be removed first

    @property
    def done(self) -> Future[None]:
        assert self.stored.written is not None
        return self.stored.written


@dataclass(eq=False)
class StoredReading:
    """Pages of one user on their way from the disk: grengines.cache.host.Reading."""

    user: int
    first: int  # page of the state
    held: list[Extent]  # of the host: all pages that are read
    layers: list[Future[list[int]]]  # the pages of each layer that are not as they were written
    times: list[float]  # when the read began, and when each layer was there (seconds, time.perf_counter)
    extents: list[Extent] = field(default_factory=list)  # of the host: the pages that are asked for
    last_copy: Mark | None = None  # end of the copies from these pages of the host to the device
    ended: bool = False  # nobody will ask for further copies

    def ready(self, layer: int) -> bool:
        done = self.layers[layer]
        return done.done() and done.exception() is None and not done.result()

    def wait(self, layer: int) -> None:
        try:
            if not self.layers[layer].result():
                return
            pages = set(chain.from_iterable(future.result() for future in self.layers))
        except OSError as error:
            raise ReadError(self.user, 0, True, f"the state of user {self.user} can't be read: {error}") from error
        raise ReadError(
            self.user, len(pages), False, f"{len(pages)} pages of user {self.user} are not as they were written"
        )

    def over(self) -> bool:
        """Return whether the pages of the host are free for others."""
        copied = self.ended and (self.last_copy is None or self.last_copy.reached())
        return copied and all(future.done() for future in self.layers)


@dataclass
class StorageTier:
    """Rows of a file, and the states in them. Not thread-safe: `UserStates` holds its lock around it.

    path, key: as in Folder; the key names everything that a state's bytes depend on, so no state is found by an engine
    of other weights. Raises ValueError for a folder or a size that is not available.
    """

    host: HostTier
    budget_bytes: int
    path: str
    key: str
    error: str = ""  # why the tier is switched off
    bytes_down: int = 0  # sent to the disk so far
    bytes_up: int = 0  # asked from the disk so far
    states: dict[int, StoredState] = field(default_factory=dict)
    ahead: dict[int, StoredReading] = field(default_factory=dict)  # by user: read before they are asked for
    _waiting: list[_Write] = field(default_factory=list)  # that the writer has not begun
    _waiting_lock: threading.Lock = field(default_factory=threading.Lock)
    _dropped: set[int] = field(default_factory=set)  # users whose records are to be removed before the next write
    _writes: list[tuple[Future[None], list[Extent]]] = field(default_factory=list)
    reads: list[StoredReading] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = [layer.numpy().view(np.uint8) for layer in self.host.layers]
        self.rows: list[Rows] = rows  # of each layer, [pages of the host, bytes of one]
        row_bytes = rows[0].shape[1]
        self.pages = self.budget_bytes // (row_bytes * len(rows))
        if self.pages < 1:
            raise ValueError(
                f"cache.storage_gb: a page takes {row_bytes * len(rows)} bytes, the budget has {self.budget_bytes}; "
                "raise it"
            )
        with ExitStack() as opened:
            self._folder = Folder(self.path, self.key)
            opened.callback(self._folder.close)
            self._index = DiskIndex(self._folder.path, self.pages)
            opened.callback(self._index.close)
            self.file = RowFile(self._folder, self.pages * len(rows), row_bytes)
            opened.callback(self.file.close)
            self._index.keep_size()
            self.extents = Extents(self.pages)
            self._load()
            opened.pop_all()  # all is there: nothing is closed
        self._readers = ThreadPoolExecutor(THREADS, "storage-read")
        self._writer = ThreadPoolExecutor(1, "storage-write")  # in order: a page is written after its record is removed

    def _load(self) -> None:
        """Take up the states of an earlier process."""
        records = self._index.load()
        taken = sorted(chain.from_iterable(record.extents for record in records.values()))
        self.extents.allocate(self.pages)
        edges = [(0, 0), *taken, (self.pages, 0)]
        gaps = [(a + n, b - a - n) for (a, n), (b, _) in pairwise(edges)]
        self.extents.free([gap for gap in gaps if gap[1]])
        self.states |= {user: StoredState(**vars(record), now=0.0) for user, record in records.items()}

    @property
    def folder(self) -> Path:
        """Return the folder of the file and its index."""
        return self._folder.path

    @property
    def kept(self) -> bool:
        """Return whether states stay when the process ends."""
        return self._folder.temporary is None

    def actual(self) -> dict[str, object]:
        """Return the entries of a record."""
        return {
            "cache_storage_pages": self.pages,
            "cache_storage_path": str(self._folder.path),
            "cache_storage_disk": disk_of(self._folder.path),
            "cache_storage_direct": self.file.direct,  # False: through the kernel's page cache
            "cache_storage_kept": self.kept,
        }

    def lacking(self, user: int, pages: int) -> int:
        """Return the number of pages that must be freed before `store` has room for a state of `pages` pages."""
        own = sum(n for _, n in self.states[user].extents) if user in self.states else 0
        return max(pages - own - self.extents.available, 0)

    def drop(self, user: int) -> None:
        """Drop the state of a user who has one."""
        self.extents.free(self.states.pop(user).extents)
        self._dropped.add(user)
        self.forget_ahead(user)

    def ready(self, state: HostState, same: int) -> bool:
        """Return whether there is memory for what `store` would write of a state: it refuses the state otherwise."""
        pages, page = sum(n for _, n in state.extents), self.host.pool.page
        return same == state.tokens or pages - same // page <= self.room()

    def store(self, user: int, state: HostState, same: int) -> bool:
        """Take over a state that left the host, and write it in the background. The disk has its first `same` tokens.

        There must be room for it (`lacking` is 0). Returns whether it is taken: not while too much is on its way.
        """
        pages, keep = sum(n for _, n in state.extents), same // self.host.pool.page
        old = self.states.get(user)
        if old is not None and same == state.tokens:
            old.now = state.now
            self.host.extents.free(state.extents)
            return True
        if not self.ready(state, same):
            return False
        kept = list(cut(old.extents, 0, keep)) if old is not None else []
        if old is not None:
            self.extents.free(list(cut(old.extents, keep, self.pages)))
            self.forget_ahead(user)
        new = self.extents.allocate(pages - keep)
        self.host.extents.free(list(cut(state.extents, 0, keep)))
        moving = list(cut(state.extents, keep, pages))
        sums = np.zeros((len(self.rows), pages), np.uint32)
        stored = StoredState(state.tokens, state.history, [*kept, *new], sums, state.now, Future())
        pieces, dropped = list(_pieces(new, moving, keep)), self._dropped | {user}
        self._queue(_Write(user, stored, old, keep, pieces, state.written, dropped), moving)
        self.bytes_down += (pages - keep) * self.host.pool.page_bytes
        self.states[user] = stored
        return True

    def read(self, user: int, first: int, pages: int) -> StoredReading | None:
        """Start to read pages of a user's state, unless that was done ahead. Return None if there is no memory for it.

        The caller sets `ended`.
        """
        reading = self.ahead.pop(user, None) or self._read(user, first, pages)
        if reading is not None:
            reading.extents = list(cut(reading.held, first - reading.first, first - reading.first + pages))
        return reading

    def read_ahead(self, user: int) -> bool:
        """Start to read a user's whole state. Return whether there is memory for it."""
        pages = sum(n for _, n in self.states[user].extents)
        there = sum(n for reading in self.ahead.values() for _, n in reading.held)
        if user in self.ahead or there + pages > AHEAD_SHARE * self.host.reserve:
            return False
        if (reading := self._read(user, 0, pages)) is None:
            return False
        self.ahead[user] = reading
        return True

    def forget_ahead(self, user: int) -> None:
        """Give up what was read ahead for a user, if anything was."""
        if (reading := self.ahead.pop(user, None)) is not None:
            reading.ended = True

    def end(self, reading: StoredReading) -> None:
        """Note that all copies from what was read are queued."""
        reading.last_copy, reading.ended = self.host._last_read, True

    def settle(self) -> None:
        """Free memory of the host whose copies are done, and note a write that failed."""
        for done, moving in [write for write in self._writes if write[0].done()]:
            self.host.extents.free(moving)
            if (error := done.exception()) is not None:
                self.error = self.error or str(error)
        self._writes = [write for write in self._writes if not write[0].done()]
        for reading in [reading for reading in self.reads if reading.over()]:
            self.host.extents.free(reading.held)
            self.reads.remove(reading)

    def finish_writes(self) -> None:
        """Wait until all states are on the disk."""
        wait_for([done for done, _ in self._writes])
        self.settle()

    def close(self) -> None:
        """Finish all work; the tier can't be used any more. A temporary folder is removed."""
        self._writer.submit(self._index.drop, self._dropped)
        self._writer.shutdown()
        self._readers.shutdown()
        self._index.close()
        self.file.close()
        self._folder.close()
        self.states.clear()

    def bytes_a_second(self) -> float:
        """Measure the bandwidth of reads and their checksums: of at most 64 MiB, the best of three."""
        each = max(PROBE_BYTES // (len(self.rows) * self.rows[0].shape[1]), 1)
        n = min(each, self.pages, self.host.reserve)
        places = self.host.extents.allocate(n)
        free = self.extents.allocate(n) if self.extents.available >= n else []
        pieces = list(_pieces(free or [(0, n)], places, 0))
        if free:  # a page that was never written is not read from the disk
            for layer in range(len(self.rows)):
                self._move(self.file.write, layer, pieces)
            self.file.sync()
        spans = []
        for _ in range(3):
            begin = time.perf_counter()
            list(self._readers.map(partial(self._probe, pieces=pieces), range(len(self.rows))))
            spans.append(time.perf_counter() - begin)
        self.host.extents.free(places)
        self.extents.free(free)
        return float(n * self.host.pool.page_bytes / min(spans))

    def _queue(self, write: _Write, moving: list[Extent]) -> None:
        """Have the writer write a state from these pages of the host."""
        self._dropped = set()
        self._writes.append((write.done, moving))
        with self._waiting_lock:
            self._waiting.append(write)
        self._writer.submit(self._write_all)

    def room(self) -> int:
        """Return the number of free pages for states on their way to the disk or back."""
        self.settle()
        writing = chain.from_iterable(moving for _, moving in self._writes)
        reading = chain.from_iterable(reading.held for reading in self.reads)
        return self.host.reserve - sum(n for _, n in chain(writing, reading))

    def _read(self, user: int, first: int, pages: int) -> StoredReading | None:
        while pages > self.room() and self.ahead:
            self.forget_ahead(next(iter(self.ahead)))
        if pages > self.room():
            return None
        stored, places = self.states[user], self.host.extents.allocate(pages)
        pieces = list(_pieces(list(cut(stored.extents, first, first + pages)), places, first))
        times = [time.perf_counter()]
        layers = [
            self._readers.submit(self._read_layer, stored, layer, pieces, times) for layer in range(len(self.rows))
        ]
        reading = StoredReading(user, first, places, layers, times)
        self.reads.append(reading)
        self.bytes_up += pages * self.host.pool.page_bytes
        return reading

    # Below, on the threads of the tier, without a lock.

    def _move(self, call: Callable[[int, Rows], None], layer: int, pieces: Sequence[_Piece]) -> None:
        """Read or write the rows of one layer."""
        for piece in pieces:
            call(layer * self.pages + piece.row, self.rows[layer][piece.host : piece.host + piece.pages])

    def _probe(self, layer: int, pieces: Sequence[_Piece]) -> None:
        self._move(self.file.read, layer, pieces)
        self._sums(layer, pieces)

    def _read_layer(self, stored: StoredState, layer: int, pieces: Sequence[_Piece], times: list[float]) -> list[int]:
        """Read the rows of one layer, and return those pages that are not as they were written. Raises OSError."""
        if stored.written is not None:
            stored.written.result()
        self.host.finish_copies()  # earlier contents of the host's pages may still be read or written
        self._move(self.file.read, layer, pieces)
        wrong = [page for page, sum_ in self._sums(layer, pieces) if sum_ != stored.sums[layer, page]]
        times.append(time.perf_counter())
        return wrong

    def _write_all(self) -> None:
        """Write the states that wait, with one synchronisation for all of them. Sets their futures."""
        with self._waiting_lock:
            writes, self._waiting = self._waiting, []
        try:
            if self.error:
                raise OSError(self.error)
            self._index.drop(set().union(*(write.dropped for write in writes)))
            for write in writes:
                self._write(write)
            self.file.sync()
            records, gone = dict[int, Record](), set[int]()
            for write in reversed(writes):  # of states that were dropped again, the pages may be others' by now
                if write.user not in gone:
                    records[write.user] = write.stored
                gone |= write.dropped
            self._index.put(dict(reversed(records.items())))
        except Exception as error:
            for write in writes:
                write.done.set_exception(error if isinstance(error, OSError) else OSError(repr(error)))
            return
        for write in writes:
            write.done.set_result(None)

    def _write(self, write: _Write) -> None:
        if write.there is not None:
            write.there.synchronize()
        if write.old is not None:
            write.stored.sums[:, : write.keep] = write.old.sums[:, : write.keep]
        for layer in range(len(self.rows)):
            for page, sum_ in self._sums(layer, write.pieces):
                write.stored.sums[layer, page] = sum_
            self._move(self.file.write, layer, write.pieces)

    def _sums(self, layer: int, pieces: Sequence[_Piece]) -> list[tuple[int, int]]:
        """Return (page of the state, checksum) of rows on the host."""
        rows = self.rows[layer]
        return [(p.page + i, zlib.crc32(rows[p.host + i])) for p in pieces for i in range(p.pages)]


def _pieces(rows: Sequence[Extent], places: Sequence[Extent], page: int) -> list[_Piece]:
    """Return the pieces in which runs of the file and runs of the host, of equally many pages, are both adjacent.

    page: of the state, the first of them.
    """
    pieces: list[_Piece] = []
    left = [list(run) for run in places]
    for row, n in rows:
        while n:
            begin, there = left[0]
            both = min(n, there)
            pieces.append(_Piece(page, row, begin, both))
            page, row, n = page + both, row + both, n - both
            left[0] = [begin + both, there - both]
            if not left[0][1]:
                left.pop(0)
    return pieces
