"""The search: which configuration carries the most load within the limits. It measures by an `Evaluator` only.

Each configuration is measured at rising fidelity. An offline probe shows the most that it can answer, and orders it by
a simulated queue. Server probes at steps of the ladder of rates decide. A configuration that is not the first is probed
just above the best rate so far, so that a worse one costs one probe. `certify` measures the best again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grbench.tune import rates
from grbench.tune.limits import PERCENTILE, Limit, Verdict, judge
from grbench.tune.outcome import BudgetSpentError, Configuration, Evaluator, Outcome, Probe
from grbench.tune.proposers import Proposer
from grbench.tune.queue_model import BatchTimes, percentile_ms
from grbench.tune.trial import HELD, Batching, Goal, Trial, cost, samples

COARSE = rates.steps(1.09)  # width of a bracket while configurations are compared
OFFLINE = 512  # requests of an offline probe
FEWEST, MOST = 1000, 20_000  # requests of a server probe; p99 needs 1000
OPEN = 1.0  # excess of an unsure figure over its limit, as a share, up to which a challenger is measured longer
LONGER = 3  # times the requests, where an outcome is unsure
FIRST_SHARE, FIRST_FEWEST, FIRST_MOST = 0.2, 3, 12  # of the budget, for offline probes before the first rate
BETWEEN = 2  # offline probes between two configurations that are probed at rates
BOTTOM = rates.steps(20)  # steps below the offline rate at which a configuration is given up
CERTIFIED = 10_000  # requests of a run that certifies
CERTIFY_SHARE = 0.6  # of the budget, at most, if it is reserved twice
CERTIFY_MOST = 0.75  # of the budget that is reserved, at most
CERTIFY_STEPS = 2  # by which a rate that fails is lowered first, then twice as many each time
CERTIFY_SEED = 101
SIZES = {"scenario.max_batch", "scenario.max_wait_ms"}  # options that a batch's time depends on by its size alone
ENDED_EARLY = ("TIMEOUT", "STOPPED")  # statuses of a rate that is too high


Progress = Callable[[Trial, Probe, Outcome, Verdict | None], None]


class Search:
    """One search. `run` measures until the budget is spent; `trials` has what it found, whenever it ends."""

    def __init__(
        self,
        configurations: Sequence[Configuration],
        goal: Goal,
        evaluator: Evaluator,
        proposer: Proposer,
        batching: Mapping[Configuration, Batching],
        progress: Progress = lambda trial, probe, outcome, verdict: None,
        screen: bool = True,
    ) -> None:
        """configurations: of the space, the default first. proposer: picks among them.

        screen: probe many offline and only the most promising at a rate; False: each in turn.
        """
        self.goal, self.trials = goal, list[Trial]()
        self._configurations, self._evaluator, self._proposer = configurations, evaluator, proposer
        self._batching, self._progress = batching, progress
        self._prune = goal.objective == "throughput"
        self._screen = screen and self._prune
        self.uncertified = ""  # why nothing was certified
        self._concluded = False  # something was: its budget is free

    # What was found

    def ranking(self) -> list[Trial]:
        """Return the trials that keep the limits, the best first."""
        return sorted((trial for trial in self.trials if trial.low is not None), key=self.score, reverse=True)

    @property
    def incumbent(self) -> Trial | None:
        """The best trial so far."""
        return next(iter(self.ranking()), None)

    def score(self, trial: Trial) -> float:
        """Return what the objective says of a trial that keeps the limits; larger is better."""
        best = trial.best
        assert best is not None and trial.low is not None
        if self.goal.objective == "latency":
            return -best.metrics["latency_ms/p99"]
        return -cost(best) if self.goal.objective == "cost" else float(trial.low)

    # Measuring

    def run(self) -> None:
        """Try configurations until the budget or the space ends, then narrow the bracket of the best."""
        try:
            self._recall()
            if self._screen:
                self._screened()
            else:
                while (configuration := self._proposer.ask()) is not None:
                    self.try_one(configuration)
        except BudgetSpentError:
            pass
        try:
            while (best := self.incumbent) is not None and self._narrow(best, 1):
                pass  # a failed step may make another trial the best
            if self._screen:
                self._runners_up()
        except BudgetSpentError:
            pass

    def _screened(self) -> None:
        """Probe configurations offline, and now and then the one that promises most at a rate."""
        offline = self._evaluator.share([Probe(None, OFFLINE)])
        first = min(max(round(FIRST_SHARE / offline), FIRST_FEWEST), FIRST_MOST) if offline else FIRST_MOST
        since = 0
        while True:
            explored = sum(trial.offline is not None or bool(trial.failed) for trial in self.trials)
            promising = self._promising()
            if promising is not None and explored >= first and since >= BETWEEN:
                self._try(promising)
                since = 0
                continue
            if (configuration := self._proposer.ask()) is None:
                if promising is None:
                    return
                self._try(promising)
                continue
            trial = Trial(configuration)
            self.trials.append(trial)
            try:
                self._offline(trial)
            finally:
                self._tell(trial)
            since += 1

    def _promising(self) -> Trial | None:
        """Return the trial that should beat the best so far by most, and was not yet shown not to."""
        best = self.incumbent
        level = -math.inf if best is None or best.low is None else best.low
        open_ = [
            t for t in self.trials if not t.failed and t is not best and self.expected(t) > level and self._may_win(t)
        ]
        return max(open_, key=self.expected, default=None)

    def expected(self, trial: Trial) -> float:
        """Return the step that a trial should reach: what is known of it, corrected by how far others were off."""
        if trial.estimate is None:
            return -math.inf
        if trial.verdicts or trial.predicted is None or trial.top is None:
            return trial.estimate
        off = [(t.low + t.high - 1) / 2 - t.predicted for t in self.trials if t.predicted and t.low and t.high]
        return min(trial.predicted + (statistics.median(off) if off else 0.0), trial.top)

    def try_one(self, configuration: Configuration) -> None:
        """Try a configuration that the proposer has picked. Raises BudgetSpentError."""
        trial = Trial(configuration)
        self.trials.append(trial)
        try:
            self._try(trial)
        finally:
            self._tell(trial)

    def _recall(self) -> None:
        """Take the outcomes of earlier searches, then go on with the configurations that they leave open."""
        for configuration in self._configurations:
            known = self._evaluator.known(configuration)
            if not known:
                continue
            trial = Trial(configuration)
            self.trials.append(trial)
            self._proposer.take(configuration)
            for probe, outcome in known:
                self._note(trial, probe, outcome)
            self._tell(trial)
        for trial in sorted(self.trials, key=lambda trial: trial.estimate or 0.0, reverse=True):
            if not trial.failed and self._may_win(trial):
                self._try(trial)

    def _runners_up(self) -> None:
        """Find the rate of the best configuration of every other engine: people ask for it."""
        best = self.incumbent
        if best is None:
            return
        mine = best.configuration.get("engine")
        for engine in dict.fromkeys(c.get("engine") for c in self._configurations):
            trials = [t for t in self.trials if t.configuration.get("engine") == engine and not t.failed]
            trial = max(trials, key=self.expected, default=None)
            if engine != mine and trial is not None and trial.low is None:
                self._try(trial, alone=True)

    def _may_win(self, trial: Trial) -> bool:
        best = self.incumbent
        if best is trial:
            return trial.high is None or trial.high - (trial.low or 0) > COARSE
        if self.goal.objective != "throughput" or best is None or best.low is None:
            return trial.low is None or self.goal.objective != "latency"
        return trial.high is None or trial.high > best.low + 1

    def _tell(self, trial: Trial) -> None:
        if self.goal.objective in ("latency", "cost"):
            score = self.score(trial) if trial.low is not None else None
            score = None if score is None else math.copysign(math.log(abs(score) + 1e-9), score)
        else:
            score = trial.estimate
        self._proposer.tell(trial.configuration, score, trial.violation)

    def _try(self, trial: Trial, *, alone: bool = False) -> None:
        """Find out whether a configuration is better than the best so far, and then its rate.

        alone: find its rate in any case.
        """
        if self.goal.rate is not None:
            self._server(trial, rates.step_below(self.goal.rate))
            return
        self._offline(trial)
        if trial.failed or trial.top is None:
            return
        best = self.incumbent if self._prune and not alone else None
        floor = trial.top - BOTTOM
        if best is not None and best is not trial and best.low is not None:
            start = best.low + 1
            if start > trial.top or (start not in trial.verdicts and not self._challenge(trial, start)):
                return
            if trial.low is None or trial.low < start:
                return
        elif trial.low is None:
            step, jump = min(round(self.expected(trial)), trial.top), COARSE
            while step >= floor and not self._server(trial, step):
                step, jump = step - jump, 2 * jump
            if trial.low is None:
                trial.failed = f"keeps the limits at no rate down to {rates.rate_of(max(step, floor)):.3g} requests/s"
                trial.violation = self._least_excess(trial)
                return
        self._climb(trial)
        self._narrow(trial, COARSE)
        self._confirm(trial)

    def _climb(self, trial: Trial) -> None:
        """Raise the rate of a trial that keeps the limits until one does not, or its offline rate is reached."""
        assert trial.low is not None and trial.top is not None
        jump = COARSE
        while (
            (high := trial.high) is not None
            and trial.low < trial.top
            and not any(s > trial.low for s in trial.verdicts)
        ):
            step = min(trial.low + jump, trial.top)
            self._server(trial, step)
            jump *= 2
            if high == trial.high and step not in trial.verdicts:
                return

    def _narrow(self, trial: Trial, width: int) -> bool:
        """Halve the bracket of a trial until it has `width` steps. Returns True if anything was measured."""
        measured = False
        while (
            self.goal.rate is None
            and trial.low is not None
            and trial.high is not None
            and trial.high - trial.low > width
        ):
            self._server(trial, (trial.low + trial.high) // 2)
            measured = True
        return measured

    def _offline(self, trial: Trial) -> None:
        bounds = [limit for limit in self.goal.limits if limit.metric.startswith("quality/")]
        if bounds and (quality := self._evaluator.quality(trial.configuration)):
            known = Outcome("OK", quality)
            verdict, limit = judge([limit for limit in bounds if limit.metric in quality], known)
            if verdict is Verdict.BROKEN and limit is not None:
                trial.failed, trial.violation = f"breaks {limit}: {limit.shown(known)}", limit.excess(known) or 1.0
                return
        if trial.offline is None:
            largest = self._batching[trial.configuration].max_batch
            self._measure(trial, Probe(None, max(OFFLINE, 8 * largest)))

    def _server(self, trial: Trial, step: int) -> bool:
        """Probe a rate. Returns True if the limits are kept, for sure or likely."""
        rate = rates.rate_of(step)
        return self._measure(trial, Probe(rate, self.requests(rate))) in HELD

    def _challenge(self, trial: Trial, step: int) -> bool:
        """Probe a rate just above the best so far, and longer if that leaves it open. Returns True if it is kept."""
        if self._server(trial, step):
            return True
        verdict, limit = trial.verdicts.get(step, (Verdict.BROKEN, None))
        excess = limit.excess(trial.probes[step]) if limit is not None else None
        if not self._screen or verdict is not Verdict.UNSURE or excess is None or excess > OPEN:
            return False
        rate = rates.rate_of(step)
        return self._measure(trial, Probe(rate, LONGER * self.requests(rate))) in HELD

    def _confirm(self, trial: Trial) -> None:
        """Probe the rate of a new leader with more requests: near the most that it carries, a short run is lucky."""
        confirmed: set[int] = set()
        while self._screen and trial is self.incumbent and (step := trial.low) is not None and step not in confirmed:
            confirmed.add(step)
            rate = rates.rate_of(step)
            verdict = self._measure(trial, Probe(rate, LONGER * self.requests(rate)))
            if verdict not in HELD and trial.low is None:
                self._server(trial, step - COARSE)

    def requests(self, rate: float) -> int:
        """Return the requests of a first probe at a rate."""
        fewest = max([FEWEST, *(10_000 for limit in self.goal.limits if limit.metric.endswith("p99.9"))])
        return min(max(fewest, 100 * round(rate * self.goal.probe_s / 100)), max(MOST, fewest))

    def _measure(self, trial: Trial, probe: Probe) -> Verdict | None:
        if not self._affords(probe):
            raise BudgetSpentError
        outcome = self._evaluator.evaluate(trial.configuration, probe)
        verdict = self._note(trial, probe, outcome)
        self._progress(trial, probe, outcome, verdict)
        return verdict

    def _affords(self, probe: Probe) -> bool:
        """Return True if the budget has room for a probe and for certifying the best so far."""
        return self._evaluator.share([probe, *self.reserve()]) <= self._evaluator.left()

    def reserve(self) -> list[Probe]:
        """Return the probes that certify the best so far, twice if the budget is large: the first rate may fail.

        None if they would leave too little of the budget for the search: the answer then says what is missing.
        """
        best = self.incumbent
        if best is None or best.low is None or not self.goal.runs or self._concluded:
            return []
        once = certifying(rates.rate_of(best.low), CERTIFIED, self.goal.runs)
        share = self._evaluator.share(once)
        return 2 * once if 2 * share <= CERTIFY_SHARE else once if share <= CERTIFY_MOST else []

    def _note(self, trial: Trial, probe: Probe, outcome: Outcome) -> Verdict | None:
        """Take an outcome into a trial. Returns the verdict on a server probe."""
        if not outcome.ok:
            if probe.rate is not None and outcome.status in ENDED_EARLY:
                self._enter(trial, probe.rate, outcome, (Verdict.BROKEN, None))
                return Verdict.BROKEN
            trial.failed, trial.violation = f"{outcome.status}: {outcome.error}", 1.0
            return Verdict.BROKEN
        if probe.rate is None:
            trial.offline = outcome
            trial.top = rates.step_below(outcome.metrics["throughput_rps"] * rates.RATIO)
            trial.predicted = self._predict(trial)
            verdict, limit = judge([limit for limit in self.goal.limits if limit.static], outcome)
        else:
            verdict, limit = judge(self.goal.limits, outcome)
            self._enter(trial, probe.rate, outcome, (verdict, limit))
        if verdict is Verdict.BROKEN and limit is not None and limit.static:
            trial.failed, trial.violation = f"breaks {limit}: {limit.shown(outcome)}", limit.excess(outcome) or 1.0
        elif self.goal.rate is not None and verdict is Verdict.BROKEN and limit is not None:
            trial.violation = max(limit.excess(outcome) or 0.0, 1e-3)
        return None if probe.rate is None else verdict

    @staticmethod
    def _enter(trial: Trial, rate: float, outcome: Outcome, verdict: tuple[Verdict, Limit | None]) -> None:
        step = rates.step_below(rate * 1.001)
        if step in trial.probes and samples(trial.probes[step]) > samples(outcome):
            return  # a shorter probe of an earlier search
        trial.probes[step], trial.verdicts[step] = outcome, verdict

    def _least_excess(self, trial: Trial) -> float:
        found = [
            limit.excess(outcome) or 0.0
            for step, outcome in trial.probes.items()
            if (limit := trial.verdicts[step][1]) is not None
        ]
        return max(min(found, default=1.0), 1e-3)

    def _predict(self, trial: Trial) -> int | None:
        """Return the highest step at which the simulated queue keeps the latency limits, at most `trial.top`."""
        assert trial.offline is not None and trial.top is not None
        mine = self._batching[trial.configuration]
        batches = [batch for other in self._alike(trial) for batch in other.offline.batches if other.offline]  # type: ignore[union-attr]
        batches = [(size, seconds) for size, seconds in batches if size <= mine.max_batch]
        bounds = [
            (float(p[2]), x.bound)
            for x in self.goal.limits
            if (p := PERCENTILE.match(x.metric)) and p[1] == "latency_ms"
        ]
        if not batches or not bounds:
            return trial.top
        times = BatchTimes(batches, trial.offline.metrics["throughput_rps"])
        low, high = trial.top - BOTTOM, trial.top
        while low < high:
            step = (low + high + 1) // 2
            wait = (mine.max_batch, mine.max_wait_s, mine.in_flight)
            kept = all(percentile_ms(times, rates.rate_of(step), percent, *wait) <= bound for percent, bound in bounds)
            low, high = (step, high) if kept else (low, step - 1)
        return low

    def _alike(self, trial: Trial) -> list[Trial]:
        """Return the measured trials that differ from this one in the size of batches only, and itself."""

        def alike(other: Trial) -> bool:
            return set(trial.configuration.differs(other.configuration)) <= SIZES

        return [other for other in self.trials if other.offline is not None and alike(other)]

    # Certification

    def certify(self) -> Certificate | None:
        """Measure the best again with other seeds and 10,000 requests; then the next best until one passes.

        Returns None if nothing keeps the limits, or if the budget has no room; `uncertified` then says why.
        """
        failures: list[str] = []
        falls: dict[int, float] = {}  # steps by which each trial was lowered last
        steps = {id(trial): self._first_certified(trial) for trial in self.ranking()}
        while open_ := [(trial, step) for trial in self.ranking() if (step := steps[id(trial)]) is not None]:
            trial, step = max(open_, key=lambda pair: self._score_at(*pair))
            if missing := self._missing(rates.rate_of(step)):
                self.uncertified = "; ".join([*failures[-1:], missing])
                return None
            outcomes, why = self._certifying_runs(trial, step)
            if not why:
                self._concluded = True
                return Certificate(trial, step, outcomes, failures)
            failures.append(f"{trial.configuration.name} at {rates.rate_of(step):.4g} requests/s: {why}")
            falls[id(trial)] = 2 * falls.get(id(trial), CERTIFY_STEPS / 2)
            lower = step - round(falls[id(trial)])
            goes_on = self.goal.rate is None and trial.top is not None and lower > trial.top - BOTTOM
            steps[id(trial)] = lower if goes_on else None
        self.uncertified = failures[-1] if failures else ""
        return None

    def _score_at(self, trial: Trial, step: int) -> float:
        """Return the score of a trial at a step to certify; larger is better.

        A lower rate multiplies the cost of a request by the ratio of the rates at most: what a machine takes a second
        does not grow.
        """
        if self.goal.objective == "cost" and trial.low is not None:
            return self.score(trial) * rates.RATIO ** (trial.low - step)
        return self.score(trial) if self.goal.rate is not None else float(step)

    def _first_certified(self, trial: Trial) -> int | None:
        """Return the step to certify first: the best one, or a lower one if its interval is not within."""
        step = trial.low
        if step is None or self.goal.rate is not None or trial.verdicts[step][0] is Verdict.KEPT:
            return step
        return step - CERTIFY_STEPS

    def _missing(self, rate: float) -> str:
        """Return in words what the budget lacks to certify a rate; "": nothing."""
        probes = certifying(rate, CERTIFIED, self.goal.runs)
        need, left = self._evaluator.share(probes), max(self._evaluator.left(), 0.0)
        if need <= left:
            return ""
        runs = f"{self.goal.runs} runs of {CERTIFIED:,} requests" if self.goal.runs > 1 else f"{CERTIFIED:,} requests"
        return (
            f"{runs} at {rate:.4g} requests/s take {need:.0%} of the budget, and {left:.0%} was left: a budget "
            f"{1 + need - left:.2g} times as large would do"
        )

    def _certifying_runs(self, trial: Trial, step: int) -> tuple[list[Outcome], str]:
        """Return the outcomes of the certifying runs, and why they fail ("": they do not)."""
        outcomes: list[Outcome] = []
        for probe in certifying(rates.rate_of(step), CERTIFIED, self.goal.runs):
            outcome, verdict, limit = self._certifying_run(trial, probe)
            longer = dataclasses.replace(probe, requests=LONGER * probe.requests)
            # A figure within the limit needs more requests; one beyond it a lower rate, if there may be one.
            longer_may_do = verdict is Verdict.LIKELY or (verdict is Verdict.UNSURE and self.goal.rate is not None)
            rest = (self.goal.runs - len(outcomes)) * [longer]
            if longer_may_do and self._evaluator.share(rest) <= self._evaluator.left():
                outcome, verdict, limit = self._certifying_run(trial, longer)
            outcomes.append(outcome)
            if verdict is not Verdict.KEPT:
                why = f"{limit.shown(outcome)} is {verdict}" if limit else f"{outcome.status}: {outcome.error}"
                return outcomes, f"in the run with seed +{probe.seed} {why}"
        return outcomes, ""

    def _certifying_run(self, trial: Trial, probe: Probe) -> tuple[Outcome, Verdict, Limit | None]:
        outcome = self._evaluator.evaluate(trial.configuration, probe)
        verdict, limit = judge(self.goal.limits, outcome) if outcome.ok else (Verdict.BROKEN, None)
        self._progress(trial, probe, outcome, verdict)
        return outcome, verdict, limit


def certifying(rate: float, requests: int, runs: int) -> list[Probe]:
    """Return the probes that certify a rate."""
    return [Probe(rate, requests, CERTIFY_SEED + run) for run in range(runs)]


@dataclass
class Certificate:
    """A configuration that kept the limits in every run with other seeds, of at least CERTIFIED requests."""

    trial: Trial
    step: int
    outcomes: list[Outcome]
    failures: list[str]  # better ones that did not

    @property
    def requests(self) -> int:
        """The requests of the shortest run."""
        return min(round(outcome.metrics["samples"]) for outcome in self.outcomes)

    @property
    def worst(self) -> Outcome:
        """The run with the largest p99."""
        return max(self.outcomes, key=lambda outcome: outcome.metrics.get("latency_ms/p99", math.inf))
