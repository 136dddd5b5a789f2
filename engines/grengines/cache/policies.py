"""Cache policies: small objects that only decide who is kept. The engine and `grbench cachesim` run them.

A policy hears of every visit and names victims; it holds no state and moves no bytes. An entry is a user with a size
(any unit above 0, the same for all), a cost (of computing the state again, any unit, the same for all) and the time of
the visit (seconds on the caller's clock). Not thread-safe: the cache asks under its own lock. No torch import here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Set
from typing import Protocol

from grengines.cache.predictive import Predictive


class Policy(Protocol):
    """What a cache asks. A visit is one `touch`, or `admit` and then, if it is stored, `touch` at the same time."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        """Whether to store the state of a user of whom nothing valid is cached."""

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        """The user's state was stored, or used and stored again."""

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        """Whose state goes: a user who was touched and not removed, and isn't in `exclude`; an entry until it is
        removed. Raises LookupError where there is none."""

    def remove(self, user: int) -> None:
        """The user's state is gone. Nothing for a user who has none."""

    def prefetch(self, now: float, horizon: float) -> list[int]:
        """Users without a state who are expected within `horizon` seconds, soonest first, for a cache that can fetch
        it from a lower tier. Each expected visit is named once."""


class _Everyone:
    """Admits everyone, expects no one."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        return True

    def prefetch(self, now: float, horizon: float) -> list[int]:
        return []


class Nothing(_Everyone):
    """No cache: nobody is admitted."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        return False

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        pass

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        raise LookupError("nobody is cached")

    def remove(self, user: int) -> None:
        pass


class LRU(_Everyone):
    """Who was last seen longest ago goes. Constant time."""

    def __init__(self) -> None:
        self._users: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        self._users[user] = None
        self._users.move_to_end(user)

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        for user in self._users:
            if user not in exclude:
                return user
        raise LookupError("every user is excluded")

    def remove(self, user: int) -> None:
        self._users.pop(user, None)


class GDSF(_Everyone):
    """Greedy dual, size and frequency (Cherkasova, HP Labs 1998): the least of clock + visits * cost / size goes.

    The clock is that value of the last victim, so that whoever isn't seen any more is overtaken in the end. Visits
    count since the state was stored. Of equals the least recently used goes. O(log n): a heap whose outdated items
    are dropped when they surface, or all at once when they are most of it.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._touches = 0  # breaks ties
        self._visits: dict[int, int] = {}
        self._live: dict[int, int] = {}  # user: the touch of the one valid item
        self._heap: list[tuple[float, int, int]] = []  # value, touch, user

    def _worth(self, visits: int, size: int, cost: float) -> float:
        return visits * cost / size

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        self._visits[user] = visits = self._visits.get(user, 0) + 1
        self._live[user] = self._touches = self._touches + 1
        heapq.heappush(self._heap, (self._clock + self._worth(visits, size, cost), self._touches, user))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [item for item in self._heap if self._live.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        heap, spared = self._heap, []
        try:
            while heap:
                value, touch, user = heap[0]
                if self._live.get(user) != touch:
                    heapq.heappop(heap)
                elif user in exclude:
                    spared.append(heapq.heappop(heap))
                else:
                    self._clock = value
                    return user
        finally:
            for item in spared:
                heapq.heappush(heap, item)
        raise LookupError("every user is excluded")

    def remove(self, user: int) -> None:
        self._visits.pop(user, None)
        self._live.pop(user, None)


class LFU(GDSF):
    """Who was seen least often goes, with dynamic ageing: GDSF with all costs and sizes alike."""

    def _worth(self, visits: int, size: int, cost: float) -> float:
        return visits


class _Visits:
    """How often users came, of the last `remember` who did."""

    def __init__(self, remember: int) -> None:
        self._remember = remember
        self._counts: OrderedDict[int, int] = OrderedDict()  # least recently seen first

    def of(self, user: int) -> int:
        return self._counts.get(user, 0)

    def count(self, user: int) -> int:
        """With one more."""
        n = self._counts[user] = self._counts.pop(user, 0) + 1
        if len(self._counts) > self._remember:
            self._counts.popitem(last=False)
        return n


class Doorkeeper:
    """Another policy, which admits nobody before their n-th visit: storing what is never used again costs time.

    The idea is TinyLFU's (Einziger, Friedman, Manes, ACM Transactions on Storage 2017), with exact counts of the last
    `remember` users who knock instead of a filter.
    """

    def __init__(self, policy: Policy, visits: int, remember: int = 1 << 20) -> None:
        self._policy, self._least, self._knocks = policy, visits, _Visits(remember)
        self.touch, self.victim = policy.touch, policy.victim
        self.remove, self.prefetch = policy.remove, policy.prefetch

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        willing = self._policy.admit(user, size, cost, now)  # it hears of every visit
        return self._knocks.count(user) >= self._least and willing


class WhileItPays:
    """Another policy, which admits users at their first visit only while that pays, and from the second on always.

    It pays while of the users whose first visit was stored a share of PAYS or more come back to a state that is of use
    before it goes: storing costs 12 to 15% of a batch on a GPU, and a hit saves some 80% (reports/user_cache.md). At
    first it is taken to pay. One newcomer of SAMPLE is stored in any case, so that a change shows.
    """

    PAYS = 1 / 8
    SAMPLE = 16
    RECENT = 64  # outcomes that the share is a mean of, exponentially weighted

    def __init__(self, policy: Policy, remember: int = 1 << 20) -> None:
        self._policy, self._visits = policy, _Visits(remember)
        self._on_trial: dict[int, float] = {}  # users whose first visit was stored, and its time
        self._newcomers = 0
        self._share = 1.0
        self.victim, self.prefetch = policy.victim, policy.prefetch

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        willing = self._policy.admit(user, size, cost, now)  # it hears of every visit
        self._end_trial(user, of_use=False)  # back, and nothing of the state is valid
        if self._visits.count(user) > 1 or not willing:
            return willing
        self._newcomers += 1
        return self._share >= self.PAYS or self._newcomers % self.SAMPLE == 0

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        self._policy.touch(user, size, cost, now)
        if self._on_trial.get(user, now) != now:
            self._visits.count(user)
            self._end_trial(user, of_use=True)
        elif self._visits.of(user) == 1:
            self._on_trial[user] = now

    def remove(self, user: int) -> None:
        self._policy.remove(user)
        self._end_trial(user, of_use=False)

    def _end_trial(self, user: int, of_use: bool) -> None:
        if self._on_trial.pop(user, None) is not None:
            self._share += (of_use - self._share) / self.RECENT


_TABLE: dict[str, type[Policy]] = {
    "none": Nothing,
    "lru": LRU,
    "lfu": LFU,
    "gdsf": GDSF,
    "predictive": Predictive,
}


def names() -> tuple[str, ...]:
    """Every policy."""
    return tuple(_TABLE)


def make(name: str, admit_visit: int = 1) -> Policy:
    """A policy that has seen nobody yet. admit_visit: the visit from which a user is admitted, if the policy does; 0:
    the first while that pays, else the second. Raises ValueError, listing the known ones, for an unknown name."""
    if name not in _TABLE:
        raise ValueError(f"unknown cache policy {name!r}; known: {', '.join(_TABLE)}")
    policy = _TABLE[name]()
    if admit_visit == 0:
        return WhileItPays(policy)
    return Doorkeeper(policy, admit_visit) if admit_visit > 1 else policy
