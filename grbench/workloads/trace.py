"""Traces: visits of users as requests, in order of arrival."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from grbench.workloads.config import RecordedConfig, WorkloadConfig, contradiction
from grbench.workloads.events import DataError, Events
from grengines.api import Catalogue, Request

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Requests(Sequence[Request]):
    """Requests in order of arrival, each made when it is first asked for, and then kept. Thread-safe.

    Recorded data has millions, of which a run issues thousands, and one takes a tenth of a millisecond. What is known
    of all of them is in arrays: `history_lengths`, `num_seen`, `users`, `times` and `arrivals_s`.
    """

    def __init__(
        self,
        *,
        events: Events,
        visits: Ints,
        users: Ints,
        firsts: Ints,
        stops: Ints,
        begins: Ints,
        ends: Ints,
        times: Ints,
        arrivals_s: Floats,
        max_history: int,
        num_candidates: int,
        seed: int,
        latency_limit_ms: float,
    ) -> None:
        """Take what each request is made of, as arrays [requests].

        visits, users, times: of the visit. firsts: its user's first event. stops: where the history ends. begins,
        ends: of the visit's own events.
        """
        self.users, self.times, self.arrivals_s = users, times, arrivals_s
        self._events, self._visits = events, visits
        self._firsts, self._stops, self._begins, self._ends = firsts, stops, begins, ends
        self._starts = np.maximum(firsts, stops - max_history)
        self.history_lengths = stops - self._starts
        self.num_seen = np.maximum(_stop_before(users, stops, self._starts) - self._starts, 0)
        self._candidates, self._seed, self._limit_ms = num_candidates, seed, latency_limit_ms
        self._barred = np.zeros(events.num_items, dtype=np.bool_)
        self._made: dict[int, Request] = {}
        self._making = threading.Lock()  # of the mask: a client's thread may ask for a request, as may a batch's

    def __len__(self) -> int:
        return len(self._visits)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if place not in self._made:
            with self._making:
                if place not in self._made:
                    self._made[place] = self._make(place)
        return self._made[place]

    def some(self, most: int) -> Sequence[Request]:
        """Return the first `most` requests and the one with the longest history, or all where there are no more."""
        return self if len(self) <= most else [*self[:most], self[int(self.history_lengths.argmax())]]

    def _make(self, i: int) -> Request:
        events, first, start, stop = self._events, self._firsts[i], self._starts[i], self._stops[i]
        begin = self._begins[i]
        past, own = events.items[first:begin], events.items[begin : self._ends[i]]
        rng = np.random.default_rng([self._seed, int(self._visits[i])])
        return Request(
            request_id=i,
            user_id=int(self.users[i]),
            history_items=events.items[start:stop],
            history_actions=events.actions[start:stop],
            history_weights=events.weights[start:stop],
            history_timestamps=events.timestamps[start:stop],
            num_seen=int(self.num_seen[i]),
            candidates=_candidates(own, past, events, self._candidates, rng, self._barred),
            timestamp=int(self.times[i]),
            arrival_s=float(self.arrivals_s[i]),
            deadline_ms=self._limit_ms,
        )


def _stop_before(users: Ints, stops: Ints, default: Ints) -> Ints:
    """Return where the history of the same user's request before each one stopped; `default` for a first one."""
    order = np.argsort(users, kind="stable")
    same = np.r_[False, users[order][1:] == users[order][:-1]]
    before = default.copy()
    before[order[same]] = stops[order[np.flatnonzero(same) - 1]]
    return before


def history_lengths(requests: Sequence[Request]) -> Ints:
    """Return the number of events of each history."""
    if isinstance(requests, Requests):
        known: Ints = requests.history_lengths
        return known
    return np.array([len(request.history_items) for request in requests])


def arrivals_s(requests: Sequence[Request]) -> Floats:
    """Return when each request arrives, in seconds. No request is made for it."""
    if isinstance(requests, Requests):
        return requests.arrivals_s
    return np.array([request.arrival_s for request in requests])


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival. The same options and seed give the same trace."""

    catalogue: Catalogue
    requests: Requests
    events: Events  # all events, by user and time
    own: Ints  # [requests, 2]: start and end of the visit's own events

    def facts(self) -> dict[str, float]:
        """Return figures that describe the trace."""
        requests, lengths = self.requests, self.requests.history_lengths
        returning = requests.num_seen > 0
        deltas = lengths - requests.num_seen
        return {
            "requests": float(len(requests)),
            "users": float(len(np.unique(requests.users))),
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
    arrivals: Floats  # seconds from the trace's start


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
    owner = _owners(events, visits)
    first_event = np.searchsorted(events.users, owner)
    arriving = np.argsort(visits.arrivals, kind="stable")
    order = arriving[with_history((visits.starts - first_event)[arriving], config)]
    return order, owner, first_event


def with_history(before: Ints, config: WorkloadConfig) -> Ints:
    """Return the places of visits with at least `min_history` earlier events, the first `max_requests` of them.

    before: the number of these events, in order of arrival. Raises DataError if no visit qualifies.
    """
    if config.min_history > config.max_history:
        raise DataError(str(contradiction(config)))
    places: Ints = np.flatnonzero(before >= config.min_history)
    if not len(places):
        longest = int(before.max(initial=0))
        raise DataError(
            f"workload.min_history={config.min_history}: the longest history before a visit has {longest} events; "
            "lower it, or use a workload with longer histories"
        )
    return places[: config.max_requests or None]


def seen_events(before: Ints, config: WorkloadConfig) -> Ints:
    """Return how many of the events before each request the user's state knows. Raises DataError if it never knows one.

    before: the number of all of them, at least `min_history`.
    """
    if config.stale_events >= (longest := int(before.max())):
        raise DataError(
            f"workload.stale_events={config.stale_events}: the longest history has {longest} events, so no state would "
            "be that old; lower it"
        )
    known: Ints = np.maximum(before - config.stale_events, config.min_history)
    return known


def build_trace(events: Events, visits: Visits, config: WorkloadConfig, seed: int, latency_limit_ms: float) -> Trace:
    """Return a trace with one request per visit that has at least `min_history` earlier events.

    Candidates are distinct: first the visit's own items, at most half of all, then others drawn by popularity. None is
    from the user's past, whatever the state knows of it. They depend only on the seed and the visit, and not on
    `max_requests` or `stale_events`. Raises DataError if there is no request.
    """
    if config.num_candidates > events.num_items:
        items = f"{events.num_items} item{'s' * (events.num_items != 1)}"
        raise DataError(f"workload.num_candidates={config.num_candidates}: the workload has {items}; ask for fewer")
    order, owner, first_event = find_requests(events, visits, config)
    firsts, begins = first_event[order], visits.starts[order]
    requests = Requests(
        events=events,
        visits=order,
        users=owner[order],
        firsts=firsts,
        stops=firsts + seen_events(begins - firsts, config),
        begins=begins,
        ends=visits.ends[order],
        times=visits.times[order],
        arrivals_s=visits.arrivals[order] - visits.arrivals[order[0]],
        max_history=config.max_history,
        num_candidates=config.num_candidates,
        seed=seed,
        latency_limit_ms=latency_limit_ms,
    )
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

    None is in the user's past, neither of the own items nor of the others: a model that only knows the past would tell
    the one from the other. A visit of known items therefore has drawn candidates only. Only where the rest of the
    catalogue is too small do items of the past follow.
    barred: a working mask over the catalogue, False before and after.
    """
    barred[past] = True
    new_own = list(dict.fromkeys(own[~barred[own]].tolist()))
    chosen = new_own[: max(count // 2, 1)]
    barred[own] = True

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
        chosen = list(dict.fromkeys([*chosen, *new_own, *rng.permutation(np.unique(past)).tolist()]))
    barred[own] = barred[past] = barred[chosen] = False
    return np.array(chosen[:count], dtype=np.int64)
