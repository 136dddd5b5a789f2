"""The highest rate at which one configuration keeps the limits, in as few probes as can be.

A configuration that is not the first is probed just above the best rate so far, so that a worse one costs one probe.
"""

from __future__ import annotations

from grbench.tune import rates
from grbench.tune.knowledge import BOTTOM, Knowledge
from grbench.tune.limits import Verdict
from grbench.tune.probes import Probes, Task
from grbench.tune.trial import LONGER, Trial

COARSE = rates.steps(1.09)  # width of a bracket while configurations are compared
OPEN = 1.0  # excess of an unsure figure over its limit, as a share, up to which a challenger is measured longer


class HighestRate:
    """Finds the rate of a trial. screen: probe longer where a short probe leaves open who leads."""

    def __init__(self, knowledge: Knowledge, probes: Probes, screen: bool) -> None:
        self._knowledge, self._probes, self._screen = knowledge, probes, screen

    def find(self, trial: Trial, *, alone: bool = False) -> Task[None]:
        """Find out whether a configuration is better than the best so far, and then its rate.

        alone: find its rate in any case.
        """
        goal = self._knowledge.goal
        if goal.rate is not None:
            yield from self._probes.at(trial, rates.step_below(goal.rate))
            return
        yield from self._probes.offline(trial)
        if trial.failed or trial.top is None:
            return
        level = None if alone else self._level(trial)
        if level is not None and not (yield from self._beats(trial, level)):
            return
        while not trial.failed and (yield from self._descend(trial)):
            yield from self._climb(trial)
            while (
                not trial.failed  # a failure leaves the bracket as it is
                and trial.low is not None
                and trial.high is not None
                and trial.high - trial.low > COARSE
            ):
                yield from self._probes.at(trial, (trial.low + trial.high) // 2)
            yield from self._confirm(trial)
            before, level = level, None if alone else self._level(trial)
            if level is None or level >= trial.top or (before is not None and level <= before):
                return
            # A trial that was probed beside this one has overtaken it: a short probe may have been unlucky.
            if not (yield from self._challenge(trial, level + 1)):
                return

    def _level(self, trial: Trial) -> int | None:
        """Return the step that another trial leads with, which this one has to beat; None: there is none."""
        best = self._knowledge.incumbent if self._knowledge.goal.objective == "throughput" else None
        return None if best is None or best is trial else best.low

    def narrow(self, trial: Trial) -> bool:
        """Narrow the bracket of a trial to one step, with a probe on each place. Returns True if any was measured."""
        measured = False
        while self._knowledge.goal.rate is None and (steps := self._between(trial)):
            tasks = iter([self._probes.at(trial, step) for step in steps])
            self._probes.run(lambda: next(tasks, None))  # noqa: B023  (it ends before the next round)
            measured = True
        return measured

    def _between(self, trial: Trial) -> list[int]:
        """Return the steps that divide the bracket of a trial evenly, at most one for each place."""
        if trial.failed or trial.low is None or trial.high is None:  # a failure leaves the bracket as it is
            return []
        width = trial.high - trial.low
        parts = min(self._probes.places, width - 1) + 1
        return [trial.low + width * i // parts for i in range(1, parts)]

    def _beats(self, trial: Trial, level: int) -> Task[bool]:
        """Return True if a trial keeps the limits at a step above the best so far, `level`."""
        start = level + 1
        if trial.top is None or start > trial.top:
            return False
        if start not in trial.verdicts and not (yield from self._challenge(trial, start)):
            return False
        return trial.low is not None and trial.low >= start

    def _challenge(self, trial: Trial, step: int) -> Task[bool]:
        """Probe a rate just above the best so far, and longer if that leaves it open. Returns True if it is kept."""
        if (yield from self._probes.at(trial, step)):
            return True
        verdict, limit = trial.verdicts.get(step, (Verdict.BROKEN, None))
        excess = limit.excess(trial.probes[step]) if limit is not None else None
        if not self._screen or verdict is not Verdict.UNSURE or excess is None or excess > OPEN:
            return False
        return (yield from self._probes.at(trial, step, LONGER))

    def _descend(self, trial: Trial) -> Task[bool]:
        """Lower the rate from the one expected until the limits are kept. Returns False if they are at none.

        A rate that was known to keep them may be far below: that of an earlier run, or of the best so far.
        """
        assert trial.top is not None
        floor = trial.top - BOTTOM if trial.low is None else trial.low + 1
        most = trial.top if trial.high is None else trial.high - 1
        step, jump = min(round(self._knowledge.expected(trial)), most), COARSE
        while step >= floor and not trial.failed and not (yield from self._probes.at(trial, step)):
            step, jump = step - jump, 2 * jump
        if trial.low is None and not trial.failed:
            trial.failed = f"keeps the limits at no rate down to {rates.rate_of(max(step, floor)):.3g} requests/s"
            trial.violation = trial.least_excess
        return trial.low is not None

    def _climb(self, trial: Trial) -> Task[None]:
        """Raise the rate of a trial that keeps the limits until one does not, or its offline rate is reached."""
        assert trial.low is not None and trial.top is not None
        jump = COARSE
        while (
            (high := trial.high) is not None
            and trial.low < trial.top
            and not any(s > trial.low for s in trial.verdicts)
        ):
            step = min(trial.low + jump, trial.top)
            yield from self._probes.at(trial, step)
            jump *= 2
            if high == trial.high and step not in trial.verdicts:
                return

    def _confirm(self, trial: Trial) -> Task[None]:
        """Probe the rate of a new leader with more requests: near the most that it carries, a short run is lucky."""
        confirmed: set[int] = set()
        while (
            self._screen
            and trial is self._knowledge.incumbent
            and (step := trial.low) is not None
            and step not in confirmed
        ):
            confirmed.add(step)
            if not (yield from self._probes.at(trial, step, LONGER)) and trial.low is None:
                yield from self._probes.at(trial, step - COARSE)
