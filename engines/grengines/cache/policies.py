"""Cache policies: small objects that decide which states are kept. The engine and `grbench cachesim` run them.

A policy is notified of every visit and names victims. It holds no state and moves no bytes. An entry is a user with a
size (above 0), a cost of computing the state again, and the time of the visit (seconds on the caller's clock). Sizes
and costs have any unit, the same for all users. Not thread-safe: the cache asks under its own lock. No torch import
here.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Set
from typing import Protocol

from grengines.cache.predictive import Predictive
from grkernels.nearest import nearest


class Policy(Protocol):
    """The questions of a cache. A visit is one `touch`, or `admit` and then, if stored, `touch` at the same time."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        """Return whether to store the state of a user who has no valid state."""

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        """Note that the user's state was stored, or used and stored again."""

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        """Return the user to evict: one that was touched, not removed, and is not in `exclude`.

        The entry stays until `remove`. Raises LookupError if there is none.
        """

    def remove(self, user: int) -> None:
        """Note that the user's state is gone. Does nothing for a user who has none."""

    def prefetch(self, now: float, horizon: float) -> list[int]:
        """Return users without a state who are expected within `horizon` seconds, soonest first.

        A cache can fetch their states from a lower tier. Each expected visit is returned once.
        """


class _Everyone:
    """A policy that admits everyone and expects nobody."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        return True

    def prefetch(self, now: float, horizon: float) -> list[int]:
        return []


class Nothing(_Everyone):
    """A policy that admits nobody: no cache."""

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        return False

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        pass

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        raise LookupError("nobody is cached")

    def remove(self, user: int) -> None:
        pass


class LRU(_Everyone):
    """A policy that evicts the least recently used state. Constant time."""

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
    """Greedy dual, size and frequency (Cherkasova, HP Labs 1998): evicts the least clock + visits * cost / size.

    The clock is that value of the last victim, so users who stop visiting are overtaken in the end. Visits count since
    the state was stored. Among equals the least recently used is evicted. O(log n): a heap whose outdated items are
    dropped when they surface, or all at once when they are most of it.
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
    """A policy that evicts the least often used state, with dynamic ageing: GDSF with equal costs and sizes."""

    def _worth(self, visits: int, size: int, cost: float) -> float:
        return visits


class _Visits:
    """Visit counts of the last `remember` users."""

    def __init__(self, remember: int) -> None:
        self._remember = remember
        self._counts: OrderedDict[int, int] = OrderedDict()  # least recently seen first

    def of(self, user: int) -> int:
        return self._counts.get(user, 0)

    def count(self, user: int) -> int:
        """Add a visit, and return the count."""
        n = self._counts[user] = self._counts.pop(user, 0) + 1
        if len(self._counts) > self._remember:
            self._counts.popitem(last=False)
        return n


class Doorkeeper:
    """Another policy that admits nobody before their n-th visit: storing a state that is never used costs time.

    The idea is from TinyLFU (Einziger, Friedman, Manes, ACM Transactions on Storage 2017). Exact counts of the last
    `remember` users replace its filter.
    """

    def __init__(self, policy: Policy, visits: int, remember: int = 1 << 20) -> None:
        self._policy, self._least, self._knocks = policy, visits, _Visits(remember)
        self.touch, self.victim = policy.touch, policy.victim
        self.remove, self.prefetch = policy.remove, policy.prefetch

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        willing = self._policy.admit(user, size, cost, now)  # it must count every visit
        return self._knocks.count(user) >= self._least and willing


class WhileItPays:
    """Another policy that admits users at their first visit only while that pays, and always from the second on.

    It pays while a share of PAYS or more of the users stored at their first visit return to a valid state. Storing
    costs 12 to 15% of a batch on a GPU, and a hit saves some 80% (experiments/user_cache.py). The policy starts as if
    it paid. One newcomer in SAMPLE is always stored, so that a change is noticed.
    """

    PAYS = 1 / 8
    SAMPLE = 16
    RECENT = 64  # outcomes that the share is a mean of, exponentially weighted

    def __init__(self, policy: Policy, remember: int = 1 << 20) -> None:
        self._policy, self._visits = policy, _Visits(remember)
        self.on_trial: dict[int, float] = {}  # users stored at their first visit, and its time
        self._newcomers = 0
        self._share = 1.0
        self.victim, self.prefetch = policy.victim, policy.prefetch

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        willing = self._policy.admit(user, size, cost, now)  # it must count every visit
        self._end_trial(user, of_use=False)  # the user is back, and nothing of the state is valid
        if self._visits.count(user) > 1 or not willing:
            return willing
        self._newcomers += 1
        return self._share >= self.PAYS or self._newcomers % self.SAMPLE == 0

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        self._policy.touch(user, size, cost, now)
        if self.on_trial.get(user, now) != now:
            self._visits.count(user)
            self._end_trial(user, of_use=True)
        elif self._visits.of(user) == 1:
            self.on_trial[user] = now

    def remove(self, user: int) -> None:
        self._policy.remove(user)
        self._end_trial(user, of_use=False)

    def _end_trial(self, user: int, of_use: bool) -> None:
        if self.on_trial.pop(user, None) is not None:
            self._share += (of_use - self._share) / self.RECENT


_TABLE: dict[str, type[Policy]] = {
    "none": Nothing,
    "lru": LRU,
    "lfu": LFU,
    "gdsf": GDSF,
    "predictive": Predictive,
}


def names() -> tuple[str, ...]:
    """Return the names of all policies."""
    return tuple(_TABLE)


def make(name: str, admit_visit: int = 1) -> Policy:
    """Return a policy that has seen nobody yet.

    admit_visit: the visit from which a user is admitted, if the policy agrees; 0: the first while that pays, else the
    second. Raises ValueError, listing the known names, for an unknown one.
    """
    if name not in _TABLE:
        raise ValueError(f"unknown cache policy {name!r}; {nearest(name, _TABLE)}known: {', '.join(_TABLE)}")
    policy = _TABLE[name]()
    if admit_visit == 0:
        return WhileItPays(policy)
    return Doorkeeper(policy, admit_visit) if admit_visit > 1 else policy
