"""Cache policies against naive models of themselves; what the predictive one knows of its users."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grengines.cache import policies, predictive
from grengines.cache.predictive import Predictive

Entry = dict[str, Any]  # of a user: visits, the time they were touched, priority
# The least of this and the clock, which is the last victim's, goes; of equals the least recently used.
WORTH: dict[str, Callable[[int, int, float], float]] = {
    "lru": lambda visits, size, cost: 0.0,
    "lfu": lambda visits, size, cost: visits,
    "gdsf": lambda visits, size, cost: visits * cost / size,
}
steps = st.lists(
    st.tuples(st.sampled_from(["touch", "touch", "touch", "evict", "remove"]), st.integers(0, 5), st.integers(1, 4)),
    max_size=60,
)


def visit(policy: policies.Policy, user: int, now: float) -> bool:
    """A visit of a user who has no state; whether it was stored."""
    stored = policy.admit(user, 1, 1.0, now)
    if stored:
        policy.touch(user, 1, 1.0, now)
    return stored


@pytest.mark.parametrize("name", WORTH)
@examples(150)
@given(steps=steps, excluded=st.sets(st.integers(0, 5), max_size=3))
def test_the_victim_is_the_naive_one(name: str, steps: list[tuple[str, int, int]], excluded: set[int]) -> None:
    policy, users, clock = policies.make(name), dict[int, Entry](), 0.0
    for now, (step, user, size) in enumerate(steps):
        cost = 10.0 * size + user
        if step == "touch":
            assert policy.admit(user, size, cost, now)
            policy.touch(user, size, cost, now)
            visits = users.get(user, {"visits": 0})["visits"] + 1
            users[user] = {"visits": visits, "touched": now, "priority": clock + WORTH[name](visits, size, cost)}
        elif step == "remove" and user in users:
            policy.remove(user)
            del users[user]
        elif step == "evict" and set(users) - excluded:
            least = min(set(users) - excluded, key=lambda u: (users[u]["priority"], users[u]["touched"]))
            assert policy.victim(now, excluded) == least
            assert policy.victim(now, excluded) == least  # asking changes nothing
            policy.remove(least)
            clock = users[least]["priority"]
            del users[least]
    assert policy.prefetch(1e9, 1e9) == []


@pytest.mark.parametrize("name", [name for name in policies.names() if name != "none"])
@examples(100)
@given(
    steps=steps,
    times=st.lists(st.floats(-1e9, 1e9) | st.sampled_from([0.0, 1.0]), min_size=60, max_size=60),
    excluded=st.sets(st.integers(0, 5), max_size=3),
)
def test_the_victim_is_cached_whatever_the_clock_says(
    name: str, steps: list[tuple[str, int, int]], times: list[float], excluded: set[int]
) -> None:
    policy, cached = policies.make(name), set[int]()
    for (step, user, size), now in zip(steps, times, strict=False):
        if step == "touch":
            if user in cached or policy.admit(user, size, 1.0, now):
                policy.touch(user, size, 1.0, now)
                cached.add(user)
        elif step == "remove":
            policy.remove(user)  # nothing for a user who has none
            cached.discard(user)
        elif cached - excluded:
            victim = policy.victim(now, excluded)
            assert victim in cached - excluded
            policy.remove(victim)
            cached.remove(victim)
        else:
            with pytest.raises(LookupError):
                policy.victim(now, excluded)
        assert not set(policy.prefetch(now, 10.0)) & cached


def test_none_admits_nobody() -> None:
    policy = policies.make("none")
    assert not visit(policy, 7, 0.0)
    policy.touch(7, 1, 1.0, 0.0)
    policy.remove(7)
    assert policy.prefetch(0.0, 1e9) == []
    with pytest.raises(LookupError):
        policy.victim(0.0)


def hits_of(policy: policies.Policy, visits: list[tuple[int, float]], capacity: int) -> int:
    """Count the hits of a cache that holds `capacity` users, all of one size."""
    cached, hits = set[int](), 0
    for user, now in visits:
        if user in cached:
            hits += 1
            policy.touch(user, 1, 1.0, now)
        elif visit(policy, user, now):
            if len(cached) == capacity:
                victim = policy.victim(now, {user})
                policy.remove(victim)
                cached.remove(victim)
            cached.add(user)
    return hits


def test_periodic_users_are_kept_over_those_who_come_once() -> None:
    # 20 users come every 100 s, and between two visits of each 99 come who never do again.
    visits = [(t // 5 % 20 if t % 5 == 0 else 1000 + t, float(t)) for t in range(20_000)]
    assert hits_of(policies.make("lru"), visits, 30) == 0
    assert hits_of(Predictive(), visits, 30) > 0.9 * 20_000 / 5


def test_of_users_alike_the_least_recently_seen_goes() -> None:
    policy = Predictive()
    for user in range(3000):
        visit(policy, user, float(user))
        if user >= 10:
            assert policy.victim(float(user)) == user - 10
            policy.remove(user - 10)


def test_prefetch_names_each_expected_visit_once_and_soonest_first() -> None:
    policy = Predictive()
    periods = {1: 50.0, 2: 30.0, 3: 40.0, 4: 1000.0, 5: 35.0}
    for user, period in periods.items():
        for turn in (2, 1, 0):
            policy.touch(user, 1, 1.0, 1000.0 - turn * period)  # all were last seen at 1000
    policy.touch(6, 1, 1.0, 1000.0)  # once: nobody knows when again
    assert policy.prefetch(1000.0, 1e6) == []  # they have their states
    for user in (1, 2, 3, 4, 6):
        policy.remove(user)
    assert policy.prefetch(1000.0, 20.0) == []
    assert policy.prefetch(1005.0, 40.0) == [2, 3]
    assert policy.prefetch(1006.0, 60.0) == [1]
    assert policy.prefetch(1006.0, 60.0) == []
    visit(policy, 2, 1030.0)
    policy.remove(2)
    assert policy.prefetch(1040.0, 60.0) == [2]  # the next visit
    policy.remove(5)
    assert policy.prefetch(1041.0, 60.0) == []  # was expected at 1035: overdue
    visit(policy, 4, 1050.0)  # back earlier, and has a state again
    assert policy.prefetch(1900.0, 600.0) == []


def test_who_returns_to_a_state_that_is_not_valid_is_refused_for_longer_each_time() -> None:
    policy, admitted = Predictive(), []
    for turn in range(100):
        if visit(policy, 1, 10.0 * turn):
            admitted.append(turn)
        else:
            policy.remove(1)
    assert admitted == [0, 1 + predictive.REFUSALS, 1 + 3 * predictive.REFUSALS + 1]
    visit(policy, 2, 1000.0)
    policy.remove(2)  # evicted: no fault of the state
    assert visit(policy, 2, 1010.0)


def test_equal_and_backward_times_teach_nothing() -> None:
    policy = Predictive()
    for user in range(100):
        for now in (5.0, 5.0, 3.0, 3.0, -1e6):
            policy.touch(user, 1, 1.0, now)
    for user in range(100):
        policy.remove(user)
    assert policy.prefetch(-1e6, 1e9) == []  # no gap is known
    for user in range(100):
        policy.touch(user, 1, 1.0, 0.0)  # 10^6 s after the clock's jump
    assert policy.victim(1.0) == 0


def test_memory_is_bounded() -> None:
    policy = Predictive(remember=1000)
    for turn in range(3):
        for user in range(5000):
            now = 5000.0 * turn + user
            visit(policy, user % 1500 if turn else user, now)
            if user % 2:
                policy.remove(policy.victim(now))
            if user % 50 == 0:
                for cached in sorted(policy.snapshot().cached)[:40]:
                    policy.remove(cached)
    now_known = policy.snapshot()
    assert len(now_known.users) == 1000
    assert now_known.panel <= now_known.users
    assert now_known.awaited <= 2 * 1000 + 64
    assert now_known.gaps <= max(predictive.SOON, 1000)
    assert now_known.queued == len(now_known.cached)


def test_a_large_panel_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictive, "PANEL", 100)
    policy = Predictive()
    for user in range(10_000):
        visit(policy, user, float(user))
        policy.remove(user)
    now_known = policy.snapshot()
    assert 20 < len(now_known.panel) <= 100
    assert now_known.sampled == now_known.panel


def test_unknown_policies_list_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown cache policy 'lruu'; nearest: lru; known: none, lru, lfu, gdsf, predictive"
    ):
        policies.make("lruu")


def test_a_doorkeeper_admits_from_the_configured_visit() -> None:
    policy = policies.make("lru", admit_visit=3)
    assert [policy.admit(1, 1, 1.0, float(t)) for t in range(4)] == [False, False, True, True]
    policy.touch(1, 1, 1.0, 4.0)
    assert policy.victim(5.0) == 1
    forgetful = policies.Doorkeeper(policies.LRU(), 2, remember=2)
    assert [forgetful.admit(user, 1, 1.0, 0.0) for user in (1, 2, 3, 1, 3)] == [False, False, False, False, True]
    assert not policies.Doorkeeper(policies.Nothing(), 2).admit(1, 1, 1.0, 0.0)


def test_first_visits_are_stored_only_while_enough_of_them_return() -> None:
    policy, rng = policies.make("lru", admit_visit=0), random.Random(0)
    capacity, now, users = 50, 0.0, itertools.count()

    def share_stored(visits: int, returning: float) -> float:
        """Send newcomers, a share of which return at once, to a cache that holds few; return the share stored."""
        nonlocal now
        stored = 0
        for user in itertools.islice(users, visits):
            now += 1
            if visit(policy, user, now):
                stored += 1
                cached.append(user)
                if rng.random() < returning:
                    policy.touch(user, 1, 1.0, now + 0.5)
            if len(cached) > capacity:
                assert policy.victim(now) == cached[0]
                policy.remove(cached.pop(0))
        return stored / visits

    cached: list[int] = []
    assert share_stored(100, returning=0.0) == 1  # until the first have gone nothing is known
    share_stored(300, returning=0.0)
    assert share_stored(3200, returning=0.0) == 1 / policies.WhileItPays.SAMPLE
    share_stored(2000, returning=0.5)  # now they do
    assert share_stored(1000, returning=0.5) == 1
    share_stored(3000, returning=0.02)
    assert share_stored(1600, returning=0.02) < 0.15
    for user in range(3):
        assert visit(policy, user, now) and policy.admit(user, 1, 1.0, now + 1)  # not newcomers any more
    assert set(policy.on_trial) <= set(cached)  # type: ignore[attr-defined]


def test_a_state_that_is_not_valid_on_return_was_of_no_use() -> None:
    policy = policies.make("lru", admit_visit=0)
    for user in range(1000):
        policy.admit(user, 1, 1.0, 2.0 * user)
        policy.touch(user, 1, 1.0, 2.0 * user)
        assert policy.admit(user, 1, 1.0, 2.0 * user + 1)  # the second visit
        policy.touch(user, 1, 1.0, 2.0 * user + 1)
    assert not policy.admit(5000, 1, 1.0, 5000.0)
    assert not policies.WhileItPays(policies.Nothing()).admit(1, 1, 1.0, 0.0)
