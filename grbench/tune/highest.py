"""The highest rate at which one configuration keeps the limits, in as few probes as can be.

A configuration that is not the first is probed just above the best rate so far, so that a worse one costs one probe.
"""

from __future__ import annotations

from grbench.tune import rates
from grbench.tune.knowledge import BOTTOM, Knowledge
from grbench.tune.limits import Verdict
from grbench.tune.probes import Probes
from grbench.tune.trial import LONGER, Trial

COARSE = rates.steps(1.09)  # width of a bracket while configurations are compared
OPEN = 1.0  # excess of an unsure figure over its limit, as a share, up to which a challenger is measured longer


class HighestRate:
    """Finds the rate of a trial. screen: probe longer where a short probe leaves open who leads."""

    def __init__(self, knowledge: Knowledge, probes: Probes, screen: bool) -> None:
        self._knowledge, self._probes, self._screen = knowledge, probes, screen

    def find(self, trial: Trial, *, alone: bool = False) -> None:
        """Find out whether a configuration is better than the best so far, and then its rate.

        alone: find its rate in any case. Raises BudgetSpentError.
        """
        goal = self._knowledge.goal
        if goal.rate is not None:
            self._probes.at(trial, rates.step_below(goal.rate))
            return
        self._probes.offline(trial)
        if trial.failed or trial.top is None:
            return
        best = self._knowledge.incumbent if goal.objective == "throughput" and not alone else None
        if best is not None and best is not trial and best.low is not None and not self._beats(trial, best.low):
            return
        if not self._descend(trial):
            return
        self._climb(trial)
        self.narrow(trial, COARSE)
        self._confirm(trial)

    def narrow(self, trial: Trial, width: int) -> bool:
        """Halve the bracket of a trial until it has `width` steps. Returns True if anything was measured."""
        measured = False
        while (
            self._knowledge.goal.rate is None
            and trial.low is not None
            and trial.high is not None
            and trial.high - trial.low > width
        ):
            self._probes.at(trial, (trial.low + trial.high) // 2)
            measured = True
        return measured

    def _beats(self, trial: Trial, level: int) -> bool:
        """Return True if a trial keeps the limits at a step above the best so far, `level`."""
        start = level + 1
        if trial.top is None or start > trial.top:
            return False
        if start not in trial.verdicts and not self._challenge(trial, start):
            return False
        return trial.low is not None and trial.low >= start

    def _challenge(self, trial: Trial, step: int) -> bool:
        """Probe a rate just above the best so far, and longer if that leaves it open. Returns True if it is kept."""
        if self._probes.at(trial, step):
            return True
        verdict, limit = trial.verdicts.get(step, (Verdict.BROKEN, None))
        excess = limit.excess(trial.probes[step]) if limit is not None else None
        if not self._screen or verdict is not Verdict.UNSURE or excess is None or excess > OPEN:
            return False
        return self._probes.at(trial, step, LONGER)

    def _descend(self, trial: Trial) -> bool:
        """Lower the rate from the one expected until the limits are kept. Returns False if they are at none.

        A rate that was known to keep them may be far below: that of an earlier run, or of the best so far.
        """
        assert trial.top is not None
        floor = trial.top - BOTTOM if trial.low is None else trial.low + 1
        most = trial.top if trial.high is None else trial.high - 1
        step, jump = min(round(self._knowledge.expected(trial)), most), COARSE
        while step >= floor and not self._probes.at(trial, step):
            step, jump = step - jump, 2 * jump
        if trial.low is None:
            trial.failed = f"keeps the limits at no rate down to {rates.rate_of(max(step, floor)):.3g} requests/s"
            trial.violation = trial.least_excess
        return trial.low is not None

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
            self._probes.at(trial, step)
            jump *= 2
            if high == trial.high and step not in trial.verdicts:
                return

    def _confirm(self, trial: Trial) -> None:
        """Probe the rate of a new leader with more requests: near the most that it carries, a short run is lucky."""
        confirmed: set[int] = set()
        while (
            self._screen
            and trial is self._knowledge.incumbent
            and (step := trial.low) is not None
            and step not in confirmed
        ):
            confirmed.add(step)
            if not self._probes.at(trial, step, LONGER) and trial.low is None:
                self._probes.at(trial, step - COARSE)
