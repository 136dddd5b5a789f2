"""Leave one out: each user's last event is predicted, the one before it chooses the epoch, the rest is trained on.

The protocol is that of SASRec, S3-Rec, TIGER and HSTU's research code: every item of the catalogue is ranked, and none
is sampled. Users with fewer than `LEAST` events are trained on and not evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from grbench.workloads.events import DataError, Events
from grengines.api import Request

Ints = npt.NDArray[np.int64]
LEAST = 3  # events of a user who is evaluated: one to train on, one to choose the epoch, one to predict
TEST, VALIDATION = 1, 2  # events from a user's end at which the event to predict lies


@dataclass(frozen=True)
class LeaveOneOut:
    """Events and where each user's begin: the events of user u are `bounds[u]` to `bounds[u + 1] - 1`."""

    events: Events

    def __post_init__(self) -> None:
        if not len(self.users):
            raise DataError(
                f"no user has {LEAST} events, which leaving one out needs; use a workload with longer histories"
            )

    @cached_property
    def bounds(self) -> Ints:
        return np.searchsorted(self.events.users, np.arange(self.events.num_users + 1))

    @cached_property
    def users(self) -> Ints:
        """The users who are evaluated."""
        return np.flatnonzero(np.diff(self.bounds) >= LEAST)

    @cached_property
    def training(self) -> npt.NDArray[np.bool_]:
        """True for each event to train on: all but the last two of users who are evaluated."""
        return ~last_events(self.events, VALIDATION)

    def some_users(self, count: int, seed: int) -> Ints:
        """Return `count` of the users who are evaluated, drawn from the seed and in ascending order; 0: all."""
        if not 0 < count < len(self.users):
            return self.users
        return np.sort(np.random.default_rng([seed, 2]).choice(self.users, count, replace=False))

    def targets(self, users: Ints, part: int = TEST) -> Ints:
        """Return the item to predict for each user."""
        return self.events.items[self.bounds[users + 1] - part]

    def pasts(self, users: Ints) -> list[Ints]:
        """Return the items of each user before the last one, oldest first."""
        return [self.events.items[self.bounds[u] : self.bounds[u + 1] - TEST] for u in users]

    def requests(self, users: Ints, max_history: int, part: int = TEST, stale_events: int = 0) -> list[Request]:
        """Return a request for each user at the time of the event to predict, without candidates.

        stale_events: newest events that the history lacks; it keeps at least one.
        """
        return [self._request(number, int(user), max_history, part, stale_events) for number, user in enumerate(users)]

    def _request(self, number: int, user: int, max_history: int, part: int, stale_events: int) -> Request:
        events, first, target = self.events, int(self.bounds[user]), int(self.bounds[user + 1]) - part
        stop = max(target - stale_events, first + 1)
        start = max(first, stop - max_history)
        return Request(
            request_id=number,
            user_id=user,
            history_items=events.items[start:stop],
            history_actions=events.actions[start:stop],
            history_weights=events.weights[start:stop],
            history_timestamps=events.timestamps[start:stop],
            num_seen=0,
            candidates=events.items[:0],
            timestamp=int(events.timestamps[target]),
            arrival_s=0.0,
            deadline_ms=0.0,
        )


def last_events(events: Events, count: int) -> npt.NDArray[np.bool_]:
    """Return True for each of the last `count` events of users who are evaluated."""
    bounds = np.searchsorted(events.users, np.arange(events.num_users + 1))
    ends = bounds[1:][np.diff(bounds) >= LEAST]
    last = np.zeros(len(events.users), np.bool_)
    for before in range(1, count + 1):
        last[ends - before] = True
    return last


def without(items: Sequence[Ints], pasts: Sequence[Ints]) -> list[Ints]:
    """Return each answer without the items of the user's past, in the same order."""
    return [answer[~np.isin(answer, past)] for answer, past in zip(items, pasts, strict=True)]
