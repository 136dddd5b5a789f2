"""Simulation of one policy at one size: a replay of a trace through a cache that only counts pages.

The cache behaves as `grengines.cache.states.UserStates` does with one request in flight. The cached prefix of a
history is reused if the history's start has not moved, and dropped otherwise. A user's state grows at each visit.
Whole states are evicted, except the one in flight, and a state that exceeds the whole cache is not kept.
`grbench.cachesim.tiers` has what lies below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from heapq import heappop, heappush

import numpy as np

from grbench.cachesim.costs import Costs
from grbench.cachesim.tiers import Tier, TierOutcome
from grbench.cachesim.trace import Columns, Floats
from grengines.cache.policies import Policy

CHUNK = 1 << 16  # requests turned into Python numbers at a time
Progress = Callable[[int], None]  # called with the number of requests done


@dataclass
class Outcome:
    """Counts of one run. `hits` are requests that found usable state."""

    requests: int = 0
    hits: float = 0
    tokens: float = 0  # events of the histories whose state was reused
    flops: float = 0.0  # saved
    evictions: int = 0
    refused: int = 0  # states that were not admitted
    seconds: float = 0.0  # of the simulator
    lower: list[TierOutcome] = field(default_factory=list)  # of the tiers below; their hits are in `hits` too


def total(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the sums of what replicas counted."""
    sums = {f.name: sum(getattr(out, f.name) for out in outcomes) for f in fields(Outcome) if f.name != "lower"}
    tiers = zip(*(out.lower for out in outcomes), strict=True)
    lower = [
        TierOutcome(**{f.name: sum(getattr(out, f.name) for out in tier) for f in fields(TierOutcome)})
        for tier in tiers
    ]
    return Outcome(**sums, lower=lower)


class Simulation:
    """A cache of `capacity` pages under a policy, and the tiers below. `outcome` is complete after every chunk."""

    def __init__(self, trace: Columns, costs: Costs, policy: Policy, capacity: int, lower: Tier | None = None) -> None:
        self._trace, self._costs, self._policy, self._capacity = trace, costs, policy, capacity
        self._cached = [0] * trace.num_users  # events of each user's state
        self._starts = [0] * trace.num_users
        self._visits = [0.0] * trace.num_users  # times
        self._free = capacity
        self._lower = lower
        self.outcome = Outcome(lower=lower.outcomes() if lower else [])

    def run(self, progress: Progress = lambda done: None) -> Outcome:
        """Replay the whole trace."""
        trace, begin = self._trace, time.perf_counter()
        for i in range(0, len(trace), CHUNK):
            chunk = slice(i, i + CHUNK)
            columns = (trace.users, trace.times, trace.starts, trace.lengths)
            self._replay(*(column[chunk].tolist() for column in columns))
            self.outcome.seconds = time.perf_counter() - begin
            progress(self.outcome.requests)
        return self.outcome

    def _replay(self, users: list[int], times: list[float], starts: list[int], lengths: list[int]) -> None:
        # A loop over Python numbers, because it takes nearly all of the time.
        policy, cached, cached_starts, capacity = self._policy, self._cached, self._starts, self._capacity
        lower, visits = self._lower, self._visits
        pages, saved, exact, free = self._costs.pages, self._costs.saved, self._costs.exact, self._free
        admit, touch, victim, remove = policy.admit, policy.touch, policy.victim, policy.remove
        hits = tokens = evictions = refused = 0
        flops = 0.0
        for user, now, start, length in zip(users, times, starts, lengths, strict=True):
            have, need, cost = cached[user], pages[length], saved[length]
            valid = have and cached_starts[user] == start and not (exact and have != length)
            if have:
                if valid:
                    hits += 1
                    tokens += have
                    flops += saved[have]
                free += pages[have]
            if lower and (loaded := lower.visit(user, start, length, cost, now, bool(valid))):
                valid = True
                hits += 1
                tokens += loaded
                flops += saved[loaded]
            if need > capacity or not (valid or admit(user, need, cost, now)):
                refused += 1
                if have:
                    cached[user] = 0
                    remove(user)
                continue
            free -= need
            while free < 0:
                other = victim(now, {user})
                if lower:
                    lower.offer(other, cached[other], cached_starts[other], visits[other], user)
                free += pages[cached[other]]
                cached[other] = 0
                remove(other)
                evictions += 1
            cached[user] = length
            cached_starts[user] = start
            visits[user] = now
            touch(user, need, cost, now)
        self._free = free
        out = self.outcome
        out.requests += len(users)
        out.hits += hits
        out.tokens += tokens
        out.flops += flops
        out.evictions += evictions
        out.refused += refused


def belady(trace: Columns, costs: Costs, capacity: int, progress: Progress = lambda done: None) -> Outcome:
    """Simulate Belady's rule with bypass, which knows the future and evicts the furthest next use.

    No policy has more hits if all states have one size (Belady, 1966; Mattson et al., 1970). A state that will be
    invalid, because the history's start moves, is never kept. With unequal sizes the optimum is NP-hard: the result
    is then a good solution, and `bound` is the limit.
    """
    outcome, begin = Outcome(requests=len(trace)), time.perf_counter()
    pages, saved, end = costs.pages, costs.saved, len(trace)
    following = _useful_next(trace, costs)
    cached = [0] * trace.num_users
    expected = [0] * trace.num_users  # index of each cached user's next request
    heap: list[tuple[int, int]] = []  # furthest first; outdated items lie in the past and are never popped
    free = capacity
    for first in range(0, end, CHUNK):
        chunk = slice(first, first + CHUNK)
        columns = (trace.users, trace.lengths, following)
        for user, length, then in zip(*(column[chunk].tolist() for column in columns), strict=True):
            if have := cached[user]:  # it was kept because it is valid now
                outcome.hits += 1
                outcome.tokens += have
                outcome.flops += saved[have]
                free += pages[have]
                cached[user] = 0
            if then == end or pages[length] > capacity:
                outcome.refused += 1
                continue
            cached[user], expected[user] = length, then
            heappush(heap, (-then, user))
            free -= pages[length]
            while free < 0:
                then, other = heappop(heap)
                if cached[other] and expected[other] == -then:
                    free += pages[cached[other]]
                    cached[other] = 0
                    outcome.evictions += other != user
                    outcome.refused += other == user
        progress(min(first + CHUNK, end))
    outcome.seconds = time.perf_counter() - begin
    return outcome


def bound(trace: Columns, costs: Costs, capacity: int) -> Outcome:
    """Return an upper bound for every policy and any sizes. Hits, tokens and FLOPs each have their own bound.

    A hit needs the user's pages from one visit to the next, and the cache offers capacity x requests page-requests.
    The bound takes the hits with the best ratio of value to need until these are used up, and a part of the last
    one: a fractional knapsack, PFOO-L of Berger, Beckmann and Harchol-Balter (2018). For a cache that holds
    everything it is the infinite cache's hit rate.
    """
    begin = time.perf_counter()
    then, pages = _useful_next(trace, costs), np.array(costs.pages)[trace.lengths]
    kept = np.flatnonzero((then < len(trace)) & (pages <= capacity))
    lengths = trace.lengths[kept]
    need = (pages * (then - np.arange(len(trace))))[kept].astype(np.float64)
    there = float(capacity) * len(trace)
    return Outcome(
        requests=len(trace),
        hits=_knapsack(np.ones(len(kept)), need, there),
        tokens=_knapsack(lengths.astype(np.float64), need, there),
        flops=_knapsack(np.array(costs.saved)[lengths], need, there),
        seconds=time.perf_counter() - begin,
    )


def _useful_next(trace: Columns, costs: Costs) -> np.ndarray:
    """Return the index of the user's next request if this state is valid then, else len(trace)."""
    then = trace.next
    last = then == len(trace)
    index = np.where(last, 0, then)
    lost = trace.starts[index] != trace.starts
    if costs.exact:
        lost |= trace.lengths[index] != trace.lengths
    return np.where(last | lost, len(trace), then)


def _knapsack(values: Floats, needs: Floats, there: float) -> float:
    """Return the largest value for a total need of `there`, with fractions. values >= 0, needs > 0."""
    order = np.argsort(needs / np.maximum(values, 1e-300), kind="stable")
    used = np.cumsum(needs[order])
    whole = int(np.searchsorted(used, there, side="right"))
    total = float(values[order[:whole]].sum())
    if whole < len(order):
        left = there - (used[whole - 1] if whole else 0.0)
        total += float(values[order[whole]] * left / needs[order[whole]])
    return total
