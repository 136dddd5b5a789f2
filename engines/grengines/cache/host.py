"""The host tier: KV caches of evicted users in page-locked memory.

A state is offloaded when it is evicted. Its pages are gathered on the device in stream order, so they can be reused at
once, and the copy to the host overlaps later work. A state is loaded one layer ahead of the computation, which waits
for each layer just before it reads it. Pages that the host already has are not sent again. On a CPU the same code runs
without streams: copies are done at once.

With a storage tier below, `reserve` further pages are the memory of states on their way to the disk and back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from grengines.cache.extents import Extent, Extents, cut
from grengines.cache.history import History
from grengines.cache.pool import PagePool
from grengines.cache.storage_file import BLOCK
from grengines.runtime.timing import Mark

AHEAD = 2  # layers in flight to the device at once
DOWN_BYTES = 2 << 30  # most gathered memory that waits for its copy to the host; further states are dropped
STAGED_SHARE = 0.125  # most bytes of prefetched states, as a share of the device's pool


class SideStream:
    """Stream for copies that run while the device's main stream computes; on a CPU no stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> SideStream:
        self._context: Any = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        self._context.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def keep(self, x: Tensor) -> None:
        """Keep the memory of `x`, made on another stream, until this stream is done with it."""
        if self._stream is not None:
            x.record_stream(self._stream)


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
    extents: list[Extent]  # of the host
    there: list[Mark]  # until then they are on their way
    staged: list[Tensor] | None  # they are on the device: each layer's pages


@dataclass
class _Staged:
    """A prefetched state: on the device, beside the pages."""

    state: HostState
    layers: list[Tensor]  # [pages, words of one]
    there: Mark


@dataclass
class HostTier:
    """Pages of host memory, and the states in them. Not thread-safe: `UserStates` holds its lock around it.

    A page holds the keys of one layer, then its values and then the scales of 8-bit ones, as whole words. So a state's
    layer is one copy for each run of pages.
    Raises ValueError if not one page fits, RuntimeError if the memory can't be page-locked.
    """

    pool: PagePool
    budget_bytes: int
    reserve: int = 0  # pages beside the budget, for a storage tier
    bytes_down: int = 0  # sent to the host so far
    used: int = 0  # pages of all states
    states: dict[int, HostState] = field(default_factory=dict)
    _staged: dict[int, _Staged] = field(default_factory=dict)
    _last_read: Mark | None = None  # end of all copies to the device so far
    _last_write: Mark | None = None  # end of all copies from the device so far

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
        self._locked: list[int] = []
        if self.device.type == "cuda":
            for x in self.layers:
                code = int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0))
                if code:
                    self.close()
                    raise RuntimeError(
                        f"cache.host_gb: {x.nbytes} bytes can't be page-locked (CUDA error {code}); lower it"
                    )
                self._locked.append(x.data_ptr())
        self._down, self._up = SideStream(self.device), SideStream(self.device)
        self._going_down: list[tuple[Mark, int]] = []

    def close(self) -> None:
        """Unlock the memory; the tier can't be used any more."""
        if self._locked:
            torch.cuda.synchronize()
        for address in self._locked:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._locked.clear()
        self.states.clear()
        self._staged.clear()

    def drop(self, user: int) -> None:
        """Drop the state of a user who has one. Its pages are free at once: later writes to them wait for readers."""
        self.extents.free(self.take_out(user).extents)

    def take_out(self, user: int) -> HostState:
        """Return the state of a user who has one, which is no longer in the tier. Its pages stay taken."""
        state = self.states.pop(user)
        self.used -= sum(n for _, n in state.extents)
        self._staged.pop(user, None)
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
        moving = (len(pages) - keep) * self.pool.page_bytes
        self._going_down = [(mark, n) for mark, n in self._going_down if not mark.reached()]
        if self._going_down and sum(n for _, n in self._going_down) + moving > DOWN_BYTES:
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
        self._going_down.append((written, moving))
        self.bytes_down += moving
        self.states[user] = HostState(tokens, history, [*kept, *new], written, now)
        self.used += len(pages)
        return True

    def lacking(self, user: int, pages: int) -> int:
        """Return the number of pages that must be freed before `store` has room for a state of `pages` pages."""
        own = sum(n for _, n in self.states[user].extents) if user in self.states else 0
        return max(pages - own - (self.pages - self.used), 0)

    def _copy_down(self, pages: Sequence[int], extents: Sequence[Extent]) -> Mark:
        """Gather pages of all layers at once, and queue their copy to these runs."""
        first = range(0, len(self.layers) * self.pool.pages, self.pool.pages)  # page of each layer
        ids = self._ids([layer + page for layer in first for page in pages])
        if self._last_read is not None:  # earlier contents of these pages may still be read
            with self._down:
                self._last_read.wait()
        parts = [x.flatten(0, 1).index_select(0, ids) for x in self._parts]
        parts += [x.new_zeros(len(ids), n) for x in parts[:1] for n in self._widths[len(parts) :]]
        block = torch.cat(parts, dim=1).unflatten(0, (-1, len(pages)))  # [layers, pages, words of one]
        gathered = Mark(self.device)
        with self._down:
            gathered.wait()
            for host, layer in zip(self.layers, block, strict=True):
                at = 0
                for begin, n in extents:
                    host[begin : begin + n].copy_(layer[at : at + n], non_blocking=True)
                    at += n
            self._down.keep(block)
            self._last_write = Mark(self.device)
            return self._last_write

    def finish_copies(self) -> None:
        """Wait for all copies to and from the device that are queued by now. Needs no lock."""
        for mark in (self._last_read, self._last_write):
            if mark is not None:
                mark.synchronize()

    def load(self, loads: Sequence[Load]) -> Onload:
        """Start to load states into pages of the device."""
        return Onload(self, [self._source(load) for load in loads])

    def _source(self, load: Load) -> _Source:
        if load.reading is not None:
            return _Source(load, load.reading.extents, [], None)
        state, staged = self.states[load.user], self._staged.pop(load.user, None)
        stop = load.first + len(load.pages)
        there = [mark for mark in (state.written, staged and staged.there) if mark]
        layers = [layer[load.first : stop] for layer in staged.layers] if staged else None
        return _Source(load, list(cut(state.extents, load.first, stop)), there, layers)

    def prefetch(self, user: int) -> bool:
        """Start to load a user's state beside the pages. Return whether there is room for it."""
        state = self.states[user]
        pages = sum(n for _, n in state.extents)
        staged = sum(len(s.layers[0]) for s in self._staged.values())
        if user in self._staged or staged + pages > STAGED_SHARE * self.pool.pages:
            return False
        layers = []
        with self._up:
            if state.written is not None:
                state.written.wait()
            for host in self.layers:
                block = torch.empty((pages, sum(self._widths)), dtype=host.dtype, device=self.device)
                at = 0
                for begin, n in state.extents:
                    block[at : at + n].copy_(host[begin : begin + n], non_blocking=True)
                    at += n
                layers.append(block)
            self._last_read = Mark(self.device)
        self._staged[user] = _Staged(state, layers, self._last_read)
        return True

    def prefetched(self, user: int) -> bool:
        """Return whether the user's state was prefetched. The copy may not have ended."""
        return user in self._staged

    def bytes_a_second(self) -> float:
        """Measure the bandwidth of copies from page-locked memory to the device: at most 64 MiB, the best of three."""
        host = self.layers[0][: max((64 << 20) // self.layers[0][0].nbytes, 1)]
        there = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        spans = []
        for _ in range(4):  # the first one warms up
            begin = Mark(self.device)
            there.copy_(host, non_blocking=True)
            spans.append(begin.ms_until(Mark(self.device)))
        return 1e3 * host.nbytes / max(min(spans[1:]), 1e-6)

    def _ids(self, pages: Sequence[int]) -> Tensor:
        ids = torch.tensor(pages, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return ids.to(self.device, non_blocking=True)


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
    pages of the storage tier that are not as they were written. bytes: of all states; host_bytes: of those that have to
    be copied from the host, storage_bytes: of those that have to be read from the disk first.
    """

    def __init__(self, tier: HostTier, sources: Sequence[_Source]) -> None:
        self._tier, self._device, self._up, self._sources = tier, tier.device, tier._up, sources
        one = tier.pool.page_bytes
        self._ids = tier._ids([page for source in sources for page in source.load.pages])
        self.bytes = len(self._ids) * one
        self.host_bytes = one * sum(len(s.load.pages) for s in sources if s.staged is None)
        self.storage_bytes = one * sum(len(s.load.pages) for s in sources if s.load.reading is not None)
        self.read_wait_ms = 0.0  # that the host waited for the disk
        shape = (len(self._ids), tier.layers[0].shape[1])
        self._staging = [torch.empty(shape, dtype=tier.layers[0].dtype, device=self._device) for _ in range(AHEAD)]
        self._sent: list[tuple[Mark, Mark]] = []
        self._waits: list[tuple[Mark, Mark]] = []
        self._placed = [Mark(self._device)]  # entry i: from here on the staging memory of layer i - 1 is free
        with self._up:
            for source in sources:
                for there in source.there:
                    there.wait()
        self._send_ahead(AHEAD)

    def layer(self, i: int) -> None:
        """Make the current stream wait for layer i, and put the layer into its pages."""
        tier, staging = self._tier, self._staging[i % AHEAD]
        if i == len(self._sent):
            self._send(i)
        begin = Mark(self._device)
        self._sent[i][1].wait()
        # On a CPU the copy itself is the wait.
        self._waits.append((begin, Mark(self._device)) if self._device.type == "cuda" else self._sent[i])
        for pages, part in zip(tier._parts, staging.split(tier._widths, dim=1), strict=False):
            pages[i].index_copy_(0, self._ids, part)
        self._placed.append(Mark(self._device))
        self._send_ahead(i + 1 + AHEAD)

    def all_layers(self) -> None:
        """Put every layer into its pages before anything is computed, as a CUDA graph needs."""
        for i in range(len(self._tier.pool.k)):
            self.layer(i)

    def times_ms(self) -> tuple[float, float]:
        """Return (time that the computation waited, time of the copies); waits until all is done."""
        waits, copies = (sum(a.ms_until(b) for a, b in spans) for spans in (self._waits, self._sent))
        return waits, copies

    def read_ms(self) -> float:
        """Return the time from the begin of the first read from the disk to the end of the last; 0 without any."""
        times = [time for s in self._sources if s.load.reading is not None for time in s.load.reading.times]
        return (max(times) - min(times)) * 1e3 if times else 0.0

    def _send_ahead(self, stop: int) -> None:
        """Queue the copies of the layers before `stop`, as far as they are on the host."""
        readings = [source.load.reading for source in self._sources if source.load.reading is not None]
        while (i := len(self._sent)) < min(stop, len(self._tier.layers)):
            if not all(reading.ready(i) for reading in readings):
                return
            self._send(i)

    def _send(self, i: int) -> None:
        begun = time.perf_counter()
        for source in self._sources:
            if source.load.reading is not None:
                source.load.reading.wait(i)
        self.read_wait_ms += (time.perf_counter() - begun) * 1e3
        staging, host = self._staging[i % AHEAD], self._tier.layers[i]
        with self._up:
            self._placed[max(i - AHEAD + 1, 0)].wait()
            begin, at = Mark(self._device), 0
            for source in self._sources:
                parts = [host[b : b + n] for b, n in source.extents] if source.staged is None else [source.staged[i]]
                for part in parts:
                    staging[at : at + len(part)].copy_(part, non_blocking=True)
                    at += len(part)
            self._tier._last_read = Mark(self._device)
            self._sent.append((begin, self._tier._last_read))
            self._up.keep(staging)


def _aligned(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor on the host that begins at a page of memory, as direct I/O needs."""
    memory = mmap(-1, max(prod(shape) * dtype.itemsize, 1), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
