"""Points in time, on the device's clock for work on a GPU and on the host's for work on a CPU; turns of batches."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple

import torch


class Turn(NamedTuple):
    """A batch's turn to queue its work: the wait for it, and whether an earlier batch was still under way then."""

    waited_ms: float
    behind: bool


class Turns:
    """Turns of batches that queue their work under `lock`. A batch is under way from its turn until `end`."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock, self._counting = lock, threading.Lock()
        self._under_way = 0

    def __enter__(self) -> Turn:
        begun = time.perf_counter()
        self._lock.acquire()
        with self._counting:
            behind = self._under_way > 0
            self._under_way += 1
        return Turn((time.perf_counter() - begun) * 1e3, behind)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.end()
        self._lock.release()

    def end(self) -> None:
        """Note that a batch whose work was queued has ended."""
        with self._counting:
            self._under_way -= 1


class Mark:
    """A point in the work of the current stream; on a CPU, a point in time."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """Mark this point. stream: the current stream, if the caller has it: the look-up takes most of the time."""
        self._device = device.index  # a number, for the same reason
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.move(stream)

    def move(self, stream: torch.cuda.Stream | None = None) -> None:
        """Mark this point instead of the one before."""
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record(stream or torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Make work that is queued on the current stream from now on wait for this point."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        """Wait on the host until the work before this point is done."""
        if self._event is not None:
            self._event.synchronize()

    def reached(self) -> bool:
        """Return whether the work before this point is done."""
        return self._event is None or self._event.query()

    def ms_until(self, other: Mark) -> float:
        """Return the milliseconds to a later mark, and wait for it."""
        other.synchronize()
        return self.ms_to(other)

    def ms_to(self, other: Mark) -> float:
        """Return the milliseconds to a later mark, which is reached."""
        if self._event is None or other._event is None:
            return (other._time - self._time) * 1e3
        return float(self._event.elapsed_time(other._event))


class Marks:
    """Points in time between pieces of work, on the stream that was current at the first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Mark] = []
        self.begin()

    def begin(self) -> None:
        """Set the first mark. Those that were set before are moved: an event is made once."""
        self._stream = torch.cuda.current_stream(self._device.index) if self._device.type == "cuda" else None
        self._count = 0
        self.add()

    def add(self) -> None:
        """Mark this point."""
        if self._count == len(self._marks):
            self._marks.append(Mark(self._device, self._stream))
        else:
            self._marks[self._count].move(self._stream)
        self._count += 1

    def wait(self) -> None:
        """Wait until the last mark is reached."""
        self._marks[self._count - 1].synchronize()

    def spans_ms(self) -> list[float]:
        """Return the milliseconds between marks, once the last one is reached."""
        self.wait()
        return [a.ms_to(b) for a, b in pairwise(self._marks[: self._count])]
