"""The requests that prove a percentile: latencies of one backlog are alike, and worth fewer that are independent.

Records say how many independent samples each percentile is worth (`<metric>_worth`, of grbench/execution/stats.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grbench.execution.stats import PERCENTILES, WORTH, percentile_of_runs, samples_for_interval, samples_of_runs
from grbench.tune import rates
from grbench.tune.limits import Limit
from grbench.tune.outcome import Evaluator, Outcome
from grbench.tune.trial import Trial

BUSIEST = 0.9  # share of the capacity, at most: of less that is free the offline rate is no measure


def requests_needed(limits: Sequence[Limit], evaluator: Evaluator, trial: Trial, step: int) -> int:
    """Return the fewest requests at a step of which every limited percentile has an interval; 0: not known.

    They go by the worth of the trial's nearest run at this step or above: of those that certify, if there is one. A
    short probe can't show what is alike over many seconds, so its requests seem to be worth more.
    """
    longest = {s: outcome for s, outcome in trial.certifying.items() if s >= step}
    known, needed = longest or trial.probes, 0
    for limit in limits:
        percent, name = limit.percent, f"{limit.metric}{WORTH}"
        above = min((s for s, outcome in known.items() if s >= step and name in outcome.metrics), default=None)
        if percent is None or above is None:
            continue
        worth = known[above].metrics[name] / known[above].metrics["samples"]
        if not longest:
            worth = math.sqrt(worth * max(worth, _beside_the_nearest(evaluator, trial, above, percent)))
        share = min(worth * _gain(trial, step, above), 1.0)
        needed = max(needed, math.ceil(samples_for_interval(percent) / share))
    return needed


def _beside_the_nearest(evaluator: Evaluator, trial: Trial, step: int, percent: float) -> float:
    """Return what a request of a probe is worth beside that at the nearest other rate; 0: not known.

    It is mostly too much: probes have one seed, so that their arrivals are the same, but for the rate, as their visits
    are. What a probe alone shows is mostly too little, because it takes the alikeness of the visits for noise. So a
    plan goes by the geometric mean of both. It is a rough one: for single traces of simulated queues it is 0.1 to 6
    times the truth, on average within a factor of 2 (tests/unit/test_search.py). Runs that are too short get one more.
    """
    name = f"latency_ms/p{percent:g}"
    others = [
        s
        for s, its in trial.probes.items()
        if s != step and name in its.metrics and its is not trial.certifying.get(s)  # which has other seeds
    ]
    if not others:
        return 0.0
    nearest = min(others, key=lambda other: abs(other - step))
    return evaluator.alike([trial.probes[s] for s in sorted((step, nearest))], percent)


def worth_of_a_request(latencies_ms: Sequence[npt.NDArray[np.float64]], percent: float) -> float:
    """Return the independent samples that a request of probes at several rates is worth, by their differences.

    latencies_ms: [samples] of each, in the order of requests. Latencies are longer at a higher rate, so those of each
    are compared by their ranks.
    """
    ranks = [np.argsort(np.argsort(its, kind="stable")) / len(its) for its in latencies_ms]
    return samples_of_runs(ranks, percent) / sum(map(len, ranks))


def _gain(trial: Trial, step: int, above: int) -> float:
    """Return by how much a request is worth more at a step than at one above.

    Near its capacity a queue needs requests as the inverse square of the share of the capacity that is free (Whitt,
    "Planning queueing simulations", Management Science 1989). Offline nothing is free.
    """
    if trial.offline is None:
        return 1.0
    rate, higher = rates.rate_of(step), rates.rate_of(above)
    most = max(trial.offline.metrics["throughput_rps"], higher / BUSIEST)
    return ((most - rate) / (most - higher)) ** 2


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the run with the largest p99."""
    return max(outcomes, key=lambda outcome: outcome.metrics.get("latency_ms/p99", math.inf))


def pooled(outcomes: Sequence[Outcome], latencies_ms: Sequence[npt.NDArray[np.float64]]) -> Outcome:
    """Return what independent runs show together: percentiles of all latencies, and other figures of the run `worst`.

    latencies_ms: [samples] of each run, in the order of requests. One run alone shows what its record says.
    """
    found = worst(outcomes)
    if len(outcomes) == 1:
        return found
    metrics, intervals = dict(found.metrics), dict(found.intervals)
    metrics["samples"] = float(sum(map(len, latencies_ms)))
    for percent in PERCENTILES:
        name = f"latency_ms/p{percent:g}"
        if all(name in outcome.metrics for outcome in outcomes):
            metrics[name], worth, interval = percentile_of_runs(latencies_ms, percent)
            metrics[f"{name}{WORTH}"] = float(worth)
            intervals.pop(name, None)
            intervals |= {name: interval} if interval else {}
    return dataclasses.replace(found, metrics=metrics, intervals=intervals)
