"""A simulated queue: the latencies of requests at a rate, from the times that batches took.

It follows the rules of grbench/scenarios/batcher.py. The search orders configurations by it and never decides by it;
the replay draws latencies from it.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# Returns the seconds of the next batch of this many requests.
Service = Callable[[int], float]
RUNS, LONG = 2, 6000  # simulated runs of a percentile, and their requests
FIXED_SHARE = 0.2  # of a full batch's time that a batch of one takes too, where no smaller batch was measured


def arrivals(rate: float, count: int, rng: np.random.Generator) -> Floats:
    """Return Poisson arrivals in seconds, ascending."""
    return np.cumsum(rng.exponential(1.0 / rate, count))


def latencies_ms(at: Floats, service: Service, max_batch: int, max_wait_s: float, in_flight: int = 1) -> Floats:
    """Return the latency of each request that arrives at `at`, in milliseconds.

    in_flight: batches at the same time; one behind another closes only when it is full. The device still takes them one
    after another, so `service` is the time between their ends.
    """
    times, count, first, free = at.tolist(), len(at), 0, 0.0
    ends: list[float] = []
    sizes: list[int] = []
    while first < count:  # min and max would take a third of the loop
        end = first + max_batch
        full = times[end - 1] if end <= count else math.inf
        starts = times[first] + max_wait_s
        if full < starts:
            starts = full
        if starts < free or (in_flight > 1 and full < free):  # it was packed while the device computed
            starts = free
        last = bisect_right(times, starts, first, min(end, count))
        free = starts + service(last - first)
        ends.append(free)
        sizes.append(last - first)
        first = last
    return (np.repeat(ends, sizes) - at) * 1e3


class BatchTimes:
    """Times of batches by size, from measured batches.

    Sizes between are interpolated. Of the time of the smallest a share is fixed for those below.
    """

    def __init__(self, batches: Sequence[tuple[int, float]], throughput: float | None = None) -> None:
        """throughput: offline, in requests a second. Full batches then take as long as it says: packing overlaps."""
        by_size: dict[int, list[float]] = {}
        for size, seconds in batches:
            by_size.setdefault(size, []).append(seconds)
        largest = max(by_size)
        few = [size for size, times in by_size.items() if len(times) >= 3 or size == largest]
        self._sizes = np.array(sorted(few), dtype=np.float64)
        self._means = np.array([np.mean(by_size[int(size)]) for size in self._sizes])
        scale = largest / throughput / self._means[-1] if throughput else 1.0
        self._means = np.maximum.accumulate(self._means * scale)
        spread = [t / float(np.mean(by_size[size])) for size in few for t in by_size[size]]
        self._spread: Floats = np.array(spread or [1.0])
        self._mean = functools.cache(self.mean)

    def mean(self, size: int) -> float:
        """Return the mean seconds of a batch of this size."""
        smallest, least = self._sizes[0], self._means[0]
        if size < smallest:
            return float(least * (FIXED_SHARE + (1 - FIXED_SHARE) * size / smallest))
        if size > self._sizes[-1]:
            return float(self._means[-1] * size / self._sizes[-1])
        return float(np.interp(size, self._sizes, self._means))

    def draw(self, rng: np.random.Generator) -> Service:
        """Return a service that takes the mean of a size times a spread drawn from the measured batches."""
        spread = itertools.cycle(rng.choice(self._spread, 4096).tolist())
        return lambda size: self._mean(size) * next(spread)


def percentile_ms(
    times: BatchTimes, rate: float, percent: float, max_batch: int, max_wait_s: float, in_flight: int
) -> float:
    """Return a percentile of the latencies of RUNS simulated runs of LONG requests: a single one is off by 5%."""
    found = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        at = arrivals(rate, LONG, rng)
        found.append(latencies_ms(at, times.draw(rng), max_batch, max_wait_s, in_flight))
    return float(np.percentile(found, percent))
