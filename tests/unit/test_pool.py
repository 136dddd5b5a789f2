"""The paged pool and the index from users to pages, against naive models of them and the real model."""

from __future__ import annotations

import dataclasses
import logging
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Set
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.hstu_oracle import error_of_order_one, make_requests
from helpers.properties import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor

from grengines.api import Catalogue, Request, Tier
from grengines.cache import host, policies
from grengines.cache.events import Counters, EventLog
from grengines.cache.guarded_policy import GuardedPolicy
from grengines.cache.history import History
from grengines.cache.host import HostTier
from grengines.cache.index import Plan
from grengines.cache.places import HostPlaces
from grengines.cache.policies import Doorkeeper
from grengines.cache.pool import PagePool, PoolFullError, page_bytes
from grengines.cache.states import UserStates
from grengines.cache.storage import ReadError, StorageTier
from grengines.cache.storage_file import BLOCK
from grengines.hstu.cached import OF_STORAGE
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import HSTURanker
from grengines.runtime.batch import pack
from grkernels.operators import Operators
from grkernels.paged_write.torch import paged_write

CPU = torch.device("cpu")
Event = tuple[int, int, float, int]  # item, actions, weight, timestamp


class Recency:
    """A policy that is obviously right: least recently used."""

    def __init__(self) -> None:
        self.users: dict[int, tuple[int, float]] = {}
        self.admitting = True

    def touch(self, user: int, size: int, cost: float, now: float) -> None:
        self.users.pop(user, None)
        self.users[user] = (size, cost)

    def victim(self, now: float, exclude: Set[int]) -> int:
        return next(user for user in self.users if user not in exclude)

    def remove(self, user: int) -> None:
        del self.users[user]  # raises for an unknown user, which is counted

    def admit(self, user: int, size: int, cost: float, now: float) -> bool:
        return self.admitting

    def prefetch(self, now: float, horizon: float) -> list[int]:
        return [0, 1, 2, 3]


def make_pool(pages: int = 8, page: int = 4, device: str = "meta", **sizes: Any) -> PagePool:
    shape = {"layers": 1, "heads": 1, "qk_dim": 2, "v_dim": 1, "dtype": torch.float32} | sizes
    return PagePool(pages=pages, page=page, device=device, **shape)


def make_states(pages: int = 8, page: int = 4, **options: Any) -> UserStates:
    return UserStates(make_pool(pages, page), options.pop("policy", None) or Recency(), **options)


def request_of(events: list[Event], user: int = 0, request_id: int = 7) -> Request:
    items, actions, weights, times = zip(*events, strict=True) if events else ((), (), (), ())
    return Request(
        request_id=request_id,
        user_id=user,
        history_items=np.array(items, dtype=np.int64),
        history_actions=np.array(actions, dtype=np.int64),
        history_weights=np.array(weights, dtype=np.float32),
        history_timestamps=np.array(times, dtype=np.int64),
        num_seen=0,
        candidates=np.array([1], dtype=np.int64),
        timestamp=10**6,
        arrival_s=0.0,
        deadline_ms=100.0,
    )


def events_of(n: int, seed: int = 0) -> list[Event]:
    rng = random.Random(seed)
    return [(rng.randrange(50), rng.randrange(4), rng.random(), 100 * i + rng.randrange(100)) for i in range(n)]


def visit(states: UserStates, request: Request) -> Plan:
    """Run one request from lookup to commit."""
    (plan,) = states.lookup([request], now=0.0)
    states.extend(plan)
    states.commit(plan)
    return plan


# The pool


def test_counts_pages_exactly_and_refuses_what_is_wrong() -> None:
    pool = make_pool(pages=4, page=3)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.used, pool.available, pool.high_water) == (4, 0, 4)
    with pytest.raises(PoolFullError, match="1 pages asked for; 0 of 4 are free"):
        pool.allocate(1)
    pool.free(first)
    assert (pool.used, pool.available, pool.high_water) == (1, 3, 4)
    for wrong in ([first[0]], [second[0], second[0]], [second[0], 4], [-1], [second[0], first[1]]):
        with pytest.raises(ValueError, match="can't be freed"):
            pool.free(wrong)
        assert pool.used == 1
    with pytest.raises(ValueError, match="-1 pages"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="at least 1"):
        make_pool(pages=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_the_bytes_it_says(dtype: torch.dtype) -> None:
    shape = {"layers": 3, "page": 32, "heads": 2, "qk_dim": 8, "v_dim": 5, "dtype": dtype}
    one = page_bytes(**shape)
    assert one == 3 * 32 * 2 * (8 + 5) * dtype.itemsize
    pool = PagePool.within(4 * one - 1, device="cpu", **shape)
    assert pool.pages == 3
    assert 3 * one == sum(x.nbytes for x in pool.k + pool.v)
    assert not any(x.any() for x in pool.k + pool.v)
    with pytest.raises(ValueError, match=f"takes {one} bytes; the pool may have {one - 1}"):
        PagePool.within(one - 1, device="cpu", **shape)


def test_writes_rows_of_several_users_into_their_pages() -> None:
    pool = make_pool(pages=6, page=4, device="cpu", layers=2, heads=3)
    states = UserStates(pool, Recency())
    visit(states, request_of(events_of(3), user=1))
    plans = states.lookup([request_of(events_of(n), user=u) for u, n in ((1, 6), (2, 5), (3, 0))], now=0.0)
    assert [states.extend(plan) for plan in plans] == [True] * 3
    batch = HostPlaces.of(states.pool, plans, first_rows=[2, 10, 20], rows=20).to(CPU)
    assert batch.page_table.dtype == torch.int32 and batch.paged_lengths.dtype == torch.int64
    assert batch.page_table.tolist() == [list(plans[0].pages), list(plans[1].pages), [0, 0]]
    assert batch.paged_lengths.tolist() == [3, 0, 0]
    assert batch.stored_lengths.tolist() == [6, 5, 0]
    assert (batch.slots >= 0).nonzero()[:, 0].tolist() == [2, 3, 4, 10, 11, 12, 13, 14]
    k, v = torch.randn(20, 3, 2), torch.randn(20, 3, 1)
    paged_write(k, v, batch.slots, pool.k[1], pool.v[1])
    assert not pool.k[0].any()
    for mine, rows, tokens in ((plans[0].pages, slice(2, 5), slice(3, 6)), (plans[1].pages, slice(10, 15), slice(5))):
        assert torch.equal(pool.k[1][mine].flatten(0, 1)[tokens], k[rows])
        assert torch.equal(pool.v[1][mine].flatten(0, 1)[tokens], v[rows])


# Validity

Change = Callable[[list[Event]], list[Event]]


def replaced(at: int, **field: Any) -> Change:
    def change(events: list[Event]) -> list[Event]:
        event = dict(zip(("item", "actions", "weight", "time"), events[at], strict=True)) | field
        return [*events[:at], tuple(event.values()), *events[at + 1 :]]

    return change


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        pytest.param(lambda e: e, 10, id="the same"),
        pytest.param(lambda e: e + events_of(3, seed=1), 10, id="new events"),
        pytest.param(lambda e: e[:7], 7, id="truncated"),
        pytest.param(lambda e: [], 0, id="emptied"),
        pytest.param(lambda e: e[1:], 0, id="the start moved"),
        pytest.param(lambda e: e[2:] + events_of(3, seed=1), 0, id="the window moved"),
        pytest.param(lambda e: e[:4] + e[5:], 4, id="an event removed"),
        pytest.param(lambda e: e[:4] + events_of(1, seed=1) + e[4:], 4, id="an event arrived late"),
        pytest.param(lambda e: [*e[:4], e[5], e[4], *e[6:]], 4, id="two events the other way round"),
        pytest.param(lambda e: e[::-1], 0, id="reversed"),
        pytest.param(replaced(5, item=99), 5, id="another item"),
        pytest.param(replaced(5, actions=7), 5, id="another action"),
        pytest.param(replaced(5, weight=2.0), 5, id="another weight"),
        pytest.param(replaced(5, time=599), 5, id="another timestamp"),
        pytest.param(replaced(0, time=-1), 0, id="the first timestamp"),
        pytest.param(replaced(9, actions=7), 9, id="the last action"),
    ],
)
@pytest.mark.parametrize("contextual", [0, 2])
def test_serves_only_what_the_history_begins_with(change: Change, valid: int, contextual: int) -> None:
    states = make_states(contextual_seq_len=contextual)
    before = events_of(10)
    visit(states, request_of(before))
    after = change(before)
    if contextual:  # they see the whole history: all or nothing
        valid = 12 if after == before else 0
    (plan,) = states.lookup([request_of(after)], now=1.0)
    assert plan.cached == valid and len(plan.pages) == -(-valid // 4) == states.pool.used
    count, whole = states.counters(), valid == 10 + contextual
    assert (count.hits, count.partial_hits, count.misses) == (whole, 0 < valid < 10, 1 + (valid == 0))
    assert count.stale == (not whole)
    assert states.extend(plan) and plan.stored == contextual + len(after)
    states.commit(plan)
    assert visit(states, request_of(after)).cached == contextual + len(after)


def test_histories_agree_exactly_as_far_as_their_events_do() -> None:
    """Exchange any field of any event with another's, in any memory layout."""
    before = events_of(40)
    rng, first = random.Random(0), History.of(request_of(before))
    for _ in range(1000):
        i, j, column = rng.randrange(40), rng.randrange(40), rng.randrange(4)
        table = [list(event) for event in before]
        table[i][column], table[j][column] = table[j][column], table[i][column]
        after: Any = [tuple(event) for event in table][: rng.randrange(41)]
        same = [a == b for a, b in zip(before, after, strict=False)]
        expected = same.index(False) if False in same else len(same)
        r = request_of([e for e in after for _ in range(2)])
        columns = {f: getattr(r, f)[::2] for f in r.__dataclass_fields__ if f.startswith("history_")}
        for other in (request_of(after), dataclasses.replace(r, **columns)):
            assert first.common(History.of(other)) == History.of(other).common(first) == expected
            assert first.first(7).common(History.of(other)) == min(expected, 7)


def test_histories_over_one_memory_agree_without_a_look_and_only_those() -> None:
    whole = request_of(events_of(40))
    columns = {f: getattr(whole, f) for f in whole.__dataclass_fields__ if f.startswith("history_")}

    def over(**changed: np.ndarray) -> History:
        return History.of(dataclasses.replace(whole, **{**columns, **changed}))

    def cut(cut_to: slice) -> History:
        return over(**{name: column[cut_to] for name, column in columns.items()})

    columns["history_weights"][20] = np.nan  # unlike itself: comparing would end there
    first = over()
    assert [first.common(cut(slice(n))) for n in (0, 7, 40)] == [0, 7, 40]
    assert first.first(30).common(cut(slice(35))) == 30
    copied = {name: column.copy() for name, column in columns.items()}
    assert first.common(over(**copied)) == first.common(over(history_weights=copied["history_weights"])) == 20
    assert first.common(over(history_items=copied["history_items"])) == 40
    # The same address is not yet the same column.
    assert first.common(cut(slice(None, None, 2))) == 1 and first.common(cut(slice(1, None))) == 0
    doubled = columns["history_items"].view(np.int32)[:40]
    assert first.common(over(history_items=doubled)) <= 1


# Eviction, refusal, faults


def test_evicts_by_the_policy_but_never_what_is_in_flight() -> None:
    states = make_states(pages=6)
    for user in (1, 2, 3):
        visit(states, request_of(events_of(8), user=user))
    (pinned,) = states.lookup([request_of(events_of(8), user=1)], now=0.0)
    visit(states, request_of(events_of(8), user=4))  # user 1 was the least recently used
    assert [user in states for user in (1, 2, 3, 4)] == [False, False, True, True]
    assert states.counters().evictions == 1 and pinned.cached == 8
    states.commit(pinned)
    assert 1 in states


def test_refuses_a_history_that_can_never_fit() -> None:
    states = make_states(pages=3, page=4)
    visit(states, request_of(events_of(4), user=2))
    (plan,) = states.lookup([request_of(events_of(13), user=5, request_id=31)], now=0.0)
    with pytest.raises(
        PoolFullError,
        match="request 31 of user 5 doesn't fit the cache: its 13 tokens need 4 pages of 4 tokens, and the whole pool "
        "has 3; give the pool more memory or keep shorter histories",
    ):
        states.extend(plan)
    assert 2 in states and states.pool.used == 1
    states.abort(plan)
    assert visit(states, request_of(events_of(12), user=5)).stored == 12


def test_what_finds_no_room_beside_others_in_flight_is_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    states = UserStates(make_pool(pages=4, page=4, device="cpu"), Recency())
    visit(states, request_of(events_of(4), user=1))
    plans = states.lookup([request_of(events_of(n), user=u) for u, n in ((2, 12), (1, 8), (3, 1))], now=0.0)
    assert [states.extend(plan) for plan in plans] == [True, False, False]
    assert [(plan.cached, plan.stored) for plan in plans] == [(0, 12), (4, 4), (0, 0)]
    assert states.counters().unstored == 2
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert "request 7: its new tokens are not cached: 1 pages asked for; requests in flight hold 4 of 4" in caplog.text
    batch = HostPlaces.of(states.pool, plans, first_rows=[0, 12, 16], rows=20).to(CPU)
    assert (batch.slots >= 0).nonzero()[:, 0].tolist() == list(range(12))
    for plan in plans:
        states.commit(plan)
    assert (1 in states, 2 in states, 3 in states) == (True, True, False)
    assert states.pool.used == 4


def test_an_allocation_that_fails_costs_only_the_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    states = make_states()
    visit(states, request_of(events_of(4)))

    def fail(n: int) -> list[int]:
        raise PoolFullError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(states.pool, "allocate", fail)
        assert visit(states, request_of(events_of(9))).stored == 4
    assert states.counters().unstored == 1
    assert visit(states, request_of(events_of(9))).cached == 4


def test_of_two_requests_of_a_user_at_once_the_second_is_bypassed(caplog: pytest.LogCaptureFixture) -> None:
    states = make_states()
    visit(states, request_of(events_of(4)))
    first, second = states.lookup([request_of(events_of(6)), request_of(events_of(8))], now=0.0)
    (third,) = states.lookup([request_of(events_of(2))], now=0.0)
    assert (first.bypassed, second.bypassed, third.bypassed) == (False, True, True)
    assert (first.cached, second.cached, third.cached) == (4, 0, 0)
    assert [states.extend(p) for p in (first, second, third)] == [True, False, False]
    states.commit(second)
    states.abort(third)
    states.commit(first)
    assert visit(states, request_of(events_of(8))).cached == 6
    assert states.counters().bypassed == 2
    assert "another request of user 0 is in flight" in caplog.text


def test_abort_leaves_what_was_cached_and_plans_end_once() -> None:
    states = make_states()
    visit(states, request_of(events_of(5)))
    (plan,) = states.lookup([request_of(events_of(20))], now=0.0)
    assert states.extend(plan) and states.pool.used == 5
    states.abort(plan)
    assert states.pool.used == 2
    states.abort(plan)
    for end in (states.extend, states.commit):
        with pytest.raises(RuntimeError, match="committed or aborted already"):
            end(plan)
    assert visit(states, request_of(events_of(20))).cached == 5


def test_a_lookup_that_fails_takes_nobody_in_flight() -> None:
    """Times of another type than the state's, and fewer than events, can't be compared with them."""
    states = make_states()
    for user in (1, 2):
        visit(states, request_of(events_of(10), user))
    before, good = states.snapshot().states, request_of(events_of(10), 1)
    wrong = dataclasses.replace(request_of(events_of(10), 2), history_timestamps=np.zeros(5, np.int32))
    with pytest.raises(ValueError, match="broadcast"):
        states.lookup([good, wrong], now=1.0)
    after = states.snapshot()
    assert not after.in_flight and states.pool.used == 6
    assert {user: s.tokens for user, s in after.states.items()} == {user: s.tokens for user, s in before.items()}
    assert [visit(states, request_of(events_of(10), user)).cached for user in (1, 2)] == [10, 10]


def test_what_is_evicted_in_flight_is_gone_when_it_lands() -> None:
    states = make_states()
    for user in (1, 2, 3):
        visit(states, request_of(events_of(5), user=user))
    one, two = states.lookup([request_of(events_of(9), user=u) for u in (1, 2)], now=0.0)
    assert states.extend(one) and states.extend(two)
    assert states.evict(1) and not states.evict(1) and states.evict(3) and not states.evict(9)
    assert one.cached == 5 and states.pool.used == 6
    states.commit(one)
    states.clear()
    states.abort(two)
    assert (len(states), states.pool.used, states.counters().evictions) == (0, 0, 2)
    assert states.counters().policy_errors == 0


def test_a_user_that_the_policy_does_not_admit_is_not_stored() -> None:
    policy = Recency()
    states = make_states(policy=policy, cost=lambda tokens: tokens**2)
    visit(states, request_of(events_of(5), user=1))
    policy.admitting = False
    assert visit(states, request_of(events_of(5), user=2)).stored == 0
    assert visit(states, request_of(events_of(9), user=1)).stored == 9
    assert (states.counters().refused, states.pool.used) == (1, 3)
    assert policy.users == {1: (3 * states.pool.page_bytes, 81)}


@pytest.mark.parametrize("victim", ["raises", "in flight", "unknown", "unhashable"])
def test_a_policy_that_fails_costs_only_its_advice(victim: str, caplog: pytest.LogCaptureFixture) -> None:
    def raising(*_: Any) -> Any:
        raise ZeroDivisionError("no such luck")

    answers = {"in flight": lambda now, exclude: 1, "unknown": lambda now, exclude: 77, "unhashable": lambda *_: []}
    policy: Any = SimpleNamespace(touch=raising, remove=raising, admit=raising, victim=answers.get(victim, raising))
    states = make_states(pages=4, policy=policy)
    for user in (1, 2):
        assert visit(states, request_of(events_of(8), user=user)).stored == 8
    (plan,) = states.lookup([request_of(events_of(8), user=1)], now=0.0)
    assert visit(states, request_of(events_of(8), user=3)).stored == 8
    states.commit(plan)
    assert (1 in states, 2 in states, 3 in states) == (True, False, True)
    assert states.counters().policy_errors == 3 + 4 + 1 + 1  # admit, touch; victim and remove once
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].exc_info
    assert "cache policy SimpleNamespace.admit failed, going on without its advice" in caplog.text


# The host tier


class Unlisted(Set[int]):
    """Users whose list nobody may ask for."""

    def __init__(self, users: set[int]) -> None:
        self.users = users

    def __contains__(self, user: object) -> bool:
        return user in self.users

    def __len__(self) -> int:
        return len(self.users)

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the cost of an eviction grows with the number of states")


def test_an_eviction_from_a_lower_tier_looks_at_no_other_state() -> None:
    policy, users = GuardedPolicy(policies.LRU(), lambda tokens: (1, 1.0), EventLog()), Unlisted(set(range(9)))
    for user in users.users:
        policy.touch(user, 1, 0.0)

    def evict(user: int) -> None:
        users.users.remove(user)
        policy.remove(user)

    assert policy.make_room(1.0, {0, 1}, users, lambda: len(users) > 6, evict)
    assert users.users == {0, 1, 5, 6, 7, 8}


def test_room_that_only_excluded_states_take_is_not_made() -> None:
    log, users = EventLog(), dict.fromkeys([1, 2, 3])
    wrong: Any = SimpleNamespace(victim=lambda now, exclude: 1, remove=lambda user: None)
    policy = GuardedPolicy(wrong, lambda tokens: (1, 1.0), log)
    assert not policy.make_room(0.0, {1, 3}, users.keys(), lambda: True, users.pop)
    assert list(users) == [1, 3] and log.counters.policy_errors == 1  # it named 1, and 2 was evicted


def tiered(host_admit_visit: int) -> UserStates:
    """Room for two users of ten events on the device and for ten on the host."""
    pool = make_pool(pages=6, page=4, device="cpu")
    tier_policy = policies.make("lru", host_admit_visit)
    return UserStates(pool, Recency(), tier=HostTier(pool, 30 * pool.page_bytes), tier_policy=tier_policy)


def test_the_host_takes_nobody_who_came_once_and_everyone_who_came_back() -> None:
    once, back = tiered(2), tiered(2)
    for user in range(100):
        visit(once, request_of(events_of(10, seed=user), user=user))
        visit(back, request_of(events_of(10, seed=user % 10), user=user % 10))
    assert once.tier is not None and back.tier is not None
    count = once.counters()
    assert (once.tier.bytes_down, count.offloads, count.offloads_refused) == (0, 0, 0)
    assert count.host_refused == count.evictions == 98
    count = back.counters()
    assert set(back.tier.states) == set(range(10)) and back.tier.bytes_down == 30 * back.pool.page_bytes
    assert count.host_refused == 10  # evicted before their second visit
    assert count.offloads + count.host_refused == count.evictions and count.policy_errors == 0


def test_reports_the_tier_of_a_user_and_the_bytes_of_each_tier() -> None:
    states = tiered(1)
    for user in (1, 2, 3):
        visit(states, request_of(events_of(10, seed=user), user=user))
    assert [states.tier_of(user) for user in range(5)] == [Tier.NONE, Tier.HOST, Tier.DEVICE, Tier.DEVICE, Tier.NONE]
    one = 3 * states.pool.page_bytes  # of ten tokens
    assert states.state_bytes() == {Tier.DEVICE: 2 * one, Tier.HOST: one}
    [plan] = states.lookup([request_of(events_of(10, seed=2), user=2)], 4.0)
    assert states.tier_of(2) is Tier.DEVICE  # in flight
    assert states.state_bytes()[Tier.DEVICE] == 2 * one
    states.abort(plan)
    states.clear()
    assert {states.tier_of(user) for user in range(5)} == {Tier.NONE}
    assert states.state_bytes() == {Tier.DEVICE: 0, Tier.HOST: 0}


def test_visits_count_for_the_host_and_not_evictions() -> None:
    states = tiered(3)
    assert states.tier is not None
    one, other = (request_of(events_of(10, seed=u), user=u) for u in (1, 2))
    visit(states, one)
    for _ in range(3):
        visit(states, other)
        states.evict(2)
    assert 2 in states.tier.states
    states.evict(1)
    assert 1 not in states.tier.states
    visit(states, one)
    visit(states, one)  # found on the device: a visit all the same
    states.evict(1)
    assert 1 in states.tier.states
    # On demand everyone's state is sent.
    visit(states, request_of(events_of(10, seed=3), user=3))
    for keep in (Tier.HOST, Tier.STORAGE):  # there is no disk: they stay on the host
        states.clear(keep)
        assert 3 in states.tier.states
    with pytest.raises(ValueError, match="keep=DEVICE"):
        states.clear(Tier.DEVICE)


# Everything at once


USERS = st.integers(0, 3)


@pytest.mark.parametrize("contextual", [0, 3])
def test_the_policy_of_the_host_knows_the_states_on_the_host_alone(contextual: int) -> None:
    """A user without a history has at most contextual tokens to store."""
    pool, policy = make_pool(pages=1, page=8, device="cpu"), Recency()
    tier = HostTier(pool, pool.page_bytes)
    states = UserStates(pool, Recency(), contextual_seq_len=contextual, tier=tier, tier_policy=policy)
    for user, length in enumerate([0, 5, 5, 5]):
        plan = visit(states, request_of(events_of(length, seed=user), user=user))
        assert plan is not None and policy.users.keys() == tier.states.keys()
    assert list(tier.states) == [2] and not states.counters().policy_errors


class PoolMachine(RuleBasedStateMachine):
    """Users visit, histories change, and plans stay in flight. A dictionary of histories is the model."""

    seen: ClassVar[Counters] = Counters()  # by all runs together
    host_pages: ClassVar[int] = 0
    storage_pages: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(pages=7, page=2, device="cpu", layers=2)
        self.policy = Recency()
        self.tier = self.storage = None
        if self.host_pages:
            reserve = 60 if self.storage_pages else 0  # for all, so that no outcome depends on how fast the disk is
            self.tier = HostTier(self.pool, self.host_pages * self.pool.page_bytes, reserve)
            if self.storage_pages:
                self.storage = StorageTier(self.tier, self.storage_pages * 2 * BLOCK, "", "")
        tiers = {"tier": self.tier, "tier_policy": Doorkeeper(Recency(), 2)}
        below = {"storage": self.storage, "storage_policy": Recency()}
        self.states = UserStates(self.pool, self.policy, **tiers, **below)
        self.histories = {user: events_of(3 + user, seed=user) for user in range(4)}
        self.cached: dict[int, list[Event]] = {}  # what is in pages
        self.open: dict[int, tuple[Plan, list[Event]]] = {}
        self.clock = 10**4

    def teardown(self) -> None:
        for name, n in dataclasses.asdict(self.states.counters()).items():
            setattr(self.seen, name, getattr(self.seen, name) + n)
        if self.storage is not None:
            self.storage.close()

    def content(self, events: list[Event], layer: int) -> Tensor:
        """Return a number for each token that depends on the events up to it, as keys and values do."""
        numbers = [hash((layer, *events[: i + 1])) % 2**20 for i in range(len(events))]
        return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1)

    @rule(user=USERS, n=st.integers(1, 4))
    def act(self, user: int, n: int) -> None:
        for _ in range(n):
            self.clock += 1
            self.histories[user].append((self.clock % 3, 1, 0.5, self.clock // 2))

    @rule(user=USERS, at=st.integers(0, 5), how=st.sampled_from(["drop", "cut", "change", "shift"]))
    def rewrite(self, user: int, at: int, how: str) -> None:
        events = self.histories[user]
        if how == "shift":
            del events[:at]
        elif how == "cut":
            del events[at + 1 :]
        elif how == "drop":
            del events[at : at + 1]
        elif at < len(events):
            events[at] = (events[at][0] + 1, *events[at][1:])

    @rule(users=st.lists(USERS, min_size=1, max_size=3), extend=st.booleans())
    def begin(self, users: list[int], extend: bool) -> None:
        """A batch: its plans stay in flight."""
        histories = [list(self.histories[user]) for user in users]
        plans = self.states.lookup([request_of(h, user=u) for u, h in zip(users, histories, strict=True)], 0.0)
        for user, history, plan in zip(users, histories, plans, strict=True):
            assert plan.bypassed == (user in self.open)
            if plan.bypassed:
                assert (plan.cached, len(plan.pages), self.states.extend(plan)) == (0, 0, False)
                self.states.commit(plan)
                continue
            same = [a == b for a, b in zip(self.cached.get(user, []), history, strict=False)]
            assert plan.cached == (same.index(False) if False in same else len(same))
            self.open[user] = plan, history
            self.cached[user] = history[: plan.cached]
        if extend:
            for user in dict.fromkeys(users):
                self.extend(user, 1.0)

    def rotten(self, user: int) -> bool:
        """Return whether the disk lost the user's state."""
        return False

    @rule(user=USERS, share=st.sampled_from([0.3, 0.7, 1.0]))
    def extend(self, user: int, share: float) -> None:
        if user not in self.open:
            return
        plan, history = self.open[user]
        if plan.load is not None:
            return
        needed = -(-len(history) // 2)
        if needed > 7:
            with pytest.raises(PoolFullError, match=f"its {len(history)} tokens need {needed} pages"):
                self.states.extend(plan, share)
            return
        pinned = sum(len(other.pages) for other, _ in self.open.values())
        fits = needed - len(plan.pages) <= 7 - pinned
        assert self.states.extend(plan, share) == fits and plan.stored == (len(history) if fits else plan.cached)
        onload = self.states.start_loading([plan])
        assert (onload is not None) == (plan.cached > plan.on_device)
        if onload is not None:
            assert plan.on_device < plan.cached <= plan.below and (share < 1 or plan.cached == plan.below)
            try:
                onload.all_layers()
            except ReadError as error:
                assert error.user == user and self.rotten(user)
                self.states.abort(plan)
                self.states.lost(error)
                self.cached[user] = [] if plan.evicted else history[: plan.on_device]
                del self.open[user]
        # Nothing may be served to users whose states were evicted.
        self.cached = {u: h for u, h in self.cached.items() if u in self.states or u in self.open}

    @rule(user=USERS, commit=st.booleans(), write=st.booleans())
    def end(self, user: int, commit: bool, write: bool) -> None:
        if user not in self.open:
            return
        plan, history = self.open.pop(user)
        if commit or write:
            batch = HostPlaces.of(self.pool, [plan], first_rows=[plan.cached], rows=len(history)).to(CPU)
            for layer in range(2):
                numbers = self.content(history, layer)
                pages = self.pool.k[layer], self.pool.v[layer]
                paged_write(numbers.expand(-1, 1, 2), numbers, batch.slots, *pages)
        self.states.commit(plan) if commit else self.states.abort(plan)
        assert not plan.cleared or self.tier is None or user not in self.tier.states
        self.states.abort(plan)
        with pytest.raises(RuntimeError):
            self.states.commit(plan)
        self.cached[user] = [] if plan.evicted else history[: plan.stored if commit else plan.on_device]

    @rule(users=st.lists(USERS, min_size=1, max_size=6), new=st.integers(0, 2))
    def visits(self, users: list[int], new: int) -> None:
        """One user visits after another, each with some new events. Plans in flight end first."""
        for user in users:
            self.end(user, commit=True, write=True)
            self.act(user, new)
            self.begin([user], extend=True)
            self.end(user, commit=True, write=True)

    @rule(user=USERS, at=st.integers(0, 5), how=st.sampled_from(["drop", "cut", "change"]))
    def visit_with_another_past(self, user: int, at: int, how: str) -> None:
        self.visits([user], new=0)
        self.rewrite(user, at, how)
        self.visits([user], new=1)

    @rule(user=USERS)
    def evict(self, user: int) -> None:
        if user in self.open:
            self.states.evict(user)
            assert self.open[user][0].evicted
        else:
            assert self.states.evict(user) == bool(self.cached.pop(user, []))

    @rule(rarely=st.integers(0, 9), keep=st.sampled_from([Tier.NONE, Tier.HOST]))
    def clear(self, rarely: int, keep: Tier) -> None:
        if not rarely:
            self.states.clear(keep)
            assert self.tier is None or keep is Tier.HOST or self.tier.states.keys() <= self.open.keys()
            assert all(plan.evicted for plan, _ in self.open.values())
            self.cached = {u: h for u, h in self.cached.items() if u in self.open}

    @invariant()
    def pages_are_owned_once_and_hold_what_was_written(self) -> None:
        idle = self.states.snapshot().states
        held = [(s.pages, s.tokens, self.cached[u]) for u, s in idle.items()]
        held += [(plan.pages, plan.cached, history) for plan, history in self.open.values()]
        owned = [i for pages, *_ in held for i in pages]
        assert len(set(owned)) == len(owned) == self.pool.used
        assert self.pool.used + self.pool.available == self.pool.pages
        assert {u for u, h in self.cached.items() if h and u not in self.open} == set(idle)
        known = {u for u, (plan, _) in self.open.items() if plan.known}
        assert set(self.policy.users) == set(idle) | known and self.states.counters().policy_errors == 0
        for pages, tokens, history in held:
            for layer in range(2):
                expected = self.content(history[:tokens], layer)
                assert torch.equal(self.pool.v[layer][pages].flatten(0, 1)[:tokens], expected)
                assert torch.equal(self.pool.k[layer][pages].flatten(0, 1)[:tokens], expected.expand(-1, 1, 2))


class TieredMachine(PoolMachine):
    """The same with a host tier that has room for fewer states than there are."""

    seen = Counters()
    host_pages = 9

    @rule()
    def prefetch(self) -> None:
        self.states.prefetch(0.0, 1.0)

    @invariant()
    def host_pages_are_owned_once(self) -> None:
        assert self.tier is not None
        pages = self.host_pages
        runs = [run for state in self.tier.states.values() for run in state.extents]
        assert self.tier.used == sum(n for _, n in runs) <= pages
        if self.storage is not None:
            self.storage.finish_writes()
            runs += [run for reading in self.storage.reads for run in reading.held]
            pages += self.tier.reserve
        runs += self.tier.extents.free_runs
        assert sorted(page for begin, n in runs for page in range(begin, begin + n)) == list(range(pages))
        assert self.tier.extents.available == sum(n for _, n in self.tier.extents.free_runs)


class StoredMachine(TieredMachine):
    """The same with a disk below a smaller host tier, which sometimes loses what was written."""

    seen = Counters()
    host_pages, storage_pages = 5, 6

    def rotten(self, user: int) -> bool:
        return user in self._rotten

    @initialize()
    def nothing_rots_yet(self) -> None:
        self._rotten: set[int] = set()

    @rule(user=USERS, rarely=st.integers(0, 3), page=st.integers(0, 8), byte=st.integers(0, 2 * 12 - 1))
    def rot(self, user: int, rarely: int, page: int, byte: int) -> None:
        """Change a bit of a page in one layer while the state is nowhere else, and visit the user."""
        assert self.storage is not None
        if rarely or user in self.open:
            return
        self.visits([user, user], new=0)
        self.clear(0, Tier.STORAGE)
        if user not in self.storage.states:
            return
        pages = [i for begin, n in self.storage.states[user].extents for i in range(begin, begin + n)]
        row = byte // 12 * self.storage.pages + pages[page % len(pages)]
        memory = torch.frombuffer(mmap(-1, BLOCK), dtype=torch.uint8).numpy().reshape(1, BLOCK)
        self.storage.file.read(row, memory)
        memory[0, byte % 12] ^= 1
        self.storage.file.write(row, memory)
        self._rotten.add(user)
        self.visits([user], new=0)

    @invariant()
    def pages_of_the_file_are_owned_once(self) -> None:
        assert self.storage is not None
        runs = [run for state in self.storage.states.values() for run in state.extents] + self.storage.extents.free_runs
        assert sorted(page for begin, n in runs for page in range(begin, begin + n)) == list(range(self.storage.pages))


STORAGE_COUNTERS = OF_STORAGE - {"storage_busy"}
HOST_COUNTERS = {"host_hits", "loaded_tokens", "offloads", "offloads_refused", "host_refused", "prefetches"}


@pytest.mark.parametrize("machine", [PoolMachine, TieredMachine, StoredMachine])
def test_any_sequence_of_events_keeps_the_pool_exact(
    machine: type[PoolMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "STAGED_SHARE", 0.7)
    if (memory := Path("/dev/shm")).is_dir():
        monkeypatch.setattr(tempfile, "tempdir", str(memory))  # the disk of a small machine is slow
    machine.seen = Counters()
    run_state_machine_as_test(machine, settings=settings(examples(200, at_least=60), stateful_step_count=40))
    seen = dataclasses.asdict(machine.seen)
    never = {"refused", "policy_errors", "faults", "storage_busy"}
    never |= (set() if machine.host_pages else HOST_COUNTERS) | (set() if machine.storage_pages else STORAGE_COUNTERS)
    assert not any(seen.pop(name) for name in never)
    assert min(seen.values()) >= 2, seen  # it all happened, more than by one chance


def test_a_million_operations_leak_nothing() -> None:
    pool = make_pool(pages=1000)
    rng = random.Random(0)
    held: list[list[int]] = []
    pages = 0
    for _ in range(1_000_000):
        if held and (rng.random() < 0.5 or pages > 990):
            at = int(rng.random() * len(held))
            held[at], held[-1] = held[-1], held[at]
            pool.free(held[-1])
            pages -= len(held.pop())
        else:
            held.append(pool.allocate(1 + int(rng.random() * 10)))
            pages += len(held[-1])
    assert pool.used == pages == len({i for ids in held for i in ids})
    for ids in held:
        pool.free(ids)
    assert (pool.used, sorted(pool.allocate(1000))) == (0, list(range(1000)))


def test_the_index_leaks_nothing_under_pressure() -> None:
    states = make_states(pages=50, page=4)
    histories = [[request_of(events_of(n, seed=u), user=u) for n in range(1, 40, 3)] for u in range(30)]
    rng = random.Random(0)
    for now in range(20_000):
        batch = [rng.choice(histories[rng.randrange(30)]) for _ in range(rng.randint(1, 4))]
        plans = states.lookup(batch, float(now))
        for plan in plans:
            states.extend(plan)
        for plan in plans:
            states.commit(plan) if rng.random() < 0.8 else states.abort(plan)
    count = states.counters()
    assert min(count.hits, count.partial_hits, count.misses, count.bypassed, count.stale, count.evictions) > 50
    assert states.pool.used == sum(len(s.pages) for s in states.snapshot().states.values()) > 0
    assert count.policy_errors == 0
    states.clear()
    assert (states.pool.used, len(states)) == (0, 0)


def test_threads_share_the_index() -> None:
    """The pages of a plan in flight are its own, and every cached token is the committed one."""

    class Interrupted(Recency):
        """Yields to another thread while the index changes."""

        def remove(self, user: int) -> None:
            time.sleep(0)
            super().remove(user)

        def victim(self, now: float, exclude: Set[int]) -> int:
            user = super().victim(now, exclude)
            time.sleep(0)
            return user

    states = UserStates(make_pool(pages=24, page=4, device="cpu"), Interrupted())
    values = states.pool.v[0].flatten()
    histories = {u: events_of(30, seed=u) for u in range(12)}
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                users = [rng.randrange(12) for _ in range(2)]
                plans = states.lookup([request_of(histories[u][: rng.randrange(30)], user=u) for u in users], 0.0)
                for plan in plans:
                    states.extend(plan)
                    tokens = torch.arange(plan.stored)
                    slots = torch.tensor([*plan.pages, 0])[tokens // 4] * 4 + tokens % 4
                    assert torch.equal(values[slots[: plan.cached]], plan.user * 100.0 + tokens[: plan.cached])
                    values[slots] = plan.user * 100.0 + tokens
                    states.abort(plan) if rng.random() < 0.2 else states.commit(plan)
                if rng.random() < 0.1:
                    states.evict(rng.randrange(12))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    count = states.counters()
    assert count.evictions > 100
    assert count.hits + count.partial_hits + count.misses + count.bypassed == 8 * 300 * 2
    assert count.policy_errors == 0 and states.pool.used == sum(len(s.pages) for s in states.snapshot().states.values())


# With the model

CATALOGUE = Catalogue(num_users=50, num_items=40, num_actions=3)


def rank_through_pages(model: HSTURanker, states: UserStates, requests: list[Request], microbatch: int = 0) -> Tensor:
    """Return logits [candidates, tasks], request by request: encode uncached tokens, then the candidates.

    microbatch 0: new events and candidates in one pass. Otherwise `microbatch` candidates per request follow at a time.
    """
    pool, encoding = states.pool, model.encoding
    plans = states.lookup(requests, now=0.0)
    stored = [states.extend(plan) for plan in plans]
    assert all(stored) or not microbatch  # candidates on their own need the whole history in pages
    cached, whole = [p.cached for p in plans], [p.tokens for p in plans]

    hosts = [pack(requests, encoding, cached=cached, candidates=slice(0) if microbatch else slice(None))]
    if microbatch:
        most = max(len(r.candidates) for r in requests)
        slices = [slice(i, i + microbatch) for i in range(0, most, microbatch)]
        hosts += [pack(requests, encoding, cached=whole, candidates=s) for s in slices]
    places = HostPlaces.of(pool, plans, hosts[0].first_rows, hosts[0].padded_tokens).to(CPU)
    parts = [
        model.paged(host.to(CPU), pool, places, write=i == 0).split(host.candidate_counts)
        for i, host in enumerate(hosts)
    ]
    logits = [torch.cat(own) for own in zip(*parts, strict=True)]
    for plan in plans:
        states.commit(plan)
    return torch.cat(logits)


def model_and_states(pages: int = 20, policy: Any = None, **shape: Any) -> tuple[HSTURanker, UserStates]:
    config = HSTUConfig(embedding_dim=12, heads=2, qk_dim=4, v_dim=3, scaling_seqlen=32, max_positions=24, head_dim=6)
    config = dataclasses.replace(config, **shape)
    model = HSTURanker.build(config, CATALOGUE, Operators.eager(), seed=0, device="cpu", dtype=torch.float32)
    sizes = {"layers": config.layers, "heads": config.heads, "qk_dim": config.qk_dim, "v_dim": config.v_dim}
    pool = make_pool(pages=pages, device="cpu", **sizes)
    return model, UserStates(pool, policy or Recency(), contextual_seq_len=config.contextual_seq_len)


@pytest.mark.parametrize("microbatch", [0, 2])
@pytest.mark.parametrize("shape", [{}, {"contextual_seq_len": 2}, {"max_attn_len": 5}, {"layers": 3, "heads": 1}])
def test_visits_through_pages_equal_the_full_forward(shape: dict[str, int], microbatch: int) -> None:
    model, states = model_and_states(**shape)
    last = make_requests(np.random.default_rng(0), CATALOGUE, [11, 30, 1, 17], [3, 5, 1, 0])
    last = [dataclasses.replace(r, user_id=u) for u, r in enumerate(last)]

    def at(lengths: list[int]) -> list[Request]:
        names = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]
        return [
            dataclasses.replace(r, **{f: getattr(r, f)[:n] for f in names}) for r, n in zip(last, lengths, strict=True)
        ]

    changed = [dataclasses.replace(r, history_items=r.history_items.copy()) for r in last]
    for r in changed:
        r.history_items[len(r.history_items) // 2] += 1
    visits = [at([3, 7, 0, 17]), at([8, 30, 0, 17]), at([11, 29, 1, 9]), last, last, changed]
    for requests in visits:
        logits = rank_through_pages(model, states, requests, microbatch)
        full = model(pack(requests, model.encoding).to(CPU))
        assert error_of_order_one(logits.numpy(), full.numpy()) < 1e-5
    count = states.counters()
    assert count.cached_tokens > 0 and count.hits > 4 and count.stale >= 5


def test_requests_that_the_cache_cannot_help_are_answered_all_the_same() -> None:
    """Batches have two requests of a user, or more than the pool holds, and the policy raises."""

    class Clueless(Recency):
        def victim(self, now: float, exclude: Set[int]) -> int:
            raise ZeroDivisionError("no such luck")

    model, states = model_and_states(pages=6, policy=Clueless())
    rng = np.random.default_rng(0)
    histories = make_requests(rng, CATALOGUE, [24] * 4, [3] * 4)
    names = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]
    for _ in range(30):
        users, lengths = rng.integers(0, 4, 3), rng.integers(0, 25, 3)
        requests = [
            dataclasses.replace(histories[u], user_id=int(u), **{f: getattr(histories[u], f)[:n] for f in names})
            for u, n in zip(users, lengths, strict=True)
        ]
        logits = rank_through_pages(model, states, requests)
        full = model(pack(requests, model.encoding).to(CPU))
        assert error_of_order_one(logits.numpy(), full.numpy()) < 1e-5
    count = dataclasses.asdict(states.counters())
    assert not any(count.pop(never) for never in ("refused", "faults", *HOST_COUNTERS, *OF_STORAGE))
    assert min(count.values()) > 0, count
