"""Traces as columns: the part of a request that a cache sees. Millions of requests fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from grbench.workloads import load_events
from grbench.workloads.config import DrawnConfig, RecordedConfig
from grbench.workloads.synthetic import draw_visitors
from grbench.workloads.trace import find_requests, find_visits, seen_events, with_history

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Workload = RecordedConfig | DrawnConfig


@dataclass(frozen=True)
class Columns:
    """Requests of `grbench.workloads.build` in order of arrival, without items and candidates. 20 bytes each."""

    users: npt.NDArray[np.int32]  # dense: 0 to num_users - 1, in the order of the workload's ids
    times: Floats  # arrival, seconds
    starts: npt.NDArray[np.int32]  # first event that the history keeps; if it moves, nothing cached is valid
    lengths: npt.NDArray[np.int32]  # events of the history

    def __len__(self) -> int:
        return len(self.users)

    @cached_property
    def num_users(self) -> int:
        return int(self.users.max()) + 1

    @cached_property
    def next(self) -> Ints:
        """Index of the same user's next request, or len(self) if there is none."""
        order = np.argsort(self.users, kind="stable")
        result = np.full(len(self), len(self), dtype=np.int64)
        same = self.users[order[1:]] == self.users[order[:-1]]
        result[order[:-1][same]] = order[1:][same]
        return result

    def part(self, chosen: npt.NDArray[np.bool_]) -> Columns:
        """Return some of the requests, with users numbered anew."""
        _, dense = np.unique(self.users[chosen], return_inverse=True)
        return Columns(dense.astype(np.int32), self.times[chosen], self.starts[chosen], self.lengths[chosen])

    def last_lengths(self) -> Ints:
        """Return the number of events of each user's history at the user's last request."""
        lengths: Ints = self.lengths[self.next == len(self)].astype(np.int64)
        return lengths


def load(config: Workload, seed: int) -> Columns:
    """Return the trace that `config` describes. Raises DataError (a ValueError) for unusable data."""
    return _synthetic(config, seed) if isinstance(config, DrawnConfig) else _recorded(config)


def _recorded(config: RecordedConfig) -> Columns:
    log = load_events(config)
    visits = find_visits(log, config)
    order, owner, first_event = find_requests(log, visits, config)
    seen = visits.starts[order] - first_event[order]  # events before each visit
    return _columns(owner[order], visits.arrivals[order], seen_events(seen, config), config.max_history)


def _synthetic(config: DrawnConfig, seed: int) -> Columns:
    """Draw the visits of `grbench.workloads.synthetic.make_events`, without the events."""
    drawn = draw_visitors(config, np.random.default_rng(seed))
    order = np.argsort(drawn.visitor, kind="stable")  # by user, then by time
    user = np.searchsorted(drawn.users, drawn.visitor[order])
    before = np.cumsum(drawn.deltas[order]) - drawn.deltas[order]
    first = np.searchsorted(user, np.arange(len(drawn.users)))
    seen = np.empty(len(order), dtype=np.int64)
    seen[order] = drawn.initial[user] + before - before[first][user]
    kept = with_history(seen, config)
    return _columns(drawn.visitor[kept], drawn.arrivals[kept], seen_events(seen[kept], config), config.max_history)


def _columns(users: Ints, arrivals: Floats, seen: Ints, max_history: int) -> Columns:
    """Return requests with `seen` earlier events, of which the last `max_history` are kept."""
    _, dense = np.unique(users, return_inverse=True)
    starts = np.maximum(seen - max_history, 0)
    return Columns(
        dense.astype(np.int32),
        arrivals - arrivals[0],
        starts.astype(np.int32),
        (seen - starts).astype(np.int32),
    )
