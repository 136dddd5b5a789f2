"""Which events a user's keys and values were computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grengines.api import Request

Column = npt.NDArray[Any]


@dataclass(slots=True, eq=False)
class History:
    """The version of a state: its events themselves, every field that decides what a token is.

    Views of the request's arrays, which are never written (api.Request): nothing is copied or hashed, and two histories
    agree exactly as far as their events do. Of two over the same memory that is known without a look at it.
    """

    items: Column  # [events]
    actions: Column
    weights: Column
    timestamps: Column

    @classmethod
    def of(cls, request: Request) -> History:
        return cls(request.history_items, request.history_actions, request.history_weights, request.history_timestamps)

    def __len__(self) -> int:
        return len(self.items)

    def first(self, events: int) -> History:
        """The history up to there."""
        if events == len(self):
            return self
        return History(self.items[:events], self.actions[:events], self.weights[:events], self.timestamps[:events])

    def common(self, other: History) -> int:
        """How many first events are the same. Of two copies, a weight that is no number is like none."""
        n = min(len(self), len(other))
        # Timestamps first: they differ soonest, and what is found bounds the rest.
        for a, b in (
            (self.timestamps, other.timestamps),
            (self.items, other.items),
            (self.actions, other.actions),
            (self.weights, other.weights),
        ):
            if n and not _same_memory(a, b):
                differs = a[:n] != b[:n]
                first = int(differs.argmax())  # faster than any()
                n = first if differs[first] else n
        return n


def _same_memory(a: Column, b: Column) -> bool:
    """Whether two columns begin at one address and go on alike. Of single aligned elements the bounds tell that."""
    alike = a.strides == b.strides and a.dtype == b.dtype and a.flags.aligned and b.flags.aligned
    return alike and np.may_share_memory(a[:1], b[:1])
