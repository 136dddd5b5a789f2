"""Points in time, on the device's clock where the work is there."""

from __future__ import annotations

import time

import torch


class Mark:
    """A point in the current stream's work; on a CPU in time."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """stream: the current one, if it is at hand: looking it up takes longer than all the rest."""
        self._device = device.index  # a number, for the same reason
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record(stream or torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """What the current stream is given from now on waits for this point."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def reached(self) -> bool:
        return self._event is None or self._event.query()

    def ms_until(self, other: Mark) -> float:
        """Milliseconds; waits for the other."""
        if self._event is None or other._event is None:
            return (other._time - self._time) * 1e3
        other._event.synchronize()
        return float(self._event.elapsed_time(other._event))
