"""The policy that keeps the users who are expected soonest."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Set
from math import frexp, inf, log2
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Ages (times since a user's last visit) in octaves: below 2^-10 s, then up to 2^30 s (34 years).
LOWEST, AGES = -10, 41
EDGES = np.concatenate([[0.0], 2.0 ** np.arange(LOWEST, LOWEST + AGES)])
LOW, WIDTH = EDGES[:-1], np.diff(EDGES)
CLASSES = 1 + 2 * (AGES // 2 + 1)  # see `_User.visited`

# Chosen on MovieLens-100K and on synthetic traces. Half or double of any changes hit rates by at most a point or so.
RECENT = 0.3  # weight of the newest gap in a user's mean, once there are a few
KEPT = 0.9  # weight of older observations, each time the tables are rebuilt
PRIOR = 2.0  # weight of the whole population's rate in the rate of a class, in visits
SOON, LATE = 256, 4096  # the tables are rebuilt after one visit for each user on the panel, within these limits
PANEL = 16384  # most users that the tables are learned from: a rebuild takes some 10 ms
MARGIN = 1.25  # the least recently seen user is evicted unless worth more than this times the least worth
REFUSALS, MOST_REFUSALS = 16, 1024  # visits without a state after one that was of no use: first and most


class _User:
    """Record of a user; times in seconds."""

    __slots__ = ("due", "gaps", "group", "last", "mean", "refusals", "retry", "sampled")

    def __init__(self, now: float, sampled: bool) -> None:
        self.last = now
        self.gaps = 0  # between visits, so far
        self.mean = 0.0  # of log2 of the gaps, the newest weighing most
        self.group = 0  # class
        self.due = inf  # expected time of the next visit; inf: unknown, or already returned by `prefetch`
        self.retry = 0  # visits before a state is admitted again
        self.refusals = REFUSALS  # visits without a state after the next one that is of no use
        self.sampled = sampled  # is on the panel

    def visited(self, now: float, gap: float) -> None:
        self.last = now
        self.gaps += 1
        self.mean += (log2(gap) - self.mean) * max(1 / self.gaps, RECENT)
        self.due = now + 2.0**self.mean
        # Class 0: one visit. Then two for each factor of 4 of the mean gap: one gap known, or more.
        octave = min(max(int(self.mean - LOWEST), 0), AGES - 1)
        self.group = 1 + 2 * (octave // 2) + (self.gaps > 1)


class Snapshot(NamedTuple):
    """Users and sizes of the policy's tables at one moment."""

    users: frozenset[int]  # remembered
    sampled: frozenset[int]  # marked as on the panel
    panel: frozenset[int]
    cached: frozenset[int]
    queued: int  # users in the queues of all classes
    awaited: int
    gaps: int


class Predictive:
    """Belady's rule with an estimate of the future: evicts the user who is expected last.

    **Estimate.** Users are classed by the mean gap between their visits. For each class a table holds the rate of
    return at every age (time since the last visit): returns over time at risk. Visits still awaited count as time at
    risk, the whole population's rate is a prior, and older observations fade. A state's worth at an age is the chance
    of a visit within t over the expected time that the state takes up room until then, at the best t. This is the hit
    density of Beckmann, Chen and Cidon (LHD, NSDI 2018). Worth never rises with age, so within a class the least
    recently seen user is evicted. The same holds for two classes of about the same worth: if gaps carry no
    information, the policy is LRU.

    **Admission.** A user whose state was not valid on return (the history's start had moved) is refused for the next
    visits, and for twice as many each time it happens again.

    **Prefetch.** A user is expected one (geometric) mean gap after the last visit.

    **Cost.** The last `remember` users are remembered (350 bytes each), beside those that are cached. The tables are
    learned from a panel of at most PANEL of them, chosen by hash. `victim` compares the first of at most CLASSES queues
    and takes constant time. `prefetch` is O(log n) for each user. Equal times are one visit, and a clock that runs
    backwards teaches nothing.
    """

    def __init__(self, remember: int = 1 << 20) -> None:
        self._remember = remember
        self._users: OrderedDict[int, _User] = OrderedDict()  # least recently seen first
        self._cached: dict[int, int] = {}  # class
        self._queues: dict[int, OrderedDict[int, _User]] = {}  # by class: cached users, least recently seen first
        self._awaited: list[tuple[float, int]] = []  # heap of (due, user) of users who lost their states
        self._panel: dict[int, _User] = {}
        self._thinned = 0  # users on the panel have a hash that ends in this many zero bits
        self._gaps: list[tuple[int, float]] = []  # of the panel, since the last rebuild: class before, seconds
        self._visits = 0  # likewise
        self._tables = _Tables()
        self._worth = self._tables.learn([], np.zeros(0), np.zeros(0, np.int64))  # [class][age], 1/s

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        known = self._seen(user, now)
        if user in self._cached:  # and not valid
            known.retry, known.refusals = known.refusals, min(2 * known.refusals, MOST_REFUSALS)
        if known.retry:
            known.retry -= 1
            return False
        return True

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        known = self._seen(user, now)
        group = known.group
        if self._cached.get(user, group) != group:
            self._take_out(user)
        self._cached[user] = group
        queue = self._queues.get(group)
        if queue is None:
            queue = self._queues[group] = OrderedDict()
        queue[user] = known
        queue.move_to_end(user)

    def victim(self, now: float, exclude: Set[int] = frozenset()) -> int:
        least, worst, oldest, first, its = inf, -1, -1, inf, inf
        table = self._worth
        for group, queue in self._queues.items():
            for user in queue:
                if user not in exclude:  # the first such is worth least in its queue
                    last = queue[user].last
                    octave = frexp(now - last)[1] - LOWEST if now > last else 0
                    worth = table[group][octave if 0 <= octave < AGES else 0 if octave < 0 else AGES - 1]
                    if worth < least:
                        least, worst = worth, user
                    if last < first:
                        first, oldest, its = last, user, worth
                    break
        if least == inf:
            raise LookupError("every user is excluded")
        return worst if its > MARGIN * least else oldest

    def remove(self, user: int) -> None:
        known = self._take_out(user)
        if known is None or known.due == inf or known.retry:
            return
        heapq.heappush(self._awaited, (known.due, user))
        if len(self._awaited) > 2 * len(self._users) + 64:
            self._awaited = [item for item in set(self._awaited) if self._is_awaited(*item)]
            heapq.heapify(self._awaited)

    def prefetch(self, now: float, horizon: float) -> list[int]:
        named = []
        while self._awaited and self._awaited[0][0] <= now + horizon:
            due, user = heapq.heappop(self._awaited)
            if self._is_awaited(due, user):
                self._users[user].due = inf
                if due >= now:  # an overdue user may never come
                    named.append(user)
        return named

    def snapshot(self) -> Snapshot:
        """Return a copy of what the policy remembers, without the tables."""
        return Snapshot(
            users=frozenset(self._users),
            sampled=frozenset(user for user, known in self._users.items() if known.sampled),
            panel=frozenset(self._panel),
            cached=frozenset(self._cached),
            queued=sum(map(len, self._queues.values())),
            awaited=len(self._awaited),
            gaps=len(self._gaps),
        )

    def _is_awaited(self, due: float, user: int) -> bool:
        return user not in self._cached and user in self._users and self._users[user].due == due

    def _take_out(self, user: int) -> _User | None:
        """Remove and return a cached user; None if there is no such user."""
        group = self._cached.pop(user, None)
        if group is None:
            return None
        queue = self._queues[group]
        known = queue.pop(user)
        if not queue:
            del self._queues[group]
        return known

    def _seen(self, user: int, now: float) -> _User:
        """Return the record of a user who visits now. A second call at the same time changes nothing."""
        known = self._users.get(user)
        if known is None:
            known = self._users[user] = _User(now, self._is_chosen(user))
            if known.sampled:
                self._panel[user] = known
                if len(self._panel) > PANEL:
                    self._thin_panel()
            if len(self._users) > self._remember:
                gone, _ = self._users.popitem(last=False)
                self._panel.pop(gone, None)
        else:
            gap = now - known.last
            if gap <= 0:
                known.last = now
                return known
            if known.sampled:
                self._gaps.append((known.group, gap))
            known.visited(now, gap)
            self._users.move_to_end(user)
        if known.sampled:
            self._visits += 1
            if self._visits >= min(max(SOON, len(self._panel)), LATE):
                self._learn(now)
        return known

    def _is_chosen(self, user: int) -> bool:
        return not (user * 0x9E3779B97F4A7C15 >> 20) & ((1 << self._thinned) - 1)

    def _thin_panel(self) -> None:
        self._thinned += 1
        for user, known in list(self._panel.items()):
            if not self._is_chosen(user):
                known.sampled = False
                del self._panel[user]

    def _learn(self, now: float) -> None:
        panel, n = self._panel.values(), len(self._panel)
        ages = np.maximum(now - np.fromiter((known.last for known in panel), np.float64, n), 0.0)
        groups = np.fromiter((known.group for known in panel), np.int64, n)
        self._worth = self._tables.learn(self._gaps, ages, groups)
        self._gaps, self._visits = [], 0


class _Tables:
    """Returns and time at risk of each class at each age, [CLASSES, AGES]."""

    def __init__(self) -> None:
        self._returns = np.zeros((CLASSES, AGES))
        self._risk = np.zeros((CLASSES, AGES))  # seconds

    def learn(self, gaps: list[tuple[int, float]], ages: Floats, groups: Ints) -> list[list[float]]:
        """Return the worth of a state, [class][age] in 1/s, from all gaps so far and the current ages.

        gaps: class and seconds of gaps that ended. ages, groups: seconds and classes of gaps that go on.
        """
        ended = np.array(gaps).reshape(-1, 2)
        returns, risk = _exposure(ended[:, 0].astype(np.int64), ended[:, 1])
        self._returns = KEPT * self._returns + returns
        self._risk = KEPT * self._risk + risk
        risk = self._risk + _exposure(groups, ages)[1]
        common = (self._returns.sum(0) + 1) / (risk.sum(0) + EDGES[1:])  # without any observation: one over the age
        rates = (self._returns + PRIOR) / (risk + PRIOR / common)
        worth: list[list[float]] = np.minimum.accumulate(_density(rates), axis=1).tolist()
        return worth


def _exposure(groups: Ints, ages: Floats) -> tuple[Floats, Floats]:
    """Return the number of gaps that end at each age, and the seconds spent at each, [CLASSES, AGES] both."""
    at = np.clip(np.searchsorted(EDGES, ages, side="right") - 1, 0, AGES - 1)
    cells, count, shape = groups * AGES + at, CLASSES * AGES, (CLASSES, AGES)
    ends = np.bincount(cells, minlength=count).reshape(shape).astype(np.float64)
    inside = np.bincount(cells, np.minimum(ages - LOW[at], WIDTH[at]), count).reshape(shape)
    passing = np.cumsum(ends[:, ::-1], axis=1)[:, ::-1] - ends
    return ends, inside + passing * WIDTH


def _density(rates: Floats) -> Floats:
    """Return the maximum over t of P(a visit within t) / E[time until the visit or t] for each class and age, 1/s."""
    worth = np.empty_like(rates)
    for age in range(AGES):
        width = WIDTH[age:].copy()
        width[0] /= 2  # from the middle of its octave
        ahead = rates[:, age:]
        left = np.exp(-np.cumsum(ahead * width, axis=1))  # not back at the end of each octave
        back = -np.diff(left, axis=1, prepend=1.0)  # within it
        # The expected time in an octave is that chance over the rate. Where no time passes, nothing comes back.
        time = np.maximum(np.cumsum(back / ahead, axis=1), 1e-300)
        worth[:, age] = (np.cumsum(back, axis=1) / time).max(axis=1)
    return worth
