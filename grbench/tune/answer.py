"""Words for what a search found: the sentence, the limit that binds, what each step costs, the nearest to a limit."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from grbench.execution import energy
from grbench.execution.measure import FEWER_RETURNS
from grbench.tune import rates
from grbench.tune.certification import Certificate
from grbench.tune.knowledge import ENDED_EARLY, Knowledge
from grbench.tune.limits import Limit, Verdict, judge
from grbench.tune.outcome import Configuration, Outcome
from grbench.tune.probes import FEWEST
from grbench.tune.trial import Goal, Trial, carried, cost
from grbench.tune.worth import worst

QUALITY = {"auc": "AUC", "ne": "normalised entropy", "hr10": "HR@10"}  # figures that an answer names
LINES = 3  # of what was left out
FIRST_ANSWER = 8  # cells that a search takes for a first answer, about


@dataclass(frozen=True)
class Answer:
    """The winner and the outcome that speaks for it.

    certificate: None if it was not certified at all. quality: what is known of that of trained weights, in words.
    own: the outcome is of a run with the search's own seed.
    """

    knowledge: Knowledge
    trial: Trial
    step: int
    outcome: Outcome
    certificate: Certificate | None
    quality: str = ""
    own: bool = True

    @property
    def rate(self) -> float:
        """The requests a second that it may claim: no more than were offered."""
        return carried(self.step, self.outcome)

    @property
    def certified(self) -> bool:
        """True if it kept the limits in every run with other seeds."""
        return self.certificate is not None

    @property
    def failed(self) -> bool:
        """True if certifying runs broke a limit at its rate or at a lower one: it is no rate to offer."""
        refuted = self.trial.refuted
        return not self.certified and self.own and refuted is not None and self.step >= refuted.step


def answer(knowledge: Knowledge, certificate: Certificate | None) -> Answer | None:
    """Return the answer of a search; None if nothing keeps the limits.

    Where every rate that a probe has kept failed its certification, it is the best that is likely kept nevertheless. If
    there is none, the configuration is an answer, and the words offer no rate.
    """
    if certificate is not None:
        return Answer(knowledge, certificate.trial, certificate.step, certificate.together, certificate)
    best = knowledge.incumbent
    if best is not None and best.low is not None:
        trial, step, outcome = best, best.low, best.probes[best.low]
    elif (unproven := knowledge.unproven) is not None:
        trial, step, outcome = unproven
    else:
        return None
    return Answer(knowledge, trial, step, outcome, None, own=outcome is not trial.certifying.get(step))


def decisive(goal: Goal, outcome: Outcome) -> str:
    """Return the figure of a probe that decides about the limits, with the verdict. If all are kept it is the first."""
    verdict, limit = judge(goal.limits, outcome)
    limit = limit or next(iter(goal.limits), Limit("latency_ms/p99", math.inf))
    return f"{limit.shown(outcome)}: {verdict}"


def leader(knowledge: Knowledge) -> str:
    """Return the best so far in a few words, with the rate at which it failed its certification."""
    best = knowledge.incumbent
    failed = knowledge.unproven
    trial = best or (failed and failed[0])
    if trial is None:
        return "none yet"
    name = trial.configuration.name
    words = "none yet" if best is None or best.low is None else f"{name} at {rates.rate_of(best.low):.4g}/s"
    if trial.refuted is None:
        return words
    whose = "it" if best is not None else name
    return f"{words} ({whose} failed its certification at {rates.rate_of(trial.refuted.step):.4g}/s)"


def sentence(found: Answer) -> str:
    """Return the answer in words."""
    name = found.trial.configuration.name
    words = f"Take {name}: {_had(found)}"
    if found.certificate is None and found.trial.refuted:
        words = f"No rate of {name} is proven, since it failed at {found.trial.refuted}. {unproven(found)}"
    words += f" ({proof(found)})"
    return ". ".join([words, *([found.quality] if found.quality else []), *_others(found)]) + "."


def unproven(found: Answer) -> str:
    """Return the rate that may be kept although none was certified, in words; never one above a rate that failed."""
    if found.failed:
        return "No lower rate is known to keep the limits"
    return f"The search's own run had {_had(found)}" if found.own else f"Likely kept, but unproven: {_had(found)}"


def _had(found: Answer) -> str:
    """Return the rate of an answer with its figures."""
    had = f"{found.rate:.4g} requests/s at {_latency(found.outcome)}"
    joules = found.outcome.metrics.get(energy.METRIC)
    if found.knowledge.goal.objective == "cost":
        return f"{had}, {_cost(found.step, found.outcome)} for 1000 requests"
    return had if joules is None else f"{had} with {joules:.3g} J each"


def quality(outcome: Outcome, against: str) -> str:
    """Return the quality of an outcome in words: what the figures are, and what is lost of them.

    against: what the losses are compared with. Of several tasks the one that loses most is named, unless only their
    mean has an interval.
    """
    metrics, ends = outcome.metrics, outcome.intervals
    had = [
        f"{word} is {metrics[key]:.4g}{_interval(ends.get(key), 1, '')}"
        for name, word in QUALITY.items()
        if (key := f"quality/{name}") in metrics
    ]
    lost = sorted((words for name in QUALITY if (words := _loss(metrics, ends, name))), key=_is_nothing)
    losses = [f"against {against} it loses {' and '.join(lost)}"] if lost else []
    said = "; ".join(([f"its {', its '.join(had)}"] if had else []) + losses)
    return said[:1].upper() + said[1:]


def _is_nothing(loss: str) -> bool:
    return loss.startswith("nothing")


def _loss(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]], name: str) -> str:
    """Return what is lost of a figure of quality in words: nothing, unless its interval proves it."""
    task_of = "()" if name == "hr10" else "(?:([^/]+)/)?"
    found = {match[1]: key for key in metrics if (match := re.fullmatch(f"quality/{task_of}{name}_loss", key))}
    if not found:
        return ""
    task = max(found, key=lambda its: (found[its] in intervals, metrics[found[its]], bool(its)))
    value, ends = metrics[found[task]], intervals.get(found[task])
    what = QUALITY[name] + (f" of {task}" if task else "")
    share = f"{_percent(value)}{_interval(ends, 100, '%')}"
    if (ends[0] if ends else value) > 0:
        return f"{share} of the {what}"
    return f"nothing of the {what}{f' beyond the interval ({share})' if ends else ''}"


def _interval(ends: Sequence[float] | None, scale: float, unit: str) -> str:
    return f" [{', '.join(f'{round(scale * end, 3) + 0.0:.4g}{unit}' for end in ends)}]" if ends else ""


def _percent(share: float) -> str:
    return f"{round(100 * share, 3) + 0.0:.4g}%"


def proof(found: Answer) -> str:
    """Return how well the answer is proved."""
    certificate = found.certificate
    if certificate is None:
        why = found.knowledge.uncertified
        one = ", one run with the search's own seed" if found.own and not found.failed else ""
        return f"not certified{one}{f': {why}' if why else ''}"
    count = len(certificate.outcomes)
    runs = f"{count} run{'s' * (count > 1)} with other seeds of at least {certificate.requests:,} requests"
    if count > 1:
        runs += (
            f"; p99 is of all their latencies, and the worst has {_latency(worst(certificate.outcomes), ends=False)}"
        )
    valid = [outcome.metrics.get("loadgen_valid") for outcome in certificate.outcomes]
    loadgen = "" if None in valid else f"; LoadGen: {'VALID' if all(valid) else 'INVALID in one of them'}"
    return f"certified: {runs}{loadgen}"


def _latency(outcome: Outcome, ends: bool = True) -> str:
    for percent in (99.0, 90.0, 50.0):
        name = f"latency_ms/p{percent:g}"
        if name in outcome.metrics:
            interval = outcome.intervals.get(name) if ends else None
            shown = f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else ""
            return f"p{percent:g} {outcome.metrics[name]:.3g}{shown} ms"
    return "unknown latency"


def _cost(step: int, outcome: Outcome) -> str:
    return f"{cost(step, outcome):.3g} {'J' if energy.METRIC in outcome.metrics else 's of the machine'}"


def _others(found: Answer) -> Iterator[str]:
    """Yield the next best engine, and what would give more if a limit on quality or memory were wider."""
    knowledge, winner = found.knowledge, found.trial
    keys = [
        key for key in dict.fromkeys(k for k, _ in winner.configuration.values) if key.partition("@")[0] == "engine"
    ]
    for key in keys:
        others = [t for t in knowledge.trials if t.configuration.get(key) not in (None, winner.configuration.get(key))]
        ranked = [t for t in knowledge.ranking() if t in others]
        if ranked:
            yield f"The next best {_word(key)}, {ranked[0].configuration.get(key)}, gives {_reach(ranked[0])}"
        elif others:
            nearest = max(others, key=lambda t: t.estimate or -1e9)
            yield f"Of {_word(key)} {nearest.configuration.get(key)} the best is {_reach(nearest)}"
    barred = [t for t in knowledge.trials if t.failed.startswith("breaks") and t.top is not None and t.top > found.step]
    if barred:
        best = max(barred, key=lambda t: t.top or 0)
        most = f"{rates.rate_of(best.top or 0):.4g}"
        yield f"{best.configuration.name} could give up to {most} requests/s but {best.failed}"


def _reach(trial: Trial) -> str:
    """Return what is known of the rate of a trial."""
    if trial.failed:
        return f"none ({trial.failed})"
    if trial.low is not None and trial.best is not None:
        if trial.high is not None and trial.high - trial.low <= 1:
            return f"{rates.rate_of(trial.low):.4g}"
        return f"at least {rates.rate_of(trial.low):.4g}"
    if trial.high is not None and (trial.refuted or trial.high in trial.verdicts):
        return f"less than {rates.rate_of(trial.high):.4g}"
    if trial.top is not None:
        tried = "" if trial.verdicts else "; no load was tried under these limits"
        return f"no more than {rates.rate_of(trial.top):.4g} (its offline rate{tried})"
    return "unknown"


def binding(found: Answer) -> str:
    """Return which limit keeps the winner from more, or that its throughput does."""
    if found.knowledge.goal.rate is not None:
        return "The rate is fixed, so no limit binds it."
    high, binds = found.trial.high, found.trial.binding
    if high is not None and binds is not None:
        verdict, limit, outcome = binds
        if limit is None:
            return f"At {rates.rate_of(high):.4g} requests/s the probe ended early, {outcome.status}: {outcome.error}."
        how = "not proven" if verdict is Verdict.LIKELY else verdict
        words = f"{limit} binds: at {rates.rate_of(high):.4g} requests/s {limit.shown(outcome)}"
        return f"{words}, {how} there."
    if found.trial.top is not None and (found.trial.low or 0) >= found.trial.top:
        return f"No limit binds: offline it answers {rates.rate_of(found.trial.top):.4g} requests/s, and not more."
    return "Which limit binds was not measured: no higher rate was probed before the budget ended."


def neighbours(found: Answer) -> list[tuple[str, str, str, str]]:
    """Return each measured configuration that differs from the winner in one option: option, values, rate, change."""
    rows = []
    for trial in found.knowledge.trials:
        keys = found.trial.configuration.differs(trial.configuration)
        if len(keys) != 1 or not (trial.offline or trial.failed or trial.probes):
            continue
        [key] = keys
        of, to = found.trial.configuration.get(key), trial.configuration.get(key)
        rows.append((key, f"{of} -> {to}", _reach(trial), _against(found, trial)))
    return sorted(rows)


def _against(found: Answer, trial: Trial) -> str:
    """Return by how much a trial's rate differs from the winner's; of a fixed rate the p99. A bound is no change."""
    if trial.failed or found.failed:
        return "-"
    mine, p99 = rates.rate_of(found.step), "latency_ms/p99"
    if found.knowledge.goal.rate is not None:
        known = trial.best is not None and p99 in trial.best.metrics and p99 in found.outcome.metrics
        return f"p99 {trial.best.metrics[p99] / found.outcome.metrics[p99] - 1:+.0%}" if known and trial.best else "-"
    if trial.low is not None:
        bracketed = trial.high is not None and trial.high - trial.low <= 1
        return f"{'' if bracketed else 'at least '}{rates.rate_of(trial.low) / mine - 1:+.0%}"
    bound = min((s for s in (trial.high, trial.top) if s is not None), default=None)
    if bound is None or bound >= found.step:
        return "not known: this rate is a bound, and no rate that keeps the limits was found below it"
    return f"slower, by {1 - rates.rate_of(bound) / mine:.0%} or more"


def unmeasured_steps(
    found: Answer, axes: Mapping[str, Sequence[str]], open_: Sequence[Configuration]
) -> list[Configuration]:
    """Return the configurations one step from the winner that were not measured."""
    wanted = []
    for key, values in axes.items():
        of = found.trial.configuration.get(key)
        if of is None:
            continue
        order = sorted(values, key=_number)
        place = order.index(of)
        wanted += [(key, order[i]) for i in (place - 1, place + 1) if 0 <= i < len(order)]
    near = []
    for key, value in wanted:
        for other in open_:
            if found.trial.configuration.differs(other) == [key] and other.get(key) == value:
                near.append(other)
    return near


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return 0.0, text


def returns(knowledge: Knowledge) -> str:
    """Return how many requests of the probes, and of the whole trace, are by returning users; "" without a cache."""
    share, whole = "cache/returning_share", "workload/returning_share"
    outcomes = [its for trial in knowledge.trials for its in (trial.offline, *trial.probes.values()) if its is not None]
    found = [its.metrics for its in outcomes if share in its.metrics and whole in its.metrics]
    if not found:
        return ""
    ends = dict.fromkeys(f"{end(metrics[share] for metrics in found):.0%}" for end in (min, max))
    words = f"Of the requests of a probe with a cache {' to '.join(ends)} are by users who had come before in it, "
    words += f"and of the whole trace {found[0][whole]:.0%}."
    few = min(metrics[share] for metrics in found) < found[0][whole] - FEWER_RETURNS
    return words + " A probe with fewer has fewer hits than a long run, and undervalues caches." * few


def busy(knowledge: Knowledge) -> str:
    """Return how many measurements other processes disturbed, and by how many cores; "" if none."""
    measured = {id(its): its for its in knowledge.outcomes if its.ok}.values()  # an earlier run may be taken twice
    disturbed = [its.busy for its in measured if its.busy]
    if not disturbed:
        return ""
    return (
        f"The machine was busy: other processes used up to {max(disturbed):.2g} cores at a time beside "
        f"{len(disturbed)} of {len(measured)} probes and certifying runs. A rate may have failed for it; "
        "rerun=true on an idle machine measures again."
    )


def remarks(knowledge: Knowledge) -> list[str]:
    """Return lines that follow the answer: what the search left out, and that the machine was busy."""
    lines = [f"Not measured: {len(some)} of {reason}." for reason, some in knowledge.left_out.items()]
    more = [f"Not measured: {len(lines) - LINES} other kinds, which the page names."] if len(lines) > LINES + 1 else []
    return [*(lines[:LINES] if more else lines), *more, *filter(None, [busy(knowledge)])]


def nobody(knowledge: Knowledge) -> str:
    """Return why there is no answer: which limit, by how much, and the nearest feasible point."""
    nearest: tuple[float, Trial, int, Limit, Outcome] | None = None
    for trial, (step, (_, limit)) in itertools.chain.from_iterable(
        ((trial, item) for item in trial.verdicts.items()) for trial in knowledge.trials
    ):
        outcome = trial.probes[step]
        excess = limit.excess(outcome) if limit and outcome.ok else None
        if limit is not None and excess is not None and (nearest is None or excess < nearest[0]):
            nearest = (excess, trial, step, limit, outcome)
    if nearest is not None:
        excess, trial, step, limit, outcome = nearest
        how = (
            f"{excess:.0%} beyond it"
            if excess > 0
            else "within it, but its interval is not: a larger budget would tell"
        )
        return (
            f"{limit}: no configuration that was measured keeps it; nearest is {trial.configuration.name} at "
            f"{rates.rate_of(step):.4g} requests/s with {limit.shown(outcome)}, {how}"
        )
    for trial in knowledge.trials:
        early = {step: probe for step, probe in trial.probes.items() if probe.status in ENDED_EARLY}
        if early:
            lowest = min(early)
            return (
                f"no configuration that was measured keeps the limits; {trial.configuration.name} at "
                f"{rates.rate_of(lowest):.4g} requests/s ended early, {early[lowest].status}: {early[lowest].error}"
            )
    offline = [trial for trial in knowledge.trials if trial.top is not None]
    fastest = max(offline, key=lambda trial: trial.top or 0, default=None)
    if fastest and fastest.offline and (unreached := fastest.cannot_reach(knowledge.goal.limits)):
        most = f"{fastest.offline.metrics['throughput_rps']:.4g} requests/s offline, and no rate gives more"
        name = fastest.configuration.name
        return f"{unreached}: no configuration that was measured reaches it; nearest is {name}: {most}"
    for trial in knowledge.trials:
        if trial.failed:
            return f"no configuration that was measured keeps the limits; {trial.configuration.name}: {trial.failed}"
    return _too_small(knowledge)


def _too_small(knowledge: Knowledge) -> str:
    """Return that no probe at a rate had room, what the offline probes took, and a budget that has it."""
    none = "nothing was measured at a rate"
    offline = [trial.offline for trial in knowledge.trials if trial.offline and not trial.offline.kept]
    if not offline:
        return f"{none}: the budget is too small; set budget=5min or budget=20cells"
    took = sum(outcome.seconds for outcome in offline)
    fastest = max(outcome.metrics["throughput_rps"] for outcome in offline)
    cell_s = took / len(offline) + max(knowledge.goal.probe_s, FEWEST / fastest)
    minutes = max(math.ceil(FIRST_ANSWER * cell_s / 60), 5)
    return (
        f"{none}: {len(offline)} offline probe{'s' * (len(offline) > 1)} took {took:.0f} s, and a first answer takes "
        f"about {FIRST_ANSWER} cells; budget={minutes}min or budget=20cells would do, or "
        "fewer configurations: space=typed searches only what is typed"
    )


def correlations(knowledge: Knowledge) -> list[tuple[str, int, float]]:
    """Return the rank correlation of each lower fidelity with what probes at rates found: name, pairs, coefficient.

    pairs: those that the fidelity puts in an order. The time of batches is that of the engine's whole stack, without
    the queue; an engine that batches by itself has none.

    It is Goodman and Kruskal's gamma over the pairs of configurations whose order probes at rates decide: one kept the
    limits where the other did not. 1: all pairs are in the same order; -1: all in the opposite one.
    """
    known = [t for t in knowledge.trials if t.offline is not None and t.predicted is not None]
    pairs = [(one, other) for one, other in itertools.permutations(known, 2) if _above(one, other)]
    fidelities: dict[str, Callable[[Trial], float | None]] = {
        "time of batches": _batch_rate,
        "offline throughput": lambda t: t.offline.metrics["throughput_rps"] if t.offline else 0.0,
        "simulated queue": lambda t: float(t.predicted or 0),
    }
    if knowledge.operations:
        fidelities = {"sizing": lambda t: -knowledge.operations[t.configuration], **fidelities}
    found = []
    for name, of in fidelities.items() if pairs else ():
        values = [
            (mine, its) for one, other in pairs if (mine := of(one)) is not None and (its := of(other)) is not None
        ]
        signs = [1 if mine > its else -1 for mine, its in values if mine != its]
        found.append((name, len(signs), sum(signs) / len(signs) if signs else 0.0))
    return found


def _batch_rate(trial: Trial) -> float | None:
    """Return the requests a second of the engine's time, from the times of its offline batches; None without them."""
    batches = trial.offline.batches if trial.offline else ()
    return sum(size for size, _ in batches) / sum(seconds for _, seconds in batches) if batches else None


def _above(one: Trial, other: Trial) -> bool:
    """Return True if one kept the limits at a rate at which the other did not, or at a higher one."""
    return one.low is not None and other.high in other.verdicts and one.low >= (other.high or 0)


def _word(key: str) -> str:
    return "engine" if key == "engine" else key.rpartition(".")[2] + " engine"


def figures(trial: Trial) -> dict[str, float]:
    """Return the best figures of a trial, by which strategies are compared: rate, p99, quality loss, memory, energy.

    None of one that keeps the limits at no rate.
    """
    if trial.low is None or trial.best is None:
        return {}
    metrics = trial.best.metrics
    found = {"requests/s": trial.carried}
    found["p99 ms"] = metrics.get("latency_ms/p99")
    losses = [value for name, value in metrics.items() if re.fullmatch(r"quality/[^/]+_loss", name)]
    found["quality loss %"] = 100 * max(losses) if losses else None
    memory = metrics.get("gpu_memory_mib/reserved", metrics.get("host_memory_mib/peak"))
    found["memory MiB"] = memory
    found["J/1000 requests"] = cost(trial.low, trial.best) if energy.METRIC in metrics else None
    return {name: value for name, value in found.items() if value is not None}
