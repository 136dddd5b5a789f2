"""The choice of a replica for each request of a trace."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grbench.cachesim.trace import Columns, Ints

POINTS = 256  # of a replica on the ring: HAProxy has 16 for each unit of weight, and `grbench serve` sets 16
FACTOR = 1.25  # most load of a replica over the mean, as `hash-balance-factor 125`
ROUTINGS = ("affinity", "random", "bounded")


@dataclass(frozen=True)
class Routes:
    """The replica of each request, and the number of requests that went to another one than the user's own."""

    replica: Ints
    spilled: int = 0


def route(trace: Columns, replicas: int, routing: str, window_s: float, seed: int) -> Routes:
    """Route a trace by one of ROUTINGS.

    affinity: to the owner of the first point of a ring behind the user's hash. bounded: the same, but a replica whose
    load would exceed FACTOR times the mean passes the request on along the ring. A request counts as load for
    `window_s` seconds. random: to any replica.
    """
    if routing == "random":
        return Routes(np.random.default_rng(seed).integers(replicas, size=len(trace)))
    points = _hashes(np.arange(replicas * POINTS) + (1 << 40))
    order = np.argsort(points)
    owners: Ints = order // POINTS
    users = np.searchsorted(points[order], _hashes(np.arange(trace.num_users))) % len(points)
    if routing == "affinity":
        return Routes(owners[users][trace.users])
    return _bounded(users[trace.users], trace.times, owners, replicas, window_s)


def _bounded(home: Ints, times: npt.NDArray[np.float64], owners: Ints, replicas: int, window_s: float) -> Routes:
    """Route requests that arrive at these times. home: the point of each request's user on the ring."""
    ring, loads, spilled = owners.tolist(), [0] * replicas, 0
    running: deque[tuple[float, int]] = deque()  # end and replica
    result = np.empty(len(home), dtype=np.int64)
    for i, (point, now) in enumerate(zip(home.tolist(), times.tolist(), strict=True)):
        while running and running[0][0] <= now:
            loads[running.popleft()[1]] -= 1
        most, at = math.ceil(FACTOR * (len(running) + 1) / replicas), point
        while loads[ring[at]] >= most:
            at = (at + 1) % len(ring)
        replica = ring[at]
        spilled += replica != ring[point]
        loads[replica] += 1
        running.append((now + window_s, replica))
        result[i] = replica
    return Routes(result, spilled)


def _hashes(numbers: Ints) -> npt.NDArray[np.uint64]:
    """Return numbers mixed to 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
