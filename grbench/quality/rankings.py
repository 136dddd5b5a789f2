"""Quality of scores: AUC, AUC within requests and normalised entropy of the last requests of a trace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from grbench.execution.watch import Show, unseen
from grbench.gate.form import Form
from grbench.quality.labels import Labels, labels_of
from grbench.quality.metrics import Estimate, Scored
from grbench.workloads.trace import Trace
from grengines.api import Float32Array, Ranker, Request

PRIOR = 10.0  # candidates that an item's mean label begins with, at the mean of all items
EARLIER = 100_000  # latest requests that these means are of: each is made for it, which takes 0.3 ms and 0.8 KB

NONE_LATER = (
    "no request of the trace is later than the ranker's training; use the workload of the training, with a higher "
    "workload.max_requests, or 0"
)


@dataclass
class Rankings:
    """The requests that are ranked, and their labels bool [candidates, tasks]."""

    trace: Trace
    tasks: list[str]
    indices: range
    labels: list[Labels]
    seed: int
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, trace: Trace, tasks: Sequence[str], count: int, seed: int, seen_until: int | None = None
    ) -> Rankings | None:
        """Take the last `count` requests of the trace, only such as are later than `seen_until`.

        seen_until: time of the last request that the model has seen in its training; None: not known, which a note
        says. The result is None if no such request is left, or the workload does not label every task.
        """
        requests = trace.requests
        last = range(max(len(requests) - count, 0), len(requests))
        first = 0 if seen_until is None else int(np.searchsorted(requests.times, seen_until, side="right"))
        indices, notes = range(max(last.start, first), last.stop), []
        if seen_until is None:
            notes.append("the weights file does not say which requests were held out: the model may know those ranked")
        elif len(indices) < len(last):
            notes.append(
                f"{len(indices)} of the last {len(last)} requests are ranked: the others are not later than the "
                "training of the model; train with a higher held_out, or lower gate.quality_requests"
            )
        labels = [labels_of(trace, i, tasks) for i in indices]
        known = [one for one in labels if one is not None]
        return cls(trace, list(tasks), indices, known, seed, notes) if known and len(known) == len(labels) else None

    @property
    def requests(self) -> list[Request]:
        return [self.trace.requests[i] for i in self.indices]

    def ask(
        self, engine: Ranker, max_batch: int, returning: bool = False, show: Show = unseen
    ) -> tuple[list[Float32Array], float]:
        """Return the engine's logits [candidates, tasks] of each request, and the seconds that these answers took.

        returning: the engine has a KV cache, and each user comes first with the events of the previous visit, twice,
        since a policy may keep nothing of a first one. The scores are then of stored states, which a note counts.
        Raises IncorrectError for an answer whose form is wrong: scores that are no numbers would have no loss.
        """
        requests, form = self.requests, Form(len(self.tasks))
        found, stored, tokens, seconds = list[Float32Array](), 0, 0, 0.0
        for begin in range(0, len(requests), max_batch):
            batch = requests[begin : begin + max_batch]
            earlier = (
                [replace(r.with_events(slice(r.num_seen)), num_seen=0) for r in batch if r.num_seen]
                if returning
                else []
            )
            for _ in range(2 if earlier else 0):
                engine.rank(earlier)
            begun = time.perf_counter()
            result = engine.rank(batch)
            seconds += time.perf_counter() - begun
            form.require(batch, result)
            found += result.scores
            stored += sum(cached.tokens for cached in result.cached)
            tokens += sum(cached.of for cached in result.cached)
            show(len(found), len(requests))
        if returning:
            share = stored / max(tokens, 1)
            self.notes.append(f"{share:.0%} of the histories of ranked requests were read from the KV cache")
        return found, seconds

    def figures(self, logits: Sequence[Float32Array]) -> dict[str, float]:
        """Return auc, gauc, ne and accuracy of each task by name, such as rated/auc, without intervals."""
        return {
            f"{task}/{name}": figure
            for t, task in enumerate(self.tasks)
            for name, figure in self._scored([z[:, t] for z in logits], t).figures().items()
        }

    def estimates(self, logits: Sequence[Float32Array]) -> dict[str, Estimate]:
        """Return the same with 95% intervals over users."""
        return {
            f"{task}/{name}": estimate
            for t, task in enumerate(self.tasks)
            for name, estimate in self._scored([z[:, t] for z in logits], t).estimates(self.seed).items()
        }

    def losses(self, logits: Sequence[Float32Array], reference: Sequence[Float32Array]) -> dict[str, Estimate]:
        """Return the share of each figure that is lost against the reference, over the same resamples of the users."""
        found: dict[str, Estimate] = {}
        for t, task in enumerate(self.tasks):
            ours, theirs = (self._scored([z[:, t] for z in its], t) for its in (logits, reference))
            found |= {f"{task}/{name}": loss for name, loss in ours.losses(theirs, self.seed).items()}
        return found

    def baselines(self) -> dict[str, dict[str, Estimate]]:
        """Return the figures of answers without a model, from what happened before the first of the requests.

        popularity: events of the item. item_mean: share of positives among the item's labelled candidates. not_yet: 1
        for an item outside the user's past, which must tell nothing (AUC 0.5). Only item_mean is a probability.
        """
        candidates = [r.candidates for r in self.requests]
        counts = np.bincount(self._earlier_items(), minlength=self.trace.catalogue.num_items).astype(np.float32)
        found: dict[str, dict[str, Estimate]] = {
            "popularity": self._of([np.tile(counts[c][:, None], len(self.tasks)) for c in candidates]),
            "item_mean": {},
            "not_yet": self._of([np.tile(new[:, None], len(self.tasks)) for new in self._not_yet()]),
        }
        means = self._item_means()
        found["item_mean"] = self.estimates([means[c] for c in candidates])
        return found

    def _of(self, scores: Sequence[Float32Array]) -> dict[str, Estimate]:
        """Return the figures of scores that are no probabilities."""
        of_order = ("/auc", "/gauc")
        return {name: value for name, value in self.estimates(scores).items() if name.endswith(of_order)}

    def _scored(self, scores: Sequence[Float32Array], task: int) -> Scored:
        return Scored.of(scores, [one[:, task] for one in self.labels], [r.user_id for r in self.requests])

    def _earlier_items(self) -> np.ndarray:
        events = self.trace.events
        return events.items[events.timestamps < min(r.timestamp for r in self.requests)]

    def _item_means(self) -> Float32Array:
        """Return each item's logit of being positive, float32 [items, tasks], from the EARLIER requests before."""
        shape = (self.trace.catalogue.num_items, len(self.tasks))
        shown, positive = np.zeros(shape), np.zeros(shape)
        for i in range(self.indices.start)[-EARLIER:]:
            labels = labels_of(self.trace, i, self.tasks)
            assert labels is not None
            candidates = self.trace.requests[i].candidates  # distinct
            shown[candidates] += 1
            positive[candidates] += labels
        overall = np.clip(positive.sum(0) / np.maximum(shown.sum(0), 1), 1e-3, 1 - 1e-3)
        share = (positive + PRIOR * overall) / (shown + PRIOR)
        logits: Float32Array = np.log(share / (1 - share)).astype(np.float32)
        return logits

    def _not_yet(self) -> list[Float32Array]:
        """Return 1 for each candidate that is not in the user's past, else 0."""
        events, firsts = self.trace.events, np.searchsorted(self.trace.events.users, [r.user_id for r in self.requests])
        return [
            (~np.isin(r.candidates, events.items[first : self.trace.own[i][0]])).astype(np.float32)
            for i, r, first in zip(self.indices, self.requests, firsts, strict=True)
        ]
