"""Knowledge of a search: its trials, which of them is the best, and what the others may still reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from grbench.tune import rates
from grbench.tune.limits import Verdict, judge
from grbench.tune.outcome import UNJUDGED, Configuration, Outcome, Probe
from grbench.tune.queue_model import BatchTimes, percentile_ms
from grbench.tune.trial import Batching, Goal, Trial, cost

BOTTOM = rates.steps(20)  # steps below the offline rate at which a configuration is given up
SIZES = {"scenario.max_batch", "scenario.max_wait_ms"}  # options that a batch's time depends on by its size alone
NEAR = 0.25  # of a step, to which the simulated queue says what a configuration reaches: by whole ones many are equal
ENDED_EARLY = ("TIMEOUT", "STOPPED")  # statuses of a rate that is too high


class Knowledge:
    """The trials of a search and what follows from them. It measures nothing."""

    def __init__(
        self,
        goal: Goal,
        batching: Mapping[Configuration, Batching],
        operations: Mapping[Configuration, float] | None = None,
    ) -> None:
        """batching: of every configuration. operations: of a request of each, by its sizes alone."""
        self.goal, self.batching, self.operations = goal, batching, operations or {}
        self.trials: list[Trial] = []
        self.outcomes: list[Outcome] = []  # of all probes and certifying runs
        self.left_out: dict[str, list[Configuration]] = {}  # while it ran, by the reason
        self.concluded = False  # something is certified: its budget is free
        self.uncertified = ""  # why nothing is

    def begin(self, configuration: Configuration) -> Trial:
        """Add and return the trial of a configuration."""
        self.trials.append(Trial(configuration))
        return self.trials[-1]

    def ranking(self) -> list[Trial]:
        """Return the trials that keep the limits, the best first."""
        return sorted((trial for trial in self.trials if trial.low is not None), key=self.score, reverse=True)

    @property
    def incumbent(self) -> Trial | None:
        """The best trial so far."""
        return next(iter(self.ranking()), None)

    def score(self, trial: Trial) -> float:
        """Return what the objective says of a trial that keeps the limits; larger is better."""
        assert trial.low is not None
        return self.score_of(trial.low, trial.probes[trial.low])

    def score_of(self, step: int, outcome: Outcome) -> float:
        """Return what the objective says of an outcome at a step that keeps the limits; larger is better."""
        if self.goal.objective == "latency":
            return -outcome.metrics["latency_ms/p99"]
        return -cost(step, outcome) if self.goal.objective == "cost" else float(step)

    @property
    def unproven(self) -> tuple[Trial, int, Outcome] | None:
        """The best trial, its step and the outcome there, where every rate that a probe has kept failed.

        It is the best that certifying runs have likely kept. If there is none, it is the best that a probe has kept,
        although certifying runs broke a limit there or at a lower rate.
        """
        if self.incumbent:
            return None
        likely = [(t, step, t.certifying[step]) for t in self.trials if (step := t.unproven) is not None]
        held = [(t, step, t.probes[step]) for t in self.trials for step in t.held]
        return max(likely or held, key=lambda found: self.score_of(*found[1:]), default=None)

    def expected(self, trial: Trial) -> float:
        """Return the step that a trial should reach: what is known of it, corrected by how far others were off."""
        if trial.estimate is None:
            return -math.inf
        if trial.verdicts or trial.refuted or trial.predicted is None or trial.top is None:
            return trial.estimate
        off = [(t.low + t.high - 1) / 2 - t.predicted for t in self.trials if t.predicted and t.low and t.high]
        return min(trial.predicted + (statistics.median(off) if off else 0.0), trial.top)

    def note(self, trial: Trial, probe: Probe, outcome: Outcome) -> Verdict | None:
        """Take an outcome into a trial. Returns the verdict on a server probe."""
        trial.measured = trial.measured or outcome.status != UNJUDGED
        self.outcomes.append(outcome)
        if not outcome.ok:
            if probe.rate is not None and outcome.status in ENDED_EARLY:
                trial.enter(probe.rate, outcome, (Verdict.BROKEN, None))
                return Verdict.BROKEN
            trial.failed, trial.violation = f"{outcome.status}: {outcome.error}", 1.0
            trial.slow = outcome.within
            return Verdict.BROKEN
        if probe.rate is None:
            trial.offline = outcome
            trial.top = rates.step_below(outcome.metrics["throughput_rps"] * rates.RATIO)
            for known in self._alike(trial):  # whose batches of other sizes were guessed until now
                known.predicted = self._predict(known)
            verdict, limit = judge([limit for limit in self.goal.limits if limit.static], outcome)
        else:
            verdict, limit = judge(self.goal.limits, outcome)
            trial.enter(probe.rate, outcome, (verdict, limit))
        if verdict is Verdict.BROKEN and limit is not None and limit.static:
            trial.breaks(limit, outcome)
        elif probe.rate is None and trial.low is None and (limit := trial.cannot_reach(self.goal.limits)) is not None:
            most = outcome.metrics["throughput_rps"]
            trial.failed = f"breaks {limit}: offline it answers {most:.4g} requests/s, and no rate gives more"
            trial.violation = 1 - most / limit.bound
        elif self.goal.rate is not None and verdict is Verdict.BROKEN and limit is not None:
            trial.violation = max(limit.excess(outcome) or 0.0, 1e-3)
        return None if probe.rate is None else verdict

    def _predict(self, trial: Trial) -> float:
        """Return the highest step, to NEAR, at which the simulated queue keeps the limits; at most `trial.top`."""
        assert trial.offline is not None and trial.top is not None
        mine, top = self.batching[trial.configuration], float(trial.top)
        batches = [batch for other in self._alike(trial) for batch in other.offline.batches if other.offline]  # type: ignore[union-attr]
        batches = [(size, seconds) for size, seconds in batches if size <= mine.max_batch]
        bounds = [(limit.percent, limit.bound) for limit in self.goal.limits if limit.percent is not None]
        if not batches or not bounds:
            return top
        times = BatchTimes(batches, trial.offline.metrics["throughput_rps"])

        def kept(step: float) -> bool:
            wait = (mine.max_batch, mine.max_wait_s, mine.in_flight)
            return all(percentile_ms(times, rates.RATIO**step, percent, *wait) <= bound for percent, bound in bounds)

        low, high = top - BOTTOM, top
        if kept(high):
            return high
        while high - low > NEAR:
            middle = (low + high) / 2
            low, high = (middle, high) if kept(middle) else (low, middle)
        return low

    def _alike(self, trial: Trial) -> list[Trial]:
        """Return the measured trials that differ from this one in the size of batches only, and itself."""

        def alike(other: Trial) -> bool:
            return set(trial.configuration.differs(other.configuration)) <= SIZES

        return [other for other in self.trials if other.offline is not None and alike(other)]
