"""Test of whether a queue grows without end, so that a scenario at a hopeless rate can be ended early.

Every PERIOD_S the number of requests in the system is read. In a queue that keeps up, the changes between readings
cancel out, and in one that does not they have a mean above 0. A t test distinguishes the two. It takes the changes as
independent. Those of a queue that keeps up are not, because what comes in goes out again: their mean varies less than
the test allows for. The test is made at every reading, and so asks for more than a single one would.

A queue also grows while an engine stands still for a moment. So it must grow in each third of the time, and the answers
must come about as fast in each. It grows while a cache is still empty, too: the first part of the requests only warms
up, and the readings begin after it. A warm-up may take longer than that: then the answers still come faster and faster.
So there is no judgement while they gain speed, and only if a line through the readings, with its interval, stays slower
than the arrivals up to the last request.
"""

from __future__ import annotations

import math

import numpy as np

PERIOD_S = 0.05
WARM = 1 / 3  # share of the requests that arrive before the first reading
FEWEST = 39  # changes
PARTS = 3
SURE, SURE_EACH = 4.5, 2.0  # standard errors of the mean change, of all and of each part
RISING = 1.0  # standard errors by which the answers gain speed: an engine that is still warming up
STEADY = 0.7  # answers of the slowest part, as a share of those of the fastest
WAITS = 2.0  # times the limit on latency that the last request has to wait at least


class HopelessError(Exception):
    """The queue of a scenario grows without end."""


class Growth:
    """The readings of one scenario. limit_ms: on latency. requests: that it has."""

    def __init__(self, limit_ms: float, requests: int) -> None:
        self._limit_s, self._requests, self._first = limit_ms / 1e3, requests, WARM * requests
        self._arrived = 0  # at the first reading
        self._times: list[float] = []
        self._waiting: list[int] = []
        self._answered: list[int] = []

    def see(self, at_s: float, arrived: int, answered: int) -> None:
        """Take a reading if PERIOD_S have passed. Raises HopelessError once it is sure that the queue grows.

        It is sure if the mean change is SURE standard errors above 0 and that of each part SURE_EACH, the answers are
        STEADY, the requests that are waiting take more than WAITS times the limit at the rate of the answers since the
        first reading, and the answers neither gain speed nor become as fast as the arrivals before the last request.
        """
        if arrived < self._first or (self._times and at_s - self._times[-1] < PERIOD_S):
            return
        self._arrived = self._arrived if self._times else arrived
        self._times.append(at_s)
        self._waiting.append(arrived - answered)
        self._answered.append(answered)
        changes = np.diff(self._waiting)
        took_s, done = at_s - self._times[0], answered - self._answered[0]
        if len(changes) < FEWEST or self._waiting[-1] * took_s <= WAITS * self._limit_s * done:
            return
        answers = [int(part.sum()) for part in np.array_split(np.diff(self._answered), PARTS)]
        if min(answers) < STEADY * max(answers):
            return
        if arrived == self._arrived:  # all had come by the first reading, or none came since
            return
        arrivals = (arrived - self._arrived) / took_s
        if self._may_keep_up(arrivals, at_s + (self._requests - arrived) / arrivals):
            return
        errors = _errors(changes)
        if errors > SURE and all(_errors(part) > SURE_EACH for part in np.array_split(changes, PARTS)):
            slope = float(changes.sum()) / took_s
            low, high = slope * (1 - 1.96 / errors), slope * (1 + 1.96 / errors)
            raise HopelessError(
                f"the queue grew by {slope:.3g} [{low:.3g}, {high:.3g}] requests/s over {took_s:.1f} s, to "
                f"{self._waiting[-1]} requests while {done} were answered: the rate can't be kept, and latencies "
                "of a growing queue mean nothing"
            )

    def _may_keep_up(self, arrivals: float, end_s: float) -> bool:
        """Return whether the answers still gain speed, or may be as fast as `arrivals` (requests/s) at the end.

        A line through the readings, and its standard errors, say both.
        """
        took = np.diff(self._times)
        middles, speeds = np.array(self._times[1:]) - took / 2, np.diff(self._answered) / took
        away = middles - middles.mean()
        spread = float(away @ away)
        slope, mean = float(away @ speeds) / spread, float(speeds.mean())
        deviation = float(np.sqrt(np.square(speeds - mean - slope * away).sum() / (len(speeds) - 2)))
        ahead = end_s - float(middles.mean())
        error = deviation * math.sqrt(1 / len(speeds) + ahead**2 / spread)
        return slope > RISING * deviation / math.sqrt(spread) or mean + slope * ahead + SURE_EACH * error >= arrivals


def _errors(changes: np.ndarray) -> float:
    """Return the mean of changes in standard errors."""
    deviation = float(changes.std(ddof=1))
    mean = float(changes.mean())
    return mean / deviation * math.sqrt(len(changes)) if deviation else math.copysign(math.inf, mean) if mean else 0.0
