"""The wall clock, which can be set while a cell runs, calls that are limited in time, and the time that work takes.

LoadGen schedules by the wall clock; grbench's own times are monotonic.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")
SILENCE_S = 15.0  # after which a user wants to know what a command is doing, and how long it will take
PR_SET_TIMERSLACK = 29  # of Linux's prctl
MOST_S = 0.05  # a step of the clock below this is no error: slewing moves both clocks alike


def wake_on_time() -> None:
    """Have timed waits of this thread, and of those that it starts, end on time. By default Linux adds up to 50 us.

    Such waits are LoadGen's for the time of the next request, and a batch's for more requests.
    """
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


class ClockMovedError(RuntimeError):
    """The wall clock was set during a measurement that depends on it. The cell is to be measured again."""


class WallClock:
    """The wall clock as it is now, to compare with later."""

    def __init__(self) -> None:
        self._ahead_s = _ahead_s()

    def check(self) -> None:
        """Raise ClockMovedError if the clock was set since."""
        moved_s = _ahead_s() - self._ahead_s
        if abs(moved_s) > MOST_S:
            raise ClockMovedError(f"the machine's clock moved by {moved_s:+.2f} s while LoadGen timed requests by it")


def _ahead_s() -> float:
    """Return the seconds by which the wall clock is ahead of the monotonic one."""
    while True:
        before = time.monotonic()
        wall = time.time()
        after = time.monotonic()
        if after - before < MOST_S / 10:  # else the process was stopped in between
            return wall - after


def at_most_every(seconds: float, call: Callable[P, None]) -> Callable[P, None]:
    """Return `call` so that it is skipped within `seconds` of the last call, and at the very start."""
    last = time.monotonic()

    def limited(*args: P.args, **kwargs: P.kwargs) -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            call(*args, **kwargs)

    return limited


def pace(seconds: float, done: float = 0.0, total: float = 0.0, most_s: float = math.inf, after_s: float = 0.0) -> str:
    """Return how long work has taken, and how long the rest takes at the same pace: "35 s so far, about 2 min left".

    done of total: what the seconds were for, in any unit; 0: it is not known, so nothing is said of the rest. most_s:
    the time of all the work, which ends then however much is done. after_s: the time of what follows the total, which
    most_s covers.
    """
    rest = remaining(seconds, done, total, most_s, after_s)
    return f"{_span(seconds)} so far" + (f", {rest} left" if rest else "")


def remaining(seconds: float, done: float, total: float, most_s: float = math.inf, after_s: float = 0.0) -> str:
    """Return how long the rest takes at the same pace: "about 2 min", or "" if it is not known. See `pace`."""
    if not 0 < done <= total:
        return ""
    rest_s = max(min(seconds * (total - done) / done, most_s - after_s - seconds), 0.0)
    least_s = 1.0 if after_s else 0.0  # "about 0 s" would say that nothing follows
    return f"about {_span(max(rest_s + after_s, least_s))}"


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
