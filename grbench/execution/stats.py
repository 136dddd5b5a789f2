"""Latency percentiles with confidence intervals, throughput and goodput.

A percentile is one of the samples, never interpolated: of n sorted samples the one with number floor(q n), counted from
zero. MLPerf LoadGen takes the same (performance summary in its results.cc), so that both agree to the sample. Of 1000
samples p99 is the tenth from the top.

An interval assumes independent samples, and latencies are not: requests of one query end together, and a wait in a
queue is like the wait before it. `independent_samples` says what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
OVERLOADED = 0.95  # share of the offered rate: with fewer answers the queue grows
SHORTEST_S = 1.0  # a rate or an energy over less time is mostly chance
LEAST_BATCHES = 10  # for the interval of a rate
LEAST_SPREAD = 0.02  # of a percentile from run to run, as a share, where the runs themselves are nearer: assumed
WAIT_ALIKE = "because requests near each other in time wait alike"  # in each note of a lack of independent samples
BODY = 90.0  # a percentile below the tail, which shows how long latencies stay alike
WORTH = "_worth"  # ends the name of a metric: how many independent samples a percentile is worth
PERCENTILES = (50.0, 90.0, 99.0, 99.9)
PART_PERCENTILES = (50.0, 90.0)  # of the parts of a latency
# A tail percentile of a few samples is their maximum under another name. Ten independent samples must lie above it.
SAMPLES_NEEDED = {99.0: 1000, 99.9: 10_000}
NO_INTERVAL = "has no 95% interval"  # in the note of a percentile


@dataclass
class Summary:
    """Figures of one latency: metrics and 95% intervals [low, high] by name, and notes for the reader."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def latency_summary(latencies_ms: npt.ArrayLike, arrivals_s: npt.ArrayLike | None = None) -> Summary:
    """Return the mean and percentiles of `latencies_ms` ([samples], milliseconds): `latency_ms/mean`, `latency_ms/p50`.

    arrivals_s: [samples] arrival times in seconds. Requests that arrive together count as one sample, and intervals go
    by `independent_samples`, which is a metric of each percentile: `latency_ms/p99_worth`. None: the samples are
    independent.

    p99 needs 1000 samples and p99.9 needs 10000. With fewer the percentile is left out, and a note says so.
    Each percentile has the interval of `percentile_interval`. The mean has none, because none holds for every
    distribution. Raises ValueError for no samples, or one that is negative or not finite.
    """
    latencies = _checked(latencies_ms, "latency_ms", lowest=0.0)
    values, count = np.sort(latencies), len(latencies)
    groups = np.arange(count) if arrivals_s is None else np.unique(np.asarray(arrivals_s), return_inverse=True)[1]
    together = int(groups.max()) + 1
    present = f"there are {together}"
    if together < count:
        present += f" ({count} requests, and those that arrive together count once)"
    summary = Summary(metrics={"latency_ms/mean": float(values.mean())})
    for percent in PERCENTILES:
        name = f"latency_ms/p{percent:g}"
        needed = SAMPLES_NEEDED.get(percent, 1)
        if together < needed:
            summary.notes.append(f"{name} withheld: it needs {needed} samples, {present}")
            continue
        summary.metrics[name] = float(values[_rank(count, percent)])
        worth = count if arrivals_s is None else independent_samples(latencies, groups, percent)
        if arrivals_s is not None:
            summary.metrics[f"{name}{WORTH}"] = float(worth)
        if ranks := _interval_ranks(count, percent, worth):
            low, high = ranks
            summary.intervals[name] = [float(values[low]), float(values[high])]
        else:
            needed, why = samples_for_interval(percent), present
            if together >= needed:
                why = f"these {count} are worth about {worth}, {WAIT_ALIKE}"
                why += f"; about {requests_for_interval(count, worth, percent)} requests are enough"
            summary.notes.append(f"{name} {NO_INTERVAL}: it needs {needed} samples, {why}")
    return summary


def independent_samples(latencies_ms: npt.NDArray[np.float64], groups: npt.NDArray[np.intp], percent: float) -> int:
    """Return how many independent samples tell as much about a percentile as these, at most one for each group.

    groups: [samples] the place of each sample's group in time, from 0. It is the variance of a count of independent
    samples below the percentile over that of these (Vehtari et al., "Rank-normalization, folding, and localization",
    Bayesian Analysis 2021, section 4.3), with the sums of groups as a time series. The smallest of several
    percentiles counts, because the few samples above p99 do not show how long latencies stay alike.
    """
    count, totals = len(latencies_ms), int(groups.max()) + 1
    ordered, worth = np.sort(latencies_ms), float(totals)
    for level in {50.0, BODY, percent}:
        below = latencies_ms < ordered[_rank(count, level)]
        share = float(below.mean())
        sums = np.bincount(groups, below - share).astype(np.float64)
        if variance := float(sums @ sums) * _inflation(sums):
            worth = min(worth, count**2 * share * (1 - share) / variance)
    return max(int(worth), 1)


def _inflation(series: npt.NDArray[np.float64]) -> float:
    """Return the variance of the sum of a series with mean 0 over that of independent terms, at least 1.

    The autocorrelations of lags 0 and 1, 2 and 3, ... are added while their pairs are positive (Geyer, "Practical
    Markov chain Monte Carlo", Statistical Science 1992).
    """
    length = len(series)
    spectrum = np.fft.rfft(series, 2 * length)  # padded, so that the end does not meet the start
    covariances = np.fft.irfft(spectrum * spectrum.conj())[: length - length % 2]
    if length < 2 or covariances[0] <= 0:
        return 1.0
    pairs = covariances.reshape(-1, 2).sum(axis=1) / covariances[0]
    ended = np.flatnonzero(pairs <= 0)
    return max(2 * float(pairs[: ended[0] if len(ended) else None].sum()) - 1, 1.0)


def percentile(samples: npt.ArrayLike, percent: float) -> float:
    """Return the sample at `percent` (0 <= percent < 100) of `samples` ([samples], any unit).

    Raises ValueError for no samples or one that is not finite.
    """
    if not 0 <= percent < 100:
        raise ValueError(f"percent={percent}: allowed is 0 <= percent < 100")
    values = np.sort(_checked(samples, f"p{percent:g}"))
    return float(values[_rank(len(values), percent)])


def percentile_interval(samples: npt.ArrayLike, percent: float) -> tuple[float, float] | None:
    """Return a 95% confidence interval of a percentile, for any distribution; None for too few samples.

    The number of samples below the true percentile is binomial(n, q), so two order statistics enclose it
    with a known probability (David and Nagaraja, Order Statistics, section 7.1). This assumes independent samples.
    """
    values = np.sort(_checked(samples, f"p{percent:g}"))
    ranks = _interval_ranks(len(values), percent, len(values))
    return (float(values[ranks[0]]), float(values[ranks[1]])) if ranks else None


def percentile_of_runs(
    runs: Sequence[npt.NDArray[np.float64]], percent: float
) -> tuple[float, int, tuple[float, float] | None]:
    """Return a percentile of the samples of independent runs, what they are worth, and its 95% interval, None for few.

    runs: as for `samples_of_runs`, which says what they are worth. Runs differ by more than that, in the state of the
    machine. So the interval is widened, on a scale of logarithms, by the standard deviation of the runs' own
    percentiles, which is taken to be at least LEAST_SPREAD. That of a few runs is itself uncertain, so the interval
    holds for machines that differ as these runs do.
    """
    values = np.sort(np.concatenate(runs))
    count, found = len(values), float(values[_rank(len(values), percent)])
    worth = samples_of_runs(runs, percent)
    if (ranks := _interval_ranks(count, percent, worth)) is None:
        return found, worth, None
    low, high = (float(values[rank]) for rank in ranks)
    own = [percentile(run, percent) for run in runs]
    if min(*own, low) > 0:
        spread = max(float(np.log(own).std(ddof=1)), LEAST_SPREAD)
        reach = 1.96 * spread / math.sqrt(len(runs))
        low = found * math.exp(-math.hypot(math.log(found / low), reach))
        high = found * math.exp(math.hypot(math.log(high / found), reach))
    return found, worth, (low, high)


def samples_of_runs(runs: Sequence[npt.NDArray[np.float64]], percent: float) -> int:
    """Return how many independent samples tell as much about a percentile as two or more independent runs.

    runs: [samples] of each, in the order of requests; their lengths may differ. What they have in common at the same
    request is the trace's, and no sampling error of a percentile of this trace. Their differences are noise: with x = 1
    for a sample below the percentile of all, the variance of the sum of x over one run is that of the sums of x less
    its mean over runs, added up and divided by (runs - 1). It is taken over the common prefix, and a longer run has as
    much a request. Where each run draws a trace of its own, the differences hold what traces vary, so that the same
    holds for the percentile of all such traces. A shift of a whole run is left out: `percentile_of_runs` counts it, at
    its own percentile.

    The smallest of several percentiles counts, as in `independent_samples`. But where a machine changes between two
    speeds, the median shows the speed, which says little of p99. So the median is left out if half of what the others
    show is more: half, because the few samples above p99 of a machine that drifts may show too little of it.
    """
    values = np.sort(np.concatenate(runs))
    lower, body, upper = (_worth_at(runs, float(values[_rank(len(values), p)])) for p in (50.0, BODY, percent))
    tail = min(body, upper)
    return max(int(max(min(lower, tail), tail / 2)), 1)


def _worth_at(runs: Sequence[npt.NDArray[np.float64]], value: float) -> float:
    """Return what runs are worth by their differences, of samples below a value, as `samples_of_runs` describes."""
    count, common = sum(map(len, runs)), min(map(len, runs))
    below = np.stack([run[:common] < value for run in runs]).astype(np.float64)
    share, noise = float(below.mean()), below - below.mean(axis=0)
    noise -= noise.mean(axis=1, keepdims=True)
    variance = sum(float(its @ its) * _inflation(its) for its in noise) / (len(runs) - 1)
    return min(count * common * share * (1 - share) / variance, count) if variance else float(count)


def samples_for_interval(percent: float) -> int:
    """Return the fewest samples that `percentile_interval` needs: each tail must hold one 97.5% of the time."""
    q, tail = percent / 100, (1 - CONFIDENCE) / 2
    return math.ceil(math.log(tail) / math.log(max(q, 1 - q)))


def surely_beyond(intervals: Mapping[str, Sequence[float]], percent: float, bound_ms: float) -> bool:
    """Return True if the lower end of the interval of a percentile of the latency is above a bound.

    A percentile is at least as large as a smaller one, so that one's lower end counts too.
    """
    names = [f"latency_ms/p{p:g}" for p in PERCENTILES if p <= percent]
    return any(name in intervals and intervals[name][0] > bound_ms for name in names)


def overloaded(metrics: Mapping[str, float]) -> bool:
    """Return True if fewer requests a second are answered than are offered: the queue grows."""
    offered = metrics.get("offered_rps")
    return offered is not None and metrics["throughput_rps"] < OVERLOADED * offered


def requests_for_interval(count: int, worth: int, percent: float) -> int:
    """Return about how many requests give a percentile an interval, where `count` are worth `worth` independent ones.

    It has two digits, and is rounded up.
    """
    enough = max(SAMPLES_NEEDED.get(percent, 1), math.ceil(count * samples_for_interval(percent) / worth))
    digits: int = 10 ** max(len(str(enough)) - 2, 0)
    return -(-enough // digits) * digits


def across_runs(
    values: Sequence[float], intervals: Sequence[Sequence[float] | None]
) -> tuple[float, tuple[float, float] | None]:
    """Return the figure of several runs of one cell and its 95% interval; of one run its own figure and interval.

    values: of each run. intervals: each run's own, [low, high] or None.

    Runs differ by more than their own intervals say: in their inputs, and in the state of the machine. The figure is
    the mean over runs, and the interval is Student's t for that mean, so two runs give a wide one. It is at least as
    wide as the runs' own intervals make the mean's, because a few runs can agree by chance. Positive figures are
    averaged as logarithms, because times and rates spread by factors.
    """
    if len(values) == 1:
        return values[0], (intervals[0][0], intervals[0][1]) if intervals[0] else None
    from scipy.special import stdtrit  # scipy.stats, with its t, takes a second to import

    logs = min(values) > 0 and all(interval is None or interval[0] > 0 for interval in intervals)
    to, back = (math.log, math.exp) if logs else (float, float)
    runs = np.array([to(value) for value in values])
    own = [(to(high) - to(low)) / 2 for low, high in filter(None, intervals)]
    count, middle = len(runs), float(runs.mean())
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * float(runs.std(ddof=1)) / math.sqrt(count)
    if len(own) == count:
        reach = max(reach, math.hypot(*own) / count)
    return back(middle), (back(middle - reach), back(middle + reach))


def throughput(answered: int, duration_s: float) -> float:
    """Return the requests answered per second. Raises ValueError for a duration that is not positive."""
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise ValueError(f"duration_s={duration_s}: allowed is a finite number > 0")
    return answered / duration_s


def rate_interval(counts: npt.ArrayLike, seconds: npt.ArrayLike) -> tuple[float, float] | None:
    """Return the 95% interval of sum(counts) / sum(seconds), both [batches] in the order of time.

    It is that of a ratio of means (Cochran, Sampling Techniques, section 6.3). Batches near each other in time are
    alike, so the variance of their sum is that of a series. It says nothing of what differs between runs. None for
    fewer than LEAST_BATCHES.
    """
    answered, taken = np.asarray(counts, np.float64), np.asarray(seconds, np.float64)
    if len(taken) < LEAST_BATCHES:
        return None
    left = taken - answered * taken.sum() / answered.sum()  # seconds that a batch took more than its share
    reach = 1.96 * math.sqrt(float(left @ left) * _inflation(left)) / taken.sum()
    rate = float(answered.sum() / taken.sum())
    return rate / (1 + reach), rate / max(1 - reach, 1e-9)


def goodput(latencies_ms: npt.ArrayLike, deadlines_ms: npt.ArrayLike, duration_s: float) -> float:
    """Return the requests per second that were answered within their deadline, or at it.

    `latencies_ms` is [requests], `deadlines_ms` the same shape or one number for all. Raises ValueError.
    """
    latencies = _checked(latencies_ms, "latencies_ms", lowest=0.0)
    deadlines = np.asarray(deadlines_ms, dtype=np.float64)
    if deadlines.shape not in ((), latencies.shape):
        raise ValueError(f"deadlines_ms: shape {deadlines.shape}; allowed is one number or {latencies.shape}")
    return throughput(int((latencies <= deadlines).sum()), duration_s)


def _rank(count: int, percent: float) -> int:
    """Return floor(count * percent / 100), in whole thousandths of a percent: 0.999 * 1000 must not round to 998."""
    return count * round(percent * 1000) // 100_000


def _interval_ranks(count: int, percent: float, worth: int) -> tuple[int, int] | None:
    """Return the ranks, from zero, of the two samples that enclose the percentile; None if they would lie outside.

    worth: the number of independent samples that `count` samples are worth.
    """
    tail = (1 - CONFIDENCE) / 2
    low = binomial_quantile(tail, worth, percent / 100) - 1
    high = binomial_quantile(1 - tail, worth, percent / 100)
    if low < 0 or high >= worth:
        return None
    return low * count // worth, -(-(high + 1) * count // worth) - 1


def binomial_quantile(level: float, count: int, share: float) -> int:
    """Return the least k for which a binomial(count, share) variable is at most k with probability `level`.

    As scipy.stats.binom.ppf. Importing scipy.stats takes seconds in every cell.
    """
    from scipy.special import bdtr, bdtrik

    below: int = max(math.ceil(bdtrik(level, count, share)) - 1, 0)
    return below if float(bdtr(below, count, share)) >= level else below + 1


def _checked(samples: npt.ArrayLike, name: str, lowest: float = -math.inf) -> npt.NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64).ravel()
    if not len(values):
        raise ValueError(f"{name}: no samples, at least one is needed; was any request answered?")
    bad = ~(np.isfinite(values) & (values >= lowest))
    if bad.any():
        row = int(bad.argmax())
        allowed = "a finite number" if lowest == -math.inf else f"a finite number >= {lowest:g}"
        raise ValueError(f"{name}: sample {row} is {values[row]:g}; allowed is {allowed}")
    return values
