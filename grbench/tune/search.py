"""The search: the order in which configurations are measured, until the budget or the space ends.

Each configuration is measured at rising fidelity. An offline probe shows the most that it can answer, and orders it by
a simulated queue (`knowledge`). Server probes at steps of the ladder of rates decide (`highest`). Then `certification`
measures the best again. All measure by an `Evaluator` only.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from grbench.report.cells import number_of
from grbench.tune import rates
from grbench.tune.certification import ROUNDING, Certificate, certifiable, certify, plan, recall, reserve
from grbench.tune.highest import COARSE, HighestRate
from grbench.tune.knowledge import Knowledge
from grbench.tune.outcome import BudgetSpentError, Configuration, Evaluator, Outcome, Probe
from grbench.tune.probes import OFFLINE, Probes, Task
from grbench.tune.proposers import Cost, Proposer
from grbench.tune.trial import Progress, Trial, quiet

FIRST_SHARE, FIRST_FEWEST, FIRST_MOST = 0.2, 3, 12  # of the budget, for offline probes before the first rate
BETWEEN = 2  # offline probes between two configurations that are probed at rates
NAMED = 3  # folders of earlier records that a line names
SETTLING = 5  # probes that bracket the rate of the best; it waits for as many that may find a better one


class Search:
    """One search. `run` measures until the budget is spent; the knowledge has what it found, whenever it ends."""

    def __init__(
        self,
        knowledge: Knowledge,
        configurations: Sequence[Configuration],
        evaluator: Evaluator,
        proposer: Proposer,
        progress: Progress = quiet,
        screen: bool = True,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """configurations: of the space, the default first. proposer: picks among them.

        screen: probe many offline and only the most promising at a rate; False: each in turn. say: takes a line.
        """
        self._say = say
        self._knowledge, self._configurations = knowledge, configurations
        self._evaluator, self._proposer = evaluator, proposer
        self._progress = progress
        self._screen = screen and knowledge.goal.objective == "throughput"
        self._probes = Probes(knowledge, evaluator, progress)
        self._highest = HighestRate(knowledge, self._probes, self._screen)
        self._since = SETTLING  # offline probes since the last probe at a rate
        self._finding: set[int] = set()  # trials whose rate is searched for
        self._again: set[int] = set()  # former leaders that got another chance

    def run(self) -> None:
        """Try configurations until the budget or the space ends, then narrow the bracket of the best."""
        with contextlib.suppress(BudgetSpentError):
            self._recall()
            if self._screen:
                self._probes.run(self._next_screened)
            else:
                self.try_each(iter(self._ask, None))
        self._name_without_room()
        with contextlib.suppress(BudgetSpentError):
            self._narrow_best()
            if self._screen:
                self._runners_up()

    def certify(self) -> Certificate | None:
        """Certify the best. Where no rate of it passes, go on with the next best ones while the budget lasts."""
        certificate = certify(self._knowledge, self._evaluator, self._progress)
        while certificate is None and self._go_on():
            certificate = certify(self._knowledge, self._evaluator, self._progress)
        return certificate

    def _go_on(self) -> bool:
        """Find the rates of the next best configurations that keep none yet, until one of them keeps the limits.

        It is for a search whose best failed its certification: the others were probed offline, and at a rate only above
        that of the best. Returns True if one keeps the limits now. If the best that may be certified has not failed,
        the budget has no room to certify it, and nothing is probed.
        """
        if any(trial.refuted is None for trial in certifiable(self._knowledge)[:1]):
            return False
        trials = self._knowledge.trials
        open_ = [t for t in trials if t.offline is not None and t.low is None and not (t.failed or t.refuted)]
        open_.sort(key=self._knowledge.expected, reverse=True)
        tried = itertools.takewhile(lambda trial: all(other.low is None for other in open_), open_)
        with contextlib.suppress(BudgetSpentError):
            self._run_each(self._highest.find(trial, alone=True) for trial in tried)
            self._narrow_best()
        return any(trial.low is not None for trial in open_)

    def _narrow_best(self) -> None:
        """Narrow the bracket of the best that may be certified. Raises BudgetSpentError."""
        while (best := next(iter(certifiable(self._knowledge)), None)) is not None and self._highest.narrow(best):
            pass  # a failed step may make another trial the best

    def try_each(self, configurations: Iterable[Configuration]) -> None:
        """Try configurations, each once there is a place. Raises BudgetSpentError."""
        self._run_each(self._try(configuration, self._highest.find) for configuration in configurations)

    def _try(self, configuration: Configuration, measure: Callable[[Trial], Task[None]]) -> Task[None]:
        """Measure a configuration that the proposer has picked, and tell it what was found."""
        trial = self._knowledge.begin(configuration)
        try:
            yield from measure(trial)
        finally:
            self._tell(trial)

    def _run_each(self, tasks: Iterator[Task[None]]) -> None:
        """Run tasks, each once there is a place."""
        self._probes.run(lambda: None if self._waits_for_default() else next(tasks, None))

    def _waits_for_default(self) -> bool:
        """Return True while the default is measured under a limit on quality: losses of others are against it."""
        if not any(limit.metric.startswith("quality/") for limit in self._knowledge.goal.limits):
            return False
        default = [trial for trial in self._knowledge.trials if trial.configuration == self._configurations[0]]
        return any(not (trial.offline or trial.probes or trial.failed) for trial in default)

    def _recall(self) -> None:
        """Take the outcomes of earlier searches, then go on with the configurations that they leave open."""
        taken: list[Outcome] = []
        for configuration in self._configurations:
            known, certifying = self._evaluator.known(configuration), self._evaluator.certifying(configuration)
            if not known and not certifying:
                continue
            trial = self._knowledge.begin(configuration)
            self._proposer.take(configuration)
            for probe, outcome in known:
                self._knowledge.note(trial, probe, outcome)
            recall(self._knowledge, self._evaluator, trial, certifying)
            taken += [outcome for _, outcome in (*known, *certifying)]
            self._tell(trial)
        if taken:
            count = number_of(len(self._knowledge.trials), "configuration")
            probes = number_of(len(taken), "probe")
            self._say(f"takes over {probes} of {count} from {_sources(taken)}, at no cost (rerun=true measures again)")
        for trial in self._knowledge.trials:
            if trial.refuted:
                self._say(f"{trial.configuration.name} failed at {trial.refuted}; it is tried at lower rates only")
        open_ = sorted(self._knowledge.trials, key=lambda trial: trial.estimate or 0.0, reverse=True)
        measure = self._probes.offline if self._screen else self._highest.find
        self._run_each(measure(trial) for trial in open_ if not trial.failed and self._may_win(trial))

    def _ask(self) -> Configuration | None:
        return self._proposer.ask(self._cost(), self._first_probes())

    def _next_screened(self) -> Task[None] | None:
        """Return a task: an offline probe, or now and then the search for the rate of what promises most."""
        if self._waits_for_default():
            return None
        explored = sum(trial.offline is not None or bool(trial.failed) for trial in self._knowledge.trials)
        promising = self._promising()
        between = BETWEEN if self._knowledge.incumbent is not promising else SETTLING
        due = explored >= self._first_probes() and self._since >= between
        if promising is not None and (due or self._at_once(promising)):
            self._since = 0
            return self._find(promising)
        if self._may_explore() and (configuration := self._ask()) is not None:
            self._since += 1
            return self._try(configuration, self._probes.offline)
        return None if promising is None else self._find(promising)

    def _first_probes(self) -> int:
        """Return the offline probes before the first rate."""
        offline, places = self._cold_start(), self._probes.places
        return min(max(places * round(FIRST_SHARE / offline), FIRST_FEWEST), FIRST_MOST) if offline else FIRST_MOST

    def _cold_start(self) -> float:
        """Return the share of the budget of a round of first probes like the default's, of engines that all start."""
        default = self._configurations[0]
        first = self._probes.places * [(default, Probe(None, OFFLINE))]
        return self._evaluator.share(first) + self._evaluator.saving(default)

    def _may_explore(self) -> bool:
        """Return True unless the budget has room only for the bracket of the best."""
        best = self._knowledge.incumbent
        if best is None or best.low is None:
            return True
        left = self._evaluator.left() - reserve(self._knowledge, self._evaluator)
        return left > self._settling()

    def _settling(self) -> float:
        """Return the share of the budget that brackets the best."""
        best = self._knowledge.incumbent
        if best is None or best.low is None or not self._screen:
            return 0.0
        return self._evaluator.share(SETTLING * [(best.configuration, self._probes.probe(best.low))])

    def _cost(self) -> Cost:
        """Return what gives the share of the budget that the first probe of a configuration takes.

        inf: what is left has no room for it beside the bracket and the certification, of the best or of itself.
        """
        best, evaluator = next(iter(certifiable(self._knowledge)), None), self._evaluator
        left, reserved = evaluator.left() - self._settling() + ROUNDING, reserve(self._knowledge, evaluator)
        runs = plan(self._knowledge, evaluator, best) if best is not None and reserved else []

        def cost(configuration: Configuration) -> float:
            first, kept = evaluator.share([(configuration, Probe(None, OFFLINE))]), reserved
            kept = max(kept, evaluator.share([(configuration, probe) for _, probe in runs]))
            return first if first + kept <= left else math.inf

        return cost

    def _at_once(self, trial: Trial) -> bool:
        """Return True if a trial is probed at a rate while its engine is kept: a probe costs less than a start."""
        if trial is self._knowledge.incumbent or self._finding:
            return False
        probe = self._probes.probe(max(round(self._knowledge.expected(trial)), 0))
        return self._evaluator.saving(trial.configuration) > self._evaluator.share([(trial.configuration, probe)])

    def _name_without_room(self) -> None:
        """Name the engines and kernels of which none was tried, because the budget had no room for their start."""
        tried = {trial.configuration.engines for trial in self._knowledge.trials}
        closed = {trial.configuration for trial in self._knowledge.trials}.union(*self._knowledge.left_out.values())
        cost, left, usual = self._cost(), max(self._evaluator.left(), 0.0), self._cold_start()
        none: dict[tuple[tuple[str, str], ...], list[Configuration]] = {}
        for configuration in self._configurations:
            if configuration.engines not in tried and configuration not in closed and cost(configuration) == math.inf:
                none.setdefault(configuration.engines, []).append(configuration)
        for engines, some in none.items():
            first = (some[0], Probe(None, OFFLINE))
            share = self._evaluator.share([first])
            if share <= usual:  # its start is no reason
                continue
            reason = f"{_named(engines)}: a first probe takes about {share:.0%} of the budget; {left:.0%} was left, "
            reason += "and the bracket and the certification of the best need it too; "
            reason += f"the probe takes {self._evaluator.budget_for([first])}"
            self._knowledge.left_out[reason] = some
            self._say(f"left out {len(some)} of {reason}")

    def _find(self, trial: Trial) -> Task[None]:
        """Find the rate of a trial, which no other task does meanwhile."""
        self._finding.add(id(trial))
        try:
            yield from self._highest.approach(trial)
        finally:
            self._finding.remove(id(trial))

    def _promising(self) -> Trial | None:
        """Return the trial that should beat the best so far by most, and was not yet shown not to."""
        best, expected = self._knowledge.incumbent, self._knowledge.expected
        level = -math.inf if best is None or best.low is None else best.low
        open_ = [
            t
            for t in self._knowledge.trials
            if not t.failed
            and (not self._highest.settled(t) if t is best else expected(t) > level and self._may_win(t))
            and id(t) not in self._finding
        ]
        waiting = self._highest.put_off if best is None else None
        promising = max(open_, key=lambda t: (id(t) != waiting, expected(t)), default=None)
        return promising or self._overtaken(level)

    def _overtaken(self, level: float) -> Trial | None:
        """Return a former leader that a short probe may have ruled out by bad luck, each once."""
        for trial in self._knowledge.ranking()[1:]:
            seen = id(trial) in self._again | self._finding
            if not seen and not trial.failed and self._highest.left_open(trial) and (trial.most or 0) > level:
                self._again.add(id(trial))
                return trial
        return None

    def _may_win(self, trial: Trial) -> bool:
        """Return True unless it is known that a trial is not the best, or that it is and at which rate."""
        best = self._knowledge.incumbent
        if best is trial:
            return trial.high is None or trial.high - (trial.low or 0) > COARSE
        objective = self._knowledge.goal.objective
        if objective != "throughput" or best is None or best.low is None:
            return trial.low is None or objective != "latency"
        return trial.high is None or trial.high > best.low + 1

    def _runners_up(self) -> None:
        """Find the rate of the best configuration of every other engine: people ask for it."""
        best = self._knowledge.incumbent
        if best is None:
            return
        mine = best.configuration.get("engine")
        others = []
        for engine in dict.fromkeys(c.get("engine") for c in self._configurations):
            trials = [t for t in self._knowledge.trials if t.configuration.get("engine") == engine and not t.failed]
            trial = max(trials, key=self._knowledge.expected, default=None)
            if engine != mine and trial is not None and trial.low is None:
                others.append(trial)
        self._run_each(self._highest.find(trial, alone=True) for trial in others)

    def _tell(self, trial: Trial) -> None:
        """Tell the proposer what is known of a trial."""
        if self._knowledge.goal.objective in ("latency", "cost"):
            score = self._knowledge.score(trial) if trial.low is not None else None
            score = None if score is None else -math.log(max(-score, 1e-9)) / math.log(rates.RATIO)
        else:
            score = trial.estimate
        self._proposer.tell(trial.configuration, score, trial.violation)
        if trial.slow and trial.configuration != self._configurations[0]:
            self._leave_out_alike(trial)

    def _leave_out_alike(self, trial: Trial) -> None:
        """Leave out all that has the engines and kernels of a trial that started too slowly, unless one of them ran."""
        engines, trials = trial.configuration.engines, self._knowledge.trials
        if any(other.offline is not None and other.configuration.engines == engines for other in trials):
            return
        closed = {other.configuration for other in trials}.union(*self._knowledge.left_out.values())
        alike = [c for c in self._configurations if c.engines == engines and c not in closed]
        if not alike:
            return
        for configuration in alike:
            self._proposer.leave_out(configuration)
        name = _named(engines)
        reason = f"{name}: the first probe of one did not end within {trial.slow}"
        self._knowledge.left_out[reason] = alike
        self._say(f"left out {len(alike)} of {reason}")


def _sources(outcomes: Iterable[Outcome]) -> str:
    """Return the folders of the searches and runs that measured outcomes: the newest three, and how many more."""
    folders = {outcome.folder.parent for outcome in outcomes if outcome.folder is not None}
    newest = [os.path.relpath(f) for f in sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True)]
    more = f" and {number_of(len(newest) - NAMED, 'more folder')}" if len(newest) > NAMED else ""
    return ", ".join(newest[:NAMED]) + more or "earlier records"


def _named(engines: tuple[tuple[str, str], ...]) -> str:
    """Return engines and kernels as they are typed."""
    return " ".join(f"{key}={value}" for key, value in engines) or "the only engines and kernels"
