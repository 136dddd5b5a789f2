"""The gate of ranking quality: a precision may cost little AUC and normalised entropy on labelled requests.

A small error of the scores may still change the order that users see. The engine and the fp32 reference rank the last
requests of the trace, if the workload has labels for the model's tasks and the model has trained weights. Neither
figure of any task may be worse by more than 0.1%, unless `gate.allow_loss` has the precision.

A task has labels if one of the workload's actions has its name (MovieLens: rated, liked). A candidate is positive
if the user took that action on it in the same visit. The other candidates are drawn (grbench/workloads/trace.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grbench.config.schema import RunSpec
from grbench.gate.base import batches
from grbench.workloads.trace import Trace
from grengines.api import Float32Array, Ranker
from grengines.numerics import IncorrectError

MAX_LOSS = 1e-3  # share of the reference's AUC or normalised entropy
TOP_K = 10
Labels = npt.NDArray[np.bool_]


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"worst_loss": self.worst_loss, "max_loss": MAX_LOSS}

    def check(self, allow_loss: Sequence[str]) -> None:
        """Raise IncorrectError for a loss above MAX_LOSS, unless `allow_loss` has the precision."""
        if self.worst_loss > MAX_LOSS and self.precision not in allow_loss:
            task, figures = max(self.tasks.items(), key=lambda item: max(item[1].auc_loss, item[1].ne_loss))
            raise IncorrectError(
                f"{self.precision} loses {figures.auc_loss:.2%} of AUC and {figures.ne_loss:.2%} of normalised entropy "
                f"on task {task}, allowed is {MAX_LOSS:.1%}; use another precision or set "
                f"gate.allow_loss=[{self.precision}]"
            )


def labels_of(trace: Trace, index: int, tasks: Sequence[str]) -> Labels | None:
    """Return bool [candidates, tasks] of a request; None if the workload does not label every task."""
    if not set(tasks) <= set(trace.events.action_names):
        return None
    candidates, (start, stop) = trace.requests[index].candidates, trace.own[index]
    items, actions = trace.events.items[start:stop], trace.events.actions[start:stop]
    columns = []
    for task in tasks:
        done = (actions >> trace.events.action_names.index(task)) & 1 == 1
        columns.append(np.isin(candidates, items[done]))
    return np.stack(columns, axis=1)


def measure(spec: RunSpec, trace: Trace, engine: Ranker, precision: str, device: str) -> Quality | None:
    """Return the quality of the engine's scores and of the reference's.

    The result is None without a ground truth: for random weights, without labels, or with gate.quality_requests=0.
    """
    model = spec.ranking_model
    if model.weights is None or not spec.gate.quality_requests:
        return None
    indices = range(max(len(trace.requests) - spec.gate.quality_requests, 0), len(trace.requests))
    labels = [labels_of(trace, i, model.tasks) for i in indices]
    if any(one is None for one in labels):
        return None
    from grengines.models.hstu.reference import RankingReference

    requests = [trace.requests[i] for i in indices]
    expected = RankingReference(model, trace.catalogue, spec.seed, device).scores(requests)
    found: list[Float32Array] = []
    for batch in batches(requests, spec.scenario.max_batch):
        found += engine.rank(batch).scores
    return compare(found, expected, [one for one in labels if one is not None], model.tasks, precision)


def compare(
    found: Sequence[Float32Array],
    expected: Sequence[Float32Array],
    labels: Sequence[Labels],
    tasks: Sequence[str],
    precision: str,
) -> Quality:
    """Return the quality of `found` and `expected`: logits [candidates, tasks] of each request."""
    overlaps = [np.isin(best(f), best(e)).mean() for f, e in zip(found, expected, strict=True) if len(e)]
    all_found, all_expected, truth = np.concatenate(found), np.concatenate(expected), np.concatenate(labels)
    figures = {}
    for t, task in enumerate(tasks):
        positive = truth[:, t]
        auc, auc_reference = area_under_curve(all_found[:, t], positive), area_under_curve(all_expected[:, t], positive)
        ne, ne_reference = entropy(all_found[:, t], positive), entropy(all_expected[:, t], positive)
        figures[task] = TaskQuality(
            positives=float(positive.mean()),
            auc=auc,
            auc_reference=auc_reference,
            auc_loss=(auc_reference - auc) / auc_reference,
            ne=ne,
            ne_reference=ne_reference,
            ne_loss=(ne - ne_reference) / ne_reference,
        )
    return Quality(precision, len(found), len(truth), float(np.mean(overlaps)), figures)


def best(scores: Float32Array) -> npt.NDArray[np.int64]:
    """Return the indices of the TOP_K best candidates by the first task."""
    return np.argsort(-scores[:, 0], kind="stable")[:TOP_K]


def area_under_curve(logits: Float32Array, positive: npt.NDArray[np.bool_]) -> float:
    """Return the chance that a positive ranks above a negative, half for a tie; 0.5 if all labels are the same."""
    from scipy.stats import rankdata

    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return 0.5
    return float((rankdata(logits)[positive].sum() - p * (p + 1) / 2) / (p * n))


def entropy(logits: Float32Array, positive: npt.NDArray[np.bool_]) -> float:
    """Return the normalised entropy (He et al., ADKDD 2014): log loss over the entropy of the share of positives.

    It is 1 if all labels are the same.
    """
    share = float(positive.mean())
    if share in (0.0, 1.0):
        return 1.0
    z = logits.astype(np.float64)
    loss = np.logaddexp(0.0, np.where(positive, -z, z)).mean()
    return float(loss / -(share * np.log(share) + (1 - share) * np.log(1 - share)))
