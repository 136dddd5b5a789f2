"""Test of whether a queue grows without end, so that a scenario at a hopeless rate can be ended early.

Every PERIOD_S the arrived and the answered requests are read. The time so far is divided into PARTS equal ones, and the
answers are counted in each two neighbours. The best of these speeds is what the engine can do. Nothing is averaged, so
an engine that stood still, or cores that other work took for a while, make no rate hopeless: its best speed was as fast
as the arrivals. The other way round, answers that come unevenly hide no hopeless rate: its best speed never was.

An engine whose cache is still empty gets faster. So half of the requests must have arrived, and the best speed must
stay below the arrivals even if it grows until the last of them. While the speeds rise (Kendall's rank test), only
arrivals far above the best speed are hopeless: a machine whose other work ends makes every speed rise a little, and an
engine so far behind halfway keeps no limit in this run. tests/unit/test_growth.py has what is found and missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

PERIOD_S = 0.05
SHORTEST_S = 2.0  # of the time that is judged
ARRIVED = 0.5  # share of the requests
STEP = 1.05  # of the time between two judgements: as few as find a hopeless queue soon
PARTS = 12
RISING = 0.5  # standard errors of Kendall's statistic above which the speeds rise
SPARE = 0.1  # share by which the arrivals must exceed the best speed,
GAIN = 0.4  # and by which more, if as much time is left as has passed
FAR = 4.0  # times the best speed that the arrivals must exceed while the speeds rise
WAITS = 2.0  # times the limit on latency that the waiting requests take at least
_EARLIER, _LATER = np.triu_indices(PARTS, 1)
_ERROR = math.sqrt(PARTS * (PARTS - 1) * (2 * PARTS + 5) / 18)


class HopelessError(Exception):
    """The queue of a scenario grows without end.

    left_s: seconds for which the load generator goes on. finish: waits for its end, at most `limit_s` seconds, without
    an answer of the engine. Returns whether it has ended, so that the process can measure another load.
    """

    finish: Callable[[float], bool] = staticmethod(lambda limit_s: False)

    def __init__(self, message: str, left_s: float) -> None:
        super().__init__(message)
        self.left_s = left_s


class Growth:
    """The readings of one scenario. limit_ms: on latency. requests, rate: that it has, and that arrive in a second."""

    def __init__(self, limit_ms: float, requests: int, rate: float) -> None:
        self._limit_s, self._requests, self._rate = limit_ms / 1e3, requests, rate
        self._times: list[float] = []
        self._answered: list[int] = []
        self._next_s = SHORTEST_S

    def see(self, at_s: float, arrived: int, answered: int) -> None:
        """Take a reading if PERIOD_S have passed. Raises HopelessError once the queue is hopeless.

        It is if its requests take more than WAITS times the limit at the best speed of the answers, and the arrivals
        exceed that speed by SPARE and GAIN; where the speeds rise, FAR times.
        """
        if not arrived or (self._times and at_s - self._times[-1] < PERIOD_S):
            return
        self._times.append(at_s)
        self._answered.append(answered)
        took_s = at_s - self._times[0]
        if took_s < self._next_s or arrived < ARRIVED * self._requests:
            return
        self._next_s = STEP * took_s
        ends = np.linspace(self._times[0], at_s, PARTS + 1)
        speeds = np.diff(np.interp(ends, self._times, self._answered)) * PARTS / took_s
        best = float((speeds[1:] + speeds[:-1]).max()) / 2
        left_s = max(self._requests - arrived, 0) / self._rate
        waiting = arrived - answered
        rises = np.sign(speeds[_LATER] - speeds[_EARLIER]).sum()
        if (
            waiting > WAITS * self._limit_s * best
            and best * (1 + SPARE + GAIN * left_s / took_s) < self._rate
            and (rises <= RISING * _ERROR or FAR * best < self._rate)
        ):
            raise HopelessError(
                f"the queue grew to {waiting} requests in {took_s:.1f} s, while answers came at {best:.3g} requests/s "
                f"at best and {self._rate:.3g} arrived: the rate can't be kept, and latencies of a growing queue mean "
                "nothing",
                left_s,
            )
