"""Points in time, on the device's clock for work on a GPU and on the host's for work on a CPU; turns of batches."""

from __future__ import annotations

import threading
import time
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
        if self._event is None or other._event is None:
            return (other._time - self._time) * 1e3
        other._event.synchronize()
        return float(self._event.elapsed_time(other._event))
