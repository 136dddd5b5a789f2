"""Certification: the best is measured again with other seeds and more requests, then the next best until one passes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from grbench.tune import rates
from grbench.tune.knowledge import BOTTOM, Knowledge
from grbench.tune.limits import Limit, Verdict, judge
from grbench.tune.outcome import Configuration, Evaluator, Outcome, Probe, Wanted
from grbench.tune.trial import LONGER, Goal, Progress, Trial, quiet

CERTIFIED = 10_000  # requests of a run that certifies
SHARE = 0.6  # of the budget, at most, if there is room for a run that fails, too
MOST = 0.75  # of the budget that is reserved, at most
NEAR = rates.steps(1.2)  # below the best, within which the second may become the best again
STEPS = 2  # by which a rate that fails is lowered first, then twice as many each time
LAST = 8  # by which the last try that the budget has room for is lowered further, once a figure was beyond its limit
SEED = 101
ROUNDING = 1e-9  # of shares of the budget


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


def reserve(knowledge: Knowledge, evaluator: Evaluator) -> float:
    """Return the share of the budget that certifies the best so far, after a run that fails if that is little.

    The second may become the best again, so that there is room for it, too, if it is near.
    Returns 0 if it would leave too little of the budget for the search: the answer then says what is missing.
    """
    best = [(trial.configuration, trial.low) for trial in knowledge.ranking()[:2] if trial.low is not None]
    if not best or not knowledge.goal.runs or knowledge.concluded:
        return 0.0
    near = [(configuration, step) for configuration, step in best if step > best[0][1] - NEAR]
    runs = [certifying(knowledge.goal, configuration, rates.rate_of(step)) for configuration, step in near]
    once, failed = (max(evaluator.share(its[:count]) for its in runs) for count in (len(runs[0]), 1))
    if failed + once <= min(SHARE, evaluator.left() + ROUNDING):
        return failed + once
    return once if once <= MOST else 0.0


def certify(knowledge: Knowledge, evaluator: Evaluator, progress: Progress = quiet) -> Certificate | None:
    """Measure the best again with other seeds and 10,000 requests; then the next best until one passes.

    One that the budget has no room for is passed over. Returns None if nothing keeps the limits, or if the budget has
    room for none; `knowledge.uncertified` then says why.
    """
    goal = knowledge.goal
    failures: list[str] = []
    missing = ""  # what the budget lacks, of the first that it has no room for
    falls: dict[int, float] = {}  # steps by which each trial was lowered last
    last = STEPS  # by which the last try is lowered further
    steps = {id(trial): _first_step(goal, trial) for trial in knowledge.ranking()}
    while open_ := [(trial, step) for trial in knowledge.ranking() if (step := steps[id(trial)]) is not None]:
        trial, step = max(open_, key=lambda pair: _score_at(knowledge, *pair))
        step = _lower_if_last(goal, evaluator, trial.configuration, step, last)
        if without := _missing(goal, evaluator, trial.configuration, step):
            missing, steps[id(trial)] = missing or without, None
            continue
        outcomes, why = _runs(goal, evaluator, progress, trial, step)
        if not why:
            knowledge.concluded = True
            return Certificate(trial, step, outcomes, failures)
        trial.refuted = f"{rates.rate_of(step):.4g} requests/s {why}"
        failures.append(f"{trial.configuration.name} at {trial.refuted}")
        if not outcomes[-1].ok or judge(goal.limits, outcomes[-1])[0] is not Verdict.LIKELY:
            last = LAST
        falls[id(trial)] = 2 * falls.get(id(trial), STEPS / 2)
        lower = step - round(falls[id(trial)])
        goes_on = goal.rate is None and trial.top is not None and lower > trial.top - BOTTOM
        steps[id(trial)] = lower if goes_on else None
    knowledge.uncertified = "; ".join([*failures[-1:], *([missing] if missing else [])])
    return None


def _first_step(goal: Goal, trial: Trial) -> int | None:
    """Return the step to certify first: the best one, or a lower one if its interval is not within."""
    step = trial.low
    if step is None or goal.rate is not None or trial.verdicts[step][0] is Verdict.KEPT:
        return step
    return step - STEPS


def _lower_if_last(goal: Goal, evaluator: Evaluator, configuration: Configuration, step: int, most: int) -> int:
    """Return a lower step, if the budget has no room for another try after one at this step fails; else the step.

    It is lower by `most` steps, or by fewer if the budget lacks room: 10,000 requests take longer at a lower rate.
    """
    first = certifying(goal, configuration, rates.rate_of(step))[:1]
    following = certifying(goal, configuration, rates.rate_of(step - STEPS))
    if goal.rate is not None or evaluator.share(first) + evaluator.share(following) <= evaluator.left() + ROUNDING:
        return step
    return next((s for s in range(step - most, step) if not _missing(goal, evaluator, configuration, s)), step)


def _score_at(knowledge: Knowledge, trial: Trial, step: int) -> float:
    """Return the score of a trial at a step to certify; larger is better.

    A lower rate multiplies the cost of a request by the ratio of the rates at most: what a machine takes a second does
    not grow.
    """
    if knowledge.goal.objective == "cost" and trial.low is not None:
        return knowledge.score(trial) * rates.RATIO ** (trial.low - step)
    return knowledge.score(trial) if knowledge.goal.rate is not None else float(step)


def _missing(goal: Goal, evaluator: Evaluator, configuration: Configuration, step: int) -> str:
    """Return in words what the budget lacks to certify the rate of a step; "": nothing."""
    rate = rates.rate_of(step)
    wanted = certifying(goal, configuration, rate)
    if evaluator.share(wanted) <= max(evaluator.left(), 0.0) + evaluator.grace + ROUNDING:
        return ""
    runs = f"{goal.runs} runs of {CERTIFIED:,} requests" if goal.runs > 1 else f"{CERTIFIED:,} requests"
    return f"{runs} at {rate:.4g} requests/s take {evaluator.budget_for(wanted)}"


def certifying(goal: Goal, configuration: Configuration, rate: float) -> list[Wanted]:
    """Return the runs that certify a rate."""
    return [(configuration, Probe(rate, CERTIFIED, SEED + run)) for run in range(goal.runs)]


def _runs(goal: Goal, evaluator: Evaluator, progress: Progress, trial: Trial, step: int) -> tuple[list[Outcome], str]:
    """Return the outcomes of the certifying runs, and why they fail ("": they do not)."""

    def run(probe: Probe) -> tuple[Outcome, Verdict, Limit | None]:
        outcome = evaluator.evaluate(trial.configuration, probe)
        verdict, limit = judge(goal.limits, outcome) if outcome.ok else (Verdict.BROKEN, None)
        progress(trial, probe, outcome, verdict)
        return outcome, verdict, limit

    outcomes: list[Outcome] = []
    wanted = certifying(goal, trial.configuration, rates.rate_of(step))
    evaluator.together(wanted)
    for number, (_, probe) in enumerate(wanted):
        outcome, verdict, limit = run(probe)
        longer = dataclasses.replace(probe, requests=LONGER * probe.requests)
        # A figure within the limit needs more requests; one beyond it a lower rate, if there may be one.
        longer_may_do = verdict is Verdict.LIKELY or (verdict is Verdict.UNSURE and goal.rate is not None)
        rest = (goal.runs - len(outcomes)) * [(trial.configuration, longer)]
        if longer_may_do and sum(evaluator.share([one]) for one in rest) <= evaluator.left():
            outcome, verdict, limit = run(longer)
        outcomes.append(outcome)
        if verdict is not Verdict.KEPT:
            why = f"{limit.shown(outcome)} is {verdict}" if limit else f"{outcome.status}: {outcome.error}"
            for _, beside in wanted[number + 1 :] if evaluator.places > 1 else ():
                run(beside)  # it was measured, and is shown
            return outcomes, f"in the run with seed +{probe.seed}: {why}"
    return outcomes, ""
