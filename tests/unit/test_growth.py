"""The test that ends a scenario whose queue grows without end."""

from __future__ import annotations

import re

import numpy as np
import pytest

from grbench.scenarios.growth import PERIOD_S, Growth, HopelessError
from grbench.tune.queue_model import arrivals, latencies_ms

LIMIT_MS = 80.0


def watched(
    load: float, seed: int, stall_s: float = 0.0, warms_over: float = 0.0, requests: int = 2000
) -> tuple[float | None, str]:
    """Return when a simulated queue of batches of 8 was stopped, as a share of its arrivals, and why.

    load: arrivals as a share of what full batches carry. stall_s: of one batch. warms_over: share of the requests in
    which a batch's excess over its usual time, half of it at first, falls to a third.
    """
    rng = np.random.default_rng(seed)
    at = arrivals(load * 8 / 0.018, requests, rng)
    batches, answered = 0, 0

    def service(size: int) -> float:
        nonlocal batches, answered
        cold = 0.5 * float(np.exp(-answered / (warms_over * requests))) if warms_over else 0.0
        batches, answered = batches + 1, answered + size
        usual = (0.002 + 0.002 * size) * float(np.exp(rng.normal(0, 0.15)))
        return usual * (1 + cold) + (stall_s if batches == 40 else 0.0)

    ends = np.sort(at + latencies_ms(at, service, 8, 0.002) / 1e3)
    growth = Growth(LIMIT_MS, requests)
    for now in np.arange(0, at[-1], PERIOD_S):
        try:
            growth.see(now, int(np.searchsorted(at, now, "right")), int(np.searchsorted(ends, now, "right")))
        except HopelessError as e:
            return float(now / at[-1]), str(e)
    return None, ""


@pytest.mark.parametrize("load, stall_s", [(0.7, 0.0), (0.95, 0.0), (1.0, 0.0), (0.85, 1.0), (0.85, 3.0)])
def test_a_queue_that_keeps_up_is_never_stopped(load: float, stall_s: float) -> None:
    assert [watched(load, seed, stall_s)[0] for seed in range(40)] == [None] * 40


def test_a_queue_that_grows_while_a_cache_warms_up_is_not_stopped() -> None:
    assert [watched(0.85, seed, warms_over=0.3, requests=6000)[0] for seed in range(20)] == [None] * 20


@pytest.mark.parametrize("requests", [2000, 6000])
def test_a_warm_up_as_long_as_all_requests_is_not_hopeless(requests: int) -> None:
    found = [watched(0.85, seed, warms_over=1.0, requests=requests)[0] for seed in range(20)]
    assert found.count(None) >= 18  # a test by standard errors; one that ignores the warm-up keeps 2


def test_a_growing_queue_is_stopped_before_its_last_arrival_with_its_slope() -> None:
    found = [watched(1.4, seed, requests=6000) for seed in range(20)]
    assert all(share is not None and 1 / 3 < share < 0.75 for share, _ in found)
    excess = 0.4 * 8 / 0.018  # requests/s that are not answered
    inside = 0
    for _, words in found:
        figures = re.search(r"grew by [\d.]+ \[([\d.]+), ([\d.]+)\] requests/s", words)
        assert figures is not None, words
        inside += float(figures[1]) < excess < float(figures[2])
    assert inside >= 15


def test_a_growing_queue_within_the_limit_goes_on() -> None:
    growth = Growth(60_000, 0)
    for reading in range(200):
        growth.see(reading * PERIOD_S, 10 * reading, 9 * reading)


def test_a_queue_without_an_arrival_since_the_first_reading_is_not_judged() -> None:
    growth = Growth(limit_ms=80.0, requests=2000)
    for i in range(400):  # all had arrived, and the answers lag
        growth.see(0.05 * i, 2000, 10 * i)
