"""Certification: the best is measured again with other seeds and more requests, then the next best until one passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from grbench.tune import rates
from grbench.tune.knowledge import BOTTOM, Knowledge
from grbench.tune.limits import Limit, Verdict, judge
from grbench.tune.outcome import Evaluator, Outcome, Probe, Wanted
from grbench.tune.trial import HELD, Goal, Progress, Refutation, Trial, quiet
from grbench.tune.worth import requests_needed

CERTIFIED = 10_000  # requests of a run that certifies, at least
# Times the requests that all runs need: what a short probe is worth is much by chance. The second is for a budget that
# has room for the first at no rate.
MARGIN, LEAST_MARGIN = 2, 1
AGAIN = 1.25  # the same once certifying runs have shown what they are worth
SHARE = 0.6  # of the budget, at most, for a try, and for what is reserved with a run that fails
MOST = 0.75  # of the budget, at most, for a try that has no room otherwise
NEAR = rates.steps(1.2)  # below the best, within which the second may become the best again
STEPS = 2  # by which a rate that fails is lowered first, then twice as many each time
LAST = 5  # by which a try is lowered, at most, so that the budget has room for another one after it
SEED = 101
ROUNDING = 1e-9  # of shares of the budget


@dataclass
class Certificate:
    """A configuration that kept the limits in all runs with other seeds, of at least CERTIFIED requests.

    together: what the runs show as one. The figure of each is within the limits, and the interval of all proves it.
    """

    trial: Trial
    step: int
    outcomes: list[Outcome]
    together: Outcome
    # Better ones that did not, or that the budget had no room for, alone or with another try.
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """The requests of the shortest run."""
        return min(round(outcome.metrics["samples"]) for outcome in self.outcomes)


def reserve(knowledge: Knowledge, evaluator: Evaluator) -> float:
    """Return the share of the budget that certifies the best so far, after one that fails if that is `SHARE` at most.

    So two tries have three runs, because a figure beyond its limit in the first ends one. Room for four did not certify
    more often (docs/SEARCHES.md). The second may become the best again, so there is room for it, too, if it is near.
    Returns 0 if it would leave too little of the budget for the search, or if too little is left to certify anything:
    the search then goes on, and the answer says what is missing.
    """
    best = [(trial, trial.low) for trial in certifiable(knowledge)[:2] if trial.low is not None]
    goal = knowledge.goal
    if not best or not goal.runs or knowledge.concluded:
        return 0.0
    plans = [plan(knowledge, evaluator, trial) for trial, step in best if step > best[0][1] - NEAR]
    if not (runs := [planned for planned in plans if planned]):
        return 0.0
    once, failed = (max(evaluator.share(run[:count]) for run in runs) for count in (goal.runs, 1))
    return failed + once if failed + once <= min(SHARE, evaluator.left() + ROUNDING) else once


def plan(knowledge: Knowledge, evaluator: Evaluator, trial: Trial) -> list[Wanted]:
    """Return the runs that will certify the best rate of a trial, or a lower one of which they are `SHARE` at most.

    Returns none if even those of the lowest rates and the least margin would be more than `MOST`, or than what is left.
    """
    candidate, left = Candidate(knowledge, evaluator, trial), evaluator.left() + evaluator.grace
    return candidate.runs(candidate.step) if candidate.find_room([min(SHARE, left), min(MOST, left)]) else []


def certify(knowledge: Knowledge, evaluator: Evaluator, progress: Progress = quiet) -> Certificate | None:
    """Measure the best again with other seeds and as many requests as prove it; then the next best until one passes.

    Where the budget has no room for that, the highest lower rate for which it has is next. Returns None if nothing
    keeps the limits, or if the budget has room for none; `knowledge.uncertified` then says why.
    """
    failures = [f"{trial.configuration.name} at {trial.refuted}" for trial in knowledge.trials if trial.refuted]
    lacks: list[tuple[Trial, int, str]] = []  # what the budget lacks for each that it has no room for
    beyond = False  # a figure was beyond its limit
    goal = knowledge.goal
    candidates = [Candidate(knowledge, evaluator, trial) for trial in certifiable(knowledge)]
    while candidates:
        candidate = max(candidates, key=Candidate.score)
        if lack := candidate.missing():
            lacks.append((candidate.trial, candidate.step, lack))
            if not candidate.find_room([evaluator.left()]):
                candidates.remove(candidate)
            continue
        if lowered := candidate.leave_room_for_another(beyond):
            failures.append(lowered)
        result = candidate.measure(progress)
        if isinstance(result, Certificate):
            knowledge.concluded = True
            result.trial.enter(rates.rate_of(result.step), result.together, (Verdict.KEPT, None))
            result.failures += [*failures, *_first_open(lacks)]
            return result
        candidate.trial.refute(result)
        failures.append(f"{candidate.trial.configuration.name} at {result}")
        if _at_every_rate(goal, result):
            candidates.remove(candidate)
            continue
        within = result.verdict is Verdict.LIKELY
        beyond = beyond or not within
        if not candidate.lower(within):
            candidates.remove(candidate)
    shown = knowledge.incumbent or (knowledge.unproven[0] if knowledge.unproven else None)
    said = shown and f"{shown.configuration.name} at {shown.refuted}"  # the answer begins with it
    last = [failure for failure in failures[-1:] if failure != said]
    knowledge.uncertified = "; ".join([*_first_open(lacks), *last])
    return None


def certifiable(knowledge: Knowledge) -> list[Trial]:
    """Return the trials that keep the limits, the best first, without those that a run refuted at every rate."""
    return [trial for trial in knowledge.ranking() if not _at_every_rate(knowledge.goal, trial.refuted)]


def _at_every_rate(goal: Goal, refutation: Refutation | None) -> bool:
    """Return True if a rate failed by a limit that does not depend on the rate: no other one proves it either."""
    if refutation is None or not refutation.outcome.ok:
        return False
    return judge([limit for limit in goal.limits if limit.static], refutation.outcome)[0] is not Verdict.KEPT


def _first_open(lacks: Sequence[tuple[Trial, int, str]]) -> list[str]:
    """Return what the budget lacks for the first rate of these that no run has refuted since; [] if there is none."""
    open_ = (words for trial, step, words in lacks if trial.refuted is None or step < trial.refuted.step)
    return list(itertools.islice(open_, 1))


def recall(knowledge: Knowledge, evaluator: Evaluator, trial: Trial, runs: Sequence[tuple[Probe, Outcome]]) -> None:
    """Take the certifying runs of earlier searches into a trial: what they prove, and the lowest rate that failed.

    The limits of this search judge them. A rate with a run beyond a limit is refuted, and a later run does not clear
    it. Runs that are too short to prove a rate, or too few, refute nothing: others follow them.
    """
    goal = knowledge.goal
    knowledge.outcomes += [outcome for _, outcome in runs]
    kept: dict[int, dict[int, tuple[Probe, Outcome]]] = {}  # by step and seed, of each the longest
    for probe, outcome in sorted(runs, key=lambda run: run[0].requests):
        assert probe.rate is not None
        trial.measured, step = True, rates.step_of(probe.rate)
        if (refutation := _alone(goal, step, probe, outcome)) is not None:
            trial.refute(refutation)
        else:
            kept.setdefault(step, {})[probe.seed] = probe, outcome
    for step, by_seed in kept.items():
        trial.recalled[step] = [probe for _, (probe, _) in sorted(by_seed.items())]
        outcomes = [outcome for _, (_, outcome) in sorted(by_seed.items())]
        found = trial.certifying[step] = evaluator.pool(outcomes)
        refutation = _together(goal, step, outcomes, found)
        if refutation is None:
            trial.enter(rates.rate_of(step), found, (Verdict.KEPT, None))
        elif refutation.verdict is Verdict.LIKELY and len(outcomes) <= max(goal.runs, 1):
            trial.enter(rates.rate_of(step), found, (refutation.verdict, refutation.limit))
        else:
            trial.refute(refutation)


class Candidate:
    """A trial to certify, and the rate to try next.

    step: of that rate. At first it is the best one, or a lower one if the interval there is not within the limits.
    """

    def __init__(self, knowledge: Knowledge, evaluator: Evaluator, trial: Trial) -> None:
        assert trial.low is not None
        self._goal, self._evaluator, self.trial = knowledge.goal, evaluator, trial
        self._outcomes = knowledge.outcomes
        self._best, self._score = trial.low, knowledge.score(trial)  # before any run failed
        sure = self._goal.rate is not None or trial.verdicts[trial.low][0] is Verdict.KEPT
        self._first = self.step = trial.low if sure else self._proven(trial.low, trial.low - STEPS)
        self._margin = MARGIN  # times the requests that are needed
        self._fall = STEPS // 2  # by which the rate was lowered last because of a figure beyond its limit

    def score(self) -> float:
        """Return the score at the rate that is tried next; larger is better.

        A lower rate multiplies the cost of a request by the ratio of the rates at most: what a machine takes a second
        does not grow.
        """
        if self._goal.objective == "cost":
            return self._score * rates.RATIO ** (self._best - self.step)
        return self._score if self._goal.rate is not None else float(self.step)

    def runs(self, step: int) -> list[Wanted]:
        """Return the runs that certify a rate, with as many requests as prove it together.

        Where runs of earlier searches prove it, these are those.
        """
        recalled = self.trial.recalled.get(step, [])
        if len(recalled) >= self._goal.runs:
            return [(self.trial.configuration, probe) for probe in recalled]
        together = self._margin * self._needed(step)
        return [self._run(step, together / self._goal.runs, SEED + number) for number in range(self._goal.runs)]

    def missing(self) -> str:
        """Return in words what the budget lacks for the runs; "": nothing."""
        wanted, evaluator = self.runs(self.step), self._evaluator
        # Runs of earlier searches take nothing, so that there is room for them in any case.
        if evaluator.share(wanted) <= max(evaluator.left() + evaluator.grace, 0.0) + ROUNDING:
            return ""
        requests = f"{wanted[0][1].requests:,} requests"
        runs = f"{self._goal.runs} runs of {requests}" if self._goal.runs > 1 else requests
        return f"{runs} at {rates.rate_of(self.step):.4g} requests/s take {evaluator.budget_for(wanted)}"

    def find_room(self, shares: Sequence[float]) -> bool:
        """Lower the rate until its runs take at most a share of the budget. Returns False if there is no such rate.

        shares: in order of preference. The least margin is for what has room at no rate otherwise.
        """
        for margin, share in itertools.product((MARGIN, LEAST_MARGIN), shares):
            self._margin = margin
            for step in range(self.step, self._lowest - 1, -1):
                if self._share(step) <= max(share, 0.0) + ROUNDING:  # a cell that passed the budget leaves less than 0
                    self.step = step
                    return True
        return False

    def leave_room_for_another(self, beyond: bool) -> str:
        """Lower the rate so that the budget has room for another one after it. Returns why, in words; "": it stays.

        beyond: a figure was beyond its limit. The words name a budget with room for the rate that was due and for
        another one after it.
        """
        due, self.step = self.step, self._step_with_another(beyond)
        if self.step == due:
            return ""
        both = self._evaluator.budget_for([*self.runs(due), *self.runs(due - STEPS)])
        rate, lower = (f"{rates.rate_of(step):.4g}" for step in (due, self.step))
        return (
            f"{self.trial.configuration.name} at {lower} instead of {rate} requests/s: a try at {rate} leaves no room "
            f"for another one, and both take {both}"
        )

    def measure(self, progress: Progress) -> Certificate | Refutation:
        """Measure the runs, and one more if they need it. Returns what they prove, or why they fail.

        The first run with a figure beyond a limit ends them, because no rate is certified that a seed contradicts. Only
        one more run may follow: who looks until it passes finds what is not there.
        """
        outcomes: list[Outcome] = []
        wanted = self.runs(self.step)
        while True:
            self._evaluator.together(wanted)
            for number, (_, probe) in enumerate(wanted):
                outcome, refutation = self._evaluate(probe, progress)
                outcomes.append(outcome)
                if refutation is not None:
                    for _, beside in wanted[number + 1 :] if self._evaluator.places > 1 else ():
                        self._evaluate(beside, progress)  # it was measured, and is shown
                    return refutation
            found = self.trial.certifying[self.step] = self._evaluator.pool(outcomes)
            refutation = _together(self._goal, self.step, outcomes, found)
            if refutation is None:
                return Certificate(self.trial, self.step, outcomes, found)
            if not (wanted := self._further(outcomes, refutation, 1 + max(probe.seed for _, probe in wanted))):
                return refutation

    def lower(self, within: bool) -> bool:
        """Lower the rate after one that failed. Returns False if there is no lower one.

        within: all figures were within their limits, and an interval was not.
        """
        if not within:
            self._fall *= 2
        fall, lowest = STEPS if within else self._fall, self._lowest
        self.step, self._margin = self._proven(self.step - 1, self.step - fall), MARGIN
        return self.step >= lowest

    @property
    def _lowest(self) -> int:
        """The lowest step to try instead: the same if the rate is given."""
        if self._goal.rate is not None:
            return self.step
        top = self._best if self.trial.top is None else self.trial.top  # earlier runs may be known at rates only
        return min(top - BOTTOM + 1, self.step)

    def _proven(self, most: int, least: int) -> int:
        """Return the highest step that runs of earlier searches prove, from `most` to `least`; else `least`."""
        goal, trial = self._goal, self.trial
        whole = (step for step, runs in trial.recalled.items() if len(runs) >= goal.runs and least <= step <= most)
        kept = (step for step in whole if judge(goal.limits, trial.certifying[step])[0] is Verdict.KEPT)
        return max(kept, default=least)

    def _share(self, step: int) -> float:
        return self._evaluator.share(self.runs(step))

    def _step_with_another(self, beyond: bool) -> int:
        """Return a step after which the budget has room for another: this one, or the highest of up to `LAST` lower.

        A step whose runs are there already stays.

        If there is none, it is the one that takes least of the budget, so that other work is the least likely to come:
        requests are worth more at a lower rate, but 10,000 of them take longer. Where all take the same, as in a budget
        of cells, it is the one lower by `LAST`, and until a figure was beyond its limit, `STEPS` below the first.
        """
        lowest = max(self.step - LAST, self._lowest)
        steps, left = range(self.step, lowest - 1, -1), self._evaluator.left() + ROUNDING
        for step in steps:
            if not self._share(step) or self._share(step) + self._share(step - STEPS) <= left:
                return step
        shares = [self._share(step) for step in steps]
        if min(shares) < max(shares):
            return steps[shares.index(min(shares))]
        return lowest if beyond else max(lowest, min(self.step, self._first - STEPS))

    def _run(self, step: int, requests: float, seed: int) -> Wanted:
        """Return a certifying run, of at least `CERTIFIED` requests in whole thousands."""
        whole = max(CERTIFIED, math.ceil(requests / 1000) * 1000)
        return self.trial.configuration, Probe(rates.rate_of(step), whole, seed)

    def _evaluate(self, probe: Probe, progress: Progress) -> tuple[Outcome, Refutation | None]:
        """Return the outcome of a certifying run, and why it fails by itself."""
        outcome = self._evaluator.evaluate(self.trial.configuration, probe)
        self._outcomes.append(outcome)
        refutation = _alone(self._goal, self.step, probe, outcome)
        if refutation is None:  # beyond a limit a backlog makes all requests alike: lower rates are not so
            self.trial.certifying[self.step] = outcome
        else:  # before the progress, which names the best
            self.trial.refute(refutation)
        verdict = judge(self._goal.limits, outcome)[0] if refutation is None else refutation.verdict
        progress(self.trial, probe, outcome, verdict)
        return outcome, refutation

    def _further(self, outcomes: list[Outcome], refutation: Refutation, seed: int) -> list[Wanted]:
        """Return one more run, with the requests that an interval of all runs still needs; none after such a one.

        An interval that is too wide asks for a lower rate. A rate that is given can't be lower, so as many requests as
        until then follow. Returns none, too, if the budget has no room for the run, or after a refutation by a figure
        of one run, which no further run changes.
        """
        limits, found, by = self._goal.limits, refutation.outcome, refutation.limit
        if len(outcomes) > self._goal.runs or by is None or by.percent is None:
            return []
        had = sum(round(outcome.metrics["samples"]) for outcome in outcomes)
        sizes: list[float] = [had] if self._goal.rate is not None else []
        if any(limit.percent is not None and limit.metric not in found.intervals for limit in limits):
            sizes = [margin * self._needed(self.step) - had for margin in (AGAIN, LEAST_MARGIN)]
        runs = ([self._run(self.step, requests, seed)] for requests in sizes if requests > 0)
        left = self._evaluator.left() + ROUNDING
        return next((further for further in runs if self._evaluator.share(further) <= left), [])

    def _needed(self, step: int) -> int:
        return requests_needed(self._goal.limits, self._evaluator, self.trial, step)


def _alone(goal: Goal, step: int, probe: Probe, outcome: Outcome) -> Refutation | None:
    """Return why a certifying run fails by itself; None: it does not."""
    verdict, limit = judge(goal.limits, outcome) if outcome.ok else (Verdict.BROKEN, None)
    if verdict in HELD:
        return None
    why = f"{limit.shown(outcome)}, {verdict}" if limit else f"{outcome.status}: {outcome.error}"
    return Refutation(step, outcome, verdict, limit, f"in the run with seed +{probe.seed}: {why}")


def _together(goal: Goal, step: int, outcomes: Sequence[Outcome], found: Outcome) -> Refutation | None:
    """Return why runs that were each within the limits do not prove a rate. found: what they show together.

    Percentiles of the latency are judged over the requests of all runs, and every other figure in each run.
    """
    percentiles = [limit for limit in goal.limits if limit.percent is not None]
    others = [limit for limit in goal.limits if limit.percent is None]
    where = ("in one of {} runs", "in {} runs together") if len(outcomes) > 1 else ("in the run", "in the run")
    one, every = (words.format(len(outcomes)) for words in where)
    for place, limits, outcome in (*((one, others, outcome) for outcome in outcomes), (every, percentiles, found)):
        verdict, limit = judge(limits, outcome)
        if limit is not None:
            why = f"{place}: {limit.shown(outcome)}, {verdict}{_unproven(verdict, limit, outcome)}"
            return Refutation(step, outcome, verdict, limit, why)
    return None


def _unproven(verdict: Verdict, limit: Limit, outcome: Outcome) -> str:
    """Return why a figure that is within a limit does not prove it; "" for any other figure."""
    if verdict is not Verdict.LIKELY:
        return ""
    if limit.metric in outcome.intervals:
        return f", but unproven: its interval is not within {limit}"
    return ", but unproven: too few independent requests for an interval"
