"""The probes of a search, within its budget: offline, or at a step of the ladder of rates.

A part of the search that measures is a task: a generator that yields each probe that it needs, and is sent the verdict.
Tasks run in rounds. A round has the next probe of as many tasks as there are places, and measures them beside each
other. Their outcomes are taken in the order of the tasks, whichever ends first: the same outcomes lead to the same
decisions. On one place tasks run one after another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from grbench.tune import rates
from grbench.tune.certification import ROUNDING, reserve
from grbench.tune.knowledge import Knowledge
from grbench.tune.limits import Verdict, judge
from grbench.tune.outcome import BudgetSpentError, Evaluator, Outcome, Probe
from grbench.tune.trial import HELD, Progress, Trial
from grbench.tune.worth import requests_needed

OFFLINE = 512  # requests of an offline probe
FEWEST, MOST = 1000, 20_000  # requests of a server probe; p99 needs 1000

T = TypeVar("T")
Wanted = tuple[Trial, Probe]
Task = Generator[Wanted, Verdict | None, T]


class Probes:
    """Measures trials. What it finds goes into the knowledge of the search."""

    def __init__(self, knowledge: Knowledge, evaluator: Evaluator, progress: Progress) -> None:
        self._knowledge, self._evaluator, self._progress = knowledge, evaluator, progress

    @property
    def places(self) -> int:
        """Probes that are measured at a time."""
        return self._evaluator.places

    def offline(self, trial: Trial) -> Task[None]:
        """Probe all requests at once, unless that is known or the quality is not enough."""
        bounds = [limit for limit in self._knowledge.goal.limits if limit.metric.startswith("quality/")]
        if bounds and (quality := self._evaluator.quality(trial.configuration)):
            known = Outcome("OK", quality)
            verdict, limit = judge([limit for limit in bounds if limit.metric in quality], known)
            if verdict is Verdict.BROKEN and limit is not None:
                trial.breaks(limit, known)
                return
        if trial.offline is None:
            largest = self._knowledge.batching[trial.configuration].max_batch
            yield trial, Probe(None, max(OFFLINE, 8 * largest))

    def at(self, trial: Trial, step: int, longer: int = 1) -> Task[bool]:
        """Probe a rate. Returns True if the limits are kept, for sure or likely.

        longer: times the requests of a first probe.
        """
        return (yield trial, self.probe(step, longer)) in HELD

    def probe(self, step: int, longer: int = 1) -> Probe:
        """Return the probe at a step."""
        rate = rates.rate_of(step)
        return Probe(rate, longer * self._requests(rate))

    def may_prove(self, trial: Trial, step: int, longer: int) -> bool:
        """Return True unless a probe of a rate that is this much longer is worth too little for an interval."""
        needed = requests_needed(self._knowledge.goal.limits, self._evaluator, trial, step)
        return needed <= self.probe(step, longer).requests

    def run(self, next_task: Callable[[], Task[object] | None]) -> None:
        """Run tasks in rounds until none is left. Raises BudgetSpentError.

        next_task: is called while there is a free place; None: no task now, and the last one if none runs.
        """
        running: list[tuple[Task[object], Wanted]] = []
        try:
            while True:
                while len(running) < self.places and (task := next_task()) is not None:
                    running += _advanced(task, None)
                if not running:
                    return
                count = self._affordable([wanted for _, wanted in running])
                verdicts = self._measure([wanted for _, wanted in running[:count]])
                round_, running = running[:count], running[count:]
                going = [_advanced(task, verdict) for (task, _), verdict in zip(round_, verdicts, strict=True)]
                running = [*itertools.chain(*going), *running]
        finally:
            for task, _ in running:
                task.close()

    def _requests(self, rate: float) -> int:
        """Return the requests of a first probe at a rate."""
        goal = self._knowledge.goal
        fewest = max([FEWEST, *(10_000 for limit in goal.limits if limit.metric.endswith("p99.9"))])
        return min(max(fewest, 100 * round(rate * goal.probe_s / 100)), max(MOST, fewest))

    def _affordable(self, wanted: Sequence[Wanted]) -> int:
        """Return how many of the probes the budget has room for. Raises BudgetSpentError if for none."""
        left = self._evaluator.left() - reserve(self._knowledge, self._evaluator) + ROUNDING
        probes = [(trial.configuration, probe) for trial, probe in wanted]
        fitting = [count for count in range(1, len(probes) + 1) if self._evaluator.share(probes[:count]) <= left]
        if not fitting:
            raise BudgetSpentError
        return fitting[-1]

    def _measure(self, wanted: Sequence[Wanted]) -> list[Verdict | None]:
        """Measure probes beside each other and take the outcomes in their order. Returns the verdicts."""
        self._evaluator.together([(trial.configuration, probe) for trial, probe in wanted])
        verdicts = []
        for trial, probe in wanted:
            outcome = self._evaluator.evaluate(trial.configuration, probe)
            verdict = self._knowledge.note(trial, probe, outcome)
            self._progress(trial, probe, outcome, verdict)
            verdicts.append(verdict)
        return verdicts


def _advanced(task: Task[object], verdict: Verdict | None) -> list[tuple[Task[object], Wanted]]:
    """Send a task the verdict on its probe. Returns the task with its next probe, or nothing if it has ended."""
    try:
        return [(task, task.send(verdict))]
    except StopIteration:
        return []
