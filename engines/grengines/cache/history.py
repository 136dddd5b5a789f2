"""The events that a user's keys and values were computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grengines.api import Request
from grengines.runtime.native import native

Column = npt.NDArray[Any]


@dataclass(slots=True, eq=False)
class History:
    """The version of a state: its events, in every field that determines a token.

    The columns are views of the request's arrays, which are never written (api.Request). Nothing is copied or hashed.
    Two histories agree exactly as far as their events do. Two over the same memory agree without a comparison.
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
        """Return the history of the first `events` events."""
        if events == len(self):
            return self
        return History(self.items[:events], self.actions[:events], self.weights[:events], self.timestamps[:events])

    def common(self, other: History) -> int:
        """Return the number of first events that are the same. In two copies a NaN weight equals none."""
        if (functions := native().functions) is not None and (same := functions.common(self, other)) is not None:
            return int(same)
        n = min(len(self), len(other))
        # Timestamps first: they differ soonest, and bound the comparison of the others.
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
    """Return whether two columns are one, or have one address, type and stride.

    For one aligned element, the bounds of memory that `may_share_memory` compares are exact.
    """
    if a is b:
        return True
    alike = a.strides == b.strides and a.dtype == b.dtype and a.flags.aligned and b.flags.aligned
    return alike and np.may_share_memory(a[:1], b[:1])
