"""grbench.execution.stats against brute force, and its intervals against simulation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.stats import binom, norm

from grbench.config.compose import compose_spec
from grbench.execution import measure, stats
from grbench.scenarios import Measurement
from grbench.tools import sizing
from grengines.api import Request
from grengines.last_layer import LastLayer

latencies = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=60)


@examples(100)
@given(latencies, st.sampled_from([0.0, 1.0, 50.0, 75.0, 90.0, 99.0, 99.9]))
def test_percentile_is_the_sample_that_loadgen_takes(samples: list[float], percent: float) -> None:
    index = math.floor(len(samples) * Fraction(str(percent)) / 100)
    assert stats.percentile(samples, percent) == sorted(samples)[index]


@pytest.mark.parametrize("count", [1000, 2000, 10_000, 100_000])
@pytest.mark.parametrize(("percent", "share_above"), [(99.0, 100), (99.9, 1000), (90.0, 10)])
def test_rank_does_not_suffer_from_binary_fractions(count: int, percent: float, share_above: int) -> None:
    assert stats.percentile(np.arange(count), percent) == count - count // share_above


@examples(100)
@given(latencies)
def test_summary_is_monotone_within_range_and_independent_of_order(samples: list[float]) -> None:
    summary = stats.latency_summary(samples)
    p50, p90, mean = (summary.metrics[f"latency_ms/{k}"] for k in ("p50", "p90", "mean"))
    assert min(samples) <= p50 <= p90 <= max(samples)
    assert p50 in samples
    assert p90 in samples
    assert mean == pytest.approx(math.fsum(samples) / len(samples))
    shuffled = np.random.default_rng(0).permutation(samples)
    assert stats.latency_summary(shuffled).metrics == pytest.approx(summary.metrics)


@examples(100)
@given(latencies, st.sampled_from(stats.PERCENTILES))
def test_interval_holds_the_percentile_and_exists_from_a_stated_count(samples: list[float], percent: float) -> None:
    interval = stats.percentile_interval(samples, percent)
    assert (interval is not None) == (len(samples) >= stats.samples_for_interval(percent))
    if interval:
        assert interval[0] <= stats.percentile(samples, percent) <= interval[1]


def test_exact_on_a_small_array() -> None:
    summary = stats.latency_summary([4.0, 1.0, 3.0, 2.0])
    assert summary.metrics == {"latency_ms/mean": 2.5, "latency_ms/p50": 3.0, "latency_ms/p90": 4.0}
    assert summary.intervals == {}
    assert summary.notes == [
        "latency_ms/p50 has no 95% interval: it needs 6 samples, there are 4",
        "latency_ms/p90 has no 95% interval: it needs 36 samples, there are 4",
        "latency_ms/p99 withheld: it needs 1000 samples, there are 4",
        "latency_ms/p99.9 withheld: it needs 10000 samples, there are 4",
    ]


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (999, {"mean", "p50", "p90"}),
        (1000, {"mean", "p50", "p90", "p99"}),
        (9999, {"mean", "p50", "p90", "p99"}),
        (10_000, {"mean", "p50", "p90", "p99", "p99.9"}),
    ],
)
def test_tail_percentiles_only_from_enough_samples(count: int, names: set[str]) -> None:
    summary = stats.latency_summary(np.arange(count, dtype=float))
    assert {name.removeprefix("latency_ms/") for name in summary.metrics} == names
    withheld = {"p99", "p99.9"} - names
    assert {note.split(" withheld")[0].removeprefix("latency_ms/") for note in summary.notes} == withheld
    assert summary.intervals.keys() == summary.metrics.keys() - {"latency_ms/mean"}


def test_interval_of_a_known_case() -> None:
    # n=100, q=0.5: ranks 40 and 61 (from one) are the textbook 95% interval of the median.
    assert stats.percentile_interval(np.arange(1, 101), 50.0) == (40.0, 61.0)


@pytest.mark.parametrize("count", [1, 5, 64, 299, 1000, 9999, 100_000])
def test_the_binomial_quantile_is_scipys(count: int) -> None:
    shares, levels = (0.01, 0.5, 0.9, 0.99, 0.999), (0.025, 0.975)
    found = [[stats.binomial_quantile(level, count, share) for share in shares] for level in levels]
    assert found == binom.ppf(np.array(levels)[:, None], count, shares).tolist()


@pytest.mark.parametrize(("count", "percent"), [(50, 50.0), (200, 90.0), (1000, 99.0), (10_000, 99.9)])
def test_interval_covers_the_truth(count: int, percent: float) -> None:
    """Heavy-tailed samples with a known quantile: 95% must be covered (0.93 leaves room for luck)."""
    rng = np.random.default_rng(7)
    truth = (1 - percent / 100) ** (-1 / 1.5)  # Pareto, shape 1.5
    runs = 400
    covered = 0
    for _ in range(runs):
        interval = stats.percentile_interval(1 + rng.pareto(1.5, count), percent)
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert covered / runs >= 0.93
    assert covered < runs  # an interval that is always right is too wide to be of use


def _queries_of_eight(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries of eight requests that arrive and end together, as in multi_stream."""
    return np.repeat(rng.lognormal(0, 0.5, count // 8), 8), np.repeat(np.arange(count // 8) / 10, 8)


def _clients_in_step(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen clients whose requests share each batch, as in closed_loop."""
    times = rng.lognormal(0, 0.5, count // 16)
    return np.repeat(times, 16), np.repeat(np.cumsum(times) - times, 16)


def _queue(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Poisson arrivals at a server that is busy for half of the time."""
    arrivals, work = np.cumsum(rng.exponential(2.0, count)), rng.lognormal(-0.125, 0.5, count)
    ends, free = np.empty(count), 0.0
    for i in range(count):
        free = ends[i] = max(free, arrivals[i]) + work[i]
    return ends - arrivals, arrivals


@pytest.mark.parametrize("draw", [_queries_of_eight, _clients_in_step, _queue])
@pytest.mark.parametrize("percent", [50, 90])
def test_interval_of_dependent_samples_covers_the_truth(draw, percent: int) -> None:
    """Counted as independent, these samples give "95%" intervals that hold the truth in 35% to 80% of the runs."""
    rng = np.random.default_rng(11)
    truth = np.quantile(draw(rng, 80_000)[0], percent / 100)
    naive = covered = known = 0
    for _ in range(200):
        latencies, arrivals = draw(rng, 1024)
        low, high = stats.percentile_interval(latencies, percent) or (0.0, 0.0)
        naive += low <= truth <= high
        if interval := stats.latency_summary(latencies, arrivals_s=arrivals).intervals.get(f"latency_ms/p{percent}"):
            known += 1
            covered += interval[0] <= truth <= interval[1]
    assert naive / 200 < 0.85
    assert known > 150
    assert covered / known >= 0.92


@pytest.mark.parametrize("counts, between", [((600, 600), 0.0), ((1200, 300), 0.0), ((600, 600, 600, 600), 0.1)])
def test_interval_of_independent_runs_covers_the_truth(counts: tuple[int, ...], between: float) -> None:
    """Runs of a queue, of unequal lengths too, whose latencies are alike within each. between: spread of the runs."""
    rng = np.random.default_rng(12)
    truth = np.quantile(_queue(rng, 200_000)[0], 0.9)
    covered, known, gains = 0, 0, []
    for _ in range(200):
        runs = [_queue(rng, count) for count in counts]
        runs = [(latencies * np.exp(rng.normal(0.0, between)), arrivals) for latencies, arrivals in runs]
        summaries = [stats.latency_summary(latencies, arrivals_s=arrivals) for latencies, arrivals in runs]
        worths = [summary.metrics["latency_ms/p90_worth"] for summary in summaries]
        all_runs = [latencies for latencies, _ in runs]
        value, worth, interval = stats.percentile_of_runs(all_runs, 90.0)
        assert value == stats.percentile(np.concatenate(all_runs), 90.0)
        gains.append(worth / sum(worths))
        if interval:
            known += 1
            covered += interval[0] <= truth <= interval[1]
    assert known > 150
    assert 0.92 <= covered / known < 1
    assert 1 / 1.3 < np.mean(gains) < 1.3


def _alike(rng: np.random.Generator, count: int, correlation: float = 0.8) -> np.ndarray:
    """Return a series of standard normal values of which neighbours correlate."""
    steps = rng.standard_normal(count) * np.sqrt(1 - correlation**2)
    return lfilter([1.0], [1.0, -correlation], steps)


@pytest.mark.parametrize("counts", [(4000, 4000), (5000, 2500), (3000, 3000, 2000)])
@pytest.mark.parametrize("trace", [1.0, 0.0])
def test_what_runs_of_one_trace_have_in_common_is_no_error_of_its_percentile(
    counts: tuple[int, ...], trace: float
) -> None:
    """The trace drifts slowly, by `trace`; the truth is that of these requests, with new noise."""
    rng = np.random.default_rng(14)
    drift = trace * (np.sin(np.arange(max(counts)) / 200) + _alike(rng, max(counts), 0.998))
    values = np.linspace(-6, 6, 4001)
    below = sum(norm.cdf(values[:, None] - drift[None, :count:20]).sum(axis=1) for count in counts)
    truth = np.exp(values[np.searchsorted(below / below[-1], 0.9)])
    covered, gains, known = 0, [], 0
    for _ in range(60):
        runs = [np.exp(drift[:count] + _alike(rng, count)) for count in counts]
        own = sum(stats.independent_samples(run, np.arange(len(run)), 90.0) for run in runs)
        _, worth, interval = stats.percentile_of_runs(runs, 90.0)
        gains.append(worth / own)
        if interval:
            known += 1
            covered += interval[0] <= truth <= interval[1]
    assert known == 60 and covered / known >= 0.92
    assert np.mean(gains) > 5 if trace else 1 / 1.3 < np.mean(gains) < 1.3


def _two_speeds(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Return the slowness of a machine at each step: 1 or 1.5, each for 250 steps on average."""
    return 1 + 0.5 * ((np.cumsum(rng.random(steps) < 1 / 250) + rng.integers(2)) % 2)


def _drift(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Return the slowness of a machine whose logarithm drifts by 0.15, alike over 150 steps."""
    return np.exp(0.15 * _alike(rng, steps, np.exp(-1 / 150)))


def _batches_of_16(rng: np.random.Generator, count: int, slowness: np.ndarray, busy: float) -> np.ndarray:
    """Return the latencies in ms of Poisson arrivals at a server of batches. slowness: of each 20 ms. busy: of 1."""
    work, arrivals = rng.lognormal(-0.08, 0.4, count), np.cumsum(rng.exponential(0.85 / busy, count))
    done = np.r_[0.0, np.cumsum(work)]
    latencies, free, first = np.empty(count), 0.0, 0
    while first < count:
        start = max(free, arrivals[first])
        last = min(int(np.searchsorted(arrivals, start, "right")), first + 16)
        free = start + (4 + 0.6 * (done[last] - done[first])) * slowness[min(int(start / 20), len(slowness) - 1)]
        latencies[first:last] = free - arrivals[first:last]
        first = last
    return latencies


def _worth_at(runs: Sequence[np.ndarray], percent: float) -> float:
    """Return what runs are worth at one percentile alone."""
    return stats._worth_at(runs, stats.percentile(np.concatenate(runs), percent))


def test_p99_of_runs_on_a_machine_of_two_speeds_has_an_interval() -> None:
    """Runs of 10,000 requests, two at a time. The median's own worth would give none of them an interval."""
    rng = np.random.default_rng(16)
    runs = [_batches_of_16(rng, 10_000, _two_speeds(rng, 1500), 0.45) for _ in range(120)]
    truth = stats.percentile(np.concatenate(runs), 99.0)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    found = [interval for pair in pairs if (interval := stats.percentile_of_runs(pair, 99.0)[2])]
    assert len(found) >= 8
    assert sum(not low <= truth <= high for low, high in found) <= 0.05 * len(found)
    medians = [_worth_at(pair, 50.0) for pair in pairs]
    assert np.median(medians) < stats.samples_for_interval(99.0) / 4


def test_p99_of_runs_on_a_machine_that_drifts_has_no_interval() -> None:
    """Two runs of 10,000 requests are worth about 50, which p99 by itself does not show."""
    rng = np.random.default_rng(17)
    runs = [_batches_of_16(rng, 10_000, _drift(rng, 1500), 0.6) for _ in range(120)]
    truth = stats.percentile(np.concatenate(runs), 99.0)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    shares = np.array([float((run < truth).mean()) for run in runs])
    assert 10 < 2 * 0.99 * 0.01 / shares.var() < 200
    enough = stats.samples_for_interval(99.0)
    assert np.mean([_worth_at(pair, 99.0) >= enough for pair in pairs]) > 0.4
    assert np.mean([stats.samples_of_runs(pair, 99.0) >= enough for pair in pairs]) <= 0.1


def test_noise_of_a_known_share_is_worth_what_its_variance_says() -> None:
    """Half of the 10,000 requests of each run take the same time in both; the others come in blocks of 5 by chance."""
    rng = np.random.default_rng(15)
    sure = np.tile(np.repeat([0.0, 1.0], 5), 1000)
    runs = [np.where(np.repeat(np.arange(2000) % 4 < 2, 5), sure, np.repeat(rng.random(2000), 5)) for _ in range(2)]
    # The variance of a request's share is 1/4 in every second block, so that it is an eighth, times the block's length.
    assert stats.samples_of_runs(runs, 50.0) == pytest.approx(20_000 * 0.25 / (5 / 8), rel=0.1)


def test_interval_of_runs_that_differ_is_wider_than_their_own() -> None:
    rng = np.random.default_rng(13)
    samples = rng.lognormal(0, 0.5, 4000)
    runs = [samples, 1.2 * rng.permutation(samples)]
    value, _, interval = stats.percentile_of_runs(runs, 99.0)
    alike = stats.percentile_of_runs([samples, samples], 99.0)
    assert interval is not None and alike[2] is not None
    assert interval[1] / value > alike[2][1] / alike[0] > 1.02
    assert interval[1] / value > np.exp(1.96 * np.log(1.2) / 2)  # sd of two is their difference over the root of 2


def test_runs_that_are_worth_too_little_have_no_interval() -> None:
    """Each run has 20 blocks of 50 requests that take the same time."""
    runs = [np.repeat(np.random.default_rng(seed).random(20), 50) for seed in range(2)]
    _, worth, interval = stats.percentile_of_runs(runs, 99.0)
    assert 20 <= worth <= 80 and interval is None


def test_requests_that_arrive_together_count_once() -> None:
    latencies, arrivals = _queries_of_eight(np.random.default_rng(0), 8 * 999)
    summary = stats.latency_summary(latencies, arrivals_s=arrivals)
    assert "latency_ms/p99" not in summary.metrics
    assert summary.notes[0] == (
        "latency_ms/p99 withheld: it needs 1000 samples, "
        "there are 999 (7992 requests, and those that arrive together count once)"
    )
    latencies, arrivals = _queries_of_eight(np.random.default_rng(0), 8 * 1000)
    assert "latency_ms/p99" in stats.latency_summary(latencies, arrivals_s=arrivals).metrics


def test_a_backlog_is_one_event_however_many_requests_it_delays() -> None:
    latencies = np.random.default_rng(0).lognormal(0, 0.1, 2000)
    latencies[900:1100] += 1000  # one stall: a second one would move p99 anywhere
    summary = stats.latency_summary(latencies, arrivals_s=np.arange(2000))
    assert summary.metrics["latency_ms/p99"] > 1000
    assert "latency_ms/p99" not in summary.intervals
    [note] = [note for note in summary.notes if "p99 has no" in note]
    assert "it needs 368 samples, these 2000 are worth about " in note
    worth, enough = (int(re.findall(text, note)[0]) for text in (r"worth about (\d+)", r"about (\d+) requests are"))
    assert 2000 * 368 / worth <= enough <= 1.1 * 2000 * 368 / worth
    assert summary.metrics["latency_ms/p99_worth"] == worth
    assert "latency_ms/p99_worth" not in stats.latency_summary(latencies).metrics  # taken as independent


@examples(50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 5))
def test_samples_are_worth_at_most_their_groups(samples: list[float], size: int) -> None:
    groups = np.arange(len(samples)) // size
    assert 1 <= stats.independent_samples(np.array(samples), groups, 90.0) <= groups.max() + 1


def test_independent_samples_are_worth_about_their_number() -> None:
    samples = np.random.default_rng(3).pareto(1.5, 20_000)
    assert stats.independent_samples(samples, np.arange(20_000), 99.0) > 18_000


@pytest.mark.parametrize("between", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_interval_over_runs_covers_the_truth(count: int, between: float) -> None:
    """Runs that differ by `between` of the truth, each with an interval of its own that knows nothing of that."""
    rng = np.random.default_rng(5)
    covered = naive = 0
    for _ in range(1000):
        values = np.exp(rng.normal(0, between, count) + rng.normal(0, 0.02, count))
        own = [[float(v * np.exp(-0.0392)), float(v * np.exp(0.0392))] for v in values]
        _, interval = stats.across_runs(values.tolist(), own)
        assert interval is not None
        covered += interval[0] <= 1 <= interval[1]
        naive += own[0][0] <= 1 <= own[0][1]
    assert covered / 1000 >= 0.93
    assert between < 0.2 or naive / 1000 < 0.3


@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_interval_of_a_rate_covers_the_truth(alike: float) -> None:
    """Batches of 16 and a last one of 4; seconds go by the size, and may be like those of the batch before."""
    rng, covered = np.random.default_rng(9), 0
    counts = np.r_[np.full(99, 16), 4]
    for _ in range(200):
        noise = rng.standard_normal(100)
        for i in range(1, 100):
            noise[i] = alike * noise[i - 1] + np.sqrt(1 - alike**2) * noise[i]
        low, high = stats.rate_interval(counts, counts / 160 * (1 + 0.2 * noise)) or (0.0, 0.0)
        covered += low <= 160 <= high
    assert 178 <= covered <= 199  # 190 expected; a short series shows a little less than its whole variance
    assert stats.rate_interval(counts[:9], np.ones(9)) is None
    assert stats.rate_interval([4] * 10, [2.0] * 10) == (2.0, 2.0)


def test_one_run_keeps_its_own_interval_and_zeros_are_averaged() -> None:
    assert stats.across_runs([3.0], [[2.0, 4.0]]) == (3.0, (2.0, 4.0))
    assert stats.across_runs([3.0], [None]) == (3.0, None)
    middle, interval = stats.across_runs([0.0, 2.0], [None, None])
    assert middle == 1.0
    assert interval == pytest.approx((1 - 12.706, 1 + 12.706), abs=0.001)
    same, wide = stats.across_runs([2.0, 2.0], [[1.0, 4.0], [1.0, 4.0]])  # they agree by chance
    assert same == pytest.approx(2.0)
    assert wide == pytest.approx((2 * 2 ** -(0.5**0.5), 2 * 2 ** (0.5**0.5)))


@examples(100)
@given(latencies, st.floats(0, 1e6), st.floats(0.01, 100))
def test_goodput_counts_answers_in_time(samples: list[float], deadline: float, duration_s: float) -> None:
    expected = sum(s <= deadline for s in samples) / duration_s
    assert stats.goodput(samples, deadline, duration_s) == pytest.approx(expected)
    assert stats.goodput(samples, [deadline] * len(samples), duration_s) == pytest.approx(expected)
    assert stats.goodput(samples, deadline, duration_s) <= stats.throughput(len(samples), duration_s)


def test_goodput_takes_each_request_at_its_own_deadline() -> None:
    assert stats.goodput([10.0, 10.0, 10.0], [9.0, 10.0, 11.0], duration_s=2.0) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.latency_summary([]), "latency_ms: no samples"),
        (lambda: stats.percentile([], 50), "p50: no samples"),
        (lambda: stats.latency_summary([1.0, float("nan")]), "latency_ms: sample 1 is nan"),
        (lambda: stats.percentile([float("inf")], 50), "p50: sample 0 is inf"),
        (lambda: stats.latency_summary([-1.0]), "latency_ms: sample 0 is -1"),
        (lambda: stats.percentile([1.0], 100), "percent=100: allowed is 0 <= percent < 100"),
        (lambda: stats.throughput(3, 0.0), "duration_s=0.0: allowed is"),
        (lambda: stats.goodput([1.0, 2.0], [1.0], 1.0), r"deadlines_ms: shape \(1,\)"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@examples(20)
@given(st.integers(1, 3000), st.sampled_from(stats.PERCENTILES))
def test_interval_ranks_reach_their_confidence(count: int, percent: float) -> None:
    """The chance that the two order statistics enclose the percentile, summed term by term."""
    interval = stats.percentile_interval(np.arange(count), percent)
    if interval is None:
        return
    low, high = int(interval[0]), int(interval[1])
    q = percent / 100
    log_terms = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(q)
        + (count - k) * math.log1p(-q)
        for k in range(low + 1, high + 1)
    ]
    assert math.fsum(math.exp(term) for term in log_terms) >= 0.95 - 1e-9


def measured(details: dict[str, float]) -> dict[str, float]:
    return summarised(details).metrics


def summarised(
    details: dict[str, float], *words: str, whole: Sequence[int] = (), users: Sequence[int] = (0, 0, 0, 0)
) -> stats.Summary:
    """Summary of four requests with 10 history events each, one per batch. whole: as of Measurement.

    users: of the trace, whose first four requests are issued.
    """
    spec, _ = compose_spec(["engine=hstu", *words])
    events, request_ids = np.arange(10), np.arange(4)
    requests = [
        Request(i, user, events, events, events, events, 0, events[:2], 10, 0.0, 80.0) for i, user in enumerate(users)
    ]
    times = dict.fromkeys((*measure.PARTS, "latency_ms"), np.full(4, 2.0))
    samples = {"request_id": request_ids, "arrival_s": request_ids / 1e3, "batch_index": request_ids, **times}
    raw = Measurement(samples, 40, 40, details, busy_s=0.008, batch_mean=1.0, whole=list(whole))
    return measure.summarise(raw, spec, requests)


def test_a_run_with_fewer_returning_users_than_its_trace_says_so() -> None:
    """A cache finds less in it than in a long run."""
    counted = dict.fromkeys(("cache_hits", "cache_partial_hits", "cache_misses", "cache_bypassed"), 1.0)
    few = summarised(counted, users=(0, 1, 2, 0, 1, 2, 0, 1, 2, 0))
    assert few.metrics["cache/returning_share"] == 0.25
    [note] = [line for line in few.notes if "came before" in line]
    assert note.startswith("25% of these 4 requests are by users who came before in the run, and 70% in the whole ")
    assert note.endswith("trace: scenario.queries=10 shows the hits of all of it")
    for details, users in ((counted, (0, 1, 2, 0)), ({}, (0, 1, 2, 0, 1, 2, 0, 1, 2, 0))):
        assert not any("came before" in line for line in summarised(details, users=users).notes)


def test_requests_that_wait_in_the_client_of_a_server_are_noted() -> None:
    """Four requests arrive 1 ms apart and take 2 ms each: the last three find one unanswered."""

    def notes(*words: str) -> list[str]:
        its = ["engine=remote", "scenario=server", "scenario.max_batch=1", *words]
        return [note for note in summarised({}, *its).notes if "waited in the client" in note]

    [note] = notes("scenario.in_flight=1")
    assert note == (
        "75% of the requests waited in the client, because all calls of scenario.in_flight=1 were under way: queue_ms "
        "has this wait, and the server saw no more calls at a time; raise scenario.in_flight, at most 1024, to send "
        "more"
    )
    assert not notes("scenario.in_flight=2") and not notes("scenario.in_flight=1", "scenario.max_batch=2")
    assert not notes("scenario=offline", "scenario.in_flight=1", "scenario.max_batch=1")


def test_cache_metrics_are_shares_of_lookups_and_of_events() -> None:
    counted = {
        "cache_hits": 1.0,
        "cache_partial_hits": 0.0,
        "cache_misses": 2.0,  # one of them came from the host
        "cache_bypassed": 1.0,
        "cache_host_hits": 1.0,
        "cache_cached_tokens": 10.0,
        "cache_loaded_tokens": 6.0,
    }
    metrics = measured(counted)
    assert metrics["cache/device_hit_rate"] == metrics["cache/host_hit_rate"] == 0.25
    assert metrics["cache/hit_rate"] == 0.5
    assert metrics["cache/token_hit_rate"] == 16 / 40
    assert metrics["engine/cache_bypassed"] == 1
    assert "model_tflops" not in metrics  # part of that work was not done
    assert "cache/host_copy_gb_s" not in metrics  # nothing was measured of it

    copies = {"cache_host_wait_ms": 1.0, "cache_host_copy_ms": 4.0, "cache_host_bytes": 8e6}
    metrics = measured(counted | copies)
    assert metrics["cache/host_wait_share"] == 0.25
    assert metrics["cache/host_copy_gb_s"] == 2.0

    disk = {"cache_storage_hits": 2.0, "cache_storage_tokens": 4.0}
    disk |= {"cache_storage_read_bytes": 6e6, "cache_storage_read_ms": 3.0}
    assert "cache/storage_hit_rate" not in metrics
    metrics = measured(counted | disk)
    assert (metrics["cache/storage_hit_rate"], metrics["cache/hit_rate"]) == (0.5, 1.0)
    assert metrics["cache/storage_read_gb_s"] == 2.0
    assert metrics["cache/token_hit_rate"] == 20 / 40

    metrics = measured(dict.fromkeys(counted, 0.0))  # every lookup failed
    assert metrics["cache/hit_rate"] == metrics["cache/token_hit_rate"] == 0

    metrics = measured({})
    assert metrics["model_tflops"] > 0
    assert not any(name.startswith("cache/") for name in metrics)


def test_the_rate_counts_what_the_engine_did_and_what_a_full_model_does() -> None:
    """Four requests of 10 events and 2 candidates in 8 ms, each in a batch of its own."""
    model, busy = compose_spec(["engine=hstu"])[0].ranking_model, 0.008 * 1e12
    cut, every = (sizing.flops(model, 10, 2, rows=rows) / busy for rows in (LastLayer.READ, LastLayer.EVERY))
    assert cut < every
    for whole, done in (([], 4 * cut), ([1, 3], 2 * cut + 2 * every), ([0, 1, 2, 3], 4 * every)):
        metrics = summarised({}, whole=whole).metrics
        assert metrics["model_tflops"] == pytest.approx(done)
        assert metrics["full_model_tflops"] == pytest.approx(4 * every)
    compiled = summarised({}, "engine=onnxruntime").metrics
    assert compiled["model_tflops"] == pytest.approx(4 * cut)
    stand_in = summarised({}, "engine=aoti", "engine.fallback=[hstu]", whole=[2]).metrics  # it answered one
    assert stand_in["model_tflops"] == pytest.approx(3 * cut + every)
    distant = summarised({}, "engine=remote", "task=rank").metrics  # only the server knows what it computes
    assert "model_tflops" not in distant and distant["full_model_tflops"] == pytest.approx(4 * every)


def test_a_record_says_that_the_cache_failed() -> None:
    counted = dict.fromkeys(("hits", "partial_hits", "misses", "bypassed", "host_hits"), 1.0)
    details = {f"cache_{name}": n for name, n in (counted | {"cached_tokens": 1.0, "loaded_tokens": 1.0}).items()}
    quiet, warned = (summarised(details | {"cache_faults": n}).notes for n in (0.0, 3.0))
    [note] = set(warned) - set(quiet)
    assert note == "the cache failed 3 times, and those batches were answered without it; see worker.log"
    lost = summarised(details | {"cache_corrupt_pages": 2.0, "cache_storage_off": 7.0}).notes
    assert [note.split(",")[0] for note in lost if note not in quiet] == [
        "2 pages of the storage tier were not as they were written",
        "the storage tier was switched off for 7 batches",
    ]


def test_a_short_offline_run_names_both_cures() -> None:
    """Findings rank repeats of a short run, and no single one."""
    [note] = set(summarised({}, "scenario=offline").notes) - set(summarised({}).notes)
    assert "too short to rank by one run; runner.repeats=5 gives an interval, and scenario.queries=" in note


def test_item_cache_metrics_count_tokens_and_distinct_rows() -> None:
    metrics = measured({"items_tokens": 10.0, "items_token_hits": 8.0, "items_distinct": 4.0, "items_hits": 2.0})
    assert metrics["cache/item_token_hit_rate"] == 0.8
    assert metrics["cache/item_hit_rate"] == 0.5
