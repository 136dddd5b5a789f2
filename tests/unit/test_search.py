"""The search of `grbench tune`: limits, the queue, the strategy over made-up configurations, and the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.checkout import ROOT
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.signal import lfilter

from grbench import deployment
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.execution import energy, stats
from grbench.execution.files import require_files
from grbench.report.page import Text
from grbench.tune import answer, config, deploy, legal, limits, page, rates, session, space
from grbench.tune import replay as replay_module
from grbench.tune.certification import STEPS, Certificate, certify, recall, reserve
from grbench.tune.knowledge import Knowledge
from grbench.tune.limits import Limit, Verdict
from grbench.tune.outcome import UNJUDGED, BudgetSpentError, Configuration, Outcome, Probe, Wanted
from grbench.tune.proposers import Listed, Neighbours, OneAtATime, OptunaProposer
from grbench.tune.queue_model import BatchTimes, arrivals, latencies_ms
from grbench.tune.replay import Grid, Measured, Replay, replay
from grbench.tune.search import Search
from grbench.tune.surrogate import Surrogate
from grbench.tune.trial import Batching, Goal, Refutation, Trial
from grbench.tune.worth import requests_needed, worst, worth_of_a_request

P99 = Limit("latency_ms/p99", 80.0)


def outcome(p99: float, low: float | None = None, high: float | None = None, **metrics: float) -> Outcome:
    metrics = {"quality/auc_loss": 0.0, **metrics}
    figures = {"latency_ms/p50": p99 / 4, "latency_ms/p99": p99, "throughput_rps": 100.0, "offered_rps": 100.0}
    intervals = {} if low is None or high is None else {"latency_ms/p99": [low, high]}
    return Outcome("OK", {**figures, "samples": 10_000.0, "loadgen_valid": 1.0, **metrics}, intervals)


class Capacities:
    """An evaluator whose configurations keep 80 ms up to a capacity; probes of some seeds are worse."""

    grace = 0.0

    def __init__(
        self,
        capacity: Mapping[Configuration, float],
        cells: int = 100,
        worse: Mapping[int, float] | None = None,
        places: int = 1,
    ) -> None:
        self.capacity, self.cells, self.worse, self.places = capacity, cells, worse or {}, places
        self.rounds: list[list[tuple[Configuration, Probe]]] = []  # that were asked for beside each other
        self.probes: list[tuple[Configuration, Probe]] = []
        self.earlier: dict[Configuration, list[tuple[Probe, Outcome]]] = {}
        self.certified: dict[Configuration, list[tuple[Probe, Outcome]]] = {}
        self.failing: dict[Configuration, str] = {}
        self.qualities: dict[str, Mapping[str, float]] = {}

    def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
        if len(self.probes) >= self.cells:
            raise BudgetSpentError
        self.probes.append((configuration, probe))
        return self.outcome(configuration, probe)

    def together(self, wanted: Sequence[tuple[Configuration, Probe]]) -> None:
        self.rounds.append(list(wanted))

    def outcome(self, configuration: Configuration, probe: Probe) -> Outcome:
        if configuration in self.failing:
            return Outcome(self.failing[configuration], error="as planned")
        capacity = self.capacity[configuration] * self.worse.get(probe.seed, 1.0)
        if probe.rate is None:
            return Outcome("OK", {"throughput_rps": 1.2 * capacity, "quality/auc_loss": 0.0})
        p99 = 80 * (probe.rate / capacity) ** 4
        return outcome(p99, 0.99 * p99, 1.01 * p99, throughput_rps=probe.rate, offered_rps=probe.rate)

    def pool(self, outcomes: Sequence[Outcome]) -> Outcome:
        return worst(outcomes)

    def alike(self, probes: Sequence[Outcome], percent: float) -> float:
        return 0.0

    def known(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        return self.earlier.get(configuration, [])

    def certifying(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        return self.certified.get(configuration, [])

    def quality(self, configuration: Configuration) -> Mapping[str, float]:
        return self.qualities.get(configuration.get("engine") or "", {})

    def share(self, wanted: Sequence[Wanted]) -> float:
        return len(wanted) / self.cells if self.cells else float(bool(wanted)) * float("inf")

    def saving(self, configuration: Configuration) -> float:
        return 0.0

    def budget_for(self, wanted: Sequence[Wanted]) -> str:
        return f"{len(wanted)} cells: set budget={len(self.probes) + len(wanted)}cells"

    def left(self) -> float:
        return 1 - len(self.probes) / self.cells if self.cells else 0.0


AXES = {"engine": ["hstu", "aoti"], "scenario.max_batch": ["1", "4", "16", "64"]}
ALL = [Configuration(tuple(zip(AXES, values, strict=True))) for values in itertools.product(*AXES.values())]
CAPACITY = {c: 100.0 + 40 * i for i, c in enumerate(ALL)}
BATCHING = {c: Batching(int(c.get("scenario.max_batch") or 1)) for c in ALL}


def searched(evaluator: Capacities, goal: Goal | None = None) -> Knowledge:
    """Return what a search over ALL found."""
    search = Knowledge(goal or Goal("throughput", (P99,)), BATCHING)
    Search(search, ALL, evaluator, Surrogate(ALL, AXES)).run()
    return search


@pytest.mark.parametrize(
    "found, verdict",
    [
        (outcome(70, 65, 79.9), Verdict.KEPT),
        (outcome(70, 65, 80.1), Verdict.LIKELY),
        (outcome(90, 79.9, 99), Verdict.UNLIKELY),
        (outcome(90, 80.1, 99), Verdict.BROKEN),
        (outcome(70), Verdict.LIKELY),  # without an interval nothing is proved
        (outcome(9000), Verdict.UNLIKELY),
        (dataclasses.replace(outcome(400), intervals={"latency_ms/p50": [81.0, 120.0]}), Verdict.BROKEN),
        (outcome(4000, throughput_rps=80.0), Verdict.BROKEN),  # the queue grows
        (outcome(70, throughput_rps=80.0), Verdict.UNLIKELY),
        (Outcome("OK", {"throughput_rps": 100.0}), Verdict.UNKNOWN),
    ],
)
def test_a_limit_is_judged_by_the_interval(found: Outcome, verdict: Verdict) -> None:
    assert P99.judge(found) is verdict


def test_a_floor_is_the_least_value_and_an_unknown_metric_is_refused() -> None:
    floor = limits.parse("throughput_rps", "90")
    assert floor.judge(outcome(1)) is Verdict.KEPT
    assert limits.parse("throughput_rps", "110").judge(outcome(1)) is Verdict.BROKEN
    with pytest.raises(ConfigError, match="quality/ne_loss: no such key"):
        limits.parse("quality.ne_loss", "0.1%").judge(outcome(1))
    assert limits.parse("quality.auc_loss", "0.1%").bound == pytest.approx(0.001)
    assert limits.parse("quality.ne", "1.5").bound == 1.5  # an entropy is no share
    assert all(limits.parse(f"quality.{name}", "0.5").floor for name in ("auc", "hr10_popular", "hr10_new", "ndcg50"))
    assert not any(limits.parse(f"quality.{name}", "0.5").floor for name in ("auc_loss", "ne", "hr10_new_loss"))


def test_a_part_of_the_latency_is_judged_by_its_figure() -> None:
    """Records have no interval of it, so that an interval would never be within a limit."""
    found = outcome(70, 65, 79.9, **{"queue_ms/p90": 10.0})
    assert [limits.parse("queue_ms.p90", bound).judge(found) for bound in ("10", "9")] == [Verdict.KEPT, Verdict.BROKEN]


def test_progress_has_the_figure_that_decides() -> None:
    goal = Goal("throughput", (P99, limits.parse("queue_ms.p90", "9")))
    found = outcome(70, 65, 79.9, **{"queue_ms/p90": 10.0})
    assert answer.decisive(goal, found) == "queue_ms.p90 10: broken"
    assert answer.decisive(Goal("throughput", (P99,)), outcome(9000)) == "latency_ms.p99 9000: likely broken"
    assert answer.decisive(Goal("latency", ()), found) == "latency_ms.p99 70 [65, 79.9]: kept"


def test_neighbouring_rates_are_three_percent_apart() -> None:
    for step in (0, 57, 230):
        assert rates.rate_of(step + 1) / rates.rate_of(step) == pytest.approx(1.03, rel=1e-3)
        assert rates.step_below(rates.rate_of(step) * 1.001) == step


def test_the_queue_of_single_requests_is_lindleys() -> None:
    at = arrivals(100.0, 500, np.random.default_rng(3))
    found = latencies_ms(at, lambda size: 0.008, 1, 0.0)
    free, expected = 0.0, []
    for time in at:
        free = max(free, time) + 0.008
        expected.append((free - time) * 1e3)
    np.testing.assert_allclose(found, expected)


def test_a_batch_waits_until_it_is_full_or_its_oldest_has_waited() -> None:
    at = np.array([0.0, 0.001, 1.0])
    np.testing.assert_allclose(latencies_ms(at, lambda size: 0.01, 2, 0.5), [11.0, 10.0, 510.0])
    sizes: list[int] = []

    def service(size: int) -> float:
        sizes.append(size)
        return 0.01

    latencies_ms(np.zeros(5), service, 4, 0.5)
    assert sizes == [4, 1]


def test_times_of_batches_agree_with_the_offline_rate() -> None:
    times = BatchTimes([(1, 0.002)] * 5 + [(8, 0.010)] * 5, throughput=1600.0)
    assert times.mean(8) == pytest.approx(8 / 1600)
    assert times.mean(1) < times.mean(4) < times.mean(8)


def test_the_search_finds_the_best_and_brackets_it() -> None:
    search = searched(Capacities(CAPACITY))
    best = search.incumbent
    assert best is not None and best.low is not None and best.high == best.low + 1
    assert best.configuration == ALL[-1]
    assert rates.rate_of(best.low) <= CAPACITY[ALL[-1]] < rates.rate_of(best.high) * 1.03


def test_the_default_is_measured_first_and_a_loser_costs_one_probe_at_a_rate() -> None:
    evaluator = Capacities({c: 1000.0 * 0.9**i for i, c in enumerate(ALL)})
    search = searched(evaluator)
    assert evaluator.probes[0] == (ALL[0], Probe(None, 512))
    losers = [trial for trial in search.trials if trial.configuration in ALL[1:4]]
    assert len(losers) == 3 and all(len(trial.probes) <= 1 for trial in losers)
    other = next(trial for trial in search.trials if trial.configuration == ALL[4])
    assert other.low is not None  # the best of another engine is bracketed as well


def test_failures_are_data() -> None:
    evaluator = Capacities(CAPACITY)
    evaluator.failing = {ALL[-1]: "OOM", ALL[0]: "UNAVAILABLE"}
    search = searched(evaluator)
    assert search.incumbent is not None and search.incumbent.configuration == ALL[-2]
    failed = {trial.configuration: trial.failed for trial in search.trials if trial.failed}
    assert failed == {ALL[-1]: "OOM: as planned", ALL[0]: "UNAVAILABLE: as planned"}


class Remembering(Capacities):
    """An evaluator that answers a probe again at no cost, as LiveEvaluator does. One probe at a rate fails.

    number: of that probe. status: that it ends with.
    """

    def __init__(self, number: int, status: str, places: int) -> None:
        super().__init__(CAPACITY, places=places)
        self._number, self._status, self._asked = number, status, 0
        self._known: dict[tuple[Configuration, Probe], Outcome] = {}
        self.failed: Configuration | None = None

    def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
        self._asked += 1
        assert self._asked < 1000, f"{configuration.name} is asked for {probe} for ever"
        if (configuration, probe) not in self._known:
            at_rates = sum(known.rate is not None for _, known in self._known)
            found = super().evaluate(configuration, probe)
            if probe.rate is not None and at_rates == self._number:
                self.failed, found = configuration, Outcome(self._status, error="as planned")
            self._known[configuration, probe] = found
        return self._known[configuration, probe]


@pytest.mark.parametrize("goal", [Goal("throughput", (P99,)), Goal("cost", (P99,))], ids=lambda goal: goal.objective)
@pytest.mark.parametrize("places", [1, 4])
def test_a_search_ends_whichever_of_its_probes_fails_at_a_rate(goal: Goal, places: int) -> None:
    for number in itertools.count():
        evaluator = Remembering(number, "KILLED", places)
        search = searched(evaluator, goal)
        if evaluator.failed is None:
            break
        [trial] = [trial for trial in search.trials if trial.configuration == evaluator.failed]
        assert trial.failed == "KILLED: as planned"
        assert search.incumbent is not None
    assert number > 5, "probes at rates"


def test_a_branch_that_loses_too_much_quality_is_cut_without_a_cell() -> None:
    evaluator = Capacities(CAPACITY)
    evaluator.qualities = {"aoti": {"quality/auc_loss": 0.014}}
    search = searched(evaluator, Goal("throughput", (P99, limits.parse("quality.auc_loss", "0.1%"))))
    assert all(configuration.get("engine") == "hstu" for configuration, _ in evaluator.probes)
    cut = {trial.failed for trial in search.trials if trial.configuration.get("engine") == "aoti"}
    assert cut == {"breaks quality.auc_loss <= 0.1%: quality.auc_loss 1.4%"}
    assert search.incumbent is not None and search.incumbent.configuration.get("engine") == "hstu"


@pytest.mark.parametrize(
    "goal", [Goal("throughput", (P99,)), Goal("pareto", (P99,)), Goal("cost", (P99,))], ids=lambda goal: goal.objective
)
def test_a_search_on_four_places_asks_for_four_probes_at_a_time_and_finds_the_same(goal: Goal) -> None:
    alone, beside = (Capacities(CAPACITY, places=places) for places in (1, 4))
    best = [found.incumbent for found in (searched(alone, goal), searched(beside, goal))]
    assert best[0] is not None and best[1] is not None
    assert (best[0].configuration, best[0].low) == (best[1].configuration, best[1].low)
    assert best[0].high is not None and best[0].high == best[1].high
    assert all(len(asked) == 1 for asked in alone.rounds)
    assert max(len(asked) for asked in beside.rounds) == 4
    assert all(len(set(asked)) == len(asked) for asked in beside.rounds)
    assert len(beside.rounds) < 0.65 * len(alone.rounds)  # a space of eight soon ends
    again = Capacities(CAPACITY, places=4)
    searched(again, goal)
    assert again.rounds == beside.rounds


def test_a_round_has_only_the_probes_that_the_budget_has_room_for() -> None:
    evaluator = Capacities(CAPACITY, cells=7, places=4)
    searched(evaluator, Goal("throughput", (P99,), runs=0))
    assert [len(asked) for asked in evaluator.rounds] == [4, 3]


def test_certifying_runs_are_measured_beside_each_other() -> None:
    evaluator = Capacities(CAPACITY, places=4)
    search = searched(evaluator)
    before = len(evaluator.rounds)
    certificate = certify(search, evaluator)
    assert certificate is not None
    [asked] = evaluator.rounds[before:]
    assert [probe.seed for _, probe in asked] == [101, 102]


@pytest.mark.parametrize("places, failed", [(1, [101]), (4, [101, 102])])
def test_certifying_runs_beside_one_that_fails_are_shown(places: int, failed: list[int]) -> None:
    evaluator = Capacities(CAPACITY, places=places)
    search = searched(evaluator)
    evaluator.worse = {101: 0.95}  # the first rates fail
    shown: list[Probe] = []
    certificate = certify(search, evaluator, lambda trial, probe, outcome, verdict: shown.append(probe))
    assert certificate is not None
    by_rate = [[probe.seed for probe in group] for _, group in itertools.groupby(shown, lambda probe: probe.rate)]
    assert by_rate == [failed] * len(certificate.failures) + [[101, 102]] and certificate.failures


def test_a_configuration_that_is_overtaken_beside_another_challenges_it() -> None:
    """Short probes of the best are unlucky above the rate of the second, which climbs beside it."""
    evaluator = Capacities(CAPACITY, places=4)
    best, usual = ALL[-1], evaluator.outcome
    evaluator.capacity = dict.fromkeys(ALL, 50.0) | {best: 400.0, ALL[-2]: 350.0}

    def unlucky(configuration: Configuration, probe: Probe) -> Outcome:
        short = probe.rate is not None and probe.rate > 300 and probe.requests < 10_000
        return outcome(81.0, 70.0, 90.0) if configuration == best and short else usual(configuration, probe)

    evaluator.outcome = unlucky  # type: ignore[method-assign]
    found = searched(evaluator).incumbent
    assert found is not None and found.configuration == best


def test_the_default_is_measured_alone_if_others_are_judged_by_its_quality() -> None:
    evaluator = Capacities(CAPACITY, places=4)
    searched(evaluator, Goal("throughput", (P99, limits.parse("quality.auc_loss", "0.1%"))))
    assert [configuration for configuration, _ in evaluator.rounds[0]] == ALL[:1]
    assert len(evaluator.rounds[1]) == 4


@pytest.mark.parametrize(
    "cells, worse, lower",
    [
        (3, 0.77, [2, 9]),  # there is no room for both runs of two tries: the second is five steps below the next one
        (4, 0.83, [0, 7]),
        (4, 0.77, [0, 7, 16]),  # the second fails, too
        (2, 0.94, [2]),  # the first try is the last
        (100, 0.77, [0, 2, 6, 14]),
    ],
)
def test_the_last_try_that_the_budget_has_room_for_is_at_a_lower_rate(
    cells: int, worse: float, lower: list[int]
) -> None:
    """Runs with other seeds carry less: other work takes a part of the machine."""
    [best] = ALL[:1]
    evaluator = Capacities({best: 100.0}, worse={101: worse, 102: worse})
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, [best], evaluator, Listed([best])).run()
    low, measured = search.trials[0].low, len(evaluator.probes)
    assert low is not None
    evaluator.cells = measured + cells
    certificate = certify(search, evaluator)
    tried = dict.fromkeys(low - rates.step_below(1.001 * (probe.rate or 0)) for _, probe in evaluator.probes[measured:])
    assert list(tried) == lower and certificate is not None and certificate.step == low - lower[-1]


def test_a_rate_that_is_lowered_for_another_try_says_so_and_names_a_budget_for_both() -> None:
    [best] = ALL[:1]
    evaluator = Capacities({best: 100.0})
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, [best], evaluator, Listed([best])).run()
    low, measured = search.trials[0].low, len(evaluator.probes)
    assert low is not None
    evaluator.cells = measured + 3
    certificate = certify(search, evaluator)
    rate, lower = rates.rate_of(low), rates.rate_of(low - 2)
    assert certificate is not None and certificate.step == low - 2
    assert certificate.failures == [
        f"hstu max_batch=1 at {lower:.4g} instead of {rate:.4g} requests/s: a try at {rate:.4g} leaves no room for "
        f"another one, and both take 4 cells: set budget={measured + 4}cells"
    ]
    del evaluator.probes[measured:]
    evaluator.cells = measured + 4
    certificate = certify(search, evaluator)
    assert certificate is not None and certificate.step == low and not certificate.failures


class Alike(Capacities):
    """An evaluator of one configuration whose latencies are alike: p99 has an interval if its requests are worth 368.

    requests: of the budget. less: what a run with this seed is worth, as a share. Offline it answers 120 a second.
    """

    def __init__(self, requests: int, less: Mapping[int, float] | None = None) -> None:
        super().__init__({ALL[0]: 100.0}, cells=1000)
        self._requests, self._less = requests, less or {}

    def outcome(self, configuration: Configuration, probe: Probe) -> Outcome:
        found = super().outcome(configuration, probe)
        if probe.rate is None:
            return found
        worth = 0.2 * (1 - probe.rate / 120) ** 2 * probe.requests * self._less.get(probe.seed, 1.0)
        metrics = found.metrics | {"samples": float(probe.requests), "latency_ms/p99_worth": worth}  # type: ignore[operator]
        return dataclasses.replace(found, metrics=metrics, intervals=found.intervals if worth >= 368 else {})

    def pool(self, outcomes: Sequence[Outcome]) -> Outcome:
        found = super().pool(outcomes)
        totals = {name: sum(o.metrics[name] for o in outcomes) for name in ("samples", "latency_ms/p99_worth")}
        intervals = {"latency_ms/p99": [60.0, 79.0]} if totals["latency_ms/p99_worth"] >= 368 else {}
        return dataclasses.replace(found, metrics={**found.metrics, **totals}, intervals=intervals)

    def share(self, wanted: Sequence[Wanted]) -> float:
        return sum(probe.requests for _, probe in wanted) / self._requests

    def left(self) -> float:
        return 1 - self.share(self.probes)


def certified(evaluator: Alike) -> tuple[Knowledge, Certificate, list[Probe]]:
    """Return what is certified of the only configuration, and the certifying runs."""
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, [ALL[0]], evaluator, Listed([ALL[0]])).run()
    assert search.trials[0].low == rates.step_below(100.0)
    certificate = certify(search, evaluator)
    assert certificate is not None
    assert certificate.together.metrics["latency_ms/p99_worth"] >= 368
    assert len(certificate.outcomes) == 1 or worst(certificate.outcomes).metrics["latency_ms/p99_worth"] < 2 * 368
    return search, certificate, [probe for _, probe in evaluator.probes if probe.seed]


def test_a_certifying_run_has_the_requests_that_an_interval_needs() -> None:
    search, certificate, runs = certified(Alike(10_000_000))
    assert search.trials[0].low == certificate.step + 2 and not certificate.failures
    per_request = 0.2 * (1 - rates.rate_of(certificate.step) / 120) ** 2
    assert {probe.requests for probe in runs} == {certificate.requests}
    assert 368 / per_request <= certificate.requests <= 368 / per_request + 1000 and len(runs) == 2
    found = answer.answer(search, certificate)
    assert (
        found is not None
        and f"2 runs with other seeds of at least {certificate.requests:,} requests" in answer.proof(found)
    )


def test_runs_that_are_worth_less_than_planned_are_followed_by_one_more_at_the_same_rate() -> None:
    _, certificate, runs = certified(Alike(10_000_000, {101: 0.4, 102: 0.4, 103: 0.4}))
    assert [probe.seed for probe in runs] == [101, 102, 103] and len({probe.rate for probe in runs}) == 1
    assert sum(probe.requests for probe in runs) == pytest.approx(1.25 * 2.5 * runs[0].requests, rel=0.05)
    assert not certificate.failures and len(certificate.outcomes) == 3


@pytest.mark.parametrize("seeds, more", [([101, 102], 103), ([101, 103], 104)])
def test_runs_of_an_earlier_search_that_are_too_short_are_followed_by_one_more(seeds: list[int], more: int) -> None:
    """They refute nothing, and the new run has a seed that none of them had."""
    evaluator = Alike(1_000_000, dict.fromkeys(seeds, 0.3))
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, [ALL[0]], evaluator, Listed([ALL[0]])).run()
    trial = search.trials[0]
    assert trial.low is not None
    rate = rates.rate_of(trial.low - STEPS)
    runs = [(probe, evaluator.outcome(ALL[0], probe)) for seed in seeds for probe in [Probe(rate, 40_000, seed)]]
    assert evaluator.pool([found for _, found in runs]).intervals == {}
    recall(search, evaluator, trial, runs)
    assert trial.refuted is None
    measured = len(evaluator.probes)
    certificate = certify(search, evaluator)
    new = [probe.seed for _, probe in evaluator.probes[measured:] if probe.rate == rate and probe.seed not in seeds]
    assert certificate is not None and new == [more]


def test_runs_that_certify_tell_better_than_probes_what_a_request_is_worth() -> None:
    """A short probe at a lower rate shows a worth of 0.1 a request, and the long run above it 0.01."""
    trial, low, high = Trial(ALL[0]), rates.step_below(50.0), rates.step_below(60.0)
    evaluator = Capacities(CAPACITY)
    for runs, step, samples, worth in ((trial.probes, low, 1000.0, 100.0), (trial.certifying, high, 50_000.0, 500.0)):
        runs[step] = Outcome("OK", {"samples": samples, "latency_ms/p99_worth": worth})
    assert requests_needed([P99], evaluator, trial, low) == pytest.approx(368 / 0.01, abs=1)
    trial.certifying.clear()
    assert requests_needed([P99], evaluator, trial, low) == pytest.approx(368 / 0.1, abs=1)


def test_two_probes_of_one_trace_tell_what_in_them_is_the_traces() -> None:
    """A trace of 4000 visits drifts, so that a run alone is worth little; noise is of its own at each rate."""
    rng = np.random.default_rng(4)
    drift = np.repeat(rng.standard_normal(40), 100)
    latencies = [scale * np.exp(drift + rng.standard_normal(4000)) for scale in (10.0, 15.0)]

    class Recorded(Capacities):
        def alike(self, probes: Sequence[Outcome], percent: float) -> float:
            assert [found.metrics["rate"] for found in probes] == [50.0, 60.0]
            return worth_of_a_request(latencies, percent)

    evaluator, trial, low, high = Recorded(CAPACITY), Trial(ALL[0]), rates.step_below(50.0), rates.step_below(60.0)
    found = [stats.latency_summary(its, arrivals_s=np.arange(4000.0)).metrics for its in latencies]
    trial.probes[low] = Outcome("OK", found[0] | {"samples": 4000.0, "rate": 50.0})
    own, alone = found[0]["latency_ms/p99_worth"] / 4000, requests_needed([P99], evaluator, trial, low)
    assert alone == math.ceil(368 / own) and own < 0.1
    trial.probes[high] = Outcome("OK", found[1] | {"samples": 4000.0, "rate": 60.0})
    apart = evaluator.alike([trial.probes[low], trial.probes[high]], 99.0)
    assert apart > 0.7  # noise has no memory
    assert requests_needed([P99], evaluator, trial, low) == math.ceil(368 / math.sqrt(own * apart)) < alone / 2
    trial.certifying[low] = Outcome("OK", {"samples": 4000.0, "latency_ms/p99_worth": 40.0})
    assert requests_needed([P99], evaluator, trial, low) == 36_800  # a run that certifies says better


@pytest.mark.parametrize("low, high, noise", [(380.0, 450.0, 0.05), (610.0, 720.0, 0.3)])
def test_what_two_probes_plan_is_near_what_certifying_runs_are_worth(low: float, high: float, noise: float) -> None:
    """Queues of recorded visits whose work is alike over 200 requests. Probes have the same gaps between arrivals."""
    rng = np.random.default_rng(5)
    planned, alone, true = [], [], []
    for _ in range(6):
        count, short = 16_000, 4000
        work = np.exp(0.5 * lfilter([0.1], [1.0, -0.995], rng.standard_normal(count)))

        done = np.r_[0.0, np.cumsum(work / work.mean())]

        def queue(rate: float, gaps: np.ndarray, done: np.ndarray = done) -> np.ndarray:
            ended = 0

            def service(size: int) -> float:
                nonlocal ended
                ended += size
                return (0.0015 + 0.0009 * (done[ended] - done[ended - size])) * np.exp(noise * rng.standard_normal())

            return latencies_ms(np.cumsum(gaps) / rate, service, 8, 0.0)

        gaps = rng.exponential(size=short)
        probes = [queue(rate, gaps) for rate in (low, high)]
        runs = [queue(low, rng.exponential(size=count)) for _ in range(2)]
        own, apart = (
            stats.independent_samples(probes[0], np.arange(short), 99.0) / short,
            worth_of_a_request(probes, 99.0),
        )
        planned.append(math.sqrt(own * max(own, apart)))
        alone.append(own)
        true.append(stats.samples_of_runs(runs, 99.0) / (2 * count))
    near, before = (np.exp(np.log(its).mean() - np.log(true).mean()) for its in (planned, alone))
    assert before < 0.8 and 0.5 < near < 2.0
    assert all(0.1 < plan / truth < 6 for plan, truth in zip(planned, true, strict=True))


def test_a_run_that_proves_nothing_alone_is_followed_by_those_with_which_it_does() -> None:
    """The first has no interval: its requests are worth half as many as an interval needs."""
    _, certificate, runs = certified(Alike(10_000_000, {101: 0.5}))
    assert [probe.seed for probe in runs] == [101, 102]
    assert not certificate.outcomes[0].intervals and certificate.together.intervals


@pytest.mark.parametrize("goal", [Goal("throughput", (P99,)), Goal("latency", (P99,), rate=90.0)])
def test_a_figure_beyond_the_limit_is_not_outweighed_by_other_runs(goal: Goal) -> None:
    """Its interval has the limit in it, and that of all runs is within."""
    evaluator = Capacities(CAPACITY)
    usual = evaluator.outcome

    def unlucky(configuration: Configuration, probe: Probe) -> Outcome:
        return outcome(81.0, 75.0, 88.0) if probe.seed == 102 else usual(configuration, probe)

    evaluator.outcome = unlucky  # type: ignore[method-assign]
    evaluator.pool = lambda outcomes: outcomes[0]  # type: ignore[method-assign]
    assert certify(searched(evaluator, goal), evaluator) is None


class Unproven(Capacities):
    """An evaluator whose second certifying run has a figure within its limit, and an interval beyond it."""

    limit = limits.parse("throughput_rps", "10")

    def outcome(self, configuration: Configuration, probe: Probe) -> Outcome:
        found = super().outcome(configuration, probe)
        ends = {"throughput_rps": [9.0, 1000.0]} if probe.seed == 102 else {}
        return dataclasses.replace(found, intervals={**found.intervals, **ends})


@pytest.mark.parametrize(
    "goal", [Goal("throughput", (P99, Unproven.limit)), Goal("latency", (P99, Unproven.limit), rate=90.0)]
)
def test_a_limit_that_runs_do_not_share_is_proven_by_each_and_a_further_run_changes_nothing(goal: Goal) -> None:
    evaluator = Unproven(CAPACITY)
    search = searched(evaluator, goal)
    before = len(evaluator.probes)
    assert certify(search, evaluator) is None
    assert {probe.seed for _, probe in evaluator.probes[before:]} == {101, 102}
    found = answer.answer(search, None)
    assert found is not None and found.trial.refuted is not None
    assert re.match(
        r"in one of 2 runs: throughput_rps .* \[9, 1000\], likely kept, but unproven: its interval is not within ",
        found.trial.refuted.why,
    )


def test_a_rate_falls_as_far_for_an_interval_of_one_run_as_for_one_of_all() -> None:
    """The figure is within the limit, so that the rate may be right. The other run has the larger p99."""
    evaluator = Unproven({ALL[0]: 100.0}, worse={102: 1.001})
    search = Knowledge(Goal("throughput", (P99, Unproven.limit)), BATCHING)
    Search(search, ALL[:1], evaluator, Listed(ALL[:1])).run()
    low, before = search.trials[0].low, len(evaluator.probes)
    certify(search, evaluator)
    tried = dict.fromkeys(rates.step_of(probe.rate or 1.0) for _, probe in evaluator.probes[before:])
    assert low is not None and [low - step for step in tried][:4] == [0, STEPS, 2 * STEPS, 3 * STEPS]


def test_tries_that_fail_pass_the_budget_by_its_grace_once() -> None:
    """A run that certifies ends, even where it passes the budget, so that each try has to have room."""

    class Overdrawn(Capacities):
        grace = 0.1

        def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
            self.probes.append((configuration, probe))
            return self.outcome(configuration, probe)

    evaluator = Overdrawn(CAPACITY, worse={101: 0.01})
    search = searched(evaluator)
    evaluator.cells = len(evaluator.probes) + 2
    assert certify(search, evaluator) is None
    assert -evaluator.grace <= evaluator.left() < 0.0


def test_a_loss_that_is_not_proven_ends_the_tries_of_a_configuration() -> None:
    """No lower rate narrows the interval of a loss."""
    evaluator = Capacities(dict.fromkeys(ALL[:1], 100.0))
    usual = evaluator.outcome

    def uncertain(configuration: Configuration, probe: Probe) -> Outcome:
        found = usual(configuration, probe)
        return dataclasses.replace(found, intervals={**found.intervals, "quality/auc_loss": [-0.01, 0.01]})

    evaluator.outcome = uncertain  # type: ignore[method-assign]
    search = Knowledge(Goal("throughput", (P99, limits.parse("quality.auc_loss", "0.1%"))), BATCHING)
    Search(search, ALL[:1], evaluator, Listed(ALL[:1])).run()
    before = len(evaluator.probes)
    assert search.ranking() and reserve(search, evaluator) > 0 and certify(search, evaluator) is None
    assert search.ranking() and reserve(search, evaluator) == 0  # the budget is for others
    measured = len(evaluator.probes)
    assert len({probe.rate for _, probe in evaluator.probes[before:]}) == 1
    assert search.ranking() and certify(search, evaluator) is None and len(evaluator.probes) == measured
    found = answer.answer(search, None)
    assert found is not None and "quality.auc_loss 0% [-1%, 1%], likely kept" in answer.sentence(found)


def test_a_search_does_not_go_on_where_only_the_budget_lacks() -> None:
    """A leader that failed at every rate does not stand before one that has not failed."""
    evaluator, memory = Capacities(CAPACITY), Limit("gpu_memory_mib/reserved", 99.0)
    usual = evaluator.outcome
    evaluator.outcome = lambda *asked: with_memory(usual(*asked), 50.0)  # type: ignore[method-assign]
    knowledge = Knowledge(Goal("throughput", (P99, memory)), BATCHING)
    search = Search(knowledge, ALL, evaluator, Surrogate(ALL, AXES))
    search.run()
    leader = knowledge.ranking()[0]
    assert leader.low is not None
    found = with_memory(leader.probes[leader.low], 200.0)
    leader.refute(Refutation(leader.low + 1, found, Verdict.BROKEN, memory, "as planned"))
    assert knowledge.ranking()[0] is leader and knowledge.ranking()[1].refuted is None
    assert any(trial.offline and trial.low is None and not trial.failed for trial in knowledge.trials)
    evaluator.cells = len(evaluator.probes) + 1  # no room for two runs, and for a probe
    before = len(evaluator.probes)
    assert search.certify() is None and len(evaluator.probes) == before


def with_memory(found: Outcome, mib: float) -> Outcome:
    return dataclasses.replace(found, metrics={**found.metrics, "gpu_memory_mib/reserved": mib})


def test_a_run_beyond_the_limit_fails_the_rate() -> None:
    evaluator = Capacities(CAPACITY)
    search = searched(evaluator)
    best = search.ranking()[0]
    evaluator.worse = {102: 0.99 * rates.rate_of(best.low or 0) / CAPACITY[best.configuration]}
    evaluator.pool = lambda outcomes: outcomes[0]  # type: ignore[method-assign]
    certificate = certify(search, evaluator)
    assert certificate is not None and certificate.step < (best.low or 0)
    assert "in the run with seed +102: latency_ms.p99 " in certificate.failures[0]


def test_a_budget_without_room_for_these_requests_certifies_at_a_rate_that_leaves_room_for_another_try() -> None:
    evaluator = Alike(70_000)
    search, certificate, runs = certified(evaluator)
    first = search.trials[0].low
    assert first is not None and certificate.step < first - 2 and len(runs) == 2
    once = sum(probe.requests for probe in runs) / 70_000
    assert 0.9 * once < evaluator.left() < 1.1 * once
    assert certificate.failures[-1].startswith("2 runs of ") and "set budget=" in certificate.failures[-1]


class Timed(Alike):
    """An evaluator whose budget is seconds: at a lower rate requests take longer."""

    def share(self, wanted: Sequence[Wanted]) -> float:
        return sum(probe.requests / (probe.rate or 120.0) for _, probe in wanted) / self._requests


def test_a_budget_without_room_for_the_usual_margin_certifies_with_the_requests_that_are_needed() -> None:
    evaluator = Timed(1_000_000)
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, [ALL[0]], evaluator, Listed([ALL[0]])).run()
    used_s = 1_000_000 * (1 - evaluator.left())
    evaluator = Timed(round(used_s) + 270)  # twice the requests that are needed take 300 s or more, at any rate
    evaluator.probes = [(ALL[0], Probe(100.0, round(100 * used_s)))]
    assert reserve(search, evaluator) > 0
    certificate = certify(search, evaluator)
    assert certificate is not None and certificate.together.metrics["latency_ms/p99_worth"] >= 368
    assert certificate.requests * len(certificate.outcomes) < 2 * requests_needed(
        search.goal.limits, evaluator, search.trials[0], certificate.step
    )
    assert evaluator.left() >= 0


def test_a_configuration_that_is_known_at_rates_only_is_certified_at_a_lower_one() -> None:
    evaluator = Capacities({ALL[0]: 100.0}, worse={101: 0.95})
    search, step = Knowledge(Goal("throughput", (P99,)), BATCHING), rates.step_below(100.0)
    probe = Probe(rates.rate_of(step), 1000)
    search.note(search.begin(ALL[0]), probe, evaluator.outcome(ALL[0], probe))
    certificate = certify(search, evaluator)
    assert certificate is not None and certificate.step == step - STEPS


def test_certification_takes_the_next_best_if_the_best_fails() -> None:
    evaluator = Capacities(CAPACITY)
    search = searched(evaluator)
    evaluator.worse = {101: 0.95}  # the first run with another seed carries 5% less
    certificate = certify(search, evaluator)
    assert certificate is not None and len(certificate.outcomes) == 2
    assert certificate.failures and "with seed +101" in certificate.failures[0]
    assert rates.rate_of(certificate.step) <= 0.95 * CAPACITY[certificate.trial.configuration]
    found = answer.answer(search, certificate)
    assert found is not None and found.outcome is certificate.together
    words = answer.sentence(found)
    assert words.startswith("Take aoti max_batch=") and "certified: 2 runs" in words and "LoadGen: VALID" in words
    assert "The next best engine, hstu, gives" in words


@pytest.mark.parametrize(
    "objective, cost",
    [("throughput", " with 0.376 J each (not certified"), ("cost", ", 376 J for 1000 requests (not ")],
)
def test_the_sentence_has_the_energy_the_next_engine_and_what_a_limit_excludes(objective: str, cost: str) -> None:
    search = Knowledge(Goal(objective, (P99, Limit("quality/auc_loss", 0.001))), BATCHING)
    rate = rates.rate_of(rates.step_below(100.0))
    found = outcome(40, 39, 41, throughput_rps=rate, **{energy.METRIC: 0.3756})
    search.note(search.begin(ALL[0]), Probe(rate, 1000), found)
    dearer = outcome(40, 39, 41, throughput_rps=rate / 2, **{energy.METRIC: 0.5})
    search.note(search.begin(ALL[4]), Probe(rate / 2, 1000), dearer)
    lossy = outcome(1, throughput_rps=300.0, **{"quality/auc_loss": 0.0014})
    search.note(search.begin(ALL[1]), Probe(None, 512), lossy)
    answered = answer.answer(search, None)
    assert answered is not None
    first, *others = answer.sentence(answered).split(". ")
    assert first.startswith(f"Take {ALL[0].name}: {rate:.4g} requests/s at p99 40 [39, 41] ms{cost}")
    assert others[0].startswith("The next best engine, aoti, gives ")
    assert others[1].startswith(f"{ALL[1].name} could give up to 300")
    assert others[1].endswith("requests/s but breaks quality.auc_loss <= 0.1%: quality.auc_loss 0.14%.")


@pytest.mark.parametrize(
    "goal, order",
    [(Goal("latency", (P99,), rate=90.0), [7, 6, 5]), (Goal("cost", (P99,)), [7, 6, 5])],
    ids=["latency", "cost"],
)
def test_certification_goes_on_with_the_next_best_of_the_objective(goal: Goal, order: list[int]) -> None:
    capacity = CAPACITY if goal.rate else {c: 1000.0 - 100 * i for i, c in enumerate(ALL)}  # least by the cheapest
    evaluator = Capacities(capacity)
    usual = evaluator.outcome

    def priced(configuration: Configuration, probe: Probe) -> Outcome:
        if probe.seed:
            return Outcome("ERROR", error="as planned")
        found = usual(configuration, probe)
        joules = {energy.METRIC: 0.5 ** ALL.index(configuration)}  # far less than a lower rate would add
        return dataclasses.replace(found, metrics={**found.metrics, **joules})

    evaluator.outcome = priced  # type: ignore[method-assign]
    search = searched(evaluator, goal)
    assert len(search.ranking()) == len(ALL)
    measured = len(evaluator.probes)
    assert certify(search, evaluator) is None
    tried = dict.fromkeys(configuration for configuration, _ in evaluator.probes[measured:])
    assert list(tried)[:3] == [ALL[i] for i in order]


def test_an_answer_that_a_certifying_run_contradicts_says_so_first() -> None:
    evaluator = Capacities(CAPACITY)
    search = searched(evaluator)
    evaluator.worse = {101: 0.01}  # no rate holds with another seed
    assert certify(search, evaluator) is None
    found = answer.answer(search, None)
    assert found is not None
    words = answer.sentence(found)
    assert words.startswith(f"No rate of {found.trial.configuration.name} is proven, since it failed at ")
    assert "requests/s in the run with seed +101: " in words and "own run had" not in words
    assert ". No lower rate is known to keep the limits (not certified" in words


def rate_that_failed(limit: Limit, cells: int) -> tuple[Knowledge, Capacities, Trial]:
    """Return a search that takes over a lucky probe at 1103 requests/s, and four runs that certify lower rates."""
    search, evaluator = Knowledge(Goal("throughput", (limit,)), BATCHING), Capacities({ALL[0]: 1000.0}, cells)
    trial = search.begin(ALL[0])
    search.note(trial, Probe(None, 512), Outcome("OK", {"throughput_rps": 1200.0}))
    search.note(trial, Probe(1103.0, 3000), shown(1103.0, 9.38))
    figures = [(1039.0, 101, 222.0), (979.7, 101, 94.9), (870.4, 101, 58.6), (870.4, 102, 25.1)]
    runs = [(Probe(rate, 10_000, seed), shown(rate, p99)) for rate, seed, p99 in figures]
    recall(search, evaluator, trial, runs)
    return search, evaluator, trial


def shown(rate: float, p99: float) -> Outcome:
    """Return figures at a rate, whose requests are too few for an interval."""
    return outcome(p99, throughput_rps=rate, offered_rps=rate)


def test_the_only_rate_that_is_offered_is_not_above_one_that_failed(tmp_path: Path) -> None:
    """Runs at 1039 and 979.7 broke the limit, and those at 870.4 were within it without proof."""
    search, _, trial = rate_that_failed(P99, 0)
    step = rates.step_of(870.4)
    assert trial.refuted is not None and trial.low == step < trial.refuted.step
    why = "in 2 runs together: latency_ms.p99 58.6, likely kept, but unproven: too few independent requests"
    trial.refute(Refutation(step, trial.certifying[step], Verdict.LIKELY, P99, why))  # as the search does that has room
    assert search.incumbent is None
    found = answer.answer(search, None)
    assert found is not None
    words = answer.sentence(found)
    assert words.startswith(f"No rate of hstu max_batch=1 is proven, since it failed at 870.4 requests/s {why}. ")
    assert (
        ". Likely kept, but unproven: 870.4 requests/s at p99 58.6 ms (not certified)." in words and "1103" not in words
    )
    declared = config.declare(["engine=hstu", "space=typed", "engine.cpu_threads=1,2"])
    text = " ".join(deploy.write(found, declared, tmp_path).read_text().replace("\n# ", " ").split())
    assert "Likely kept, but unproven: 870.4 requests/s at p99 58.6 ms." in text and "1103" not in text


@pytest.mark.parametrize(
    "figures, why",
    [
        ((70.0, 65.0, 90.0), "likely kept, but unproven: its interval is not within latency_ms.p99 <= 80"),
        ((70.0,), "likely kept, but unproven: too few independent requests for an interval"),
    ],
)
def test_a_figure_within_its_limit_says_why_it_proves_nothing(figures: tuple[float, ...], why: str) -> None:
    evaluator = Capacities({ALL[0]: 100.0})
    usual = evaluator.outcome

    def unsure(configuration: Configuration, probe: Probe) -> Outcome:
        return outcome(*figures) if probe.seed else usual(configuration, probe)

    evaluator.outcome = unsure  # type: ignore[method-assign]
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, ALL[:1], evaluator, Listed(ALL[:1])).run()
    evaluator.cells = len(evaluator.probes) + 3
    assert certify(search, evaluator) is None
    found = answer.answer(search, None)
    assert found is not None and found.trial.refuted is not None and found.trial.refuted.why.endswith(why)


def test_runs_that_certify_are_judged_by_another_limit() -> None:
    """One run at 979.7 is within the wider limit, and proves nothing alone."""
    search, evaluator, trial = rate_that_failed(Limit("latency_ms/p99", 200.0), 0)
    assert certify(search, evaluator) is None
    found = answer.answer(search, None)
    assert found is not None
    words = answer.sentence(found)
    assert words.startswith("No rate of hstu max_batch=1 is proven, since it failed at 1039 requests/s in the run ")
    assert ". Likely kept, but unproven: 979.7 requests/s at p99 94.9 ms (not certified: 2 runs of " in words
    sure = [(Probe(870.4, 40_000, seed), outcome(70.9, 60.0, 90.0, throughput_rps=870.4)) for seed in (101, 102)]
    later = Later(evaluator, 0)
    later.certified[ALL[0]] = sure
    later.outcome = lambda configuration, probe: sure[0][1]  # type: ignore[method-assign]
    recall(search, later, trial, sure)
    certificate = certify(search, later)
    assert certificate is not None and certificate.step == rates.step_of(870.4)


def test_a_load_that_was_tried_above_the_offline_rate_is_no_load_untried() -> None:
    search, _, trial = rate_that_failed(P99, 0)
    other = search.begin(ALL[1])
    search.note(other, Probe(None, 512), Outcome("OK", {"throughput_rps": 1009.0}))
    rows = {
        values: rate for _, values, rate, _ in answer.neighbours(answer.Answer(search, trial, 1, shown(1, 1), None))
    }
    assert rows["1 -> 4"].endswith(" (its offline rate; no load was tried under these limits)")
    search.note(other, Probe(1103.0, 3000), Outcome("STOPPED", error="as planned"))
    rows = {
        values: rate for _, values, rate, _ in answer.neighbours(answer.Answer(search, trial, 1, shown(1, 1), None))
    }
    assert rows["1 -> 4"].endswith(" (its offline rate)")


def test_the_advice_after_a_rate_that_failed_is_for_a_lower_one() -> None:
    evaluator = Capacities({ALL[0]: 100.0}, worse=dict.fromkeys(range(101, 121), 0.5))
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, ALL[:1], evaluator, Listed(ALL[:1])).run()
    evaluator.cells = len(evaluator.probes) + 2
    assert certify(search, evaluator) is None
    found = answer.answer(search, None)
    assert found is not None and found.trial.refuted is not None
    words = answer.sentence(found)
    advised = re.search(r"at (\S+) requests/s take 2 cells: set budget=", words)
    assert advised is not None and float(advised[1]) < rates.rate_of(found.trial.refuted.step)
    assert words.count(str(found.trial.refuted)) == 1


def test_nothing_is_reserved_where_too_little_is_left_to_certify() -> None:
    evaluator = Capacities(CAPACITY)
    search = searched(evaluator)
    evaluator.share = lambda wanted: 0.35 * len(wanted)  # type: ignore[method-assign]
    for left, reserved in ((0.8, 0.7), (0.57, 0.0)):
        evaluator.left = lambda left=left: left  # type: ignore[method-assign, misc]
        assert reserve(search, evaluator) == pytest.approx(reserved)


class Later(Capacities):
    """An evaluator that goes on from the probes and certifying runs of another, which cost nothing."""

    def __init__(self, first: Capacities, cells: int) -> None:
        super().__init__(first.capacity, cells, first.worse)
        for configuration, probe in first.probes:
            known = self.certified if probe.seed else self.earlier
            known.setdefault(configuration, []).append((probe, first.outcome(configuration, probe)))

    def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
        if self._is_new((configuration, probe)):
            return super().evaluate(configuration, probe)
        return self.outcome(configuration, probe)

    def share(self, wanted: Sequence[Wanted]) -> float:
        new = [its for its in wanted if self._is_new(its)]
        return super().share(new) if new else 0.0

    def _is_new(self, wanted: Wanted) -> bool:
        return wanted[1] not in [probe for probe, _ in self.certified.get(wanted[0], [])]


def test_a_search_that_goes_on_recommends_no_rate_that_failed_and_none_above_it(tmp_path: Path) -> None:
    """Runs with other seeds carry half, so that the first search ends without a certificate."""
    first = Capacities(CAPACITY, worse=dict.fromkeys(range(101, 121), 0.5))
    search = searched(first)
    first.cells = len(first.probes) + 2
    assert certify(search, first) is None
    refuted = {t.configuration: t.refuted.step for t in search.trials if t.refuted}
    assert refuted
    for budget in (0, 3, 100):
        later = Later(first, budget)
        search = searched(later)
        certificate = certify(search, later)
        found = answer.answer(search, certificate)
        assert found is not None
        for trial in search.trials:
            failed = refuted.get(trial.configuration, math.inf)
            assert trial.low is None or trial.low < failed
            tried = [rates.step_below(1.001 * p.rate) for c, p in later.probes if c == trial.configuration and p.rate]
            assert all(step < failed for step in tried)
        assert found.step < refuted.get(found.trial.configuration, math.inf)
        if budget == 100:
            assert certificate is not None and rates.rate_of(certificate.step) <= 0.5 * CAPACITY[ALL[-1]]


RANKED = {"quality/auc": 0.7957, "quality/auc_loss": 0.0014, "quality/liked/auc_loss": 0.0014}
RANKED |= {"quality/rated/auc_loss": -0.001, "quality/popularity/rated/auc_loss": 0.5}
LISTED = {"quality/hr10": 0.0996, "quality/hr10_loss": 0.001, "quality/popularity/hr10_loss": 0.5}


@pytest.mark.parametrize(
    "figures, ends, words",
    [
        (
            RANKED,
            {"quality/auc": [0.78, 0.81], "quality/liked/auc_loss": [0.001, 0.0019]},
            "Its AUC is 0.7957 [0.78, 0.81]; against fp32 it loses 0.14% [0.1%, 0.19%] of the AUC of liked",
        ),
        (
            RANKED | {"quality/ne": 0.85, "quality/liked/ne_loss": 0.00035},
            {"quality/liked/auc_loss": [-0.001, 0.0019], "quality/liked/ne_loss": [0.0002, 0.0005]},
            "Its AUC is 0.7957, its normalised entropy is 0.85; against fp32 it loses 0.035% [0.02%, 0.05%] of the "
            "normalised entropy of liked and nothing of the AUC of liked beyond the interval (0.14% [-0.1%, 0.19%])",
        ),
        (
            RANKED | {"quality/auc_loss": 0.0002},
            {"quality/auc_loss": [0.0001, 0.0003]},
            "Its AUC is 0.7957; against fp32 it loses 0.02% [0.01%, 0.03%] of the AUC",
        ),
        (RANKED, {}, "Its AUC is 0.7957; against fp32 it loses 0.14% of the AUC of liked"),
        (
            LISTED,
            {"quality/hr10_loss": [-0.02, 0.03]},
            "Its HR@10 is 0.0996; against fp32 it loses nothing of the HR@10 beyond the interval (0.1% [-2%, 3%])",
        ),
        (LISTED, {}, "Its HR@10 is 0.0996; against fp32 it loses 0.1% of the HR@10"),
        ({"quality/hr10": 0.0996}, {}, "Its HR@10 is 0.0996"),
    ],
)
def test_an_answer_says_what_is_lost_of_trained_weights(
    figures: dict[str, float], ends: dict[str, list[float]], words: str
) -> None:
    assert answer.quality(Outcome("OK", figures, ends), "fp32") == words


def test_the_rate_that_failed_is_named_beside_the_best_and_in_the_deployment(tmp_path: Path) -> None:
    first = Capacities({ALL[0]: 100.0}, worse={101: 0.9, 102: 0.9})
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, ALL[:1], first, Listed(ALL[:1])).run()
    assert "failed" not in answer.leader(search)
    low = search.trials[0].low
    assert low is not None
    certificate = certify(search, first)
    failed = search.trials[0].refuted
    assert certificate is not None and failed is not None and certificate.step < failed.step <= low
    assert answer.leader(search).endswith(f" (it failed its certification at {rates.rate_of(failed.step):.4g}/s)")
    declared = config.declare(["engine=hstu", "space=typed", "engine.cpu_threads=1,2"])
    for one in (certificate, None):
        found = answer.answer(search, one)
        assert found is not None and found.step < failed.step
        text = " ".join(deploy.write(found, declared, tmp_path).read_text().replace("\n# ", " ").split())
        assert (
            f"It failed its certification at {rates.rate_of(failed.step):.4g} requests/s in the run with seed +" in text
        )


def test_a_search_that_goes_on_repeats_no_certification() -> None:
    """The second try was certified: it costs nothing, where there is no room for the rate between both."""
    first = Capacities(CAPACITY, worse={101: 0.95})
    search = searched(first)
    before = certify(search, first)
    assert before is not None and before.trial.refuted is not None
    later = Later(first, 0)
    certificate = certify(searched(later), later)
    assert certificate is not None and not later.probes
    assert (certificate.trial.configuration, certificate.step) == (before.trial.configuration, before.step)
    assert certificate.failures[0] == f"{before.trial.configuration.name} at {before.trial.refuted}"


def test_a_certificate_that_costs_nothing_is_found_after_a_cell_that_passed_the_budget() -> None:
    first = Capacities(CAPACITY, worse={101: 0.95})
    before = certify(searched(first), first)
    later = Later(first, 0)
    search = searched(later)
    later.left = lambda: -0.01  # type: ignore[method-assign]
    certificate = certify(search, later)
    assert before is not None and certificate is not None and certificate.step == before.step


def test_a_rate_that_is_certified_below_one_that_failed_is_the_winners() -> None:
    evaluator = Capacities({ALL[0]: 100.0}, worse={101: 0.8, 102: 0.8})
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, ALL[:1], evaluator, Listed(ALL[:1])).run()
    certificate = certify(search, evaluator)
    assert certificate is not None and certificate.trial.low == certificate.step
    assert answer.figures(certificate.trial) and search.incumbent is certificate.trial
    assert answer.leader(search).startswith(f"{ALL[0].name} at {rates.rate_of(certificate.step):.4g}/s (it failed")


def test_where_every_rate_failed_the_answer_is_the_best_by_the_objective() -> None:
    evaluator = Capacities(CAPACITY, worse=dict.fromkeys(range(101, 121), 0.1))
    search = searched(evaluator, Goal("latency", (P99,), rate=90.0))
    best = search.incumbent
    assert best is not None and certify(search, evaluator) is None and search.incumbent is None
    found = answer.answer(search, None)
    assert found is not None and found.trial is best
    assert answer.leader(search).startswith(f"none yet ({best.configuration.name} failed its certification at")


def test_the_line_of_a_certifying_run_that_failed_names_the_best_after_it() -> None:
    evaluator = Capacities(CAPACITY, worse={101: 0.9, 102: 0.9})
    search = searched(evaluator)
    leaders: list[str] = []

    def note(trial: Trial, probe: Probe, outcome: Outcome, verdict: Verdict | None) -> None:
        if verdict not in (Verdict.KEPT, Verdict.LIKELY):
            assert probe.rate is not None and trial.low != rates.step_of(probe.rate)
            leaders.append(answer.leader(search))

    before = answer.leader(search)
    certify(search, evaluator, note)
    assert leaders and before not in leaders


class InSession(Capacities):
    """Capacities for a session, which says how long things take."""

    cell_s = 1.0

    def rest_s(self, certifying: Sequence[Wanted]) -> float:
        return 0.0


def test_a_step_that_keeps_the_limits_is_the_answer_where_every_rate_of_the_winner_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["engine=hstu", "space=typed", "scenario.max_batch=1,2,4,8,16,32,64", "tracking=none"]
    declared = config.declare([*words, "latency_ms.p99=80", "budget=14cells", "certify_runs=4"])
    built = space.build(declared.axes, declared.typed, declared.fixed)
    first, *others = built.configurations
    evaluator = InSession({first: 400.0, **dict.fromkeys(others, 200.0)}, 14, {101: 0.01})
    usual = evaluator.outcome

    def slower_offline(configuration: Configuration, probe: Probe) -> Outcome:
        """Let the others fail before the first certifies, and after that keep the limits at their first rate."""
        found = usual(configuration, probe)
        if configuration == first or probe.rate is not None:
            return found
        if not any(run.seed for _, run in evaluator.probes):
            return Outcome("OOM", error="as planned")
        return dataclasses.replace(found, metrics={**found.metrics, "throughput_rps": 200.0})

    monkeypatch.setattr(evaluator, "outcome", slower_offline)
    monkeypatch.setattr(session, "LiveEvaluator", lambda *given: evaluator)
    assert session.TuneSession(declared, built, words).run() == 0
    said = capsys.readouterr()
    last = [line for line in said.err.splitlines() if "; best: " in line][-1]
    best = re.search(r"; best: (?P<name>max_batch=\d+) at (?P<rate>[\d.]+)/s;", last)
    assert best is not None and best["name"] != first.name, said.err
    assert said.out.startswith(f"Take {best['name']}: {best['rate']} requests/s at p99 "), said.out
    assert re.search(r"\(not certified, .*: 4 runs of 10,000 requests at 1\d\d\.\d requests/s take 4 cells", said.out)
    [folder] = (tmp_path / "outputs" / "tune").iterdir()
    facts = json.loads((folder / "tune.json").read_text())
    assert facts["winner"]["overrides"] == facts["pareto"][0] == [f"scenario.{best['name']}"]
    assert f"Take {best['name']}: " in (folder / "tune.md").read_text()
    file = folder / "best.yaml"
    [spec] = deployment.load(file).specs(file).values()
    assert f"max_batch={spec.scenario.max_batch}" == best["name"]


@pytest.mark.parametrize("failing", [1, 2, 7])
def test_where_the_best_fails_the_next_best_are_probed_at_a_rate_and_certified(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All others are slower, so that the search has only their offline rates until the best fails."""
    monkeypatch.chdir(tmp_path)
    words = ["engine=hstu", "space=typed", "scenario.max_batch=1,2,4,8,16,32,64", "tracking=none"]
    declared = config.declare([*words, "latency_ms.p99=80", "budget=300cells"])
    built = space.build(declared.axes, declared.typed, declared.fixed)
    ranked = built.configurations
    evaluator = InSession({c: 200.0 * 0.9**i if i else 400.0 for i, c in enumerate(ranked)}, 300)
    usual = evaluator.outcome

    def outcome(configuration: Configuration, probe: Probe) -> Outcome:
        fails = probe.seed and configuration in ranked[:failing]
        found = Outcome("ERROR", error="as planned") if fails else usual(configuration, probe)
        return dataclasses.replace(found, busy=1.4)

    monkeypatch.setattr(evaluator, "outcome", outcome)
    monkeypatch.setattr(session, "LiveEvaluator", lambda *given: evaluator)
    assert session.TuneSession(declared, built, words).run() == 0
    answered = capsys.readouterr().out
    at_rates = list(dict.fromkeys(configuration for configuration, probe in evaluator.probes if probe.rate))
    assert at_rates == ranked[: failing + 1]
    assert "The machine was busy: other processes used up to 1.4 cores" in answered.splitlines()[-1]
    if failing == len(ranked):
        assert answered.startswith(f"No rate of {ranked[0].name} is proven")
    else:
        assert answered.startswith(f"Take {ranked[failing].name}: ") and "(certified: 2 runs" in answered


def cut_short() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "evaluated, why",
    [
        (cut_short, "its evaluation was interrupted"),
        (lambda: Outcome("TIMEOUT", error="as planned"), "TIMEOUT: as planned"),
        (lambda: None, "the budget asks for no cell"),
    ],
)
def test_a_certificate_stands_where_its_weights_were_not_evaluated(
    evaluated: Callable[[], Outcome | None],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = ROOT / "experiments" / "weights" / "ml_100k" / "ranker" / "weights.safetensors"
    words = [f"model.weights={weights}", "model.tasks=[rated,liked]", "engine.precision=fp32"]
    words += ["engine=hstu", "space=typed", "scenario.max_batch=4,8", "tracking=none"]
    declared = config.declare([*words, "latency_ms.p99=80", "budget=60cells"])
    built = space.build(declared.axes, declared.typed, declared.fixed)
    evaluator = InSession(dict.fromkeys(built.configurations, 100.0), 60)
    asked: list[Configuration] = []

    def evaluate_quality(configuration: Configuration) -> Outcome | None:
        asked.append(configuration)
        return evaluated()

    evaluator.evaluate_quality = evaluate_quality  # type: ignore[attr-defined]
    monkeypatch.setattr(session, "LiveEvaluator", lambda *given: evaluator)
    with contextlib.suppress(KeyboardInterrupt):
        session.TuneSession(declared, built, words).run()
    said = capsys.readouterr().out
    assert len(asked) == 1 and said.startswith(f"Take {asked[0].name}: ") and "(certified: 2 runs" in said
    assert f". Its quality is unknown: {why}." in said
    [file] = tmp_path.glob("outputs/tune/*/best.yaml")
    assert deployment.load(file).strategies[0].certified is not None
    assert f"# Its quality is unknown: {why}." in file.read_text()


@pytest.mark.parametrize("certified", [True, False])
def test_no_place_claims_more_than_the_rate_that_was_offered(certified: bool, tmp_path: Path) -> None:
    """Random arrivals came 2% faster than they were asked for."""
    evaluator = Capacities(CAPACITY)
    usual = evaluator.outcome

    def faster(configuration: Configuration, probe: Probe) -> Outcome:
        found = usual(configuration, probe)
        more = {"throughput_rps": 1.02 * probe.rate} if probe.rate else {}
        return dataclasses.replace(found, metrics={**found.metrics, **more})

    evaluator.outcome = faster  # type: ignore[method-assign]
    search = searched(evaluator)
    certificate = certify(search, evaluator) if certified else None
    search.uncertified = "the search was interrupted"
    found = answer.answer(search, certificate)
    assert found is not None and found.outcome.metrics["throughput_rps"] > found.rate == rates.rate_of(found.step)
    words = f"{found.rate:.4g} requests/s at p99 "
    assert f": {words}" in answer.sentence(found) and words in page.summary(search, found)
    declared = config.declare(["engine=hstu", "space=typed", "engine.cpu_threads=1,2"])
    file = deploy.write(found, declared, tmp_path)
    [strategy] = deployment.load(file).strategies
    assert (strategy.certified.throughput_rps if strategy.certified else None) == (found.rate if certified else None)
    comment = "# The strategy is not certified, one run with the search's own seed: the search was interrupted."
    assert (comment in file.read_text().splitlines()) is not certified
    lows = {trial.low for trial in search.trials if trial.low is not None}
    offered = {rates.rate_of(step) for step in lows}
    chart = page.front_chart(search, found)
    assert chart is not None
    assert {x for series in chart.series for x in series.x} <= offered | {found.rate}
    assert {answer.figures(trial).get("requests/s") for trial in search.trials} - {None} == offered


def test_a_deployment_names_files_that_can_be_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("events.csv", "ranker.safetensors", "other.safetensors"):
        (tmp_path / name).write_text("user_id,item_id,timestamp\n")
    (tmp_path / "search").mkdir()
    monkeypatch.chdir(tmp_path)
    typed = ["task=rank", "engine=hstu", "workload=csv", "workload.path='events.csv'", "cache=lru", "cache.host_gb=1"]
    typed += ["cache.storage_gb=1", "cache.storage_path=states", "space=typed", "engine.cpu_threads=1,2"]
    declared = config.declare([*typed, "model.weights=ranker.safetensors,other.safetensors"])
    knowledge = Knowledge(declared.goal, BATCHING)
    trial = knowledge.begin(Configuration((("model.weights", "other.safetensors"),)))
    file = deploy.write(answer.Answer(knowledge, trial, 100, outcome(1), None), declared, tmp_path / "search")
    monkeypatch.chdir("/")
    [spec] = (compose_spec(strategy.overrides)[0] for strategy in deployment.load(file).strategies)
    assert spec.workload.path == str(tmp_path / "events.csv")  # type: ignore[union-attr]
    assert spec.ranking_model.weights == str(tmp_path / "other.safetensors")
    assert spec.cache.storage_path == str(tmp_path / "states")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "typed, chosen",
    [
        (
            ["engine=hstu", "scenario=trace_replay"],
            ["model=hstu_tiny", "workload=ml_100k", "kernel=auto", "cache=none", "engine.precision=auto"],
        ),
        (
            ["engine=pipeline", "engine@engine.rank=hstu", "cache=lru", "kernel.hstu_attention=torch"],
            ["kernel=auto", "engine@engine.retrieve=vllm", "engine.retrieve.precision=auto"],
        ),
    ],
)
def test_a_deployment_says_by_itself_what_its_strategy_is(typed: list[str], chosen: list[str], tmp_path: Path) -> None:
    """A later version may have other defaults than what nobody typed."""
    declared = config.declare([*typed, "space=typed", "scenario.max_batch=4,8"])
    knowledge = Knowledge(declared.goal, BATCHING)
    trial = knowledge.begin(Configuration((("scenario.max_batch", "8"),)))
    file = deploy.write(answer.Answer(knowledge, trial, 100, outcome(1), None), declared, tmp_path)
    loaded = deployment.load(file)
    words = loaded.strategies[0].overrides
    batching = ["scenario.max_batch=8", "scenario.max_wait_ms=2", "scenario.in_flight=", "scenario.order=fifo"]
    for word in (*chosen, *batching):
        assert any(its.startswith(word) for its in words)
    assert len({word.partition("=")[0] for word in words}) == len(words)
    [spec] = loaded.specs().values()
    given = [word for word in typed if not word.startswith("scenario=")]
    assert spec == compose_spec([*given, "scenario.max_batch=8", f"task={declared.task}"])[0]


def test_a_budget_too_small_to_certify_says_which_one_would_do() -> None:
    evaluator = Capacities(CAPACITY, cells=14)
    evaluator.share = lambda wanted: sum(1 + probe.requests / 2000 for _, probe in wanted) / 14  # type: ignore[method-assign]
    search = searched(evaluator)
    assert search.incumbent is not None
    assert certify(search, evaluator) is None
    words = answer.proof(answer.Answer(search, search.incumbent, 0, outcome(1), None))
    assert words.startswith("not certified, one run with the search's own seed: 2 runs of 10,000 requests at ")
    assert words.endswith(f" requests/s take 2 cells: set budget={len(evaluator.probes) + 2}cells")


def test_the_budget_of_a_certification_is_kept_from_the_search() -> None:
    evaluator = Capacities(CAPACITY, cells=60)
    search = searched(evaluator)
    assert 3 <= 60 - len(evaluator.probes) <= 50  # room for a run that fails, and for both of a lower rate
    assert certify(search, evaluator) is not None
    assert reserve(search, evaluator) == 0  # what is left is free


def test_a_probe_that_was_stopped_bounds_the_rate_and_is_never_feasible() -> None:
    evaluator = Capacities(CAPACITY)
    usual = evaluator.outcome

    def stopped(configuration: Configuration, probe: Probe) -> Outcome:
        if probe.rate is not None and probe.rate > evaluator.capacity[configuration]:
            return Outcome("STOPPED", error="the queue grew by 40 requests/s")
        return usual(configuration, probe)

    evaluator.outcome = stopped  # type: ignore[method-assign]
    search = searched(evaluator)
    best = search.incumbent
    assert best is not None and best.low is not None and best.high == best.low + 1
    assert rates.rate_of(best.low) <= CAPACITY[best.configuration] and not best.failed
    found = answer.answer(search, None)
    assert found is not None and "the probe ended early, STOPPED: the queue grew by" in answer.binding(found)


def test_rates_that_were_all_stopped_are_named_instead_of_the_budget() -> None:
    evaluator = Capacities(CAPACITY)
    evaluator.outcome = lambda configuration, probe: Outcome("STOPPED", error="the queue grew by 40")  # type: ignore[method-assign]
    evaluator.failing = {ALL[0]: "OOM"}
    words = answer.nobody(searched(evaluator, Goal("latency", (P99,), rate=90.0)))
    assert words.endswith(" requests/s ended early, STOPPED: the queue grew by 40")


def test_a_budget_without_a_probe_at_a_rate_is_answered_with_one_that_suffices() -> None:
    slow, kept = (Outcome("OK", {"throughput_rps": 100.0}, seconds=s, kept=not s) for s in (30.0, 0.0))
    knowledge = Knowledge(Goal("throughput", (P99,), probe_s=4.0), BATCHING)
    knowledge.note(knowledge.begin(ALL[0]), Probe(None, 512), kept)
    assert answer.nobody(knowledge).endswith("the budget is too small; set budget=5min or budget=20cells")
    for configuration in ALL[1:3]:
        knowledge.note(knowledge.begin(configuration), Probe(None, 512), slow)
    words = answer.nobody(knowledge)  # 8 cells of 30 s beside the 10 s of 1000 requests
    assert "2 offline probes took 60 s" in words and "; budget=6min or budget=20cells would do, or fewer" in words


def test_the_default_is_asked_for_even_if_others_are_known() -> None:
    evaluator = Capacities(CAPACITY)
    evaluator.earlier = {c: [(Probe(None, 512), evaluator.outcome(c, Probe(None, 512)))] for c in ALL[3:6]}
    searched(evaluator, Goal("pareto", (P99,)))
    first = next(c for c, _ in evaluator.probes if c not in evaluator.earlier)
    assert first == ALL[0]


def test_a_rate_of_an_earlier_run_that_is_far_below_costs_no_ladder() -> None:
    best = ALL[-1]
    low = Capacities({best: CAPACITY[best]})
    low.earlier = {best: [(Probe(CAPACITY[best] / 20, 1000), low.outcome(best, Probe(CAPACITY[best] / 20, 1000)))]}
    fresh = Capacities({best: CAPACITY[best]})
    for evaluator in (fresh, low):
        found = Knowledge(Goal("throughput", (P99,)), BATCHING)
        Search(found, [best], evaluator, Listed([best])).run()
        assert found.incumbent is not None and found.incumbent.low is not None
        assert rates.rate_of(found.incumbent.low) == pytest.approx(CAPACITY[best], rel=0.03)
    assert len(low.probes) <= len(fresh.probes)


def test_a_configuration_that_is_known_at_rates_only_is_probed_offline_once_its_best_rate_fails() -> None:
    """An earlier run was lucky at 120 requests/s, and the next step was too high: nothing is left to bracket."""
    evaluator, best, lucky = Capacities({ALL[0]: 100.0}), ALL[0], rates.step_below(120.0)
    evaluator.earlier = {
        best: [
            (Probe(rates.rate_of(lucky), 1000), outcome(79.0, 78.0, 79.5)),
            (Probe(rates.rate_of(lucky + 1), 1000), outcome(90.0, 89.0, 91.0)),
        ]
    }
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, [best], evaluator, Listed([best])).run()
    [trial] = search.trials
    assert trial.offline is not None and trial.low == rates.step_below(100.0)
    assert [probe.rate for _, probe in evaluator.probes[:2]] == [rates.rate_of(lucky), None]


def test_another_limit_is_answered_from_earlier_outcomes_alone() -> None:
    first = Capacities(CAPACITY)
    searched(first)
    again = Capacities(CAPACITY, cells=0)
    for configuration, probe in first.probes:
        again.earlier.setdefault(configuration, []).append((probe, first.outcome(configuration, probe)))
    search = searched(again, Goal("throughput", (Limit("latency_ms/p99", 100.0),)))
    assert again.probes == [] and search.incumbent is not None
    assert search.incumbent.best is not None and search.incumbent.best.intervals["latency_ms/p99"][1] <= 100


def test_the_simulated_queue_learns_of_smaller_batches_that_another_configuration_has() -> None:
    """Until then batches of 4 count as 0.4 of the time of 16. They take as long, so a queue of few requests waits."""
    sizes = [Configuration((("scenario.max_batch", str(size)),)) for size in (16, 4)]
    found = Knowledge(Goal("throughput", (P99,)), {c: Batching(size) for c, size in zip(sizes, (16, 4), strict=True)})
    predicted = []
    for size, configuration in zip((16, 4), sizes, strict=True):
        trial = found.begin(configuration)
        batches = [(size, 0.045 + 0.0001 * i) for i in range(32)]
        found.note(trial, Probe(None, 512), Outcome("OK", {"throughput_rps": size / 0.0466}, batches=batches))
        predicted.append(found.trials[0].predicted)
    assert predicted[0] is not None and predicted[1] is not None
    assert predicted[1] < predicted[0] - 1
    assert predicted[0] % 1 or predicted[1] % 1, "whole steps make many configurations equal"


def test_the_least_latency_at_a_rate() -> None:
    search = searched(Capacities(CAPACITY), Goal("latency", (), rate=90.0))
    assert search.incumbent is not None and search.incumbent.configuration == ALL[-1]
    assert all(len(trial.probes) == 1 for trial in search.trials)


def test_a_limit_that_nobody_keeps_is_named_with_the_nearest_point() -> None:
    goal = Goal("throughput", (P99, Limit("host_memory_mib/peak", 1.0)))
    evaluator = Capacities(CAPACITY)
    usual = evaluator.evaluate

    def heavy(configuration: Configuration, probe: Probe) -> Outcome:
        found = usual(configuration, probe)
        return dataclasses.replace(found, metrics={**found.metrics, "host_memory_mib/peak": 3.0})

    evaluator.evaluate = heavy  # type: ignore[method-assign]
    search = searched(evaluator, goal)
    assert answer.answer(search, None) is None
    assert "breaks host_memory_mib.peak <= 1: host_memory_mib.peak 3" in answer.nobody(search)

    slow = Capacities(dict.fromkeys(ALL, 1.0))
    slow.evaluate = lambda configuration, probe: (  # type: ignore[method-assign]
        outcome(200.0, 190.0, 210.0) if probe.rate else Outcome("OK", {"throughput_rps": 100.0})
    )
    words = answer.nobody(searched(slow))
    assert words.startswith("latency_ms.p99 <= 80: no configuration") and "150% beyond it" in words


@pytest.mark.parametrize("metric", ["throughput_rps", "goodput_rps"])
def test_a_rate_above_every_offline_rate_costs_no_probe_at_a_rate(metric: str) -> None:
    most = 1.2 * CAPACITY[ALL[-1]]
    evaluator = Capacities(CAPACITY)
    search = searched(evaluator, Goal("throughput", (P99, Limit(metric, 1e9))))
    assert len(evaluator.probes) == len(ALL) and all(probe.rate is None for _, probe in evaluator.probes)
    assert all(trial.failed.startswith(f"breaks {metric} >= 1e+09: offline it answers ") for trial in search.trials)
    assert answer.nobody(search) == (
        f"{metric} >= 1e+09: no configuration that was measured reaches it; nearest is {ALL[-1].name}: "
        f"{most:.4g} requests/s offline, and no rate gives more"
    )


def test_a_rate_that_the_fastest_alone_reaches_is_probed_of_it_alone() -> None:
    evaluator = Capacities(CAPACITY)
    search = searched(evaluator, Goal("throughput", (Limit("throughput_rps", 1.1 * CAPACITY[ALL[-1]]),)))
    assert search.incumbent is not None and {c for c, probe in evaluator.probes if probe.rate} == {ALL[-1]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Surrogate(ALL, AXES),
        lambda: OptunaProposer(ALL, AXES),
        lambda: Listed(ALL, 1),
        lambda: Neighbours(ALL, AXES),
        lambda: OneAtATime(ALL, AXES),
    ],
)
def test_every_configuration_is_proposed_once(make: Callable[[], Listed]) -> None:
    proposer, seen = make(), []
    while (configuration := proposer.ask()) is not None:
        seen.append(configuration)
        proposer.tell(configuration, CAPACITY[configuration], 0.0)
    assert sorted(c.name for c in seen) == sorted(c.name for c in ALL)


@pytest.mark.parametrize("seed", range(4))
def test_what_fails_first_is_not_tried_again_at_once(seed: int) -> None:
    """One of two kernels can't start, and each try may cost a fifth of a budget of time."""
    axes = {"kernel": ["auto", "compile"], "cache": ["none", "lru"], "scenario.max_batch": ["1", "4", "16", "64"]}
    every = [Configuration(tuple(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    proposer = Surrogate(every, axes, seed)
    asked: list[Configuration] = []
    while sum(c.get("kernel") == "compile" for c in asked) < 1:
        asked.append(proposer.ask() or every[0])
        starts = asked[-1].get("kernel") == "auto"
        proposer.tell(asked[-1], 100.0 if starts else None, 0.0 if starts else 1.0)
    following = proposer.ask()
    assert following is not None and following.get("kernel") == "auto"


SLOW_AXES = {"engine": ["hstu", "aoti"], "kernel": ["triton", "torch"], "scenario.max_batch": ["1", "4", "16", "64"]}
SLOW_ALL = [
    Configuration(tuple(zip(SLOW_AXES, values, strict=True))) for values in itertools.product(*SLOW_AXES.values())
]


class SlowStarts(Capacities):
    """An evaluator over SLOW_ALL in which some configurations do not start within their time limit."""

    def __init__(self, slow: Callable[[Configuration], bool], cells: int = 100, places: int = 1) -> None:
        super().__init__({c: 100.0 + 10 * i for i, c in enumerate(SLOW_ALL)}, cells, places=places)
        self._slow = slow

    def outcome(self, configuration: Configuration, probe: Probe) -> Outcome:
        if self._slow(configuration):
            return Outcome("TIMEOUT", error="as planned", within="108 s; more time")
        return super().outcome(configuration, probe)


def searched_slow(evaluator: SlowStarts, seed: int = 0) -> tuple[Knowledge, list[str]]:
    """Return what a search over SLOW_ALL found, and the lines that it said."""
    lines: list[str] = []
    batching = {c: Batching(int(c.get("scenario.max_batch") or 1)) for c in SLOW_ALL}
    found = Knowledge(Goal("throughput", (P99,)), batching)
    Search(found, SLOW_ALL, evaluator, Surrogate(SLOW_ALL, SLOW_AXES, seed), say=lines.append).run()
    return found, lines


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_that_starts_too_slowly_is_tried_once(seed: int) -> None:
    evaluator = SlowStarts(lambda configuration: configuration.get("engine") == "aoti")
    search, lines = searched_slow(evaluator, seed)
    engines = [configuration.engines for configuration, _ in evaluator.probes]
    reason = "engine=aoti kernel={}: the first probe of one did not end within 108 s; more time"
    for kernel in ("triton", "torch"):
        assert engines.count((("engine", "aoti"), ("kernel", kernel))) == 1
        assert len(search.left_out[reason.format(kernel)]) == 3
        assert f"left out 3 of {reason.format(kernel)}" in lines
    assert len(lines) == 2
    assert search.incumbent is not None and search.incumbent.configuration.get("engine") == "hstu"
    assert sum(trial.configuration.get("engine") == "hstu" for trial in search.trials) == 8


def test_a_slow_start_leaves_out_nothing_of_engines_that_have_run() -> None:
    evaluator = SlowStarts(lambda configuration: configuration.get("scenario.max_batch") == "64")
    known = [c for c in SLOW_ALL if c.get("scenario.max_batch") == "1"]  # one of each engine and kernel
    evaluator.earlier = {c: [(Probe(None, 512), evaluator.outcome(c, Probe(None, 512)))] for c in known}
    search, lines = searched_slow(evaluator)
    [taken] = lines
    assert taken.startswith("takes over 4 probes of 4 configurations from ") and len(search.trials) == len(SLOW_ALL)
    assert sum(bool(trial.slow) for trial in search.trials) == 4


def test_a_slow_start_of_the_default_leaves_out_nothing() -> None:
    search, lines = searched_slow(SlowStarts(lambda configuration: configuration == SLOW_ALL[0]))
    assert search.trials[0].slow and not lines and len(search.trials) == len(SLOW_ALL)


def test_what_runs_in_the_round_of_a_slow_start_counts() -> None:
    """On as many places as there are configurations all of a kind are open at once."""
    slow = [c for c in SLOW_ALL if c.get("scenario.max_batch") == "64"]
    search, lines = searched_slow(SlowStarts(lambda configuration: configuration in slow, places=16))
    assert not lines and not search.left_out and len(search.trials) == len(SLOW_ALL)


def made_up_grid() -> Grid:
    """36 configurations in which the best batch depends on the kernel, and the first one is the worst."""
    axes = {"kernel": ["torch", "triton", "cutlass"], "engine.cuda_graphs": ["false", "true"]}
    axes |= {"scenario.max_batch": ["1", "4", "8", "16", "64", "256"]}
    cells, batching = {}, {}
    for kernel, graphs, batch in itertools.product(*axes.values()):
        size = int(batch)
        fixed = (4.0 if graphs == "false" else 1.0) + (2.0 if kernel == "cutlass" else 0.0)
        each = {"torch": 3.0, "triton": 1.3, "cutlass": 1.0}[kernel]
        seconds = (fixed + each * max(size, 4 if kernel == "cutlass" else 2) * (1 + 0.004 * size)) / 1e3
        configuration = Configuration(tuple(zip(axes, (kernel, graphs, batch), strict=True)))
        batches = [(size, seconds * (1 + 0.1 * np.sin(i))) for i in range(16)]
        cells[configuration] = Measured(size / seconds, batches, "OOM" if kernel == "torch" and size > 32 else "OK")
        batching[configuration] = Batching(size, 0.002)
    return Grid(axes, cells, batching)


Truths = dict[Configuration, float]
REPLAYED = Goal("throughput", (P99,), probe_s=6.0)


@pytest.fixture(scope="module")
def replayed() -> tuple[Grid, Truths]:
    """Return a grid and what each of its configurations can do, of few runs: it takes longer than a search of them."""
    grid = made_up_grid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_module, "RUNS", 3)
        return grid, {configuration: grid.truth(configuration, REPLAYED.limits) for configuration in grid.cells}


def test_the_truth_of_a_grid_is_kept_by_half_of_other_runs() -> None:
    """Batches of very different lengths: the highest rate of a single run is off by up to a tenth."""
    batches = [(16, 0.08 if i % 10 == 0 else 0.008) for i in range(100)]
    only = Configuration((("kernel", "triton"),))
    grid = Grid({"kernel": ["triton"]}, {only: Measured(16 / 0.0152, batches)}, {only: Batching(16)})
    truth, bounds = grid.truth(only, (Limit("latency_ms/p99", 250.0),)), [(99.0, 250.0)]
    others = [grid._highest(only, bounds, seed) for seed in range(100, 130)]
    assert max(others) > 1.04 * min(others)
    assert 8 <= sum(rate >= truth for rate in others) <= 22  # two standard errors of a share of half, and of the truth


def test_a_replayed_search_comes_near_the_best_and_certifies_nothing_false(replayed: tuple[Grid, Truths]) -> None:
    grid, truths = replayed
    runs = [replay(grid, REPLAYED, "grbench", 40, seed, truths) for seed in range(3)]
    finals = [run.final for run in runs if run.final is not None]
    assert len(finals) == 3 and sum(finals) / 3 <= 0.06  # two steps of the ladder
    assert not any(run.false_feasible for run in runs)


def test_a_replay_goes_on_where_every_leader_fails_as_a_search_does(
    replayed: tuple[Grid, Truths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The regret is that of the search alone, without what its certification found."""
    made, truths = replayed
    memory, draw = "gpu_memory_mib/reserved", Replay._draw
    cells = {c: dataclasses.replace(cell, metrics={memory: 50.0}) for c, cell in made.cells.items()}
    grid, goal = Grid(made.axes, cells, made.batching), dataclasses.replace(REPLAYED, limits=(P99, Limit(memory, 99.0)))
    whole = replay(grid, goal, "grbench", 40, 0, truths)
    led: set[Configuration] = set()
    certified: list[Configuration] = []

    def drawn(self: Replay, configuration: Configuration, probe: Probe, rng: np.random.Generator) -> Outcome:
        found = draw(self, configuration, probe, rng)
        if probe.rate and not probe.seed and not certified:
            led.add(configuration)
        certified.extend([configuration] * bool(probe.seed))
        fails = probe.seed and configuration in led
        return dataclasses.replace(found, metrics={**found.metrics, memory: 200.0}) if fails else found

    monkeypatch.setattr(Replay, "_draw", drawn)
    run = replay(grid, goal, "grbench", 40, 0, truths)
    assert certified[0] in led and certified[-1] not in led
    assert run.final is not None and run.final > 0
    assert (run.regret, run.by_round, run.cells) == (whole.regret, whole.by_round, whole.cells)


def test_places_save_rounds_and_cost_no_regret(replayed: tuple[Grid, Truths]) -> None:
    grid, truths = replayed
    rounds = {}
    for places in (1, 2, 4):
        runs = [replay(grid, REPLAYED, "grbench", 60, seed, truths, places) for seed in range(2)]
        rounds[places] = sum(len(run.by_round) for run in runs)
        assert all(run.final is not None and run.final <= 0.06 and not run.false_feasible for run in runs)
    assert rounds[2] <= 0.6 * rounds[1] and rounds[4] <= 0.35 * rounds[1]


def test_the_space_leaves_out_what_cannot_be_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legal, "refusals", lambda specs: [None] * len(specs))
    axes = {"engine": ["hstu", "onnxruntime", "vllm"], "engine.cuda_graphs": ["false", "true"]}
    axes |= {"scenario.in_flight": ["1", "2"], "scenario.max_batch": ["4", "16"]}
    built = space.build(axes, axes, ["task=rank", "scenario=server"])
    names = [configuration.name for configuration in built.configurations]
    assert names[0] == "hstu cuda_graphs=false in_flight=1 max_batch=16"  # as a run without these options
    assert len(names) == 8 + 2 and "onnxruntime in_flight=1 max_batch=4" in names
    assert any("task=rank: engine vllm can't" in reason for reason in built.left_out)
    assert any("onnxruntime ends a batch before" in reason for reason in built.left_out)
    axes["engine"] = ["hstu", "tensorrt"]
    built = space.build({**axes, "engine.cuda_graphs": ["auto", "false"]}, axes, ["task=rank", "scenario=server"])
    found = {(c.get("engine"), c.get("engine.cuda_graphs")) for c in built.configurations}
    assert found == {("hstu", "auto"), ("hstu", "false"), ("tensorrt", "false")}
    assert built.left_out["engine.cuda_graphs=auto: allowed is bool with engine=tensorrt"] == 4
    with pytest.raises(ConfigError, match="cuda_graphs=fals: "):
        typed = {"engine": ["tensorrt"], "engine.cuda_graphs": ["true", "fals"]}
        space.build(typed, typed, ["task=rank", "scenario=server"])
    with pytest.raises(ConfigError, match=r"^engine\.no_such: no such key; known keys: "):
        space.build({**axes, "engine.no_such": ["1", "2"]}, {*axes, "engine.no_such"}, ["task=rank", "scenario=server"])
    with pytest.raises(ConfigError, match=r"^task=rank: engine vllm can't; allowed: "):  # one reason stands alone
        space.build({"engine": ["vllm"], "scenario.max_batch": ["4", "8"]}, [], ["task=rank", "scenario=server"])


def _with_weights(model: str) -> list[str]:
    """Return the overrides of a model, with weights, of docs/TUNING.md's search under a limit on quality."""
    page = (ROOT / "docs" / "TUNING.md").read_text().replace("\\\n", " ")
    [command] = [line for line in page.splitlines() if "grbench tune" in line and "model.weights=" in line]
    words = shlex.split(command, comments=True)
    words = words[words.index("tune") + 1 :]
    assert "quality.auc_loss=0.1%" in words
    return [f"model.weights={model}" if word.startswith("model.weights=") else word for word in words]


@pytest.mark.parametrize(("gpu", "windows"), [(False, ["0", "64"]), (True, ["0", "1024"])])
def test_the_windows_of_a_search_under_a_limit_on_quality_fit_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, windows: list[str]
) -> None:
    monkeypatch.setattr(config, "visible_gpus", lambda: [0] if gpu else [])
    monkeypatch.setattr(legal, "refusals", lambda specs: [legal.refusal(spec) for spec in specs])  # in this process

    def built(weights: Path) -> space.Space:
        declared = config.declare(_with_weights(str(weights)))
        axes = {key: declared.axes[key] for key in ("engine", "model.max_attn_len")}
        made = space.build({**axes, "engine": axes["engine"][:1]}, declared.typed, declared.fixed)
        require_files(made.specs.values())
        return made

    trained = ROOT / "experiments" / "weights" / "ml_100k" / "ranker" / "weights.safetensors"
    found = built(trained)
    assert [c.get("model.max_attn_len") for c in found.configurations] == windows and not found.left_out
    with safe_open(str(trained), framework="np") as f:
        options = {**json.loads(f.metadata()["model"]), "max_attn_len": int(windows[1])}
    own = tmp_path / "windowed.safetensors"
    save_file(load_file(trained), own, metadata={"model": json.dumps(options)})
    found = built(own)  # one that the weights were not trained with is left out
    assert [c.get("model.max_attn_len") for c in found.configurations] == windows[1:]
    [(why, count)] = found.left_out.items()
    assert count == 1 and f"written for max_attn_len={windows[1]}, the model has 0; " in why


def test_an_option_is_left_out_of_configurations_that_do_not_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legal, "refusals", lambda specs: [None] * len(specs))
    axes = {"cache.host_gb": ["0", "1"], "cache.onload_share": ["0.5", "0.6"]}
    fixed = ["engine=hstu", "cache=lru", "scenario=server"]
    built = space.build(axes, axes, fixed)
    found = {(c.get("cache.host_gb"), c.get("cache.onload_share")) for c in built.configurations}
    assert found == {("0", None), ("1", "0.5"), ("1", "0.6")}
    for configuration, spec in built.specs.items():  # a probe's cell is composed from the words
        assert compose_spec([*fixed, *configuration.words])[0] == spec


def test_combinations_are_counted_without_options_that_an_engine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legal, "refusals", lambda specs: [None] * len(specs))
    axes = {"engine": ["hstu", "onnxruntime"], "engine.cuda_graphs": ["true", "false"]}
    axes |= {"scenario.max_batch": ["4", "8", "16"]}  # 6 of hstu, and 3 of onnxruntime, which has no graphs
    monkeypatch.setattr(space, "MOST", 9)
    assert len(space.build(axes, axes, ["scenario=server"]).configurations) == 9
    monkeypatch.setattr(space, "MOST", 8)
    with pytest.raises(ConfigError, match=r"^the space has 9 combinations, allowed are 8; fix an option"):
        space.build(axes, axes, ["scenario=server"])
    monkeypatch.setattr(space, "compose_many", None)  # what is surely too many is refused before any is composed
    with pytest.raises(ConfigError, match=r"^the space has 10 combinations, allowed are 8"):
        space.build({**axes, "scenario.max_batch": list("12345")}, axes, ["scenario=server"])


def test_the_default_space_of_a_gpu_has_room_for_the_options_that_a_limit_on_quality_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "visible_gpus", lambda: [0])
    monkeypatch.setattr(space, "_with_options", lambda *given: [])  # checking each takes ten seconds
    (tmp_path / "weights.safetensors").touch()
    words = [f"model.weights={tmp_path}/weights.safetensors", "quality.auc_loss=0.1%", "latency_ms.p99=80"]
    declared = config.declare(words)
    assert {"model.max_attn_len", "cache.precision"} <= declared.axes.keys()
    with pytest.raises(ConfigError, match="is bool with engine=tensorrt"):  # none was checked, nor their number refused
        space.build(declared.axes, declared.typed, declared.fixed)


@pytest.mark.parametrize(
    "words, fewest",
    [
        (["space=nvidia_cache", "model=wide_heads", "model.layers=8", "workload=synthetic_long"], 60),
        (["space=mlperf_server", "model=dlrm_v3", "workload=synthetic_mlperf", "latency_ms.p99=80"], 150),
    ],
)
def test_public_setups_are_spaces(monkeypatch: pytest.MonkeyPatch, words: list[str], fewest: int) -> None:
    monkeypatch.setattr(legal, "refusals", lambda specs: [None] * len(specs))
    declared = config.declare([*words, "engine.device=cuda"])
    built = space.build(declared.axes, declared.typed, declared.fixed)
    assert len(built.configurations) >= fewest
    assert {c.get("engine") for c in built.configurations} == {"hstu", "aoti"}


def test_rank_correlations_count_only_pairs_that_probes_at_rates_decide() -> None:
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    rate = rates.rate_of(rates.step_below(100.0))
    for configuration, offline, p99 in zip(ALL[:4], (300.0, 200.0, 250.0, 50.0), (70, 90, 70, None), strict=True):
        trial = search.begin(configuration)
        search.note(trial, Probe(None, 512), Outcome("OK", {"throughput_rps": offline}))
        if p99:  # the first and the third keep the limit where the second does not
            search.note(trial, Probe(rate, 1000), outcome(p99, p99 - 1, p99 + 1))
    ordered = [("offline throughput", 2, 1.0), ("simulated queue", 2, 1.0)]
    assert answer.correlations(search) == [("time of batches", 0, 0.0), *ordered]
    search.trials[1].offline = Outcome("OK", {"throughput_rps": 280.0}, batches=[(8, 0.08), (4, 0.02)])  # 120 a second
    search.trials[0].offline = Outcome("OK", {"throughput_rps": 300.0}, batches=[(8, 0.05), (4, 0.03)])  # 150 a second
    assert answer.correlations(search)[:2] == [("time of batches", 1, 1.0), ("offline throughput", 2, 0.0)]
    search.operations = dict.fromkeys(ALL, 5.0)
    assert answer.correlations(search)[0] == ("sizing", 0, 0.0)
    search.operations[ALL[1]] = 6.0
    assert answer.correlations(search)[0] == ("sizing", 2, 1.0)
    line = "- offline throughput: 0.00 over 2 pairs of configurations"
    assert line in page.summary(search, answer.answer(search, None)).splitlines()  # in MLflow's note


def test_the_front_has_every_figure_by_which_configurations_are_compared() -> None:
    search = Knowledge(Goal("pareto", (P99,)), BATCHING)
    rate = rates.rate_of(rates.step_below(100.0))
    of_a_gpu = {"gpu_memory_mib/reserved": 4000.0, energy.METRIC: 0.25, "quality/auc_loss": 0.002}
    of_a_cpu = {"host_memory_mib/peak": 3000.0, energy.METRIC: 0.5, "quality/auc_loss": 0.001}
    for configuration, p99, metrics in zip(ALL, (40, 50, 60), (of_a_gpu, of_a_cpu, of_a_gpu), strict=False):
        search.note(search.begin(configuration), Probe(rate, 1000), outcome(p99, p99 - 1, p99 + 1, **metrics))
    table = page.front_table(search)  # the third loses to the first
    heads = ["#", "configuration", "requests/s answered", "p99 ms", "quality loss %", "memory MiB", "J/1000 requests"]
    assert table.heads == heads
    first, second = ([str(cell) for cell in row[3:]] for row in table.rows)
    assert (first, second) == (["40.0", "0.200", "4000", "250"], ["50.0", "0.100", "3000", "500"])
    charts = {chart.y: list(chart.series[0].y) for chart in page.trade_offs(search)}
    losses, memory, energies = [0.2, 0.1, 0.2], [4000.0, 3000.0, 4000.0], [250.0, 500.0, 250.0]
    assert charts == {"quality loss %": losses, "memory MiB": memory, "J/1000 requests": energies}


def test_a_bound_of_a_neighbour_is_no_change() -> None:
    """Each neighbour of the winner that was timed offline only says so, and has no percentage of its own."""
    search = searched(Capacities(CAPACITY, cells=24))
    found = answer.answer(search, None)
    assert found is not None
    winner = found.trial.configuration
    near = [t for t in search.trials if len(winner.differs(t.configuration)) == 1]
    bounded = [t for t in near if t.low is None and t.top is not None and not t.verdicts]
    rows = {values: (rate, change) for _, values, rate, change in answer.neighbours(found)}
    assert bounded
    for trial in bounded:
        [key] = winner.differs(trial.configuration)
        rate, change = rows[f"{winner.get(key)} -> {trial.configuration.get(key)}"]
        assert rate.startswith("no more than ") and rate.endswith(
            " (its offline rate; no load was tried under these limits)"
        )
        assert change.startswith(("slower, by ", "not known: this rate is a bound")) and "+" not in change
    below = answer.Answer(search, found.trial, 10_000, found.outcome, None)  # a winner that is faster than all bounds
    assert all(change.startswith("slower, by ") for *_, rate, change in answer.neighbours(below) if "offline" in rate)


@pytest.mark.parametrize(
    "typed, axes",
    [
        (
            ["engine=pipeline", "engine@engine.rank=hstu,onnxruntime", "space=typed"],
            {"engine@engine.rank": ["hstu", "onnxruntime"]},
        ),
        (
            ["study=quality", "study/quality@_global_=rank,rank_bf16"],
            {"study/quality@_global_": ["rank", "rank_bf16"], "study/quality/load@_global_": ["offline", "server"]},
        ),
        (["study=quality", "study/quality@_global_=rank"], {"study/quality/load@_global_": ["offline", "server"]}),
    ],
)
def test_an_axis_of_a_group_keeps_the_place_of_the_group(typed: list[str], axes: dict[str, list[str]]) -> None:
    """engine@engine.rank is the engine of a stage, and not the engine. What a study sweeps over is an axis too."""
    assert config.declare(typed).axes == axes


def test_a_row_says_why_it_has_no_more_and_is_counted_if_it_was_probed() -> None:
    declared = config.declare(["space=typed", "engine=hstu,aoti", "latency_ms.p99=80"])
    search = Knowledge(declared.goal, BATCHING)
    step = rates.step_below(100.0)
    rate = rates.rate_of(step)
    kept, stopped = outcome(40, 39, 41), Outcome("STOPPED", error="the queue grew")

    def trial(configuration: Configuration, offline: float, *loads: tuple[float, Outcome]) -> None:
        its = search.begin(configuration)
        search.note(its, Probe(None, 512), Outcome("OK", {"throughput_rps": offline}))
        for at, found in loads:
            search.note(its, Probe(at, 1000), found)

    trial(ALL[0], 200.0, (rate, kept))
    trial(ALL[1], rate * 0.99, (rate, kept))
    trial(ALL[2], 60.0, (rates.rate_of(step - 30), kept))
    trial(ALL[3], 200.0, (rate, stopped))
    trial(ALL[4], 200.0, (rate, outcome(90, 85, 95)))
    trial(ALL[5], 50.0)
    search.note(search.begin(ALL[6]), Probe(None, 512), Outcome(UNJUDGED, error="no loss"))
    search.begin(ALL[7])
    table = page._all(search)
    reasons = {str(row[1]): row[-1] for row in table.rows}
    assert [reasons[configuration.name] for configuration in ALL] == [
        "budget ended",
        "offline rate",
        "offline rate below the best",
        f"STOPPED at {rate:.4g}/s",
        f"latency_ms.p99 90 [85, 95] at {rate:.4g}/s (broken)",
        "no load was tried under these limits",
        "UNJUDGED: no loss",
        "no room in the budget for its first probe",
    ]
    found = answer.answer(search, None)
    assert found is not None and found.trial.configuration == ALL[0]
    assert answer.binding(found).endswith("no higher rate was probed before the budget ended.")
    lines = [
        block.text for block in page.blocks(search, found, declared, space.Space(AXES, ALL)) if isinstance(block, Text)
    ]
    assert any(line.endswith("; 6 of 8 configurations were measured.") for line in lines)
    assert "requests/s offered" in table.heads and "requests/s answered" in page.front_table(search).heads


def test_a_page_says_that_short_probes_have_few_returning_users() -> None:
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    assert answer.returns(search) == ""
    whole = {"workload/returning_share": 0.6, "throughput_rps": 100.0}
    search.note(search.begin(ALL[0]), Probe(None, 512), Outcome("OK", whole))
    assert answer.returns(search) == ""  # no cache
    search.note(search.begin(ALL[2]), Probe(None, 512), Outcome("OK", whole | {"cache/returning_share": 0.55}))
    assert answer.returns(search).endswith("and of the whole trace 60%.")
    search.trials.clear()
    trial = search.begin(ALL[1])
    search.note(trial, Probe(None, 512), Outcome("OK", whole | {"cache/returning_share": 0.12}))
    assert "with a cache 12% are by users who had come before in it, and of the whole trace 60%." in answer.returns(
        search
    )
    search.note(trial, Probe(50.0, 1000), outcome(70, **whole | {"cache/returning_share": 0.7}))
    assert "12% to 70%" in answer.returns(search) and answer.returns(search).endswith(" undervalues caches.")


def test_an_answer_and_its_page_say_how_often_the_machine_was_busy() -> None:
    evaluator = Capacities(CAPACITY)
    usual = evaluator.outcome
    cores = itertools.chain([0.5, 1.44], itertools.repeat(0.0))

    def disturbed(configuration: Configuration, probe: Probe) -> Outcome:
        return dataclasses.replace(usual(configuration, probe), busy=1.25 if probe.seed else next(cores))

    evaluator.outcome = disturbed  # type: ignore[method-assign]
    search = searched(evaluator)
    certificate = certify(search, evaluator)
    assert certificate is not None
    runs = len(certificate.outcomes)
    words = f"used up to 1.4 cores at a time beside {2 + runs} of {len(evaluator.probes)} probes and certifying runs."
    [line] = answer.remarks(search)
    assert words in line
    declared = config.declare(["space=typed", "engine=hstu,aoti", "latency_ms.p99=80"])
    found = answer.answer(search, certificate)
    blocks = page.blocks(search, found, declared, space.Space(AXES, ALL))
    assert line in [block.text for block in blocks if isinstance(block, Text)]
    assert words in page.summary(search, found)
    assert answer.busy(searched(Capacities(CAPACITY))) == ""


@pytest.mark.parametrize("kinds", [3, 4, 6])
def test_an_answer_repeats_what_was_left_out_during_the_search(kinds: int) -> None:
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    search.left_out = {f"kernel={kind}: no room; set budget={kind}min": ALL[:2] for kind in range(kinds)}
    lines = answer.remarks(search)
    assert lines[0] == "Not measured: 2 of kernel=0: no room; set budget=0min."
    assert len(lines) == min(kinds, 4)
    assert lines[3:] == {4: ["Not measured: 2 of kernel=3: no room; set budget=3min."]}.get(
        kinds, ["Not measured: 3 other kinds, which the page names."] * (kinds > 4)
    )


def test_a_configuration_has_one_number_in_all_tables_and_figures() -> None:
    search = searched(Capacities(CAPACITY))
    table = page._all(search)
    numbers = {row[1]: row[0] for row in table.rows}
    assert [row[0] for row in table.rows] == [str(i) for i in range(1, len(search.trials) + 1)]
    assert {row[1]: row[0] for row in page.front_table(search).rows}.items() <= numbers.items()
    chart = page.front_chart(search)
    assert chart is not None
    assert [series.name for series in chart.series] == ["configurations", "Pareto front"]
    assert chart.limits == [("y", 80.0, "limit 80 ms")]
    points = chart.series[0]
    assert dict(zip(points.hover, points.texts, strict=True)).items() <= numbers.items() and points.hover


def test_a_chart_of_one_configuration_has_no_front() -> None:
    evaluator = Capacities({ALL[0]: 100.0})
    search = Knowledge(Goal("throughput", (P99,)), BATCHING)
    Search(search, ALL[:1], evaluator, Listed(ALL[:1])).run()
    chart = page.front_chart(search, answer.answer(search, None))
    assert chart is not None
    assert [series.name for series in chart.series] == ["configurations", "answer, not certified"]
