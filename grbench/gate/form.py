"""The form of answers: their number, shape, type and range. No reference is needed to check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grengines.api import Float32Array, Int64Array, Request
from grengines.numerics import IncorrectError


@dataclass(frozen=True)
class Form:
    """The form of a task's answers."""

    tasks: int | None  # scores of an item; None: one number
    k: int | None = None  # most items of an answer; None: the candidates are scored
    num_items: int = 0  # of the catalogue

    def problem(self, requests: Sequence[Request], result: Any) -> str | None:
        """Return what is wrong with the form of a batch's answers; None: nothing."""
        scores: Sequence[Float32Array] = result.scores
        if len(scores) != len(requests):
            return f"{len(scores)} answers to {len(requests)} requests"
        if self.k is None:
            counts = [len(r.candidates) for r in requests]
        else:
            if problem := self._items_problem(requests, result.items):
                return problem
            counts = [len(found) for found in result.items]
        width = () if self.tasks is None else (self.tasks,)
        if _right(scores, counts, width):
            return None
        for request, count, one in zip(requests, counts, scores, strict=True):
            if one.shape != (count, *width) or one.dtype != np.float32:
                expected = f"{[count, *width]} float32"
                return f"request {request.request_id}: scores are {list(one.shape)} {one.dtype}, expected {expected}"
            if not np.isfinite(one).all():
                return f"request {request.request_id}: a score is not a finite number"
        raise AssertionError("scores that are wrong together are wrong one by one")

    def require(self, requests: Sequence[Request], result: Any) -> None:
        """Raise IncorrectError if the form of a batch's answers is wrong."""
        if problem := self.problem(requests, result):
            raise IncorrectError(f"in a batch of {len(requests)}: {problem}")

    def _items_problem(self, requests: Sequence[Request], items: Sequence[Int64Array]) -> str | None:
        assert self.k is not None
        if len(items) != len(requests):
            return f"items of {len(items)} requests, there were {len(requests)}"
        for request, found in zip(requests, items, strict=True):
            if found.dtype != np.int64 or found.ndim != 1 or not 0 < len(found) <= self.k:
                shape = f"{list(found.shape)} {found.dtype}"
                return f"request {request.request_id}: items are {shape}, expected 1 to {self.k} of int64"
        everything = np.concatenate(items)
        if everything.min() < 0 or everything.max() >= self.num_items:
            return f"an item that is none of the catalogue's {self.num_items} was returned"
        return None


def _right(scores: Sequence[Float32Array], counts: list[int], width: tuple[int, ...]) -> bool:
    """Return True if all scores of a batch are as expected. One look at all takes a third of the time of many looks."""
    try:
        is_one = len(scores) == 1 and scores[0].dtype == np.float32
        together = scores[0] if is_one else np.concatenate(scores, dtype=np.float32, casting="no")
    except (TypeError, ValueError):  # of several types or shapes
        return False
    shape = (sum(counts), *width)  # that of one score without a list, too, which has no length
    return together.shape == shape and list(map(len, scores)) == counts and bool(np.isfinite(together).all())
