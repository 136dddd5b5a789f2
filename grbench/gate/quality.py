"""The gate of quality: a precision may cost little of what trained weights are worth.

A small error of the scores may still change the order that users see. The engine and the fp32 reference rank the last
requests of the trace that were held out, if the workload labels the model's tasks and the weights are trained. Neither
AUC nor normalised entropy of any task may be worse by more than 0.1%. Of lists of items, HR@10 must be within the 95%
interval of the reference's, and the interval of its loss over the same users, which is far narrower, must reach down to
0.1%. `gate.allow_loss` names precisions that may lose more.

grbench/quality/ has the labels, the metrics and their intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from grbench.config.schema import RunSpec
from grbench.execution.watch import Show, unseen
from grbench.gate.rank import coarsest
from grbench.quality.exact import in_fp32, is_exact, prepared
from grbench.quality.held_out import HeldOut, doubt_of_lists
from grbench.quality.lists import Lists
from grbench.quality.metrics import Estimate, Floats, Ints, estimate_of
from grbench.quality.protocol import LeaveOneOut
from grbench.quality.rankings import NONE_LATER, Rankings
from grbench.quality.references import References
from grbench.workloads.config import DrawnConfig
from grbench.workloads.trace import Trace
from grengines.api import Engine, Float32Array, Ranker, Retrieval
from grengines.numerics import IncorrectError

MAX_LOSS = 1e-3  # share of the reference's AUC, normalised entropy or HR@10
TOP_K = 10
AT_ONCE = 64  # requests that the reference of a ranker gets, after which its progress is shown
# What a user watches, behind "measuring quality".
ANSWERS, EXACT, POPULAR_ITEMS = "", " of the same model in fp32", " of the order of popular items"
INTERVALS = ": 95% intervals"
POPULAR = "_popular"  # suffix of figures of a ranker's list, whose candidates come by popularity
# Figures whose resamples are kept. auc and ne are means of the tasks.
COMPARED = ("hr10", "ndcg10", "auc", "ne", f"hr10{POPULAR}", f"ndcg10{POPULAR}")

Watching = Callable[[str], Show]  # takes what is measured beside the engine's quality; the result shows the progress


def unwatched(what: str) -> Show:
    """Show no progress."""
    return unseen


@dataclass
class TaskQuality:
    """Figures of one task, by the engine's scores and by the reference's. Losses are shares; below 0 is a gain."""

    positives: float  # share of the candidates
    auc: float
    auc_reference: float
    auc_loss: float
    ne: float  # normalised entropy: log loss over that of always predicting the share of positives
    ne_reference: float
    ne_loss: float
    auc_loss_interval: list[float]  # 95%, over users: of pairs of the engine's and the reference's figures
    ne_loss_interval: list[float]


@dataclass
class Quality:
    """Figures of all tasks, by the engine and by the reference."""

    precision: str
    requests: int
    candidates: int
    top_k_overlap: float  # share of the TOP_K best by the first task that the reference has among its TOP_K
    tasks: dict[str, TaskQuality]

    @property
    def worst_loss(self) -> float:
        return max(max(t.auc_loss, t.ne_loss) for t in self.tasks.values())

    @property
    def sure(self) -> bool:
        """True if no task loses more than MAX_LOSS, with 97.5% confidence for each figure."""
        return all(max(t.auc_loss_interval[1], t.ne_loss_interval[1]) <= MAX_LOSS for t in self.tasks.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"worst_loss": self.worst_loss, "max_loss": MAX_LOSS, "sure": self.sure}

    def check(self, allow_loss: Sequence[str]) -> None:
        """Raise IncorrectError for a loss above MAX_LOSS, unless `allow_loss` has the precision."""
        if self.worst_loss > MAX_LOSS and self.precision not in allow_loss:
            task, figures = max(self.tasks.items(), key=lambda item: max(item[1].auc_loss, item[1].ne_loss))
            raise IncorrectError(
                f"{self.precision} loses {figures.auc_loss:.2%} of AUC and {figures.ne_loss:.2%} of normalised entropy "
                f"on task {task}, allowed is {MAX_LOSS:.1%}; {_advice(self.precision)}"
            )


@dataclass
class ListQuality:
    """HR@10 of an engine's lists, and of the reference's, with 95% intervals over users."""

    precision: str
    users: int
    hr10: float
    hr10_reference: float
    hr10_interval: list[float]  # of the reference's
    hr10_loss: float  # share; below 0 is a gain
    hr10_loss_interval: list[float]  # of pairs of the engine's and the reference's answers

    @classmethod
    def of(cls, found: Estimate, expected: Estimate, loss: Estimate | None, users: int, precision: str) -> ListQuality:
        """Compare figures over these users. loss: None where the reference has no hits, so that none can be lost."""
        low, high = expected.interval
        # Resamples of hits alone, or of none, are all alike. By the rule of three, 3 of n users may still differ.
        spread = 3 / users if low == high else 0.0
        within, lost = [max(low - spread, 0.0), min(high + spread, 1.0)], loss or Estimate(0.0, 0.0, 0.0)
        return cls(precision, users, found.value, expected.value, within, lost.value, lost.interval)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, allow_loss: Sequence[str]) -> None:
        """Raise IncorrectError for an HR@10 outside the interval or a sure loss, unless `allow_loss` has the precision.

        One above the interval is wrong as well: where the retriever orders items better than the ranker, a ranker whose
        scores are all equal leaves its order.
        """
        if self.precision in allow_loss:
            return
        low, high = self.hr10_interval
        if not low <= self.hr10 <= high:
            raise IncorrectError(
                f"{self.precision} has an HR@10 of {self.hr10:.4f} over {self.users} users, allowed is {low:.4f} to "
                f"{high:.4f}, the 95% interval of fp32's {self.hr10_reference:.4f}; {_advice(self.precision)}"
            )
        least, most = self.hr10_loss_interval
        if least > MAX_LOSS:
            raise IncorrectError(
                f"{self.precision} loses {self.hr10_loss:.1%} of fp32's HR@10 over the same {self.users} users, its "
                f"95% interval is {least:.1%} to {most:.1%}, allowed is one that begins at {MAX_LOSS:.1%} or less; "
                f"{_advice(self.precision)}"
            )


def _advice(precision: str) -> str:
    if precision == "fp32":  # which gate.allow_loss can't name
        return "use other kernels or another engine"
    return f"use another precision or set 'gate.allow_loss=[{precision}]'"


def measure(
    spec: RunSpec,
    trace: Trace,
    engine: Ranker,
    precision: str,
    device: str,
    references: References,
    watching: Watching = unwatched,
) -> tuple[Quality | None, QualityFigures] | None:
    """Return the quality of the engine's scores beside the reference's, and the figures of the record.

    precision: the coarsest of the engine. references: has the reference's answers, or keeps them. watching: shows how
    far the answers are. The result is None without a ground truth: for random weights, without labels, or with
    gate.quality_requests=0. If no request is later than the training, there is only a note that says so.
    """
    model = spec.ranking_model
    if model.weights is None or not spec.gate.quality_requests:
        return None
    rankings = rankings_of(spec, trace)
    if rankings is None:
        labelled = set(model.tasks) <= set(trace.events.action_names)
        return (None, QualityFigures({}, {}, [f"no quality: {NONE_LATER}"])) if labelled else None
    from grengines.models.hstu.reference import RankingReference

    requests = rankings.requests

    def exact() -> list[Float32Array]:
        show, scores = watching(EXACT), list[Float32Array]()
        reference = RankingReference(model, trace.catalogue, spec.seed, device)
        for begin in range(0, len(requests), AT_ONCE):
            scores += reference.scores(requests[begin : begin + AT_ONCE])
            show(len(scores), len(requests))
        return scores

    expected = references.of(spec, trace.catalogue, None, device, requests, exact)
    found, _ = rankings.ask(engine, spec.scenario.max_batch, spec.cache.name != "none", watching(ANSWERS))
    popular = _of_popular(spec, trace, engine, watching)
    watching(INTERVALS)  # of many users they take seconds, in which nothing is asked
    losses = rankings.losses(found, expected)
    beside = {f"loss/{name}": loss for name, loss in losses.items()} | popular
    figures = QualityFigures.of(rankings.estimates(found) | beside, rankings.baselines(), rankings.notes)
    return compare(found, expected, rankings, precision, losses), figures


def _of_popular(spec: RunSpec, trace: Trace, engine: Ranker, watching: Watching) -> dict[str, Estimate]:
    """Return HR@10 and NDCG@10 of the engine's order of the most popular `workload.num_candidates` items.

    They say what is lost where the last of a client's candidates are left out. The result is {} for synthetic events,
    and for a ranker that may know the items to be found.
    """
    if isinstance(spec.workload, DrawnConfig) or doubt_of_lists(spec.ranking_model.weights):
        return {}
    lists = lists_of(spec, trace)
    tasks, show = len(spec.ranking_model.tasks), watching(POPULAR_ITEMS)
    figures = lists.estimates(lists.ask_ranker(engine, tasks, spec.scenario.max_batch, show))
    return {f"{name}{POPULAR}": figures[name] for name in ("hr10", "ndcg10")}


def rankings_of(spec: RunSpec, trace: Trace) -> Rankings | None:
    """Return the labelled requests of the trace that a trained ranker has not seen; None if there is none."""
    model = spec.ranking_model
    assert model.weights is not None, "checked before"
    seen_until = HeldOut.of(model.weights).seen_until
    return Rankings.of(trace, model.tasks, spec.gate.quality_requests, spec.seed, seen_until)


def compare(
    found: Sequence[Float32Array],
    expected: Sequence[Float32Array],
    rankings: Rankings,
    precision: str,
    losses: Mapping[str, Estimate] | None = None,
) -> Quality:
    """Return the quality of `found` and `expected`: logits [candidates, tasks] of each request.

    losses: `rankings.losses` of the two, where they are known.
    """
    overlaps = [np.isin(best(f), best(e)).mean() for f, e in zip(found, expected, strict=True) if len(e)]
    truth = np.concatenate(rankings.labels)
    ours, theirs = rankings.figures(found), rankings.figures(expected)
    losses = losses or rankings.losses(found, expected)
    figures = {}
    for t, task in enumerate(rankings.tasks):
        auc, ne = losses[f"{task}/auc"], losses[f"{task}/ne"]
        figures[task] = TaskQuality(
            positives=float(truth[:, t].mean()),
            auc=ours[f"{task}/auc"],
            auc_reference=theirs[f"{task}/auc"],
            auc_loss=auc.value,
            ne=ours[f"{task}/ne"],
            ne_reference=theirs[f"{task}/ne"],
            ne_loss=ne.value,
            auc_loss_interval=auc.interval,
            ne_loss_interval=ne.interval,
        )
    return Quality(precision, len(found), len(truth), float(np.mean(overlaps)), figures)


def best(scores: Float32Array) -> npt.NDArray[np.int64]:
    """Return the indices of the TOP_K best candidates by the first task."""
    return np.argsort(-scores[:, 0], kind="stable")[:TOP_K]


@dataclass
class QualityFigures:
    """The figures of a record: `quality/...` in its metrics, and their intervals.

    resamples: of those in COMPARED, by name. Two records of one seed and the same users have the same resamples, so
    those of the difference are the differences.
    """

    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    notes: list[str]
    resamples: dict[str, Floats] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        figures: Mapping[str, Estimate],
        baselines: Mapping[str, Mapping[str, Estimate]],
        notes: Sequence[str] = (),
    ) -> QualityFigures:
        named = {f"quality/{name}": estimate for name, estimate in figures.items()}
        for baseline, its in baselines.items():
            named |= {f"quality/{baseline}/{name}": estimate for name, estimate in its.items()}
        for name in ("auc", "ne"):
            tasks = [e for key, e in figures.items() if key.endswith(f"/{name}") and not key.startswith("loss/")]
            if tasks:
                mean = float(np.mean([e.value for e in tasks]))
                named[f"quality/{name}"] = estimate_of(mean, np.mean([e.drawn for e in tasks], axis=0))
        return cls(
            {name: e.value for name, e in named.items()},
            {name: e.interval for name, e in named.items()},
            list(notes),
            {name: named[f"quality/{name}"].drawn for name in COMPARED if f"quality/{name}" in named},
        )


def measure_lists(
    spec: RunSpec,
    trace: Trace,
    engine: Engine,
    retrieval: Retrieval | None,
    actual: dict[str, Any],
    references: References,
    watching: Watching = unwatched,
) -> tuple[ListQuality | None, QualityFigures] | None:
    """Return HR@10 beside the reference's, and the figures of the record, leave one out over some users.

    The lists are those of the run: of `retrieval.k` items, with the user's past and without it. The reference is the
    same model in fp32; a decoder has none, and the reference itself is not compared. actual: what ran. references: has
    the reference's answers, or keeps them. The result is None without a ground truth: for random weights or synthetic
    events. `grbench evaluate` asks about all users, for longer lists.
    """
    trained = spec.retrieval is not None and spec.retrieval.weights is not None
    if spec.task == "recommend":
        trained = trained and spec.ranking_model.weights is not None
    if not trained or not spec.gate.quality_requests or isinstance(spec.workload, DrawnConfig):
        return None
    if spec.task == "recommend" and (why := doubt_of_lists(spec.ranking_model.weights)):
        return None, QualityFigures({}, {}, [f"no quality: {why}"])
    lists = lists_of(spec, trace)
    answers = lists.ask(engine, spec.task, spec.scenario.max_batch, watching(ANSWERS))
    found, beside, losses = lists.estimates(answers), None, dict[str, Estimate]()
    if is_exact(actual):
        losses = lists.losses(answers, answers)
    elif exact := in_fp32(spec, actual):

        def asked() -> list[Ints]:
            with prepared(exact, trace.catalogue, retrieval, lists.requests) as reference:
                return lists.ask(reference, exact.task, exact.scenario.max_batch, watching(EXACT))

        expected = references.of(spec, trace.catalogue, retrieval, actual["device"], lists.requests, asked)
        theirs = lists.estimates(expected)
        losses = lists.losses(answers, expected)
        lost = losses.get("hr10")
        beside = ListQuality.of(found["hr10"], theirs["hr10"], lost, len(lists.users), coarsest(actual))
    found |= {f"loss/{name}": loss for name, loss in losses.items()}
    return beside, QualityFigures.of(found, lists.baselines(), lists.notes(answers))


def lists_of(spec: RunSpec, trace: Trace) -> Lists:
    """Return the users whose last item is to be found: among the candidates of a ranker, else among all items."""
    if spec.task == "rank":
        k = spec.workload.num_candidates
    else:
        assert spec.retrieval is not None
        k = spec.retrieval.k
    split = LeaveOneOut(trace.events)
    users = split.some_users(spec.gate.quality_requests, spec.seed)
    longest = int(trace.requests.history_lengths.max())  # the engine was prepared for them
    return Lists(
        split,
        users,
        min(longest, spec.workload.max_history),
        k,
        spec.seed,
        stale_events=spec.workload.stale_events,
    )
