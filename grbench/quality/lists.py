"""Quality of answers that are lists of items: hit rate, NDCG and MRR, leave one out over the full catalogue.

A ranker's list has the candidates that it is given. Here these are the most popular items outside the user's past, so
with fewer of them the less popular ones are lost, as where a client sends its candidates in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grbench.execution.watch import Show, unseen
from grbench.gate.form import Form
from grbench.quality import metrics
from grbench.quality.metrics import CUTOFFS, Estimate, Floats, Ints
from grbench.quality.protocol import LeaveOneOut, without
from grengines.api import Ranker, Request

NEW = "_new"  # suffix of figures whose answers have lost the items of the user's past


@dataclass
class Lists:
    """The users whose last item is to be found, and the figures of answers to them.

    k: items of an answer; of a ranker's, its candidates. Figures beyond it, such as hr50 of ten items, are left out,
    except up to 10: what an answer of fewer items lacks is missed. stale_events: newest events that the histories lack.
    Figures of the answers without the user's past go up to the cutoff for which every user has enough items left.
    """

    split: LeaveOneOut
    users: Ints
    max_history: int
    k: int
    seed: int
    stale_events: int = 0

    @property
    def requests(self) -> list[Request]:
        return self.split.requests(self.users, self.max_history, stale_events=self.stale_events)

    def ask(self, engine: Any, task: str, max_batch: int, show: Show = unseen) -> list[Ints]:
        """Return the items that the engine finds for each user. task: generate or recommend."""
        requests, found = self.requests, list[Ints]()
        for begin in range(0, len(requests), max_batch):
            found += getattr(engine, task)(requests[begin : begin + max_batch]).items
            show(len(found), len(requests))
        return found

    def ask_ranker(self, engine: Ranker, tasks: int, max_batch: int, show: Show = unseen) -> list[Ints]:
        """Return each user's candidates, the best by the first of `tasks` first.

        Raises IncorrectError for an answer whose form is wrong: scores that are no numbers have no order.
        """
        candidates, form, found = self.candidates(), Form(tasks), list[Ints]()
        requests = [replace(r, candidates=its) for r, its in zip(self.requests, candidates, strict=True)]
        for begin in range(0, len(requests), max_batch):
            batch = requests[begin : begin + max_batch]
            form.require(batch, result := engine.rank(batch))
            ordered = [np.argsort(-scores[:, 0], kind="stable") for scores in result.scores]
            found += [r.candidates[order] for r, order in zip(batch, ordered, strict=True)]
            show(len(found), len(requests))
        return found

    def candidates(self) -> list[Ints]:
        """Return the `k` most popular items outside each user's past, the most popular first."""
        order = np.argsort(-self._counts, kind="stable")
        pasts = self.split.pasts(self.users)
        return [without([order[: self.k + len(past)]], [past])[0][: self.k] for past in pasts]

    def figures(self, answers: Sequence[Ints]) -> dict[str, Floats]:
        """Return hr10, ndcg10 and so on of each user, and the same with `NEW`."""
        found = self._figures(metrics.ranks_of(answers, self._targets))
        left = without(answers, self.split.pasts(self.users))
        most = shortest(answers, left, self.split.events.num_items)
        its = self._figures(metrics.ranks_of(left, self._targets), most)
        return found | {f"{name}{NEW}": figure for name, figure in its.items()}

    def estimates(self, answers: Sequence[Ints]) -> dict[str, Estimate]:
        """Return the mean of each figure over users, with its interval."""
        return metrics.means(self.figures(answers), self.seed)

    def losses(self, answers: Sequence[Ints], reference: Sequence[Ints]) -> dict[str, Estimate]:
        """Return the share of each figure that is lost against the reference, over the same users."""
        ours, theirs = self.figures(answers), self.figures(reference)
        both = {name: its for name, its in ours.items() if name in theirs and theirs[name].any()}
        return metrics.relative_losses(both, theirs, self.seed)

    def notes(self, answers: Sequence[Ints]) -> list[str]:
        """Return a line that names the figures without the past that are left out."""
        found = self.figures(answers)
        gone = [f"{name}{NEW}" for name in found if not name.endswith(NEW) and f"{name}{NEW}" not in found]
        if not gone:
            return []
        return [
            f"figures without a user's past are left out ({', '.join(gone)}): the {self.k} items of an answer leave "
            "some users too few; raise retrieval.k and retrieval.beam_width to have them"
        ]

    def baselines(self) -> dict[str, dict[str, Estimate]]:
        """Return the figures of the most popular items, by the events of the training split."""
        pasts = self.split.pasts(self.users)
        place = np.empty(self.split.events.num_items, np.int64)
        place[np.argsort(-self._counts, kind="stable")] = np.arange(len(place))
        ranks = place[self._targets]
        own = [np.unique(past) for past in pasts]
        fewer = [int((place[past] < rank).sum()) for past, rank in zip(own, ranks, strict=True)]
        gone = [target in past for past, target in zip(own, self._targets, strict=True)]
        left = np.where(gone, metrics.NOT_FOUND, ranks - np.array(fewer))
        figures = self._figures(ranks) | {f"{name}{NEW}": its for name, its in self._figures(left).items()}
        return {"popularity": metrics.means(figures, self.seed)}

    @property
    def _counts(self) -> Ints:
        """Events of each item in the training split."""
        events = self.split.events
        return np.bincount(events.items[self.split.training], minlength=events.num_items)

    @property
    def _targets(self) -> Ints:
        return self.split.targets(self.users)

    def _figures(self, ranks: Ints, most: int = metrics.NOT_FOUND) -> dict[str, Floats]:
        return metrics.list_figures(ranks, [c for c in CUTOFFS if c <= min(max(self.k, 10), most)])


def shortest(answers: Sequence[Ints], left: Sequence[Ints], items: int) -> int:
    """Return the highest cutoff at which a target that `left` does not have is surely missed, for every user.

    left: of the answers, without the past. Nothing lies beyond an answer that has all items of the catalogue.
    """
    return min((len(b) for a, b in zip(answers, left, strict=True) if len(a) < items), default=items)
