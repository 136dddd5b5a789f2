"""The probes of a search, within its budget: offline, or at a step of the ladder of rates."""

from __future__ import annotations

from grbench.tune import rates
from grbench.tune.certification import reserve
from grbench.tune.knowledge import Knowledge
from grbench.tune.limits import Verdict, judge
from grbench.tune.outcome import BudgetSpentError, Evaluator, Outcome, Probe
from grbench.tune.trial import HELD, Progress, Trial

OFFLINE = 512  # requests of an offline probe
FEWEST, MOST = 1000, 20_000  # requests of a server probe; p99 needs 1000


class Probes:
    """Measures trials. What it finds goes into the knowledge of the search."""

    def __init__(self, knowledge: Knowledge, evaluator: Evaluator, progress: Progress) -> None:
        self._knowledge, self._evaluator, self._progress = knowledge, evaluator, progress

    def offline(self, trial: Trial) -> None:
        """Probe all requests at once, unless that is known or the quality is not enough. Raises BudgetSpentError."""
        bounds = [limit for limit in self._knowledge.goal.limits if limit.metric.startswith("quality/")]
        if bounds and (quality := self._evaluator.quality(trial.configuration)):
            known = Outcome("OK", quality)
            verdict, limit = judge([limit for limit in bounds if limit.metric in quality], known)
            if verdict is Verdict.BROKEN and limit is not None:
                trial.breaks(limit, known)
                return
        if trial.offline is None:
            largest = self._knowledge.batching[trial.configuration].max_batch
            self._measure(trial, Probe(None, max(OFFLINE, 8 * largest)))

    def at(self, trial: Trial, step: int, longer: int = 1) -> bool:
        """Probe a rate. Returns True if the limits are kept, for sure or likely. Raises BudgetSpentError.

        longer: times the requests of a first probe.
        """
        rate = rates.rate_of(step)
        return self._measure(trial, Probe(rate, longer * self._requests(rate))) in HELD

    def _requests(self, rate: float) -> int:
        """Return the requests of a first probe at a rate."""
        goal = self._knowledge.goal
        fewest = max([FEWEST, *(10_000 for limit in goal.limits if limit.metric.endswith("p99.9"))])
        return min(max(fewest, 100 * round(rate * goal.probe_s / 100)), max(MOST, fewest))

    def _measure(self, trial: Trial, probe: Probe) -> Verdict | None:
        reserved = reserve(self._knowledge, self._evaluator)
        if self._evaluator.share([probe, *reserved]) > self._evaluator.left():
            raise BudgetSpentError
        outcome = self._evaluator.evaluate(trial.configuration, probe)
        verdict = self._knowledge.note(trial, probe, outcome)
        self._progress(trial, probe, outcome, verdict)
        return verdict
