"""The choice among waiting requests: nobody is lost, starved or late because of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grbench.scenarios.batcher import Batcher, ContinuousBatcher, Ticket
from grbench.scenarios.waiting import MOST_PASSED, Key, Waiting, order_key
from grengines.api import Finished, RankResult, Request, Tier

EMPTY = np.zeros(0, np.int64)
STEP_S = 0.01  # between two batches


def ticket(request_id: int, arrived: float = 0.0, *, user: int = -1, events: int = 0, deadline: float = 1e9) -> Ticket:
    history = np.zeros(events, np.int64)
    user = request_id if user < 0 else user
    request = Request(
        request_id, user, history, history, history.astype(np.float32), history, 0, EMPTY, 0, arrived, deadline
    )
    return Ticket(request, arrived)


def events(request: Request) -> int:
    return len(request.history_items)


def drain(arrivals: list[list[Ticket]], key: Callable[[Request], int] | None, max_batch: int) -> list[list[Ticket]]:
    """Take a batch after each group of arrivals, then all that is left."""
    waiting, batches, step = Waiting(key, max_batch), [], 0
    while step < len(arrivals) or len(waiting):
        waiting.add(arrivals[step] if step < len(arrivals) else [])
        if batch := waiting.take(max_batch, step * STEP_S):
            batches.append(batch)
        step += 1
    return batches


@st.composite
def loads(draw: st.DrawFn) -> list[list[Ticket]]:
    """Groups of tickets that arrive between batches: few users, few lengths, some with deadlines."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=20))
    deadline = st.sampled_from([20.0, 60.0, 1e9])
    arrivals, number = [], 0
    for step, size in enumerate(sizes):
        group = []
        for _ in range(size):
            user, length, limit = draw(st.integers(0, 9)), draw(st.integers(0, 5)), draw(deadline)
            group.append(ticket(number, step * STEP_S, user=user, events=length, deadline=limit))
            number += 1
        arrivals.append(group)
    return arrivals


@examples(300, at_least=60)
@given(arrivals=loads(), max_batch=st.integers(1, 5))
def test_each_is_answered_once_within_the_bound_and_users_stay_in_order(
    arrivals: list[list[Ticket]], max_batch: int
) -> None:
    batches = drain(arrivals, events, max_batch)
    order = [t.request for batch in batches for t in batch]
    ids = [r.request_id for r in order]
    assert sorted(ids) == list(range(sum(map(len, arrivals))))
    by_arrival = drain(arrivals, None, max_batch)
    fifo = {t.request.request_id: i for i, batch in enumerate(by_arrival) for t in batch}
    assert list(map(len, batches)) == list(map(len, by_arrival))
    for i, batch in enumerate(batches):
        assert [t.request.request_id for t in batch] == sorted(t.request.request_id for t in batch)
        for t in batch:
            younger = sum(other > t.request.request_id for other in ids[: sum(map(len, batches[:i]))])
            assert younger == t.passed <= MOST_PASSED * max_batch
            assert i <= fifo[t.request.request_id] + MOST_PASSED
    for user in range(10):
        own = [r.request_id for r in order if r.user_id == user]
        assert own == sorted(own)


@examples(200, at_least=40)
@given(lengths=st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=12), max_batch=st.integers(1, 5))
def test_equal_keys_go_in_order_of_arrival(lengths: list[list[int]], max_batch: int) -> None:
    starts = [0, *accumulate(map(len, lengths))]
    arrivals = [
        [ticket(start + i, events=n) for i, n in enumerate(group)]
        for start, group in zip(starts, lengths, strict=False)
    ]
    order = [t.request for batch in drain(arrivals, events, max_batch) for t in batch]
    for length in range(3):
        own = [r.request_id for r in order if events(r) == length]
        assert own == sorted(own)


def test_similar_lengths_share_a_batch_with_the_oldest() -> None:
    waiting = Waiting(events, 3)
    waiting.add(ticket(i, events=n) for i, n in enumerate([900, 10, 20, 880, 30, 910, 40]))
    assert [t.request.request_id for t in waiting.take(3, 0.0)] == [0, 3, 5]
    assert waiting.most_passed == 2
    assert [t.request.request_id for t in waiting.take(3, 0.0)] == [1, 2, 4]
    assert [t.request.request_id for t in waiting.take(3, 0.0)] == [6]


@pytest.mark.parametrize("key", [0, 2, 4])
def test_a_request_is_taken_out_once(key: int) -> None:
    waiting = Waiting(None, 8)
    waiting.add(dataclasses.replace(ticket(i), key=i) for i in range(5))
    assert waiting.remove(key) and not waiting.remove(key)
    assert [t.key for t in waiting.take(8, 0.0)] == [i for i in range(5) if i != key]


def test_a_request_is_not_passed_over_for_ever() -> None:
    """Eight requests of eight lengths wait, and three more of the oldest one's length arrive before every batch."""
    waiting = Waiting(events, 4)
    waiting.add(ticket(i, events=100 * i) for i in range(8))
    batches = []
    for step in range(6):
        waiting.add(ticket(100 + 3 * step + i, events=100 * step) for i in range(3))
        batches.append([t.request.request_id for t in waiting.take(4, 0.0)])
    assert batches[:5] == [[i, 100 + 3 * i, 101 + 3 * i, 102 + 3 * i] for i in range(5)]
    assert batches[5][:3] == [5, 6, 7]  # 15 younger ones have gone before each; with three more they would be 18
    assert waiting.most_passed == 15 <= MOST_PASSED * 4


@pytest.mark.parametrize("waited_ms, goes", [(39, False), (40, True), (79, True), (80, False)])
def test_half_a_deadline_sends_a_request_off_unless_it_is_late_already(waited_ms: float, goes: bool) -> None:
    waiting = Waiting(events, 2)
    waiting.add([ticket(0, events=10), ticket(1, events=5000, deadline=80), *(ticket(i, events=10) for i in (2, 3))])
    assert (1 in [t.request.request_id for t in waiting.take(2, waited_ms / 1e3)]) == goes


class Tiers:
    """An engine that has even users' states on the device, and user 1's on the host."""

    def tier_of(self, user: int) -> Tier:
        return Tier.DEVICE if user % 2 == 0 else Tier.HOST if user == 1 else Tier.NONE

    def state_bytes(self) -> dict[Tier, int]:
        return {}

    def actual(self) -> dict[str, str]:
        return {"engine": "tiers"}

    prepare = reset_cache = close = lambda self: None


@pytest.mark.parametrize("key", [None, events], ids=["by arrival", "by length"])
@pytest.mark.parametrize("count", [0, -2])
def test_none_is_taken_where_there_is_no_room(count: int, key: Key | None) -> None:
    waiting = Waiting(key, 2)
    waiting.add(ticket(i, events=i) for i in range(20))
    assert waiting.take(count, 0.0) == [] and len(waiting) == 20
    assert waiting.most_passed == 0


class Stepping(Tiers):
    """An engine that batches by itself. Every second step ends the oldest request. most: under way at a time."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.most = self.steps = 0

    @property
    def unfinished(self) -> int:
        return len(self.keys)

    def admit(self, key: int, request: Request) -> None:
        self.keys.append(key)
        self.most = max(self.most, len(self.keys))

    def step(self) -> list[Finished]:
        self.steps += 1
        if self.steps % 2:
            return []
        return [Finished(self.keys.pop(0), EMPTY, EMPTY.astype(np.float32), tokens=1)]


def test_continuous_batching_with_a_key_admits_no_more_than_a_batch() -> None:
    engine = Stepping()
    batcher = ContinuousBatcher(engine, 2, lambda tickets: None, key=events)
    batcher.submit(ticket(i, events=i % 3) for i in range(20))
    batcher.close()
    assert engine.most == 2
    assert sorted(batcher.samples()["request_id"]) == list(range(20))


def test_requests_with_a_cached_state_go_together() -> None:
    key = order_key("hit", Tiers())
    waiting = Waiting(key, 3)
    waiting.add(ticket(user) for user in (3, 0, 2, 5, 1, 4, 7))
    taken = [[t.request.user_id for t in waiting.take(3, 0.0)] for _ in range(3)]
    assert taken == [[3, 5, 7], [0, 2, 4], [1]]


def test_an_engine_that_does_not_report_is_refused() -> None:
    class Silent(Tiers):
        tier_of = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"scenario\.order=hit: engine tiers does not report whose .*; set"):
        order_key("hit", Silent())


def test_the_batcher_orders_what_waits_behind_a_batch() -> None:
    batches: list[list[int]] = []

    def answer(requests: object) -> RankResult:
        batches.append([r.request_id for r in requests])  # type: ignore[attr-defined]
        return RankResult(scores=[], batch_ms=0, transfer_ms=0, compute_ms=0, tokens=1, padded_tokens=1)

    batcher = Batcher(answer, 2, math.inf, lambda tickets: None, key=order_key("length", Tiers()))
    batcher.submit(ticket(i, events=n) for i, n in enumerate([100, 900, 110, 910]))
    batcher.close()
    assert batches == [[0, 2], [1, 3]]
    assert batcher.most_passed == 1


@pytest.mark.parametrize("key", [None, events])
def test_what_is_queued_late_is_at_its_place_by_arrival(key: Key | None) -> None:
    """A server may have read a call sooner than one that came before it. Those of one call stay in order."""
    waiting = Waiting(key, 6)
    for number, arrived in enumerate((1.0, 3.0, 0.0, 2.0, 2.0)):
        waiting.add([ticket(number, arrived)])
    assert waiting.oldest.request.request_id == 2
    assert [t.request.request_id for t in waiting.take(6, 10.0)] == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("key", [None, events])
def test_what_is_put_back_is_at_its_place_again(key: Key | None) -> None:
    waiting = Waiting(key, 3)
    waiting.add(ticket(n, float(n), events=n % 2) for n in range(7))
    taken = waiting.take(3, 10.0)
    waiting.put_back(taken[1:])
    assert waiting.oldest.request.request_id == 1
    assert [t.request.request_id for t in waiting.take(7, 10.0)] == [
        n for n in range(7) if n != taken[0].request.request_id
    ]
