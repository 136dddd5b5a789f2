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
PATIENCE = 3  # rates that the first trial breaks before it waits for another that should carry more
OPEN = 1.0  # excess of a figure over its limit that no interval proves, as a share, up to which longer probes follow
UNKNOWN = (None, None)  # verdict and limit of a step without a probe


class HighestRate:
    """Finds the rate of a trial. screen: probe longer where a short probe leaves open who leads."""

    def __init__(self, knowledge: Knowledge, probes: Probes, screen: bool) -> None:
        self._knowledge, self._probes, self._screen = knowledge, probes, screen
        self._confirmed: set[tuple[int, int | None]] = set()  # trials with the step of a longer probe
        self.put_off: int | None = None  # the trial that waits for others until one leads; later ones do not wait

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
        if (yield from self._descend(trial)):
            while (step := self._next_step(trial)) is not None:
                yield from self._probes.at(trial, step)

    def approach(self, trial: Trial) -> Task[None]:
        """Find out whether a trial is better than the best so far, with as few probes; of the best, find the rate."""
        best = self._knowledge.incumbent
        if best is None or best.low is None:
            yield from self._descend(trial, may_wait=True)
        elif best is not trial:
            yield from self._beats(trial, best.low)
        while trial is best is self._knowledge.incumbent and not trial.failed and not self.settled(trial):
            if self._far_below(trial):
                yield from self._descend(trial)
            elif (step := self._next_step(trial)) is not None:
                yield from self._probes.at(trial, step)
            else:
                yield from self._confirm(trial)

    def _confirm(self, trial: Trial) -> Task[None]:
        """Probe the rate of the best with more requests: near the most that it carries, a short run is lucky."""
        assert trial.low is not None
        self._confirmed.add((id(trial), trial.low))
        yield from self._probes.at(trial, trial.low, LONGER)
        if trial.low is None and not trial.failed:
            yield from self._descend(trial)

    def _waits(self, trial: Trial, step: int) -> bool:
        """Return True if a trial that broke some rates waits, because another, not yet probed, should carry more."""
        if self.put_off is not None or len(trial.verdicts) < PATIENCE:
            return False
        others = [t for t in self._knowledge.trials if not (t.failed or t.verdicts)]
        if any(self._knowledge.expected(other) > step + COARSE for other in others):
            self.put_off = id(trial)
        return self.put_off is not None

    def settled(self, trial: Trial) -> bool:
        """Return True if the rate of the best is bracketed and confirmed, or no longer probe would confirm it."""
        confirmed = (id(trial), trial.low) in self._confirmed or not self._confirmable(trial)
        return confirmed and self._next_step(trial) is None

    def _confirmable(self, trial: Trial) -> bool:
        """Return True unless even a longer probe at the best rate is worth too little for an interval."""
        return trial.low is None or self._probes.may_prove(trial, trial.low, LONGER)

    def _far_below(self, trial: Trial) -> bool:
        """Return True if nothing above the best rate of a trial was probed, and much more is expected."""
        low = trial.low
        return low is not None and max(trial.verdicts) == low < round(self._knowledge.expected(trial)) - COARSE

    def _next_step(self, trial: Trial) -> int | None:
        """Return the step that narrows the bracket of a trial; None: it is as narrow as `COARSE`, or can't be."""
        low, high, top = trial.low, trial.high, trial.top
        if trial.failed or low is None or high is None or top is None:  # a failure leaves the bracket as it is
            return None
        if trial.refuted or any(step > low for step in trial.verdicts):
            return (low + high) // 2 if high - low > COARSE else None
        expected = round(self._knowledge.expected(trial))
        return None if low >= top else min(expected if expected > low else low + COARSE, top)

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
        if trial.most is None or start > trial.most:
            return False
        if trial.verdicts.get(start, UNKNOWN)[0] is not Verdict.BROKEN:
            yield from self._challenge(trial, start)
        return trial.low is not None and trial.low >= start

    def _challenge(self, trial: Trial, step: int) -> Task[None]:
        """Probe a rate just above the best so far, and longer if that leaves it open."""
        kept = yield from self._probes.at(trial, step)
        if not kept and self._screen and self._open(trial, step):
            yield from self._probes.at(trial, step, LONGER)

    def left_open(self, trial: Trial) -> bool:
        """Return True if only a figure that no interval proves rules out that a trial carries more."""
        return trial.high is not None and self._open(trial, trial.high)

    def _open(self, trial: Trial, step: int) -> bool:
        """Return True if the figure at a step is not far above its limit, and no interval proves that it is above."""
        verdict, limit = trial.verdicts.get(step, UNKNOWN)
        excess = limit.excess(trial.probes[step]) if limit is not None else None
        return verdict is Verdict.UNLIKELY and excess is not None and excess <= OPEN

    def _descend(self, trial: Trial, *, may_wait: bool = False) -> Task[bool]:
        """Lower the rate from the one expected until the limits are kept. Returns False if they are at none.

        The first is below it by the width of a bracket, because the highest of several estimates was lucky. A rate that
        was known to keep the limits may be far below: that of an earlier run, or of the best so far. A trial of which
        earlier runs are known at rates only is probed offline before.

        may_wait: stop after some probes if another trial should carry more; the offline rate of this one misled.
        """
        yield from self._probes.offline(trial)
        if trial.failed or trial.top is None:
            return False
        floor = trial.top - BOTTOM if trial.low is None else trial.low + 1
        most = trial.top if trial.high is None else trial.high - 1
        step, jump = min(round(self._knowledge.expected(trial)) - COARSE, most), COARSE
        while step >= floor and not trial.failed and not (yield from self._probes.at(trial, step)):
            step, jump = step - jump, 2 * jump
            if may_wait and self._waits(trial, step):
                return False
        if trial.low is None and not trial.failed:
            trial.failed = f"keeps the limits at no rate down to {rates.rate_of(max(step, floor)):.3g} requests/s"
            trial.violation = trial.least_excess
        return trial.low is not None
