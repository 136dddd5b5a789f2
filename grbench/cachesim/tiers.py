"""Tiers below the device in a simulation: host memory, and storage below it. They count pages and move none.

A tier behaves as `grengines.cache.offload` does with one request in flight and `cache.onload_share=1`: a state that the
tier above evicts is stored, only pages that are new to the tier are written, and a state that is loaded stays. Whatever
the host evicts is offered to storage (`grengines.cache.storage_offload`).
"""

from __future__ import annotations

from dataclasses import dataclass

from grbench.cachesim.costs import Costs
from grengines.cache.policies import Policy

NAMES = ("host", "storage")


@dataclass
class TierOutcome:
    """Counts of one tier. `hits` are requests that found usable state here and in no tier above."""

    hits: int = 0
    flops: float = 0.0  # saved by the hits
    read: int = 0  # pages that the hits load to the device
    written: int = 0  # pages that the tier takes from above
    stored: int = 0  # states that it took
    refused: int = 0  # states that its policy did not admit or that found no room


class Tier:
    """States in `capacity` pages under a policy. below: the tier that takes what this one evicts."""

    def __init__(self, costs: Costs, policy: Policy, capacity: int, below: Tier | None = None) -> None:
        self._costs, self._policy, self._capacity, self._below = costs, policy, capacity, below
        self._states: dict[int, tuple[int, int, float]] = {}  # by user: events, start of the history, last visit
        self._free = capacity
        self._admitted: set[int] = set()
        self.outcome = TierOutcome()

    def outcomes(self) -> list[TierOutcome]:
        """Return the counts of this tier and of those below."""
        return [self.outcome, *(self._below.outcomes() if self._below else [])]

    def visit(self, user: int, start: int, length: int, cost: float, now: float, above: bool) -> int:
        """Note a visit, and return the events that are loaded: none if the device has the state (`above`).

        Visits of users without a valid state here or below count for the policy's admission.
        """
        tier, events = self._find(user, start, length)
        if events or self._policy.admit(user, self._costs.pages[length], cost, now):
            self._admitted.add(user)
        else:
            self._admitted.discard(user)
        if above or not events:
            return 0
        tier.outcome.hits += 1
        tier.outcome.flops += self._costs.saved[events]
        tier.outcome.read += self._costs.pages[events]
        return events

    def offer(self, user: int, events: int, start: int, now: float, visitor: int) -> None:
        """Store a state that the device evicts, if the user is admitted. visitor: the user in flight."""
        if user in self._admitted:
            self._store(user, events, start, now, visitor)
        else:
            self.outcome.refused += 1

    def _find(self, user: int, start: int, length: int) -> tuple[Tier, int]:
        events, began, _ = self._states.get(user, (0, -1, 0.0))
        if events and self._same(events, began, length, start):
            return self, events
        return self._below._find(user, start, length) if self._below else (self, 0)

    def _same(self, events: int, start: int, length: int, begin: int) -> int:
        """Return how many events of a state hold for a history of `length` events from `begin` on."""
        usable = start == begin and (not self._costs.exact or events == length)
        return min(events, length) if usable else 0

    def _store(self, user: int, events: int, start: int, now: float, visitor: int) -> None:
        pages, out = self._costs.pages, self.outcome
        had, began, _ = self._states.get(user, (0, -1, 0.0))
        need, own = pages[events], pages[had] if had else 0
        try:
            if need > self._capacity:
                raise LookupError
            while need - own > self._free:
                self._evict(self._policy.victim(now, {user, visitor}), visitor)
        except LookupError:  # nobody can be evicted
            out.refused += 1
            return
        same = self._same(had, began, events, start)
        if same < events:
            out.written += need - same // self._costs.page
        self._free += own - need
        self._states[user] = events, start, now
        out.stored += 1
        self._policy.touch(user, need, self._costs.saved[events], now)

    def _evict(self, user: int, visitor: int) -> None:
        events, start, now = self._states.pop(user)
        self._free += self._costs.pages[events]
        self._policy.remove(user)
        if self._below:
            self._below._store(user, events, start, now, visitor)
