"""Which events a user's keys and values were computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    places: tuple[Any, ...]  # of each column: its address, strides and dtype

    @classmethod
    def of(cls, request: Request) -> History:
        r = request
        columns = r.history_items, r.history_actions, r.history_weights, r.history_timestamps
        return cls(*columns, tuple([(x.__array_interface__["data"][0], x.strides, x.dtype) for x in columns]))

    def __len__(self) -> int:
        return len(self.items)

    def first(self, events: int) -> History:
        """The history up to there."""
        if events == len(self):
            return self
        columns = self.items[:events], self.actions[:events], self.weights[:events], self.timestamps[:events]
        return History(*columns, self.places)

    def common(self, other: History) -> int:
        """How many first events are the same. Of two copies, a weight that is no number is like none."""
        n = min(len(self), len(other))
        if self.places == other.places:
            return n
        # Timestamps first: they differ soonest, and what is found bounds the rest.
        for a, b in (
            (self.timestamps, other.timestamps),
            (self.items, other.items),
            (self.actions, other.actions),
            (self.weights, other.weights),
        ):
            if n:
                differs = a[:n] != b[:n]
                first = int(differs.argmax())  # faster than any()
                n = first if differs[first] else n
        return n
