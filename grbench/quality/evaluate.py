"""Quality of one configuration: its engine answers the protocol's requests, and so does the same model in fp32.

Engines that generate or recommend are asked for each user's last item (lists.py), engines that rank for the candidates
of the last requests of the trace (rankings.py). Nothing is timed; `grbench` itself measures speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grbench import workloads
from grbench.config.schema import ConfigError, RunSpec, check_truth, weights_of
from grbench.execution.retrieval import build_retrieval
from grbench.execution.watch import Show
from grbench.gate.quality import MAX_LOSS
from grbench.quality.exact import in_fp32, prepared
from grbench.quality.held_out import HeldOut, doubt_of_lists
from grbench.quality.lists import Lists
from grbench.quality.metrics import CUTOFFS, Estimate
from grbench.quality.protocol import LeaveOneOut
from grbench.quality.rankings import NONE_LATER, Rankings
from grbench.quality.references import References
from grbench.workloads.config import DrawnConfig
from grbench.workloads.events import Events
from grbench.workloads.item_map import check_items
from grengines.api import Catalogue

ANSWERS, EXACT = "answers", "answers of the same model in fp32"  # what a user watches
Report = Callable[[str], None]
Watching = Callable[[str], AbstractContextManager[Show]]


@dataclass
class Evaluation:
    """Figures of a configuration, with 95% intervals over users.

    losses: shares of the figures of the same model in fp32, by eager kernels of the native engine; empty if the
    configuration is that, or no such engine has the model.
    """

    users: int
    requests: int
    figures: dict[str, Estimate]
    baselines: dict[str, dict[str, Estimate]]
    losses: dict[str, Estimate]
    actual: dict[str, Any]
    seconds: float  # of the engine's answers, without what fills a KV cache before
    notes: list[str] = field(default_factory=list)

    def statement(self, name: str) -> str:
        """Return in words whether the loss of a figure is at most MAX_LOSS."""
        loss = self.losses[name]
        if loss.high <= MAX_LOSS:
            return f"{name}: no more than {MAX_LOSS:.1%} is lost against fp32, with 97.5% confidence"
        verb = f"at least {loss.low:.2%} is lost" if loss.low > MAX_LOSS else f"up to {loss.high:.2%} may be lost"
        return f"{name}: {verb} against fp32, with 97.5% confidence"

    def no_better(self, names: Sequence[str]) -> list[str]:
        """Return a line for each of these figures in which a baseline is at least as good as the model."""
        lines = []
        for name in names:
            sign = -1 if name.endswith("ne") else 1  # of an error the lower one is better
            rivals = {rival: its[name].value for rival, its in self.baselines.items() if name in its}
            if name in self.figures and rivals:
                best = max(rivals, key=lambda rival: sign * rivals[rival])
                own = self.figures[name].value
                if sign * rivals[best] >= sign * own:
                    lines.append(f"{name}: no better than {best} ({own:.3f} against {rivals[best]:.3f})")
        return lines


def evaluate(spec: RunSpec, users: int, references: References, report: Report, watching: Watching) -> Evaluation:
    """Evaluate one configuration. users: how many are asked about; 0: all.

    To rank, `gate.quality_requests` says how many requests are asked about. references: has the answers of the model
    in fp32, or keeps them. report: takes a line. watching: shows how far the answers are. Raises ConfigError and
    UnavailableError.
    """
    check_truth(spec)
    if spec.task == "recommend" and (why := doubt_of_lists(spec.ranking_model.weights)):
        raise ConfigError(why)
    if spec.task == "rank":
        if users:
            raise ConfigError(f"--users {users}: to rank, set gate.quality_requests=NUMBER instead, the last requests")
        return _of_scores(spec, references, report, watching)
    return _of_lists(spec, users, references, report, watching)


def _of_lists(spec: RunSpec, users: int, references: References, report: Report, watching: Watching) -> Evaluation:
    assert spec.retrieval is not None and not isinstance(spec.workload, DrawnConfig)
    events = workloads.load_events(spec.workload)
    _check_items(spec, events)
    split = LeaveOneOut(events)
    chosen = split.some_users(users, spec.seed)
    k = _items(spec, split)
    spec = replace(spec, retrieval=replace(spec.retrieval, k=k, beam_width=max(k, spec.retrieval.beam_width)))
    assert spec.retrieval is not None
    retrieval = build_retrieval(spec.retrieval, spec.workload, events, spec.seed, report)
    workload = spec.workload
    lists = Lists(split, chosen, workload.max_history, k, spec.seed, stale_events=workload.stale_events)
    catalogue = Catalogue(events.num_users, events.num_items, len(events.action_names))

    def ask(its: RunSpec, what: str) -> tuple[Any, dict[str, Any], float]:
        with watching(what) as show, prepared(its, catalogue, retrieval, lists.requests) as engine:
            begun = time.perf_counter()
            answers = lists.ask(engine, its.task, its.scenario.max_batch, show)
            return answers, engine.actual(), time.perf_counter() - begun

    report(f"{len(chosen):,} users are asked about, {k} items each")
    answers, actual, seconds = ask(spec, ANSWERS)
    losses = dict[str, Estimate]()
    if exact := in_fp32(spec, actual):
        asked = (spec, catalogue, retrieval, actual["device"], lists.requests)
        losses = lists.losses(answers, references.of(*asked, lambda: ask(exact, EXACT)[0]))
    figures, notes = lists.estimates(answers), lists.notes(answers)
    return Evaluation(len(chosen), len(chosen), figures, lists.baselines(), losses, actual, seconds, notes)


def _of_scores(spec: RunSpec, references: References, report: Report, watching: Watching) -> Evaluation:
    if not spec.gate.quality_requests:
        raise ConfigError("gate.quality_requests=0: no request would be ranked; allowed here is >= 1")
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    _check_items(spec, trace.events)
    model = spec.ranking_model
    if not set(model.tasks) <= set(trace.events.action_names):
        known = ",".join(trace.events.action_names)
        raise ConfigError(
            f"model.tasks=[{','.join(model.tasks)}]: the workload does not label them; "
            f"set 'model.tasks=[{known}]' or some of these"
        )
    assert model.weights is not None, "checked before"
    seen_until = HeldOut.of(model.weights).seen_until
    rankings = Rankings.of(trace, model.tasks, spec.gate.quality_requests, spec.seed, seen_until)
    if rankings is None:
        raise ConfigError(f"model.weights={model.weights}: {NONE_LATER}")

    def ask(its: RunSpec, what: str) -> tuple[Any, dict[str, Any], float]:
        with watching(what) as show, prepared(its, trace.catalogue, None, rankings.requests) as engine:
            ranker: Any = engine  # it has the task rank
            scores, seconds = rankings.ask(ranker, its.scenario.max_batch, its.cache.name != "none", show)
            return scores, engine.actual(), seconds

    report(f"the last {len(rankings.requests):,} requests are ranked")
    scores, actual, seconds = ask(spec, ANSWERS)
    losses = dict[str, Estimate]()
    if exact := in_fp32(spec, actual):
        asked = (spec, trace.catalogue, None, actual["device"], rankings.requests)
        losses = rankings.losses(scores, references.of(*asked, lambda: ask(exact, EXACT)[0]))
    users = len({r.user_id for r in rankings.requests})
    baselines = rankings.baselines()
    figures = rankings.estimates(scores)
    return Evaluation(users, len(scores), figures, baselines, losses, actual, seconds, rankings.notes)


def _items(spec: RunSpec, split: LeaveOneOut) -> int:
    """Return the items of an answer: enough for the cutoffs, also after the past is removed, where the search has them.

    A pipeline answers with the items that it is configured to retrieve and rank.
    """
    assert spec.retrieval is not None
    if spec.task == "recommend":
        return spec.retrieval.k
    if spec.retrieval.levels > 1:
        return spec.retrieval.beam_width
    longest = max(len(past) for past in split.pasts(split.users))
    return min(split.events.num_items, max(CUTOFFS) + longest)


def _check_items(spec: RunSpec, events: Events) -> None:
    """Raise DataError for weights of other items."""
    for weights in weights_of(spec).values():
        if weights is not None:
            check_items(events, Path(weights))
