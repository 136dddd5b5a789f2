"""The test that ends a scenario whose queue grows without end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers.properties import PROFILE

from grbench.scenarios.config import ServerConfig
from grbench.scenarios.growth import ARRIVED, PERIOD_S, Growth, HopelessError
from grbench.scenarios.loadgen import growth_of
from grbench.tune.queue_model import Floats, arrivals, latencies_ms

TRACES = 8000 if PROFILE == "long" else 120
KINDS = ("even", "uneven", "stalls", "bursts", "slow cores", "warm-up", "warm-up stalls", "warm-up bursts")


@dataclass
class Queue:
    """A simulated scenario. at, ends: of its requests, seconds. load: of the second half, all included."""

    at: Floats
    ends: Floats
    latencies_ms: Floats
    rate: float
    load: float
    limit_ms: float

    @property
    def kept(self) -> bool:
        """Return whether the engine carries the load, and answered what came in the last fourth of the time."""
        since = 0.75 * self.at[-1]
        came, went = (np.searchsorted(of, [since, self.at[-1]]) for of in (self.at, self.ends))
        return bool(self.load < 0.95 and went[1] - went[0] >= came[1] - came[0])

    def stopped(self) -> tuple[float, str] | None:
        """Return when the test stopped it, as a share of the arrivals, and why; None: it did not."""
        growth, last = Growth(self.limit_ms, len(self.at), self.rate), float(self.ends[-1])
        times = np.arange(0.0, last, PERIOD_S)
        arrived, answered = (np.searchsorted(of, times, "right").tolist() for of in (self.at, self.ends))
        for reading in zip(times.tolist(), arrived, answered, strict=True):
            try:
                growth.see(*reading)
            except HopelessError as e:
                return reading[1] / len(self.at), str(e)
        return None


def queue(
    load: float,
    rng: np.random.Generator,
    kind: str = "even",
    requests: int = 0,
    size: int = 0,
    warm_up: tuple[float, float] | None = None,
) -> Queue:
    """Simulate a server that batches up to `size` requests. load: arrivals as a share of what full batches carry.

    kind: in words, what makes its batches take longer. Other work does in bursts, a fourth of the time, or for up to a
    third of it; an empty cache takes up to 2.5 times as long, and up to 0.6 of the requests to lose most of that.
    warm_up: by what share longer, and for what share of the requests.
    """
    requests, size = requests or int(rng.choice([1000, 2000, 5000])), size or int(rng.choice([1, 4, 8, 32]))
    full_s = size * float(np.exp(rng.uniform(*np.log([0.004, 0.02]))))
    at = arrivals(load * size / full_s, requests, rng)
    longer, stands_s = np.ones(requests), np.zeros(requests)  # by the requests that were answered before
    if "bursts" in kind:
        edges = np.cumsum(rng.exponential(requests / 60 * np.array([3.0, 1.0]), (60, 2)).ravel()).astype(int)
        for begin, end in edges.reshape(-1, 2):
            longer[begin:end] *= rng.uniform(1.2, 3)
    if "slow cores" in kind:
        begin, times = int(rng.uniform(0, 2 / 3) * requests), rng.uniform(1.2, 2)
        longer[begin : begin + int(rng.uniform(0.1, 1 / 3) * requests / times)] *= times
    if "warm-up" in kind:
        share, lasts = warm_up or (rng.uniform(0.3, 1.5), rng.uniform(0.1, 0.6))
        longer *= 1 + share * np.exp(-np.arange(requests) / (lasts * requests))
    if "stalls" in kind:
        stands_s[rng.integers(0, requests, 3)] = np.minimum(rng.uniform(0.3, 3, 3), 0.06 * at[-1])
    spread = rng.uniform(0.02, 0.5)
    usual = np.exp(rng.normal(-(spread**2) / 2, spread, requests))
    if kind == "uneven":
        usual *= np.where(rng.random(requests) < 0.05, 5.0, 1.0) / 1.2
    answered = 0

    def service(count: int) -> float:
        nonlocal answered
        first, answered = answered, answered + count
        took_s = full_s * (0.2 + 0.8 * count / size) * usual[first] * longer[first]
        return float(took_s + stands_s[first:answered].sum())

    late = latencies_ms(at, service, size, 0.002)
    lasting = load * float(longer[requests // 2 :].mean()) + float(stands_s.sum() / at[-1])
    limit_ms = float(rng.uniform(2, 8) * full_s * 1e3)
    return Queue(at, np.sort(at + late / 1e3), late, load * size / full_s, lasting, limit_ms)


def test_a_rate_that_the_engine_keeps_is_not_stopped() -> None:
    """At most one in a thousand, and none whose p99 would have kept the limit."""
    wrong, kept = [], 0
    for seed in range(TRACES):
        rng = np.random.default_rng(seed)
        one = queue(rng.uniform(0.5, 1.0), rng, KINDS[seed % len(KINDS)])
        stopped, kept = one.stopped() is not None, kept + one.kept
        assert not (stopped and np.percentile(one.latencies_ms, 99) <= one.limit_ms), seed
        wrong += [seed] if stopped and one.kept else []
    assert kept > TRACES / 4 and len(wrong) <= kept / 1000, wrong


@pytest.mark.parametrize("load, share", [(1.3, 0.7), (3.0, 0.95)])
def test_most_hopeless_rates_are_found(load: float, share: float) -> None:
    kinds = [kind for kind in KINDS if "warm-up" not in kind]
    found = []
    for seed in range(TRACES // 5):
        rng = np.random.default_rng(seed)
        found.append(queue(load, rng, kinds[seed % len(kinds)]).stopped())
    assert sum(one is not None for one in found) >= share * len(found)


@pytest.mark.parametrize("requests", [2000, 6000])
def test_a_warm_up_as_long_as_all_requests_is_not_hopeless(requests: int) -> None:
    warming = [queue(0.85, np.random.default_rng(seed), "warm-up", requests, 8, (0.5, 1.0)) for seed in range(20)]
    assert [one.stopped() for one in warming].count(None) >= 18  # it is a test by standard errors


def test_a_hopeless_rate_is_found_before_its_last_arrival_with_what_was_seen() -> None:
    rng = np.random.default_rng(0)
    one = queue(3.0, rng, requests=5000, size=8)
    share, why = one.stopped() or (1.0, "")
    assert ARRIVED <= share < 0.6
    figures = re.search(
        r"grew to (\d+) requests in [\d.]+ s, .* at ([\d.]+) requests/s at best and ([\d.]+) arrived", why
    )
    assert figures is not None, why
    waiting, best, rate = map(float, figures.groups())
    assert rate == pytest.approx(one.rate, rel=0.01) and best == pytest.approx(one.rate / 3, rel=0.15)
    assert waiting == pytest.approx(share * 5000 * 2 / 3, rel=0.15)


def test_a_queue_that_all_have_joined_is_hopeless_while_it_takes_longer_than_allowed() -> None:
    """A rate far beyond the engine's has issued all requests before there is anything to judge."""
    growth, step = Growth(limit_ms=80.0, requests=2000, rate=4000.0), round(100 * PERIOD_S)
    with pytest.raises(HopelessError, match="grew to 1"):
        for i in range(400):
            growth.see(PERIOD_S * i, min(2000, round(4000 * PERIOD_S * (i + 1))), step * i)


@pytest.mark.parametrize("words", [{"queries": 30_000}, {"queries": 1024, "min_duration_s": 60.0}], ids=str)
def test_an_engine_that_warms_up_in_a_fifth_of_the_time_goes_on(words: dict[str, Any]) -> None:
    """It answers 330 requests/s for 12 s of 60 and then 700, while 500 arrive: a shortest duration counts too."""
    growth = growth_of(ServerConfig(target_qps=500.0, **words), latency_limit_ms=80.0)
    for i in range(round(60 / PERIOD_S)):
        at_s = PERIOD_S * (i + 1)
        arrived = round(500 * at_s)
        growth.see(at_s, arrived, min(arrived, round(330 * at_s + 370 * max(at_s - 12, 0))))


@pytest.mark.parametrize("rate, hopeless", [(1500.0, True), (450.0, False)])
def test_speeds_that_rise_a_little_are_hopeless_far_below_the_arrivals(rate: float, hopeless: bool) -> None:
    """Other work leaves the cores of an engine, which answers 130 requests/s at first and 150 at last."""
    growth, stopped = Growth(20.0, 6000, rate), False
    for i in range(800):
        at_s = PERIOD_S * i
        try:
            growth.see(at_s, min(6000, round(rate * at_s) + 1), round(130 * at_s + 0.25 * at_s**2))
        except HopelessError:
            stopped = True
            break
    assert stopped is hopeless


def test_a_growing_queue_within_the_limit_goes_on() -> None:
    growth = Growth(60_000, 2000, 200.0)
    for reading in range(200):
        growth.see(reading * PERIOD_S, 10 * (reading + 1), 9 * reading)
