"""Histories of users that the server keeps, so that a client sends only what is new.

The version of a user's history is the number of its events so far. A client appends events to the version that it
knows. So a delta that comes twice or out of order is noticed. A client that holds another version gets the
server's in the error, and sends what is missing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grbench.serve.errors import RefusedError
from grengines.api import Float32Array, Int64Array


@dataclass(frozen=True, eq=False)
class History:
    """Events, oldest first: a column for each field."""

    items: Int64Array
    actions: Int64Array
    weights: Float32Array
    timestamps: Int64Array

    def __len__(self) -> int:
        return len(self.items)

    def joined(self, later: History) -> History:
        """Return these events and later ones."""
        if not len(later):
            return self
        return History(*(np.concatenate([a, b]) for a, b in zip(self._columns(), later._columns(), strict=True)))

    def newest(self, events: int) -> History:
        """Return the last `events` events: a copy, so that the dropped ones take no memory."""
        if len(self) <= events:
            return self
        return History(*(column[len(self) - events :].copy() for column in self._columns()))

    def same(self, other: History) -> bool:
        """Return whether both have the same events."""
        return all(np.array_equal(a, b) for a, b in zip(self._columns(), other._columns(), strict=True))

    def part(self, events: slice) -> History:
        """Return some of the events."""
        return History(*(column[events] for column in self._columns()))

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.items, self.actions, self.weights, self.timestamps


@dataclass
class _Kept:
    version: int  # events so far, dropped ones included
    history: History


class Histories:
    """The newest events of the last `max_users` users. Used by the event loop alone."""

    def __init__(self, max_users: int, max_history: int) -> None:
        self._max_users, self._max_history = max_users, max_history
        self._users: OrderedDict[tuple[str, int], _Kept] = OrderedDict()  # by client and user

    def __len__(self) -> int:
        return len(self._users)

    def at(self, user: int, version: int, client: str = "") -> History:
        """Return the history of a client's user. Raises RefusedError for another version than the server's."""
        kept = self._users.get((client, user))
        if kept is None or kept.version != version:
            raise self._conflict(user, f"STATE_VERSIONS={version}", kept)
        self._users.move_to_end((client, user))
        return kept.history

    def append(self, user: int, version: int, events: History, client: str = "") -> tuple[int, bool]:
        """Append events to the history of this version. Return the new version, and whether they were there already.

        Raises RefusedError for a version that is not the server's, unless it is the same delta once more.
        """
        kept = self._users.get((client, user))
        if kept is None and version == 0:
            kept = self._users[client, user] = _Kept(0, events.newest(0))
        if kept is None or version > kept.version:
            raise self._conflict(user, f"version={version}", kept)
        if version < kept.version:
            behind = kept.version - version  # events since that version
            known = kept.history.newest(behind)
            there = known.part(slice(len(events)))
            if behind > len(kept.history) or len(events) > behind or not there.same(events):
                raise self._conflict(user, f"version={version}", kept)
            return kept.version, True
        kept.version += len(events)
        kept.history = kept.history.joined(events).newest(self._max_history)
        self._users.move_to_end((client, user))
        while len(self._users) > self._max_users:
            self._users.popitem(last=False)
        return kept.version, False

    @staticmethod
    def _conflict(user: int, given: str, kept: _Kept | None) -> RefusedError:
        if kept is None:
            return RefusedError(404, f"{given}: user {user} has no state here; append the history from version 0")
        return RefusedError(
            409, f"{given}: the state of user {user} has version {kept.version}; append what is missing from there"
        )
