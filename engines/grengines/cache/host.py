"""The host tier: KV caches of evicted users in page-locked memory.

A state is offloaded when it is evicted. Its pages are gathered on the device in stream order, so they can be reused at
once, and the copy to the host overlaps later work. A state is loaded one layer ahead of the computation, which waits
for each layer just before it reads it. Pages that the host already has are not sent again. On a CPU the same code runs
without streams: copies are done at once.

All memory that copies take is made with the tier, and every kernel of theirs runs once then: asking a GPU for memory
or loading a kernel may wait for all that is queued, and requests would wait too.

With a storage tier below, `reserve` further pages are the memory of states on their way to the disk and back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grengines.cache.extents import Extent, Extents, cut, joined
from grengines.cache.history import History
from grengines.cache.pool import PagePool
from grengines.cache.storage_file import BLOCK
from grengines.cache.transfer import PageIds
from grengines.runtime.timing import Mark

AHEAD = 2  # layers in flight to the device at once
DOWN_BYTES = 2 << 30  # most memory for gathered states that wait for their copy to the host; others are dropped
UP_BYTES = 512 << 20  # most memory for layers in flight to the device
UP_LOADS = 4  # times the pool's pages whose numbers may be on their way to the device
WARM_PAGES = 32  # most pages of the copies that load all kernels: those for few rows and those for many
STAGED_SHARE = 0.125  # most bytes of prefetched states, as a share of the device's pool


def side_stream(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return what enters a stream for copies that run while the main stream computes; on a CPU there is no stream.

    Each entry is a context of its own, because threads enter the same stream.
    """
    return partial(torch.cuda.stream, torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext


@dataclass(eq=False)
class HostState:
    """State of one user on the host."""

    tokens: int
    history: History
    extents: list[Extent]
    written: Mark | None  # end of the copy from the device
    now: float  # time of the user's last visit


class Reading(Protocol):
    """Pages of one user on their way from the disk to pages of the host, layer by layer."""

    extents: list[Extent]
    times: list[float]  # when it began, and when each layer was there (seconds, time.perf_counter)

    def ready(self, layer: int) -> bool:
        """Return whether a layer is there as it was written, so that `wait` returns at once."""

    def wait(self, layer: int) -> None:
        """Wait until a layer is there. Raises ReadError (grengines.cache.storage) where it is not as it was written."""


@dataclass
class Load:
    """Pages of one user to load from the host."""

    user: int
    first: int  # first page of the state to load
    pages: Sequence[int]  # of the device, for this page and those after it
    reading: Reading | None = None  # of these pages, which only the storage tier has


@dataclass
class _Source:
    """The places of the pages of a load."""

    load: Load
    extents: list[Extent]  # of the host's memory, or of that of prefetched states
    there: list[Mark]  # until then they are on their way
    near: bool = False  # they were prefetched


@dataclass
class _Staged:
    """A prefetched state: on the device, beside the pages."""

    extents: list[Extent]  # of the memory of prefetched states
    there: Mark


@dataclass
class HostTier:
    """Pages of host memory, and the states in them. Not thread-safe: `UserStates` holds `lock` around it.

    A page holds the keys of one layer, then its values and then the scales of 8-bit ones, as whole words. So a state's
    layer is one copy for each run of pages.

    On the device the tier has memory for as many gathered pages as the pool has, at most DOWN_BYTES, for AHEAD layers
    of as many pages, at most UP_BYTES, and for the prefetched states.

    Raises ValueError if not one page fits, RuntimeError if the memory can't be page-locked, torch.OutOfMemoryError if
    the device has no room.
    """

    pool: PagePool
    budget_bytes: int
    reserve: int = 0  # pages beside the budget, for a storage tier
    prefetches: bool = False  # states will be prefetched: their memory is made now, and not for the first of them
    bytes_down: int = 0  # sent to the host so far
    used: int = 0  # pages of all states
    states: dict[int, HostState] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)  # a load takes it for each layer, beside prefetches
    _staged: dict[int, _Staged] = field(default_factory=dict)
    _last_read: Mark | None = None  # end of all copies to the device so far
    _last_write: Mark | None = None  # end of all copies from the device so far
    _last_placed: Mark | None = None  # end of all reads of prefetched states so far

    def __post_init__(self) -> None:
        pool = self.pool
        self.device = pool.k[0].device
        self.pages = self.budget_bytes // pool.page_bytes
        if self.pages < 1:
            raise ValueError(
                f"cache.host_gb: a page takes {pool.page_bytes} bytes, the budget has {self.budget_bytes}; raise it"
            )
        self.extents = Extents(self.pages + self.reserve)
        self._parts = as_words([pool.all_k, pool.all_v, *pool.all_scales])
        self._widths = [x.shape[2] for x in self._parts]
        word = self._parts[0].dtype
        if self.reserve and (rest := -sum(self._widths) % (BLOCK // word.itemsize)):
            self._widths.append(rest)  # a disk takes whole blocks
        shape = (self.pages + self.reserve, sum(self._widths))
        with torch.inference_mode(False):  # made in that mode, it could be written to in that mode only
            self.layers = [_aligned(shape, word) for _ in pool.k]
            self._make_transfers()
        self._locked: list[int] = []
        try:
            if self.device.type == "cuda":
                self._lock_memory()
            self._warm_up()
        except BaseException:  # CUDA would keep memory locked that is no longer there
            self.close()
            raise

    def _lock_memory(self) -> None:
        """Page-lock the memory on the host."""
        for x in self.layers:
            code = int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0))
            if code:
                raise RuntimeError(
                    f"cache.host_gb: {x.nbytes} bytes can't be page-locked (CUDA error {code}); lower it"
                )
            self._locked.append(x.data_ptr())

    def _make_transfers(self) -> None:
        """Make the memory and the streams of all copies."""
        pool, (_, words), word = self.pool, self.layers[0].shape, self.layers[0].dtype
        gathered = min(max(DOWN_BYTES // pool.page_bytes, 1), pool.pages)
        loaded = min(max(UP_BYTES // (AHEAD * words * word.itemsize), 1), pool.pages)
        self._down_ids = PageIds(len(self.layers) * gathered, self.device)
        self._up_ids = PageIds(UP_LOADS * pool.pages, self.device)
        self._gathered = torch.empty(self._down_ids.rows, words, dtype=word, device=self.device)
        if len(self._widths) > len(self._parts):  # what a disk takes beyond a page stays zero
            self._gathered[:, -self._widths[-1] :] = 0
        self._staging = [torch.empty(loaded, words, dtype=word, device=self.device) for _ in range(AHEAD)]
        self._first_rows = np.arange(len(self.layers))[:, None] * pool.pages  # of each layer in `_flat`
        self._flat = [x.flatten(0, 1) for x in self._parts]
        self._down, self._up = side_stream(self.device), side_stream(self.device)
        self._placed = [Mark(self.device)] * AHEAD  # from here on the staging memory is free
        self._ahead: Tensor | None = None  # memory of prefetched states [layers, pages, words]
        self._ahead_pages = Extents(int(STAGED_SHARE * pool.pages))
        self._leaving: list[Extent] = []  # of it: what the last load reads
        self._last_load: Onload | None = None
        if self.prefetches:
            self._make_ahead()

    def _make_ahead(self) -> Tensor:
        shape = len(self.layers), self._ahead_pages.available, self.layers[0].shape[1]
        with torch.inference_mode(False):
            self._ahead = torch.zeros(shape, dtype=self.layers[0].dtype, device=self.device)
        made = Mark(self.device)
        with self._up():
            made.wait()
        return self._ahead

    def _warm_up(self) -> None:
        """Copy first pages to the host and back, few and many of them, so that all kernels are loaded."""
        n = 1
        while n <= min(WARM_PAGES, self.pages, self.pool.pages):
            there = self._copy_down(range(n), [(0, n)])
            Onload(self, [_Source(Load(0, 0, range(n)), [(0, n)], [there])]).all_layers()
            if self._ahead is not None and n <= self._ahead.shape[1]:  # zeros, as the pages
                Onload(self, [_Source(Load(0, 0, range(n)), [(0, n)], [], near=True)]).all_layers()
            n *= 2

    @property
    def device_bytes(self) -> int:
        """Return the bytes of the memory on the device that copies take."""
        ahead = [] if self._ahead is None else [self._ahead]
        return sum(x.nbytes for x in (self._gathered, *self._staging, *ahead))

    def close(self) -> None:
        """Unlock the memory; the tier can't be used any more."""
        if self._locked:
            torch.cuda.synchronize()
        for address in self._locked:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._locked.clear()
        self.states.clear()
        self._staged.clear()
        self._last_load = None

    def drop(self, user: int) -> None:
        """Drop the state of a user who has one. Its pages are free at once: later writes to them wait for readers."""
        self.extents.free(self.take_out(user).extents)

    def take_out(self, user: int) -> HostState:
        """Return the state of a user who has one, which is no longer in the tier. Its pages stay taken."""
        state = self.states.pop(user)
        self.used -= sum(n for _, n in state.extents)
        if (staged := self._staged.pop(user, None)) is not None:
            self._ahead_pages.free(staged.extents)
        return state

    def store(
        self, user: int, tokens: int, history: History, pages: Sequence[int], same: int, now: float = 0.0
    ) -> bool:
        """Copy a user's state from its pages on the device. The host already has its first `same` tokens.

        now: time of the user's last visit. There must be room for it (`lacking` is 0). Returns whether it is taken: not
        while too many copies wait.
        """
        old = self.states.get(user)
        if old is not None:
            old.now = now
        if same == tokens:
            return True
        keep = same // self.pool.page  # pages that need not be sent again
        if self._down_ids.room(min(len(self.layers) * (len(pages) - keep), self._down_ids.rows)) is None:
            return False
        kept: list[Extent] = []
        if old is not None:
            kept = list(cut(old.extents, 0, keep))
            self.extents.free(list(cut(old.extents, keep, self.pages)))
            self.take_out(user)
        new: list[Extent] = []
        try:
            new = self.extents.allocate(len(pages) - keep)
            written = self._copy_down(pages[keep:], new)
        except BaseException:
            self.extents.free([*kept, *new])
            raise
        self.bytes_down += (len(pages) - keep) * self.pool.page_bytes
        self.states[user] = HostState(tokens, history, [*kept, *new], written, now)
        self.used += len(pages)
        return True

    def lacking(self, user: int, pages: int) -> int:
        """Return the number of pages that must be freed before `store` has room for a state of `pages` pages."""
        own = sum(n for _, n in self.states[user].extents) if user in self.states else 0
        return max(pages - own - (self.pages - self.used), 0)

    def _copy_down(self, pages: Sequence[int], extents: Sequence[Extent]) -> Mark:
        """Gather pages of all layers at once, and queue their copy to these runs.

        What is more than all the memory for gathered pages goes in pieces, each after the one before.
        """
        piece = self._down_ids.rows // len(self.layers)
        for at in range(0, len(pages), piece):
            part = pages[at : at + piece]
            written = self._copy_piece(part, list(cut(extents, at, at + len(part))))
        return written

    def _copy_piece(self, pages: Sequence[int], extents: Sequence[Extent]) -> Mark:
        n = len(self.layers) * len(pages)
        begin = self._down_ids.take(n)
        ids = self._down_ids.put(begin, (self._first_rows + np.array(pages)).reshape(-1))
        rows = self._gathered[begin : begin + n]
        for part, gathered in zip(self._flat, rows.split(self._widths, dim=1), strict=False):
            torch.index_select(part, 0, ids, out=gathered)
        ready = Mark(self.device)
        with self._down():
            if self._last_read is not None:  # earlier contents of these pages may still be read
                self._last_read.wait()
            ready.wait()
            for host, layer in zip(self.layers, rows.unflatten(0, (-1, len(pages))), strict=True):
                at = 0
                for first, length in extents:
                    host[first : first + length].copy_(layer[at : at + length], non_blocking=True)
                    at += length
            self._last_write = Mark(self.device)
        self._down_ids.hold(begin, n, self._last_write)
        return self._last_write

    def finish_copies(self) -> None:
        """Wait for all copies to and from the device that are queued by now. Needs no lock."""
        for mark in (self._last_read, self._last_write):
            if mark is not None:
                mark.synchronize()

    def load(self, loads: Sequence[Load]) -> Onload:
        """Start to load states into pages of the device.

        The load before has queued all its layers or was given up: loads share the memory on the way.
        """
        self._free_left(given_up=True)
        self._last_load = Onload(self, [self._source(load) for load in loads])
        return self._last_load

    def _source(self, load: Load) -> _Source:
        if load.reading is not None:
            return _Source(load, load.reading.extents, [])
        state, staged, stop = self.states[load.user], self._staged.pop(load.user, None), load.first + len(load.pages)
        if staged is not None:
            self._leaving += staged.extents
            return _Source(load, list(cut(staged.extents, load.first, stop)), [staged.there], near=True)
        there = [state.written] if state.written is not None else []
        return _Source(load, list(cut(state.extents, load.first, stop)), there)

    def _free_left(self, given_up: bool) -> None:
        """Free the prefetched states that the last load read, if it has queued all its copies or was given up."""
        if given_up or self._last_load is None or self._last_load.queued:
            self._ahead_pages.free(self._leaving)
            self._leaving = []

    def prefetch(self, user: int) -> bool:
        """Start to load a user's state beside the pages. Return whether there is room for it."""
        self._free_left(given_up=False)
        state = self.states[user]
        pages = sum(n for _, n in state.extents)
        if user in self._staged or pages > self._ahead_pages.available:
            return False
        memory = self._make_ahead() if self._ahead is None else self._ahead
        extents = self._ahead_pages.allocate(pages)
        with self._up():
            for mark in (state.written, self._last_placed):
                if mark is not None:
                    mark.wait()
            for ahead, host in zip(memory, self.layers, strict=True):
                at = 0
                for to, length in extents:
                    for begin, n in cut(state.extents, at, at + length):
                        ahead[to : to + n].copy_(host[begin : begin + n], non_blocking=True)
                        to, at = to + n, at + n
            self._last_read = Mark(self.device)
        self._staged[user] = _Staged(extents, self._last_read)
        return True

    def prefetched(self, user: int) -> bool:
        """Return whether the user's state was prefetched. The copy may not have ended."""
        return user in self._staged

    def bytes_a_second(self) -> float:
        """Measure the bandwidth of copies from page-locked memory to the device: at most 64 MiB, the best of three."""
        most = min(max((64 << 20) // self.layers[0][0].nbytes, 1), len(self._staging[0]))
        host = self.layers[0][:most]
        there = self._staging[0][: len(host)]
        spans = []
        for _ in range(4):  # the first one warms up
            begin = Mark(self.device)
            there.copy_(host, non_blocking=True)
            spans.append(begin.ms_until(Mark(self.device)))
        return 1e3 * host.nbytes / max(min(spans[1:]), 1e-6)


def as_words(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous tensors [layers, pages, ...] as integers [layers, pages, words], views: the widest that fit.

    Copies of wide words are fast, and take every dtype.
    """
    flat = [x.flatten(2) for x in parts]
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    word = next(w for w in words if not any(x.shape[2] * x.itemsize % w.itemsize for x in flat))
    return [x.view(word) for x in flat]


class Onload:
    """States of one batch that are being loaded.

    Call `layer(i)` before layer i writes or reads its pages, or `all_layers` before any does; both raise ReadError for
    pages of the storage tier that are not as they were written. A layer of more pages than the tier's memory on the way
    goes in steps. Prefetched states go to their pages straight from where they are.

    bytes: of all states; host_bytes: of those that have to be copied from the host, storage_bytes: of those that have
    to be read from the disk first.
    """

    def __init__(self, tier: HostTier, sources: Sequence[_Source]) -> None:
        self._tier, self._device, self._up = tier, tier.device, tier._up
        far = [source for source in sources if not source.near]
        near = [source for source in sources if source.near]
        one, pages = tier.pool.page_bytes, [page for s in (*far, *near) for page in s.load.pages]
        self.bytes = len(pages) * one
        self.storage_bytes = one * sum(len(s.load.pages) for s in far if s.load.reading is not None)
        self.host_bytes = one * (copied := sum(len(s.load.pages) for s in far))
        self.read_wait_ms = 0.0  # that the host waited for the disk
        begin = tier._up_ids.take(len(pages))
        ids = tier._up_ids.put(begin, np.array(pages, np.int64))
        tier._up_ids.hold(begin, len(pages), Mark(self._device))
        self._readings = [source.load.reading for source in far if source.load.reading is not None]
        self._ids = ids[:copied].split(len(tier._staging[0])) if copied else ()  # of each step of a layer
        self._runs = [list(_runs(far, i * len(tier._staging[0]), len(ids))) for i, ids in enumerate(self._ids)]
        self._sent: list[tuple[Mark, Mark]] = []  # of each step
        self._waits: list[tuple[Mark, Mark]] = []
        extents = joined(extent for source in near for extent in source.extents)
        self._near = list(zip(ids[copied:].split([n for _, n in extents]), extents, strict=True)) if near else []
        self._near_there = [there for source in near for there in source.there]
        self._placed = 0 if near else len(tier.layers)  # layers of prefetched states that are in their pages
        with self._up():
            for source in far:
                for there in source.there:
                    there.wait()
        self._send_ahead(AHEAD)

    @property
    def queued(self) -> bool:
        """Return whether the copies of all layers are queued."""
        layers = len(self._tier.layers)
        return len(self._sent) == layers * len(self._ids) and self._placed == layers

    def layer(self, i: int) -> None:
        """Make the current stream wait for layer i, and put the layer into its pages."""
        self._place(i, i + 1)
        self._arrive(i)

    def all_layers(self) -> None:
        """Put every layer into its pages before anything is computed, as a CUDA graph needs."""
        self._place(0, len(self._tier.layers))
        for i in range(len(self._tier.layers)):
            self._arrive(i)

    def times_ms(self) -> tuple[float, float]:
        """Return (time that the computation waited, time of the copies); waits until all is done."""
        waits, copies = (sum(a.ms_until(b) for a, b in spans) for spans in (self._waits, self._sent))
        return waits, copies

    def read_ms(self) -> float:
        """Return the time from the begin of the first read from the disk to the end of the last; 0 without any."""
        times = [time for reading in self._readings for time in reading.times]
        return (max(times) - min(times)) * 1e3 if times else 0.0

    def _place(self, first: int, stop: int) -> None:
        """Put the prefetched states of layers first to stop - 1 into their pages, in the current stream."""
        if not self._near:
            return
        tier = self._tier
        assert tier._ahead is not None
        if self._near_there:
            begin = Mark(self._device)
            for there in self._near_there:
                there.wait()
            self._waits.append((begin, Mark(self._device)))
            self._near_there = []
        for ids, (at, n) in self._near:
            rows = tier._ahead[first:stop, at : at + n]
            for pages, part in zip(tier._parts, rows.split(tier._widths, dim=2), strict=False):
                pages[first:stop].index_copy_(1, ids, part)
        tier._last_placed = Mark(self._device)
        self._placed = stop

    def _arrive(self, i: int) -> None:
        """Make the current stream wait for layer i on its way from the host, and put it into its pages."""
        tier = self._tier
        for step, ids in enumerate(self._ids, i * len(self._ids)):
            if step == len(self._sent):
                self._send(step)
            begin = Mark(self._device)
            self._sent[step][1].wait()
            # On a CPU the copy itself is the wait.
            self._waits.append((begin, Mark(self._device)) if self._device.type == "cuda" else self._sent[step])
            staging = tier._staging[step % AHEAD][: len(ids)]
            for pages, part in zip(tier._parts, staging.split(tier._widths, dim=1), strict=False):
                pages[i].index_copy_(0, ids, part)
            tier._placed[step % AHEAD] = Mark(self._device)
            self._send_ahead(step + 1 + AHEAD)

    def _send_ahead(self, stop: int) -> None:
        """Queue the copies of the steps before `stop`, as far as they are on the host."""
        while (step := len(self._sent)) < min(stop, len(self._tier.layers) * len(self._ids)):
            if not all(reading.ready(step // len(self._ids)) for reading in self._readings):
                return
            self._send(step)

    def _send(self, step: int) -> None:
        (i, part), at, tier = divmod(step, len(self._ids)), 0, self._tier
        begun = time.perf_counter()
        for reading in self._readings:
            reading.wait(i)
        self.read_wait_ms += (time.perf_counter() - begun) * 1e3
        staging = tier._staging[step % AHEAD]
        with tier.lock, self._up():
            tier._placed[step % AHEAD].wait()
            begin = Mark(self._device)
            for first, n in self._runs[part]:
                staging[at : at + n].copy_(tier.layers[i][first : first + n], non_blocking=True)
                at += n
            tier._last_read = Mark(self._device)
            self._sent.append((begin, tier._last_read))


def _runs(sources: Sequence[_Source], first: int, n: int) -> Iterator[Extent]:
    """Yield the runs of n pages of all sources, one after another, from page `first` on."""
    for source in sources:
        yield from cut(source.extents, first, first + n)
        first -= len(source.load.pages)


def _aligned(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor on the host that begins at a page of memory, as direct I/O needs."""
    memory = mmap(-1, max(prod(shape) * dtype.itemsize, 1), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
