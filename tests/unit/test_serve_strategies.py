"""Strategies of the server with an engine of a few lines: who is to blame, what is dropped, who answers instead."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import math
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grbench.deployment import Deployment, Serves, Step
from grbench.gate.form import Form
from grbench.serve import batches, checked, live_gate, recovery
from grbench.serve import controller as controllers
from grbench.serve import service as services
from grbench.serve import strategy as strategies
from grbench.serve.controller import Controller
from grbench.serve.costs import Costs, Kind
from grbench.serve.errors import RefusedError
from grbench.serve.held import FailedError
from grbench.serve.live_gate import LiveGate
from grbench.serve.logs import Log
from grbench.serve.metrics import Answered, Metrics
from grbench.serve.options import deployment_of, parse
from grbench.serve.requests import Bounds
from grbench.serve.service import Service
from grbench.serve.serving_deployment import ServingDeployment
from grbench.serve.state import Histories
from grbench.serve.strategy import State, Strategy
from grengines.api import Catalogue, Finished, RankResult, Request

GOOD, POISON, UNFIT = 1, 7, 8  # items


def request(item: int = GOOD, number: int = 0) -> Request:
    one = np.ones(1, np.int64)
    return Request(number, number, one, one, one.astype(np.float32), one, 0, np.array([item]), 0, 0.0, math.inf)


def scores(requests: Sequence[Request]) -> list[np.ndarray]:
    """A score of each candidate; that of POISON is not finite."""
    return [np.where(r.candidates[:, None] == POISON, np.nan, 0.5).astype(np.float32) for r in requests]


class Engine:
    """Answers batches. `before` is called first, and may raise."""

    def __init__(self, before: Callable[[Sequence[Request]], None] = lambda requests: None) -> None:
        self.before, self.closed = before, False

    def rank(self, requests: Sequence[Request]) -> RankResult:
        self.before(requests)
        return RankResult(
            batch_ms=0.0, transfer_ms=0.0, compute_ms=0.1, tokens=1, padded_tokens=1, scores=scores(requests)
        )

    def reset_cache(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Continuous(Engine):
    """Batches by itself. It does not admit a request for UNFIT."""

    def __init__(self, before: Callable[[Sequence[Request]], None] = lambda requests: None) -> None:
        super().__init__(before)
        self.admitted: dict[int, Request] = {}

    name = "continuous"

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        pass

    def actual(self) -> dict[str, Any]:
        return {}

    @property
    def unfinished(self) -> int:
        return len(self.admitted)

    def admit(self, key: int, request: Request) -> None:
        if UNFIT in request.candidates:
            raise ValueError("it can never fit")
        self.admitted[key] = request

    def step(self) -> list[Finished]:
        admitted, self.admitted = self.admitted, {}
        self.before(list(admitted.values()))
        found = scores(list(admitted.values()))
        return [Finished(key, r.candidates, s[:, 0], 1) for (key, r), s in zip(admitted.items(), found, strict=True)]


def made(
    engine: Any, name: str = "one", serves: Serves | None = None, limit_s: float = 60.0, wait_ms: float = 0.0
) -> Strategy:
    """A strategy that serves with this engine."""
    scenario = SimpleNamespace(order="fifo", max_batch=4, max_wait_ms=wait_ms, in_flight=1)
    spec: Any = SimpleNamespace(task="rank", seed=0, scenario=scenario, cache=SimpleNamespace(name="none"))
    trace: Any = SimpleNamespace(requests=[request(GOOD, i) for i in range(2)])
    one = Strategy(name, spec, serves or Serves(), trace, None, limit_s, Answered(), lambda strategy, what: None)
    if isinstance(engine, Continuous):
        spec.task, form = "step", Form(tasks=None, k=1, num_items=10)
    else:
        form = Form(tasks=1)
    check = lambda engine, max_batch: engine.before([])  # noqa: E731
    one.checked.engine, one.checked._gate = engine, SimpleNamespace(form=form, check=check)  # type: ignore[assignment]
    one._let_in(Costs(0.001, {Kind(1): 0.001}))
    return one


def controller(*members: Strategy, steps: Sequence[Step] = ()) -> Controller:
    return Controller(Deployment(1, "rank", degrade=list(steps)), members, Metrics(None), 100)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(limited())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


async def outcome(strategy: Strategy, item: int = GOOD, deadline: float = math.inf) -> str:
    """Ask a strategy; return "answered" or why not."""
    try:
        await strategy.submit(request(item), Kind(1), deadline)
    except FailedError as e:
        return e.reason
    return "answered"


class Held(Engine):
    """Its batches wait for `free`. `sizes` are theirs."""

    def __init__(self) -> None:
        super().__init__(self._wait)
        self.free = threading.Event()
        self.sizes: list[int] = []

    def _wait(self, requests: Sequence[Request]) -> None:
        self.sizes.append(len(requests))
        self.free.wait()


def test_reading_a_call_is_a_part_of_its_wait_for_company() -> None:
    """A call that was read for ten minutes takes the one along that waits, and its queue_ms leaves them out."""

    async def work() -> None:
        one = made(Engine(lambda requests: None), wait_ms=600_000.0)
        waits = one.submit(request(), Kind(1))
        await asyncio.sleep(0.05)
        assert not waits.done()
        long_ago = await controller(one).answer(request(), math.inf, time.perf_counter() - 600)  # `run` has 60 s
        assert 0 < long_ago.done.queue_ms < 60_000
        assert (await waits).batch_size == long_ago.done.batch_size == 2
        await one.close(1.0)

    run(work)


async def held() -> tuple[Held, Strategy, asyncio.Task[str]]:
    """An engine that holds its first batch, its strategy, and the request of that batch."""
    engine = Held()
    one = made(engine)
    first = asyncio.create_task(outcome(one))
    await until(lambda: bool(engine.sizes))
    return engine, one, first


@pytest.mark.parametrize("kind", [Engine, Continuous])
def test_a_request_without_finite_scores_is_to_blame_alone(kind: type[Engine]) -> None:
    async def work() -> None:
        one = made(kind())
        found = await asyncio.gather(*(outcome(one, item) for item in (GOOD, POISON, GOOD, POISON, GOOD)))
        assert found == ["answered", "outside", "answered", "outside", "answered"] and one.state is State.READY
        await one.close(1.0)

    run(work)


@pytest.mark.parametrize("kind", [Engine, Continuous])
def test_an_engine_without_finite_scores_is_to_blame_itself(
    kind: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.scores", lambda requests: [np.full((1, 1), np.nan, np.float32) for _ in requests])

    async def work() -> None:
        one = made(kind())
        assert await outcome(one) == "wrong" and one.state is State.OUT
        await one.close(1.0)

    run(work)


def test_the_time_of_an_engines_call_is_reported_only_where_it_is_known() -> None:
    async def work() -> None:
        one, steps = made(Engine()), made(Continuous())
        known, unknown = [await controller(member).answer(request(), math.inf) for member in (one, steps)]
        assert services._parameters([known, known])["engine_ms"] > 0
        assert "engine_ms" not in services._parameters([unknown])
        assert "engine_ms" not in services._parameters([known, unknown])
        await asyncio.gather(one.close(1.0), steps.close(1.0))
        engine, slow, first = await held()
        waiting = [slow.submit(request(item), Kind(1)) for item in (GOOD, POISON)]
        engine.free.set()
        good, _ = await asyncio.gather(*waiting, return_exceptions=True)
        assert not isinstance(good, BaseException) and good.engine_ms is None  # it was asked again, alone
        await first
        await slow.close(1.0)

    run(work)


def test_a_request_that_is_not_admitted_is_to_blame_alone() -> None:
    async def work() -> None:
        one = made(Continuous())
        found = await asyncio.gather(*(outcome(one, item) for item in (UNFIT, GOOD, UNFIT, GOOD)))
        assert found == ["outside", "answered"] * 2 and one.state is State.READY and one.pending == 0
        await one.close(1.0)

    run(work)


@pytest.mark.parametrize("kind", [Engine, Continuous])
def test_a_hanging_engine_is_not_touched_before_its_thread_has_ended(
    kind: type[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "FIRST_PAUSE_S", 0.01)
    free, asked = threading.Event(), []

    def before(requests: Sequence[Request]) -> None:
        asked.append(len(requests))  # 0: the gate's check
        if len(asked) == 1:
            free.wait()

    async def work() -> None:
        one = made(kind(before), limit_s=0.05)
        asking = asyncio.create_task(outcome(one))
        while not asking.done():
            await asyncio.sleep(0.02)
            one.check_time()
        assert asking.result() == "hung" and one.state is State.OUT
        await asyncio.sleep(0.2)
        assert asked == [1]
        free.set()
        await until(lambda: one.state is not State.OUT)
        assert asked == [1, 0] and await outcome(one) == "answered"
        await one.close(1.0)

    run(work)


def test_a_start_that_the_end_of_the_server_meets_stops_after_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs take most of a start. Their requests are answered one after another, until the server ends."""
    begun, ended = threading.Event(), threading.Event()

    class Sample(list[Request]):
        def some(self, count: int) -> list[Request]:
            return self[:count]

    class Slow(Engine):
        answers = 0

        def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
            self.actual = dict

        def rank(self, requests: Sequence[Request]) -> RankResult:
            self.answers += 1
            begun.set()
            ended.wait(60)
            return super().rank(requests)

    engine = Slow()
    monkeypatch.setattr(checked.engines, "build", lambda *given: engine)

    async def work() -> None:
        one = made(engine)
        one.spec.warmup_batches = 1000
        trace: Any = one.checked._trace
        gate: Any = one.checked.gate
        gate.check = lambda engine, size: SimpleNamespace(to_dict=dict)
        trace.catalogue, trace.requests = None, Sample(trace.requests)
        starting = asyncio.create_task(one.start())
        await until(begun.is_set)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        ended.set()

    run(work)  # it waits for the thread
    assert engine.closed and engine.answers == 1


def test_a_strategy_that_fails_while_it_closes_gives_its_requests_back() -> None:
    free, begun = threading.Event(), threading.Event()

    def before(requests: Sequence[Request]) -> None:
        begun.set()
        free.wait()
        raise RuntimeError("broken")

    async def work() -> None:
        one = made(Engine(before))
        asking = asyncio.create_task(outcome(one))
        await until(begun.is_set)
        closing = asyncio.create_task(one.close(60.0))
        await asyncio.sleep(0.05)
        free.set()
        assert await asking == "raised"
        await closing
        engine, hanging, asking = await held()
        closing = asyncio.create_task(hanging.close(0.0))
        assert await asking == "out" and not engine.closed
        engine.free.set()
        await closing
        await until(lambda: engine.closed)

    run(work)


@pytest.mark.parametrize("busy", ["a batch", "a check"])
def test_an_engine_that_is_busy_while_its_strategy_closes_is_released_later(
    busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(strategies, "STOP_S", 0.05)
    free, begun = threading.Event(), threading.Event()

    def before(requests: Sequence[Request]) -> None:
        if bool(requests) is (busy == "a batch"):
            begun.set()
            free.wait()
        elif requests:
            raise RuntimeError("broken, so that it is checked")

    async def work() -> None:
        engine = Engine(before)
        one = made(engine)
        asking = asyncio.create_task(outcome(one))
        await until(begun.is_set)
        await one.close(0.0)
        assert await asking in ("out", "raised") and not engine.closed
        free.set()
        await until(lambda: engine.closed)

    run(work)


def test_a_strategy_that_cannot_start_its_batcher_again_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FIRST_PAUSE_S", 0.01)
    start, failures = batches.start, [RuntimeError("can't start new thread")]

    def starts(*given: Any) -> Any:
        if one and failures:
            raise failures.pop()
        return start(*given)

    one: list[Strategy] = []
    monkeypatch.setattr(batches, "start", starts)

    async def work() -> None:
        one.append(made(Engine()))
        one[0].checked.rebuild = lambda: Costs(0.001, {Kind(1): 0.001})  # type: ignore[method-assign]
        one[0].take_out("raised", "for a test")
        await until(lambda: one[0].state is not State.OUT)
        assert not failures and await outcome(one[0]) == "answered"
        await one[0].close(1.0)

    run(work)


def test_a_batcher_that_dies_takes_its_strategy_out() -> None:
    class Ends(BaseException):
        pass

    def before(requests: Sequence[Request]) -> None:
        if requests:
            raise Ends("thread")

    async def work() -> None:
        one = made(Engine(before))
        asking = asyncio.create_task(outcome(one))
        while not asking.done():
            await asyncio.sleep(0.02)
            one.check_time()
        assert asking.result() == "raised" and one.state is State.OUT
        await one.close(1.0)

    run(work)


def test_a_result_that_cannot_be_delivered_fails_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "Reply", lambda *values: 1 / 0)

    async def work() -> None:
        one = made(Engine())
        assert await outcome(one) == "raised" and one.state is State.OUT
        await one.close(1.0)

    run(work)


def test_requests_that_are_late_or_given_up_are_dropped() -> None:
    async def work() -> None:
        engine, one, first = await held()
        late = asyncio.create_task(outcome(one, deadline=time.perf_counter() + 0.05))
        left, kept = asyncio.create_task(outcome(one)), asyncio.create_task(outcome(one))
        await asyncio.sleep(0.1)
        left.cancel()
        engine.free.set()
        assert [await first, await late, await kept] == ["answered", "late", "answered"]
        assert engine.sizes == [1, 1] and one.pending == 0 and one.waiting_s == 0.0
        await one.close(1.0)

    run(work)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Collect no cycles: a server does so seldom, and what is in one keeps the body of its call until then."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_a_call_whose_client_leaves_is_forgotten_before_the_next_batch() -> None:
    async def work() -> None:
        engine, one, first = await held()
        asked = request()
        tensor = weakref.ref(asked.history_items)
        call = asyncio.create_task(controller(one).answer(asked, math.inf))
        del asked
        await until(lambda: one.pending == 2)
        call.cancel()
        await asyncio.wait([call])
        del call
        assert tensor() is None and one.pending == 1 and one.waiting_s == one.costs.each_s(Kind(1))
        engine.free.set()
        assert await first == "answered" and engine.sizes == [1]
        await one.close(1.0)

    run(work)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("kind", [Engine, Continuous])
def test_a_call_is_forgotten_once_it_has_ended(kind: type[Engine]) -> None:
    """No further batch is made."""

    async def work() -> None:
        one = made(kind())
        for deadline in (math.inf, 0.0):
            asked = request()
            tensor = weakref.ref(asked.history_items)
            future = one.submit(asked, Kind(1), deadline)
            other = one.submit(request(), Kind(1))
            del asked
            await asyncio.wait([future, other])
            assert (future.exception() is None) is (deadline > 0)
            del future, other
            await until(lambda: tensor() is None)  # noqa: B023  (it ends before the next)
        await one.close(1.0)

    run(work)


@pytest.mark.usefixtures("uncollected")
def test_a_call_that_is_dropped_is_forgotten() -> None:
    async def work() -> None:
        one = made(Engine())
        asked = request()
        tensor = weakref.ref(asked.history_items)
        both = controller(one)
        begun = [both.begin(asked, math.inf), both.begin(request(), math.inf)]
        one._held[0].deadline = 0.0
        del asked
        with pytest.raises(RefusedError, match="the deadline passed"):
            await both.finish(begun.pop(0))
        await both.finish(begun.pop())
        await until(lambda: tensor() is None)
        await one.close(1.0)

    run(work)


def test_a_request_that_would_make_an_earlier_one_late_waits_for_the_next_batch() -> None:
    async def work() -> None:
        engine, one, first = await held()
        one.costs = Costs(100.0, {Kind(1): 100.0})  # seconds: a batch of one takes 200, of two 300
        now = time.perf_counter()
        deadlines = [now + 250.0, math.inf, math.inf, now + 60_000.0]
        waiting = [asyncio.create_task(outcome(one, deadline=deadline)) for deadline in deadlines]
        await asyncio.sleep(0.05)
        engine.free.set()
        assert [await task for task in (first, *waiting)] == ["answered"] * 5
        assert engine.sizes == [1, 1, 3] and one.pending == 0 and one.waiting_s == 0.0
        await one.close(1.0)

    run(work)


def test_a_batch_takes_no_more_than_can_be_in_time() -> None:
    """Those that would be late behind the others are given back, so that the others count."""

    async def work() -> None:
        engine, one, first = await held()
        one.costs = Costs(100.0, {Kind(1): 100.0})  # seconds: a batch of two takes 300, of three 400
        deadline = time.perf_counter() + 350.0
        waiting = [asyncio.create_task(outcome(one, deadline=deadline)) for _ in range(3)]
        await asyncio.sleep(0.05)
        engine.free.set()
        assert [await first, *[await task for task in waiting]] == ["answered", "answered", "answered", "late"]
        assert engine.sizes == [1, 2] and one.pending == 0
        await one.close(1.0)

    run(work)


def broken(requests: Sequence[Request]) -> None:
    raise RuntimeError("broken")


def test_a_fallback_that_would_be_late_is_refused() -> None:
    async def work() -> None:
        first, second = made(Engine(broken), "first"), made(Engine(), "second")
        second.costs = Costs(5000.0, {Kind(1): 0.001})
        with pytest.raises(RefusedError, match=r"deadline: first: raised; another strategy would take 5\d{6}\.") as e:
            await controller(first, second).answer(request(), time.perf_counter() + 1000.0)
        assert e.value.status == 503 and e.value.retry_after_s
        await asyncio.gather(first.close(1.0), second.close(1.0))

    run(work)


def test_sizes_are_wrong_only_if_no_strategy_takes_them() -> None:
    async def work() -> None:
        short, long = made(Engine(), "short", Serves(max_history=0)), made(Engine(), "long", Serves(max_history=1))
        both = controller(short, long)
        assert (await both.answer(request(), math.inf)).strategy == "long"
        long.take_out("raised", "broken")
        with pytest.raises(RefusedError, match=r"no strategy in service takes 1 events .*: long is out") as e:
            await both.answer(request(), math.inf)
        assert e.value.status == 503 and e.value.retry_after_s
        with pytest.raises(RefusedError, match="no strategy takes 1 events") as e:
            await controller(short).answer(request(), math.inf)
        assert e.value.status == 400
        await asyncio.gather(short.close(1.0), long.close(1.0))

    run(work)


def test_a_strategy_of_a_step_is_named_as_degraded() -> None:
    async def work() -> None:
        usual, cheap = made(Engine(broken), "usual"), made(Engine(), "cheap")
        both = controller(usual, cheap, steps=[Step("small", strategy="cheap", loss={"auc_loss_pct": 0.3})])
        for reason in ("fallback", "only"):
            answer = await both.answer(request(), math.inf)
            assert (answer.strategy, answer.reason, answer.degraded) == ("cheap", reason, "small")
            assert answer.loss == {"auc_loss_pct": 0.3}
            assert (answer.asked, answer.ran) == ("strategy=usual", "strategy=cheap")
        await asyncio.gather(usual.close(1.0), cheap.close(1.0))

    run(work)


def test_of_several_answers_the_largest_loss_is_reported() -> None:
    """A loss in percent is a hundredth of one in shares: 0.3% is less than 0.05."""

    async def work() -> None:
        usual, cheap = made(Engine(broken), "usual"), made(Engine(), "cheap")
        answer = await controller(usual, cheap, steps=[Step("s", strategy="cheap")]).answer(request(), math.inf)
        share, percent = [dataclasses.replace(answer, loss=its) for its in ({"auc_loss": 0.05}, {"auc_loss_pct": 0.3})]
        for both in ([share, percent], [percent, share]):
            found = services._parameters(both)
            assert {name: value for name, value in found.items() if "loss" in name} == {"auc_loss": 0.05}
        gain = dataclasses.replace(answer, loss={"auc_loss": -0.002})
        for some in ([gain], [answer, gain], [gain, answer]):
            assert services._parameters(some)["auc_loss"] == -0.002
        for some, known in (([answer], {}), ([share, answer], {"auc_loss": 0.05})):
            found = services._parameters(some)
            assert {name: its for name, its in found.items() if "loss" in name} == {**known, "loss": "unknown"}
        await asyncio.gather(usual.close(1.0), cheap.close(1.0))

    run(work)


@pytest.mark.parametrize(
    "step, asked, ran",
    [
        (Step("s", max_history=2), "events=16", "events=2"),
        (Step("s", max_candidates=1), "candidates=16", "candidates=1"),
        (Step("s", stale_state=True), "events=16", "events=1"),
    ],
)
def test_a_degraded_answer_says_what_was_asked_and_what_ran(step: Step, asked: str, ran: str) -> None:
    """The whole request costs 1000 s, and anything smaller nothing."""
    many = dataclasses.replace(request().with_events(np.zeros(16, np.int64)), candidates=np.full(16, GOOD))

    async def work() -> None:
        one = made(Engine())
        one.spec.cache = SimpleNamespace(name="lru")
        both = controller(one, steps=[step])
        first = await both.answer(request(), math.inf)  # the user's state has its one event
        assert (first.degraded, first.asked, first.ran) == ("", "", "")

        class Whole(Costs):
            def each_s(self, kind: Kind) -> float:
                return 1000.0 if kind == one.kind_of(many) else 0.0

        one.costs = Whole(0.0, {})
        answer = await both.answer(many, time.perf_counter() + 500.0)
        assert (answer.degraded, answer.asked, answer.ran) == ("s", asked, ran)
        assert len(answer.done.reply.scores) == (1 if step.max_candidates else 16)
        await one.close(1.0)

    run(work)


def test_the_first_step_that_helps_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that leaves out no candidate is none."""
    monkeypatch.setattr(controllers, "FRESH_S", math.inf)
    many = dataclasses.replace(request(), candidates=np.full(16, GOOD))
    steps = [Step(f"{number}", max_candidates=number) for number in (16, 8, 4)]

    async def work() -> None:
        one = made(Engine())

        class Squared(Costs):
            def each_s(self, kind: Kind) -> float:
                return 4.0**kind.candidates  # 1024 s of 16 candidates, 256 s of 8, 64 s of 4

        one.costs = Squared(0.0, {})
        both = controller(one, steps=steps)
        for left_s, step in ((2000.0, ""), (900.0, "8"), (200.0, "4")):
            assert (await both.answer(many, time.perf_counter() + left_s)).degraded == step
        with pytest.raises(RefusedError, match="deadline: the answer would take"):
            await both.answer(many, time.perf_counter() + 50.0)
        assert list(both._degraded(steps[0], [one], many)) == []
        await one.close(1.0)

    run(work)


def test_refusals_make_the_next_requests_begin_with_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are whole again after a while without refusals. A deadline that no server meets does not count."""
    for name, value in {"RISE_S": 0.0, "CALM_S": math.inf, "FRESH_S": math.inf}.items():
        monkeypatch.setattr(controllers, name, value)
    many = dataclasses.replace(request(), candidates=np.full(16, GOOD))

    async def work() -> None:
        one = made(Engine())
        one.costs = Costs(0.0, {Kind(1, 5): 10.0, Kind(1, 4): 5.0, Kind(1, 3): 2.0})
        both = controller(one, steps=[Step("half", max_candidates=8), Step("quarter", max_candidates=4)])

        async def refused(left_s: float) -> None:
            with pytest.raises(RefusedError, match="deadline: the answer would take"):
                await both.answer(many, time.perf_counter() + left_s)

        async def taken(asked: Request = many) -> str:
            one.waiting_s = 0.0
            return (await both.answer(asked, time.perf_counter() + 100.0)).degraded

        await refused(0.5)
        assert await taken() == ""
        for step in ("half", "quarter", "quarter"):
            one.waiting_s = 1000.0
            await refused(100.0)
            assert await taken() == step
            assert await taken(request()) == ""  # one candidate: no step makes it cheaper
        monkeypatch.setattr(controllers, "CALM_S", 0.0001)
        await asyncio.sleep(0.01)
        assert await taken() == ""
        await one.close(1.0)

    run(work)


@pytest.mark.parametrize(
    "level, left_s, taken",
    [
        (0, 10.0, ["", "", ""]),
        (1, 10.0, ["", "", "half"]),
        (2, 10.0, ["", "quarter", "quarter"]),
        (3, 10.0, ["", "quarter", "quarter"]),
        (2, math.inf, ["", "", ""]),
    ],
)
def test_requests_begin_with_the_last_step_of_the_level_that_changes_them(
    level: int, left_s: float, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have 4, 8 and 16 candidates and one event, and would be in time as a whole, as is any without a deadline."""
    monkeypatch.setattr(controllers, "CALM_S", math.inf)
    steps = [Step("half", max_candidates=8), Step("quarter", max_candidates=4), Step("short", max_history=1)]

    async def work() -> None:
        one = made(Engine())
        both = controller(one, steps=steps)
        both._overload._level, both._overload._refused = level, time.perf_counter()
        for candidates, step in zip((4, 8, 16), taken, strict=True):
            asked = dataclasses.replace(request(), candidates=np.full(candidates, GOOD))
            assert (await both.answer(asked, time.perf_counter() + left_s)).degraded == step
        await one.close(1.0)

    run(work)


def test_the_live_gate_blames_only_the_engine_that_answered() -> None:
    async def work() -> None:
        one, metrics = made(Engine()), Metrics(None)
        gate = LiveGate(1.0, 1.0, metrics)
        done = await one.submit(request(), Kind(1))
        verdicts: list[Any] = [ZeroDivisionError("reference"), SimpleNamespace(error=2.0, tolerance=1.0, problem="no")]

        def judge(answers: Sequence[Any]) -> list[Any]:
            if isinstance(verdict := verdicts[0], Exception):
                raise verdict
            return [verdict]

        one.checked.judge = lambda answer: judge([answer])[0]  # type: ignore[method-assign]
        count = lambda name: metrics.registry.get_sample_value(name, {"strategy": "one"})  # noqa: E731
        await gate._judge(one, done)
        assert count("grbench_gate_unjudged_total") == 1 and one.state is State.READY
        verdicts.pop(0)
        one.generation += 1
        await gate._judge(one, done)
        assert count("grbench_gate_wrong_total") == 1 and one.state is State.READY
        one.generation -= 1
        await gate._judge(one, done)
        assert one.state is State.OUT and one.why == "wrong: live gate: no"
        gate.close()
        await one.close(1.0)

    run(work)


def test_the_live_gate_leaves_the_device_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes 20 ms for an answer, of each of which it is asked. It may take a tenth of the time."""
    now = [100.0]
    monkeypatch.setattr(live_gate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    async def work() -> None:
        one, metrics = made(Engine()), Metrics(None)
        gate = LiveGate(1.0, 0.1, metrics)
        done = await one.submit(request(), Kind(1))

        def judge(answer: Any) -> Any:
            now[0] += 0.02
            raise ZeroDivisionError("it rests after an answer that it cannot judge too")

        def judged_s() -> float:
            return metrics.registry.get_sample_value("grbench_gate_seconds_total") or 0.0

        one.checked.judge = judge  # type: ignore[method-assign]
        for _ in range(9):
            gate.take(one, done)
        await asyncio.gather(*gate._tasks)
        assert judged_s() == pytest.approx(4 * 0.02)  # four wait for each other, and it rests after them
        while now[0] < 110:
            gate.take(one, done)
            await asyncio.gather(*gate._tasks)
            now[0] += 0.002
        assert judged_s() == pytest.approx(0.1 * 10, rel=0.1)
        gate.close()
        await one.close(1.0)

    run(work)


def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """A service whose strategies do not start."""

    async def start(strategy: Strategy) -> None:
        raise RuntimeError("it does not start")

    monkeypatch.setattr(Strategy, "start", start)
    monkeypatch.setattr(
        "grbench.serve.serving_deployment.load_workload", lambda specs: (SimpleNamespace(catalogue=None), [None])
    )
    deployment = deployment_of(None, ["engine=hstu"])
    config = parse(["serve.gate_share=0"])[0]
    return Service(deployment, None, config, Log(io.StringIO()), lambda: deployment)


def test_a_reload_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        served = service(monkeypatch)
        [spec] = served.deployment.specs("deployment").values()
        served.present = before = ServingDeployment(
            controller(), spec, Bounds("rank", Catalogue(1, 1, 1), 1, 1, 1), Histories(1, 1)
        )
        with pytest.raises(RefusedError, match="it does not start; the deployment before it goes on"):
            await served.reload()
        assert served.present is before
        async with served._reloading:  # as it starts
            waiting = asyncio.create_task(served.reload())
            await asyncio.sleep(0.01)
            assert not waiting.done()
            await served.close(0.0)
        with pytest.raises(RefusedError, match="the server is ending") as e:
            await waiting
        assert e.value.status == 503

    run(work)


def test_a_request_that_a_replaced_strategy_gives_back_is_answered_by_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        engine = Held()
        served, old, new = service(monkeypatch), made(engine), made(Engine(), "new")
        before = controller(old)
        served.present = SimpleNamespace(controller=controller(new))  # type: ignore[assignment]
        asking = asyncio.create_task(served._finish(before, before.begin(request(), math.inf)))
        await until(lambda: bool(engine.sizes))
        closing = asyncio.create_task(old.close(0.0))
        assert (await asking).strategy == "new"
        engine.free.set()
        await asyncio.gather(closing, new.close(1.0))
        await served.close(0.0)

    run(work)


def test_a_deadline_of_a_deployment_is_one_that_was_asked_for() -> None:
    assert deployment_of(None, ["engine=hstu"]).limits == {}
    assert deployment_of(None, ["engine=hstu", "latency_limit_ms=80"]).limits == {"latency_ms.p99": 80.0}
