"""Traces: visits of users as requests, in order of arrival."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grbench.workloads.config import RecordedConfig, WorkloadConfig
from grbench.workloads.events import DataError, Events
from grengines.api import Catalogue, Request

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival. The same options and seed give the same trace."""

    catalogue: Catalogue
    requests: list[Request]
    events: Events  # all events, by user and time
    own: Ints  # [requests, 2]: start and end of the visit's own events

    def facts(self) -> dict[str, float]:
        """Return figures that describe the trace."""
        lengths = np.array([len(r.history_items) for r in self.requests])
        returning = np.array([r.num_seen > 0 for r in self.requests])
        deltas = lengths - np.array([r.num_seen for r in self.requests])
        return {
            "requests": float(len(self.requests)),
            "users": float(len({r.user_id for r in self.requests})),
            "items": float(self.catalogue.num_items),
            "history_p50": float(np.median(lengths)),
            "history_p90": float(np.percentile(lengths, 90)),
            "history_max": float(lengths.max()),
            "returning_share": float(returning.mean()),
            "delta_mean": float(deltas[returning].mean()) if returning.any() else 0.0,
        }


@dataclass(frozen=True)
class Visits:
    """Visits as positions in sorted events: history before `starts`, the visit's own events up to `ends`."""

    starts: Ints
    ends: Ints
    times: Ints  # seconds, on the clock of the events
    arrivals: npt.NDArray[np.float64]  # seconds from the trace's start


def find_visits(events: Events, config: RecordedConfig) -> Visits:
    """Split each user's events into visits. A pause ends a visit, and so do `visit_events` events."""
    n = len(events.users)
    new_user = np.r_[True, np.diff(events.users) != 0]
    pause = new_user | np.r_[True, np.diff(events.timestamps) > config.visit_gap_s]
    session_start = np.maximum.accumulate(np.where(pause, np.arange(n), 0))
    starts = np.flatnonzero((np.arange(n) - session_start) % config.visit_events == 0)
    ends = np.r_[starts[1:], n]
    times = events.timestamps[starts]
    return Visits(starts, ends, times, (times - times.min()).astype(np.float64))


def find_requests(events: Events, visits: Visits, config: WorkloadConfig) -> tuple[Ints, Ints, Ints]:
    """Select visits with at least `min_history` earlier events, in order of arrival, at most `max_requests`.

    Returns their indices, the user of every visit, and the position of that user's first event. Raises DataError if
    no visit qualifies.
    """
    if config.min_history > config.max_history:
        raise DataError(
            f"workload.min_history={config.min_history} is above max_history={config.max_history}; lower it"
        )
    owner = _owners(events, visits)
    first_event = np.searchsorted(events.users, owner)
    eligible = np.flatnonzero(visits.starts - first_event >= config.min_history)
    if not len(eligible):
        longest = int((visits.starts - first_event).max(initial=0))
        raise DataError(
            f"workload.min_history={config.min_history}: the longest history before a visit has {longest} events; "
            "lower it, or use a workload with longer histories"
        )
    order = eligible[np.argsort(visits.arrivals[eligible], kind="stable")]
    return order[: config.max_requests or None], owner, first_event


def build_trace(
    events: Events,
    visits: Visits,
    config: WorkloadConfig,
    seed: int,
    latency_limit_ms: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Return a trace with one request per visit that has at least `min_history` earlier events.

    Candidates are distinct: first the visit's own items, at most half of all, then others drawn by popularity, none of
    them from the user's past. They depend only on the seed and the visit, and not on `max_requests`. Raises DataError
    if there is no request.

    progress: called now and then with the requests that are built and their number.
    """
    if config.num_candidates > events.num_items:
        raise DataError(
            f"workload.num_candidates={config.num_candidates}: the workload has {events.num_items} items; ask for fewer"
        )
    order, owner, first_event = find_requests(events, visits, config)
    origin = float(visits.arrivals[order[0]])
    seen_until: dict[int, int] = {}
    barred = np.zeros(events.num_items, dtype=np.bool_)
    requests = []
    for request_id, visit in enumerate(order):
        if request_id % 10_000 == 0:
            progress(request_id, len(order))
        user, stop = int(owner[visit]), int(visits.starts[visit])
        start = max(int(first_event[visit]), stop - config.max_history)
        past, own = events.items[int(first_event[visit]) : stop], events.items[stop : int(visits.ends[visit])]
        rng = np.random.default_rng([seed, int(visit)])
        requests.append(
            Request(
                request_id=request_id,
                user_id=user,
                history_items=events.items[start:stop],
                history_actions=events.actions[start:stop],
                history_weights=events.weights[start:stop],
                history_timestamps=events.timestamps[start:stop],
                num_seen=max(seen_until.get(user, start) - start, 0),
                candidates=_candidates(own, past, events, config.num_candidates, rng, barred),
                timestamp=int(visits.times[visit]),
                arrival_s=float(visits.arrivals[visit]) - origin,
                deadline_ms=latency_limit_ms,
            )
        )
        seen_until[user] = stop
    catalogue = Catalogue(events.num_users, events.num_items, len(events.action_names))
    return Trace(catalogue, requests, events, np.stack([visits.starts[order], visits.ends[order]], axis=1))


def _owners(events: Events, visits: Visits) -> Ints:
    """Return the user of each visit. A visit without own events belongs to the user of the event before it."""
    has_own = visits.ends > visits.starts
    owners: Ints = events.users[np.where(has_own, np.minimum(visits.starts, len(events.users) - 1), visits.starts - 1)]
    return owners


def _candidates(
    own: Ints, past: Ints, events: Events, count: int, rng: np.random.Generator, barred: npt.NDArray[np.bool_]
) -> Ints:
    """Return `count` distinct items: `own` first (at most half), then others drawn from the events.

    The others are not in the user's past, because a user rarely takes an item twice: a model that only knows the past
    would tell them from the visit's own. Only where the rest of the catalogue is too small do items of the past follow.
    barred: a working mask over the catalogue, False before and after.
    """
    chosen = list(dict.fromkeys(own.tolist()))[: max(count // 2, 1)]
    barred[own] = barred[past] = True

    def take(drawn: Ints) -> None:
        new = list(dict.fromkeys(drawn[~barred[drawn]].tolist()))
        barred[new] = True
        chosen.extend(new)

    for _ in range(8):
        if len(chosen) < count:
            take(events.items[rng.integers(len(events.items), size=2 * (count - len(chosen)) + 8)])
    if len(chosen) < count:
        free = events.num_items - int(np.count_nonzero(barred))
        while len(chosen) < count and free > 2 * count:  # few items are popular: draw uniformly
            take(rng.integers(events.num_items, size=2 * (count - len(chosen))))
    if len(chosen) < count:  # a large share of the catalogue: the remaining items, then the visit's own and the past
        chosen += rng.permutation(np.flatnonzero(~barred)).tolist()
        chosen = list(dict.fromkeys([*chosen, *own.tolist(), *rng.permutation(np.unique(past)).tolist()]))
    barred[own] = barred[past] = barred[chosen] = False
    return np.array(chosen[:count], dtype=np.int64)
