"""The requests that wait, and the choice of those that are answered next."""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING

from grengines.api import CachingEngine, Engine, Request

if TYPE_CHECKING:
    from grbench.scenarios.batcher import Ticket

MOST_PASSED = 4  # batches by which a request may begin later than in order of arrival

Key = Callable[[Request], int]  # requests of similar keys go together


def order_key(order: str, engine: Engine) -> Key | None:
    """Return the key of an order; None for order of arrival.

    Raises ValueError for `hit` with an engine that does not report whose state it has.
    """
    if order == "length":
        return lambda request: len(request.history_items) + len(request.candidates)
    if order == "hit":
        if not isinstance(engine, CachingEngine):
            raise ValueError(
                f"scenario.order=hit: engine {engine.actual().get('engine')} does not report whose state is cached; "
                "set scenario.order=length or fifo"
            )
        tier_of = engine.tier_of
        return lambda request: tier_of(request.user_id)
    return None


class Waiting:
    """Waiting requests, oldest first. Not thread-safe.

    key: None takes them in order of arrival. Otherwise the oldest request goes with those of the nearest keys, of equal
    ones the older. A user's requests stay in order.

    **No starvation.** A request is passed over by at most MOST_PASSED * max_batch younger ones, so it begins at most
    MOST_PASSED batches later than in order of arrival. Before a batch could exceed that, the request is next. Such
    requests are the oldest ones, but for those that were queued late: whatever passes over a request passes over all
    older ones as well.

    **Deadlines.** A request that has waited half of its deadline is next, the oldest such request before the others.
    One that has missed its deadline is useless already, and has no such right.
    """

    def __init__(self, key: Key | None, max_batch: int) -> None:
        self.most_passed = 0  # younger requests that were taken before a request, at most
        self._key, self._max_batch = key, max_batch
        self._queue: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, tickets: Iterable[Ticket]) -> None:
        """Queue requests, each at its place by arrival: reading a large call may take longer than the one after it."""
        for ticket in tickets:
            if self._queue and ticket.arrived < self._queue[-1].arrived:
                insort(self._queue, ticket, key=_arrival)
            else:
                self._queue.append(ticket)

    def put_back(self, tickets: Iterable[Ticket]) -> None:
        """Queue requests that were taken, each at its place by arrival."""
        if tickets := list(tickets):
            self._queue = deque(sorted([*tickets, *self._queue], key=_arrival))

    def remove(self, key: int) -> bool:
        """Remove the request of a ticket's key. Returns False if it does not wait."""
        for place, ticket in enumerate(reversed(self._queue), 1):  # a call that is refused takes its newest back
            if ticket.key == key:
                del self._queue[-place]
                return True
        return False

    @property
    def oldest(self) -> Ticket:
        return self._queue[0]

    def take(self, count: int, now: float) -> list[Ticket]:
        """Remove and return the next requests, oldest first: at most `count`, none for 0 or less.

        now: seconds, time.perf_counter.
        """
        if count <= 0:
            return []
        if self._key is None or len(self._queue) <= count:
            return [self._queue.popleft() for _ in range(min(count, len(self._queue)))]
        # The choice stays cheap however many wait.
        window = list(islice(self._queue, (MOST_PASSED + 1) * self._max_batch))
        chosen = self._choose(window, self._key, count, now)
        younger = 0
        for place in reversed(range(len(window))):
            ticket = window[place]
            if place in chosen:
                younger += 1
            else:
                ticket.passed += younger
                self.most_passed = max(self.most_passed, ticket.passed)
        for _ in window:
            self._queue.popleft()
        self._queue.extendleft(window[place] for place in reversed(range(len(window))) if place not in chosen)
        return [window[place] for place in sorted(chosen)]

    def _choose(self, window: list[Ticket], key: Key, count: int, now: float) -> set[int]:
        """Return the places in the window of the requests that go next."""
        elders, seen = [], Counter[int]()  # older waiting requests of each one's user
        for ticket in window:
            elders.append(seen[ticket.request.user_id])
            seen[ticket.request.user_id] += 1
        bound = (MOST_PASSED - 1) * self._max_batch  # one batch more, and it would have been passed over too often
        first = [place for place, ticket in enumerate(window) if ticket.passed > bound]
        first += [
            place
            for place, ticket in enumerate(window)
            if ticket.passed <= bound and not elders[place] and _urgent(ticket, now)
        ]
        first = first[:count] or [0]
        keys = [key(ticket.request) for ticket in window]
        longest = max(keys[place] for place in first)
        others = sorted(set(range(len(window))) - set(first), key=lambda p: (elders[p], abs(keys[p] - longest), p))
        return {*first, *others[: count - len(first)]}


def _arrival(ticket: Ticket) -> float:
    return ticket.arrived


def _urgent(ticket: Ticket, now: float) -> bool:
    """Return whether a request has waited half of its deadline, which it can still meet."""
    deadline_s = ticket.request.deadline_ms / 1e3
    return deadline_s / 2 <= now - ticket.arrived < deadline_s
