"""Measured costs of a strategy: what a batch takes, by the lengths of its requests.

A batch takes a fixed time, and a time for each request. That depends on the events of its history and on its
candidates, each in classes that double in width, and on whether the user's state is cached. Both are measured before
the strategy serves, and follow every batch after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from grengines.api import Request

RATE = 0.15  # weight of the newest batch
MOST_CHANGE = 4.0  # of one batch: a pause of the machine is no new cost


class Kind(NamedTuple):
    """A class of requests that cost about the same."""

    events: int  # bits of the number of events
    candidates: int = 0  # the same of candidates: they cost otherwise, and a cached state does not save them
    cached: bool = False

    @classmethod
    def of(cls, request: Request, cached: bool = False) -> Kind:
        return cls(len(request.history_items).bit_length(), len(request.candidates).bit_length(), cached)

    def covers(self, other: Kind) -> bool:
        """Return True if a request of this kind has all that one of the other has to compute, or more."""
        return self.cached == other.cached and self.events >= other.events and self.candidates >= other.candidates

    def tokens(self, events: bool) -> int:
        """Return the candidates, and the events if so asked, rounded up to the ends of their classes; at least 1."""
        return max(sum(1 << bits for bits in (self.events if events else 0, self.candidates) if bits), 1)

    def distance(self, other: Kind) -> tuple[bool, int, int]:
        """Return how unlike two kinds are, to be compared.

        A cached state says little of what a whole history costs, and the reverse. Of two cached states the candidates
        count first.
        """
        events, candidates = abs(self.events - other.events), abs(self.candidates - other.candidates)
        return self.cached != other.cached, candidates + (0 if self.cached and other.cached else events), events


class Costs:
    """The costs of one strategy, in seconds."""

    def __init__(self, fixed_s: float, each_s: dict[Kind, float]) -> None:
        """each_s: at least one kind."""
        self.fixed_s, self._each_s = fixed_s, each_s

    @classmethod
    def measured(
        cls, requests: Sequence[Request], max_batch: int, seconds: Callable[[Sequence[Request]], float]
    ) -> Costs:
        """Time batches of one request and of several, for each kind among `requests`.

        seconds: answers a batch and returns what it took.
        """
        by_kind: dict[Kind, Request] = {Kind.of(r): r for r in requests}
        fixed, each = [], {}
        size = min(max_batch, 8)
        for kind, request in by_kind.items():
            one = min(seconds([request]) for _ in range(3))
            more = min(seconds([request] * size) for _ in range(2)) if size > 1 else 2 * one
            each[kind] = max((more - one) / max(size - 1, 1), one / size / 4, 1e-6)
            fixed.append(max(one - each[kind], 0.0))
        # A pause of the machine in all calls of a kind is no cost: no longer request is cheaper.
        each = {kind: min(its for other, its in each.items() if other.covers(kind)) for kind in each}
        return cls(sorted(fixed)[len(fixed) // 2], each)

    def each_s(self, kind: Kind) -> float:
        """Return what a request adds to a batch. A kind not seen yet costs as a token of the nearest one does.

        Of two kinds with a cached state the candidates are compared; that estimate is at most the one without a state.
        """
        if (known := self._each_s.get(kind)) is not None:
            return known
        near = min(self._each_s, key=kind.distance)
        events = not (kind.cached and near.cached)
        seconds = self._each_s[near] * kind.tokens(events) / near.tokens(events)
        if not events and not all(other.cached for other in self._each_s):
            return min(seconds, self.each_s(kind._replace(cached=False)))
        return seconds

    def batch_s(self, kinds: Iterable[Kind]) -> float:
        """Return what a batch of these requests takes."""
        return self.fixed_s + sum(map(self.each_s, kinds))

    def observe(self, kinds: Sequence[Kind], seconds: float) -> None:
        """Follow a batch that took `seconds`."""
        ratio = min(max(seconds / max(self.batch_s(kinds), 1e-9), 1 / MOST_CHANGE), MOST_CHANGE)
        change = 1 + RATE * (ratio - 1)
        self.fixed_s *= change
        for kind in set(kinds):
            self._each_s[kind] = self.each_s(kind) * change

    def table(self) -> list[dict[str, float | int | bool]]:
        """Return the costs for people: milliseconds by kind."""
        return [
            {
                "events_below": 1 << kind.events,
                "candidates_below": 1 << kind.candidates,
                "cached": kind.cached,
                "ms": round(seconds * 1e3, 4),
            }
            for kind, seconds in sorted(self._each_s.items())
        ]
