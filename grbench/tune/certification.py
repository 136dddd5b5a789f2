"""Certification: the best is measured again with other seeds and more requests, then the next best until one passes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from grbench.tune import rates
from grbench.tune.knowledge import BOTTOM, Knowledge
from grbench.tune.limits import Verdict, judge
from grbench.tune.outcome import Evaluator, Outcome, Probe, Wanted
from grbench.tune.trial import HELD, Goal, Progress, Refutation, Trial, quiet
from grbench.tune.worth import POOLED, requests_needed

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


@dataclass(frozen=True)
class Try:
    """A rate to certify. margin: times the requests that are needed."""

    step: int
    margin: int = MARGIN


@dataclass
class Candidate:
    """A trial to certify, with its best rate and its score before any run failed.

    fall: steps by which the last figure beyond a limit lowered it; half of STEPS before the first.
    """

    trial: Trial
    low: int
    score: float
    attempt: Try | None = None
    fall: int = STEPS // 2


@dataclass
class Certificate:
    """A configuration that kept the limits in all runs with other seeds, of at least CERTIFIED requests.

    together: what the runs show as one. The figure of each is within the limits, and the interval of all proves it.
    """

    trial: Trial
    step: int
    outcomes: list[Outcome]
    together: Outcome
    failures: list[str]  # better ones that did not, or that the budget had no room for, alone or with another try

    @property
    def requests(self) -> int:
        """The requests of the shortest run."""
        return min(round(outcome.metrics["samples"]) for outcome in self.outcomes)


def reserve(knowledge: Knowledge, evaluator: Evaluator) -> float:
    """Return the share of the budget that certifies the best so far, after one that fails if that is `SHARE` at most.

    So two tries have three runs, because a figure beyond its limit in the first ends one. Room for four did not certify
    more often (docs/TUNING.md). The second may become the best again, so that there is room for it, too, if it is near.
    Returns 0 if it would leave too little of the budget for the search: the answer then says what is missing.
    """
    best = [(trial, trial.low) for trial in knowledge.ranking()[:2] if trial.low is not None]
    goal = knowledge.goal
    if not best or not goal.runs or knowledge.concluded:
        return 0.0
    plans = [plan(goal, evaluator, trial) for trial, step in best if step > best[0][1] - NEAR]
    if not (runs := [planned for planned in plans if planned]):
        return 0.0
    once, failed = (max(evaluator.share(run[:count]) for run in runs) for count in (goal.runs, 1))
    return failed + once if failed + once <= min(SHARE, evaluator.left() + ROUNDING) else once


def plan(goal: Goal, evaluator: Evaluator, trial: Trial) -> list[Wanted]:
    """Return the runs that will certify the best rate of a trial, or a lower one of which they are `SHARE` at most.

    Returns none if even those of the lowest rates and the least margin would be more than `MOST`.
    """
    if trial.low is None:
        return []
    planned = _with_room(goal, evaluator, trial, _first_step(goal, trial, trial.low), [SHARE, MOST])
    return [] if planned is None else certifying(goal, evaluator, trial, planned)


def certify(knowledge: Knowledge, evaluator: Evaluator, progress: Progress = quiet) -> Certificate | None:
    """Measure the best again with other seeds and as many requests as prove it; then the next best until one passes.

    Where the budget has no room for that, the highest lower rate for which it has is next. Returns None if nothing
    keeps the limits, or if the budget has room for none; `knowledge.uncertified` then says why.
    """
    goal = knowledge.goal
    failures = [f"{trial.configuration.name} at {trial.refuted}" for trial in knowledge.trials if trial.refuted]
    missing = ""  # what the budget lacks, of the first that it has no room for
    beyond = False  # a figure was beyond its limit
    ranked = ((trial, trial.low) for trial in knowledge.ranking())
    candidates = [Candidate(trial, low, knowledge.score(trial)) for trial, low in ranked if low is not None]
    for candidate in candidates:
        candidate.attempt = Try(_first_step(goal, candidate.trial, candidate.low))
    while open_ := [(candidate, attempt) for candidate in candidates if (attempt := candidate.attempt) is not None]:
        candidate, attempt = max(open_, key=lambda pair: _score_at(goal, pair[0], pair[1].step))
        trial = candidate.trial
        if without := _missing(goal, evaluator, trial, attempt):
            missing = missing or without
            candidate.attempt = _with_room(goal, evaluator, trial, attempt.step, [evaluator.left()])
            continue
        if (lowered := _with_another(goal, evaluator, candidate, attempt, beyond)) != attempt:
            failures.append(_instead(goal, evaluator, trial, attempt, lowered))
        outcomes, found, refutation = _runs(goal, evaluator, progress, trial, lowered)
        step = lowered.step
        if refutation is None:
            knowledge.concluded = True
            trial.enter(rates.rate_of(step), found, (Verdict.KEPT, None))
            return Certificate(trial, step, outcomes, found, [*failures, *([missing] if missing else [])])
        trial.refute(refutation)
        failures.append(f"{trial.configuration.name} at {refutation}")
        static = [limit for limit in goal.limits if limit.static]
        if found.ok and judge(static, found)[0] is not Verdict.KEPT:  # no other rate proves it either
            candidate.attempt = None
            continue
        fall = STEPS
        if not found.ok or judge(goal.limits, found)[0] is not Verdict.LIKELY:
            beyond = True
            candidate.fall = fall = 2 * candidate.fall
        lower = _proven(goal, trial, step - 1, step - fall)
        candidate.attempt = Try(lower) if lower >= _lowest(goal, trial, step) else None
    knowledge.uncertified = "; ".join([*([missing] if missing else []), *failures[-1:]])
    return None


def recall(goal: Goal, evaluator: Evaluator, trial: Trial, runs: Sequence[tuple[Probe, Outcome]]) -> None:
    """Take the certifying runs of earlier searches into a trial: what they prove, and the lowest rate that failed.

    The limits of this search judge them. A rate with a run beyond a limit is refuted, and a later run does not clear
    it. Runs that are too short to prove a rate refute nothing: one more follows them.
    """
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
        if len(outcomes) < max(goal.runs, 1):
            continue
        if (refutation := _together(goal, step, outcomes, found)) is None:
            trial.enter(rates.rate_of(step), found, (Verdict.KEPT, None))
        elif refutation.verdict is not Verdict.LIKELY or len(outcomes) > goal.runs:
            trial.refute(refutation)


def _proven(goal: Goal, trial: Trial, most: int, least: int) -> int:
    """Return the highest step that runs of earlier searches prove, of those from `most` to `least`; else `least`."""
    whole = (step for step, runs in trial.recalled.items() if len(runs) >= goal.runs and least <= step <= most)
    kept = (step for step in whole if judge(goal.limits, trial.certifying[step])[0] is Verdict.KEPT)
    return max(kept, default=least)


def _first_step(goal: Goal, trial: Trial, low: int) -> int:
    """Return the step to certify first: the best one, or a lower one if its interval is not within."""
    if goal.rate is not None or trial.verdicts[low][0] is Verdict.KEPT:
        return low
    return _proven(goal, trial, low, low - STEPS)


def _lowest(goal: Goal, trial: Trial, step: int) -> int:
    """Return the lowest step to certify instead of one: itself if the rate is given or none was measured offline."""
    return step if goal.rate is not None or trial.top is None else min(trial.top - BOTTOM + 1, step)


def _with_room(goal: Goal, evaluator: Evaluator, trial: Trial, step: int, shares: Sequence[float]) -> Try | None:
    """Return the try at the highest step, this one or a lower one, whose runs take at most a share of the budget.

    shares: in order of preference. The least margin is for what has room at no rate otherwise.
    """
    lower = range(step, _lowest(goal, trial, step) - 1, -1)
    for margin, share in itertools.product((MARGIN, LEAST_MARGIN), shares):
        for tried in (Try(s, margin) for s in lower):
            if evaluator.share(certifying(goal, evaluator, trial, tried)) <= max(share, 0.0) + ROUNDING:
                return tried  # after a cell that passed the budget, less than none is left
    return None


def _with_another(goal: Goal, evaluator: Evaluator, candidate: Candidate, attempt: Try, beyond: bool) -> Try:
    """Return a try after which the budget has room for another one: this one, or the highest of up to `LAST` lower.

    One whose runs are there already stays as it is.

    If there is none, it is the one that takes least of the budget, so that other work is the least likely to come:
    requests are worth more at a lower rate, but 10,000 of them take longer. Where all take the same, as in a budget of
    cells, it is the one lower by `LAST`, and until a figure was beyond its limit, `STEPS` below the first.
    """
    trial = candidate.trial
    lowest = max(attempt.step - LAST, _lowest(goal, trial, attempt.step))
    steps, left = range(attempt.step, lowest - 1, -1), evaluator.left() + ROUNDING

    def at(step: int) -> Try:
        return dataclasses.replace(attempt, step=step)

    def share(step: int) -> float:
        return evaluator.share(certifying(goal, evaluator, trial, at(step)))

    for step in steps:
        if not share(step) or share(step) + share(step - STEPS) <= left:
            return at(step)
    shares = [share(step) for step in steps]
    if min(shares) < max(shares):
        return at(steps[shares.index(min(shares))])
    first = _first_step(goal, trial, candidate.low)
    return at(lowest if beyond else max(lowest, min(attempt.step, first - STEPS)))


def _instead(goal: Goal, evaluator: Evaluator, trial: Trial, attempt: Try, lowered: Try) -> str:
    """Return in words why a try is lowered, and a budget with room for the one that was due and another after it."""
    tries = (attempt, dataclasses.replace(attempt, step=attempt.step - STEPS))
    both = [run for due in tries for run in certifying(goal, evaluator, trial, due)]
    rate, lower = (f"{rates.rate_of(due.step):.4g}" for due in (attempt, lowered))
    return (
        f"{trial.configuration.name} at {lower} instead of {rate} requests/s: a try at {rate} leaves no room for "
        f"another one, and both take {evaluator.budget_for(both)}"
    )


def _score_at(goal: Goal, candidate: Candidate, step: int) -> float:
    """Return the score of a candidate at a step to certify; larger is better.

    A lower rate multiplies the cost of a request by the ratio of the rates at most: what a machine takes a second does
    not grow.
    """
    if goal.objective == "cost":
        return candidate.score * rates.RATIO ** (candidate.low - step)
    return candidate.score if goal.rate is not None else float(step)


def _missing(goal: Goal, evaluator: Evaluator, trial: Trial, attempt: Try) -> str:
    """Return in words what the budget lacks for a try; "": nothing."""
    wanted = certifying(goal, evaluator, trial, attempt)
    if evaluator.share(wanted) <= max(evaluator.left(), 0.0) + evaluator.grace + ROUNDING:
        return ""
    requests = f"{wanted[0][1].requests:,} requests"
    runs = f"{goal.runs} runs of {requests}" if goal.runs > 1 else requests
    return f"{runs} at {rates.rate_of(attempt.step):.4g} requests/s take {evaluator.budget_for(wanted)}"


def certifying(goal: Goal, evaluator: Evaluator, trial: Trial, attempt: Try) -> list[Wanted]:
    """Return the runs that certify a rate, with as many requests as prove it together.

    Where runs of earlier searches prove it, these are those.
    """
    recalled = trial.recalled.get(attempt.step, [])
    if recalled and len(recalled) >= goal.runs:
        return [(trial.configuration, probe) for probe in recalled]
    together = attempt.margin * requests_needed(goal.limits, evaluator, trial, attempt.step)
    requests = max(CERTIFIED, math.ceil(together / goal.runs / 1000) * 1000)
    return [(trial.configuration, Probe(rates.rate_of(attempt.step), requests, SEED + run)) for run in range(goal.runs)]


def _runs(
    goal: Goal, evaluator: Evaluator, progress: Progress, trial: Trial, attempt: Try
) -> tuple[list[Outcome], Outcome, Refutation | None]:
    """Return the outcomes of the certifying runs, what they show together, and why they fail (None: they do not).

    The first run with a figure beyond a limit ends them, because no rate is certified that a seed contradicts. One more
    run may follow, and only one: who looks until it passes finds what is not there.
    """

    def run(probe: Probe) -> tuple[Outcome, Refutation | None]:
        outcome = evaluator.evaluate(trial.configuration, probe)
        verdict = judge(goal.limits, outcome)[0] if outcome.ok else Verdict.BROKEN
        progress(trial, probe, outcome, verdict)
        if verdict in HELD:  # beyond a limit a backlog makes all requests alike: lower rates are not so
            trial.certifying[attempt.step] = outcome
        return outcome, _alone(goal, attempt.step, probe, outcome)

    outcomes: list[Outcome] = []
    wanted: list[Wanted] = certifying(goal, evaluator, trial, attempt)
    while True:
        evaluator.together(wanted)
        for number, (_, probe) in enumerate(wanted):
            outcome, refutation = run(probe)
            outcomes.append(outcome)
            if refutation is not None:
                for _, beside in wanted[number + 1 :] if evaluator.places > 1 else ():
                    run(beside)  # it was measured, and is shown
                return outcomes, outcome, refutation
        found = trial.certifying[attempt.step] = evaluator.pool(outcomes)
        if (refutation := _together(goal, attempt.step, outcomes, found)) is None:
            return outcomes, found, None
        margins = (AGAIN, LEAST_MARGIN)
        seed = 1 + max(probe.seed for _, probe in wanted)
        further = (_further(goal, evaluator, trial, attempt.step, outcomes, found, margin, seed) for margin in margins)
        wanted = next((runs for runs in further if evaluator.share(runs) <= evaluator.left() + ROUNDING), [])
        if not wanted:
            return outcomes, found, refutation


def _alone(goal: Goal, step: int, probe: Probe, outcome: Outcome) -> Refutation | None:
    """Return why a certifying run fails by itself; None: it does not."""
    verdict, limit = judge(goal.limits, outcome) if outcome.ok else (Verdict.BROKEN, None)
    if verdict in HELD:
        return None
    why = f"{limit.shown(outcome)} is {verdict}" if limit else f"{outcome.status}: {outcome.error}"
    return Refutation(step, outcome, verdict, limit, f"in the run with seed +{probe.seed}: {why}")


def _together(goal: Goal, step: int, outcomes: Sequence[Outcome], found: Outcome) -> Refutation | None:
    """Return why runs that were each within the limits do not prove a rate. found: what they show together."""
    alone = [limit for limit in goal.limits if not limit.metric.startswith(POOLED)]
    verdicts = [judge(goal.limits, found), *(judge(alone, outcome) for outcome in outcomes)]
    for verdict, limit in verdicts:
        if limit is not None:
            why = f"in {len(outcomes)} runs together: {limit.shown(found)} is {verdict}"
            return Refutation(step, found, verdict, limit, why)
    return None


def _further(
    goal: Goal,
    evaluator: Evaluator,
    trial: Trial,
    step: int,
    outcomes: list[Outcome],
    found: Outcome,
    margin: float,
    seed: int,
) -> list[Wanted]:
    """Return one more run, with the requests that an interval of all runs still needs; none after such a one.

    margin: times the requests that all runs need. An interval that is too wide asks for a lower rate. A rate that is
    given can't be lower, so as many requests as until then follow.
    """
    had = sum(round(outcome.metrics["samples"]) for outcome in outcomes)
    lacks = any(limit.metric.startswith(POOLED) and limit.metric not in found.intervals for limit in goal.limits)
    if lacks:
        more = margin * requests_needed(goal.limits, evaluator, trial, step) - had
    else:
        more = had if goal.rate is not None else 0
    if more <= 0 or len(outcomes) > goal.runs:
        return []
    requests = max(CERTIFIED, math.ceil(more / 1000) * 1000)
    return [(trial.configuration, Probe(rates.rate_of(step), requests, seed))]
