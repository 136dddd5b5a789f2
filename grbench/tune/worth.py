"""The requests that prove a percentile: latencies of one backlog are alike, and worth fewer that are independent.

Records say how many independent samples each percentile is worth (`<metric>_worth`, of grbench/execution/stats.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from grbench.execution.stats import WORTH, samples_for_interval
from grbench.tune import rates
from grbench.tune.limits import PERCENTILE, Limit
from grbench.tune.trial import Trial

BUSIEST = 0.9  # share of the capacity, at most: of less that is free the offline rate is no measure


def requests_needed(limits: Sequence[Limit], trial: Trial, step: int) -> int:
    """Return the fewest requests at a step of which every limited percentile has an interval; 0: not known.

    They go by the worth of the trial's nearest run at this step or above.
    """
    known, needed = trial.probes | trial.certifying, 0
    for limit in limits:
        percentile, name = PERCENTILE.match(limit.metric), f"{limit.metric}{WORTH}"
        above = min((s for s, outcome in known.items() if s >= step and name in outcome.metrics), default=None)
        if percentile and above is not None:
            metrics = known[above].metrics
            share = min(metrics[name] / metrics["samples"] * _gain(trial, step, above), 1.0)
            needed = max(needed, math.ceil(samples_for_interval(float(percentile[2])) / share))
    return needed


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
