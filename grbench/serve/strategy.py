"""One strategy that serves: its engine, its gate, its batcher, and what becomes of it when the engine fails.

`start` builds the engine, checks it against the fp32 reference, warms it up and measures its costs. Then requests go
through the batcher of measurements, on threads of this process. Everything else here runs on the event loop, so no
state needs a lock. A strategy that fails goes out: the requests that it held are given back, and after a growing
pause the engine is checked again, rebuilt if need be, and let in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from grbench.config.schema import RunSpec
from grbench.deployment import Serves
from grbench.execution import engines
from grbench.gate import gate_for
from grbench.gate.base import Gate, sample
from grbench.gate.measured import Answer
from grbench.scenarios.batcher import Batcher, ContinuousBatcher, RequestLoop, Ticket
from grbench.scenarios.waiting import order_key
from grbench.serve.blame import Guarded, Mixed, device_is_lost, judged_alone, one_by_one
from grbench.serve.costs import Costs, Kind
from grbench.serve.requests import Reply
from grbench.workloads.trace import Trace
from grengines.api import BatchResult, Cached, ContinuousEngine, Request, Retrieval
from grengines.numerics import IncorrectError

FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0  # before a strategy that went out is tried again
CALM_S = 60.0  # in service without a failure, after which the first pause is short again
STOP_S = 1.0  # for the threads of a strategy that is closed to end
KNOWN_USERS = 100_000
WARM_UP = 512  # requests of the workload that costs are measured with


class State(StrEnum):
    """The state of a strategy."""

    STARTING = "starting"
    READY = "ready"
    OUT = "out"
    CLOSED = "closed"


class FailedError(Exception):
    """A strategy did not answer. reason: raised, hung, device, wrong, outside, late or out."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Done:
    """An answer of a strategy, with the times of its stages in milliseconds."""

    reply: Reply
    request: Request
    cached: Cached
    fallback: str
    batch_size: int
    queue_ms: float
    pack_ms: float
    load_ms: float
    compute_ms: float
    generation: int  # of the strategy

    def as_answer(self) -> Answer:
        """Return it as the gate judges answers."""
        return Answer(
            self.request, self.reply.items, self.reply.scores, 0, self.batch_size, 0, self.cached, self.fallback
        )


@dataclass
class _Pending:
    future: asyncio.Future[Done]
    kind: Kind
    cost_s: float
    deadline: float  # seconds, time.perf_counter


class Strategy:
    """A strategy. on_change: called after its state has changed, with what happened."""

    def __init__(
        self,
        name: str,
        spec: RunSpec,
        serves: Serves,
        trace: Trace,
        retrieval: Retrieval | None,
        time_limit_s: float,
        on_change: Callable[[Strategy, str], None],
    ) -> None:
        self.name, self.spec, self.serves = name, spec, serves
        self.state, self.why = State.STARTING, ""
        self.costs = Costs(0.0, {Kind(0): 0.0})
        self.actual: dict[str, Any] = {}
        self.gate_figures: dict[str, Any] = {}
        self.waiting_s = 0.0  # what the requests that it holds add to batches
        self.batches = 0
        self.measured = 0.0  # when costs were measured last, time.perf_counter
        self._trace, self._retrieval, self._time_limit_s, self._on_change = trace, retrieval, time_limit_s, on_change
        self._engine: Any = None
        self._gate: Gate | None = None
        self._batcher: RequestLoop | None = None
        self._pending: dict[int, _Pending] = {}
        self._keys = itertools.count()
        self._numbers = itertools.count()
        self._running: dict[int, float] = {}  # begin of the engine's work on each thread, by a number
        self._loop = asyncio.get_running_loop()
        self._known: OrderedDict[int, int] = OrderedDict()  # events of each user's last request
        self._pause_s, self._in_since = FIRST_PAUSE_S, 0.0
        self._retry: asyncio.Task[None] | None = None
        self._checking: asyncio.Future[None] | None = None  # of the engine, on a thread
        self.generation = 0  # of the batcher; messages of an earlier one are late

    @property
    def pending(self) -> int:
        """Number of requests that it holds."""
        return len(self._pending)

    @property
    def device(self) -> str:
        return str(self.actual.get("device", "cpu"))

    @property
    def gate(self) -> Gate:
        assert self._gate is not None, "a strategy that has answered was checked"
        return self._gate

    def kind_of(self, request: Request) -> Kind:
        """Return the kind of a request, with the user's state cached if this strategy answered the user before."""
        return Kind.of(request, self.known_events(request.user_id) > 0)

    def known_events(self, user: int) -> int:
        """Return the events that the user's cached state has, by the last answer; 0 without a cache."""
        return self._known.get(user, 0)

    def takes(self, request: Request) -> bool:
        """Return whether the strategy serves requests of this size."""
        history, candidates = len(request.history_items), len(request.candidates)
        s = self.serves
        return (
            s.min_history <= history
            and (s.max_history is None or history <= s.max_history)
            and (s.max_candidates is None or candidates <= s.max_candidates)
        )

    async def start(self) -> None:
        """Build, check, warm up and let in. Raises what fails."""
        await asyncio.to_thread(self._build)
        self._let_in()

    def submit(self, request: Request, kind: Kind, deadline: float = math.inf) -> asyncio.Future[Done]:
        """Queue a request. The future raises FailedError if the strategy does not answer it.

        deadline: seconds, time.perf_counter. A request that waits longer, or whose future is cancelled, is dropped.
        """
        future: asyncio.Future[Done] = self._loop.create_future()
        if self.state is not State.READY or self._batcher is None:
            future.set_exception(FailedError("out", f"strategy {self.name} is {self.state}"))
            return future
        key, cost_s = next(self._keys), self.costs.each_s(kind)
        self._pending[key] = _Pending(future, kind, cost_s, deadline)
        self.waiting_s += cost_s
        self._batcher.submit([Ticket(request, time.perf_counter(), key)])
        return future

    def check_time(self) -> None:
        """Take the strategy out if a batch has taken longer than the limit or its batcher has died. Called often."""
        if self.state not in (State.READY, State.CLOSED) or self._batcher is None:
            return
        if (error := self._batcher.failure) is not None:
            self._failed(error)
        elif begun := list(self._running.values()):
            took = time.perf_counter() - min(begun)
            if took > self._time_limit_s:
                limit = f"serve.time_limit_s={self._time_limit_s:g}"
                self.take_out("hung", f"a batch has taken {took:.1f} s, longer than {limit}")

    def take_out(self, reason: str, message: str) -> None:
        """Give the requests back and try again later. One that closes only gives its requests back."""
        error = FailedError(reason, message)
        if self.state is not State.READY:
            self._give_back(error)
            return
        self.state, self.why = State.OUT, f"{reason}: {message}"
        self.generation += 1
        self._known.clear()
        self._give_back(error)
        if time.perf_counter() - self._in_since >= CALM_S:
            self._pause_s = FIRST_PAUSE_S
        self._retry = self._loop.create_task(self._come_back())
        self._on_change(self, reason)

    async def close(self, limit_s: float) -> None:
        """Answer what is queued, within a limit, and release the engine unless a thread is still in it."""
        self.state = State.CLOSED
        if self._retry is not None:
            self._retry.cancel()
        if waiting := [one.future for one in self._pending.values()]:
            await asyncio.wait(waiting, timeout=limit_s)
        self._give_back(FailedError("out", f"strategy {self.name} is closed"))
        if self._checking is not None:
            await asyncio.wait([self._checking], timeout=STOP_S)
        is_free = self._checking is None or self._checking.done()
        if self._batcher is not None:
            is_free = await asyncio.to_thread(self._batcher.has_ended, STOP_S) and is_free
        if self._engine is not None and is_free:
            await asyncio.to_thread(self._engine.close)

    def _give_back(self, error: FailedError) -> None:
        """Stop the batcher, and fail what the strategy holds."""
        if self._batcher is not None:
            self._batcher.fail(error)
        pending, self._pending, self.waiting_s = self._pending, {}, 0.0
        for one in pending.values():
            if not one.future.done():
                one.future.set_exception(error)

    def _build(self) -> None:
        """Make the engine, check it, warm it up and measure its costs. Raises what fails."""
        spec, trace = self.spec, self._trace
        engine: Any = engines.build(spec, trace.catalogue, self._retrieval)
        try:
            engine.prepare(trace.requests.some(engines.MOST_PREPARED), spec.scenario.max_batch)
            self.actual = engine.actual()
            if self._gate is None:
                self._gate = gate_for(spec, trace, self._retrieval, self.actual)
            self.gate_figures = self._gate.check(engine, spec.scenario.max_batch).to_dict()
            self.costs = self._measure(engine)
        except BaseException:
            engine.close()
            raise
        self._engine = engine

    def _measure(self, engine: Any) -> Costs:
        """Warm up and measure costs with requests of the workload."""
        answer = getattr(engine, self.spec.task)

        def seconds(requests: Sequence[Request]) -> float:
            engine.reset_cache()
            begun = time.perf_counter()
            answer(requests)
            return time.perf_counter() - begun

        requests, size = self._trace.requests[:WARM_UP], self.spec.scenario.max_batch
        for i in range(self.spec.warmup_batches):
            first = i * size % len(requests)
            answer(requests[first : first + max(size >> i % 3, 1)])
        costs = Costs.measured(requests, size, seconds)
        engine.reset_cache()
        return costs

    def _let_in(self) -> None:
        self.generation += 1
        generation, scenario = self.generation, self.spec.scenario
        watch, answered = self._watcher(generation)
        self._known_good = sample(self._trace.requests, 2, self.spec.seed)[0]
        key = order_key(scenario.order, self._engine)

        def wanted(tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
            return self._wanted(generation, tickets)

        if isinstance(self._engine, ContinuousEngine):
            guarded = Guarded(self._engine, lambda: self._guarding(generation))
            self._batcher = ContinuousBatcher(
                guarded, scenario.max_batch, answered, watch, key, wanted,
                lambda ticket, error: self._post(generation, self._refuse, ticket, error),
            )  # fmt: skip
        else:
            answer = self._answerer(generation)
            self._batcher = Batcher(
                answer, scenario.max_batch, scenario.max_wait_ms / 1e3, answered, scenario.in_flight, watch, key, wanted
            )
        self.state, self.why, self._in_since = State.READY, "", time.perf_counter()
        self._on_change(self, "ready")

    async def _come_back(self) -> None:
        """Check the engine after a pause; from the second time on, rebuild it. The pause doubles each time."""
        rebuild = False
        while self.state is State.OUT:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)
            if self._batcher is not None and not self._batcher.has_ended():  # a thread is still in the engine
                continue
            self._checking = self._loop.run_in_executor(None, self._rebuild if rebuild else self._check)
            try:
                await asyncio.shield(self._checking)
            except Exception as e:
                self.why = f"{self.why.partition(';')[0]}; tried again: {type(e).__name__}: {' '.join(str(e).split())}"
                self._on_change(self, "still out")
                rebuild = True
                continue
            self._let_in()

    def _check(self) -> None:
        """Check the engine with an empty cache: what is in it may be what was wrong."""
        self._engine.reset_cache()
        self.gate.check(self._engine, self.spec.scenario.max_batch)
        self._engine.reset_cache()

    def _rebuild(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        self._build()

    # What follows runs on the batcher's threads, and posts messages to the event loop.

    def _post(self, generation: int, call: Callable[..., None], *values: Any) -> None:
        def deliver() -> None:
            if generation == self.generation:
                call(*values)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    @contextlib.contextmanager
    def _guarding(self, generation: int) -> Iterator[None]:
        """Note how long the engine works, for the limit, and report what it raises."""
        number = next(self._numbers)
        self._running[number] = time.perf_counter()
        try:
            yield
        except Exception as e:
            self._post(generation, self._failed, e)
            raise
        finally:
            del self._running[number]

    def _answerer(self, generation: int) -> Callable[[Sequence[Request]], BatchResult]:
        """Return the function that answers a batch. If it fails, the engine is asked about each request alone."""
        ask, form = getattr(self._engine, self.spec.task), self.gate.form

        def answer(requests: Sequence[Request]) -> BatchResult:
            result: BatchResult = ask(requests)
            if problem := form.problem(requests, result):
                raise IncorrectError(problem)
            return result

        def guarded(requests: Sequence[Request]) -> BatchResult:
            with self._guarding(generation):
                try:
                    return answer(requests)
                except Exception as e:
                    if device_is_lost(e):
                        raise
                answer([self._known_good])  # raises if the engine is to blame
                return one_by_one(answer, requests)

        return guarded

    def _wanted(self, generation: int, tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
        """Return the requests of the next batch, and those that wait for a later one.

        The batch ends before a request that would make an earlier one late. A request that would itself be late is
        dropped, and so is one whose client has left. One alone runs until its deadline, whatever is predicted: so
        costs that are too high are measured again.
        """
        now = time.perf_counter()
        end = now + (self.costs.fixed_s if len(tickets) > 1 else 0.0)
        soonest = math.inf  # deadline of those that are wanted so far
        wanted: list[Ticket] = []
        others: list[Ticket] = []
        dropped: list[Ticket] = []
        for place, ticket in enumerate(tickets):
            one = self._pending.get(ticket.key)
            own_s = 0.0 if one is None or len(tickets) == 1 else one.cost_s
            if one is None or one.future.done() or end + own_s > one.deadline:
                dropped.append(ticket)
            elif end + own_s > soonest:
                others = tickets[place:]  # all of them, so that a user's requests stay in order
                break
            else:
                wanted.append(ticket)
                end, soonest = end + own_s, min(soonest, one.deadline)
        if dropped:
            self._post(generation, self._drop, dropped)
        return wanted, others

    def _watcher(
        self, generation: int
    ) -> tuple[Callable[[Sequence[Request], BatchResult, int], None], Callable[[list[Ticket]], None]]:
        """Return the two functions that the batcher calls after each batch."""
        form, is_continuous = self.gate.form, isinstance(self._engine, ContinuousEngine)
        last: list[BatchResult] = []

        def watch(requests: Sequence[Request], result: BatchResult, size: int) -> None:
            last[:] = [judged_alone(form, requests, result) if is_continuous else result]

        def answered(tickets: list[Ticket]) -> None:
            assert self._batcher is not None, "it calls this"
            self._post(generation, self._deliver, tickets, last[0], self._batcher.take_rows()[-len(tickets) :])

        return watch, answered

    # What follows runs on the event loop again.

    def _failed(self, error: BaseException) -> None:
        reason = "wrong" if isinstance(error, IncorrectError) else "device" if device_is_lost(error) else "raised"
        self.take_out(reason, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")

    def _drop(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            one = self._release(ticket)
            if one is not None and not one.future.done():
                one.future.set_exception(FailedError("late", "the deadline passed while the request waited"))

    def _refuse(self, ticket: Ticket, error: ValueError) -> None:
        one = self._release(ticket)
        if one is not None and not one.future.done():
            one.future.set_exception(_outside(error))

    def _release(self, ticket: Ticket) -> _Pending | None:
        """Forget a request that was queued, and return what is known of it."""
        one = self._pending.pop(ticket.key, None)
        if one is not None:
            self.waiting_s = max(self.waiting_s - one.cost_s, 0.0) if self._pending else 0.0
        return one

    def _deliver(self, tickets: list[Ticket], result: Any, rows: list[tuple[float, ...]]) -> None:
        self.batches += 1
        ended = [self._release(ticket) for ticket in tickets]
        try:
            self._hand_out(tickets, ended, result, rows)
        except Exception as e:  # the result is not as it should be
            for one in ended:
                if one is not None and not one.future.done():
                    one.future.set_exception(FailedError("raised", f"{type(e).__name__}: {e}"))
            self._failed(e)

    def _hand_out(
        self, tickets: list[Ticket], ended: list[_Pending | None], result: Any, rows: list[tuple[float, ...]]
    ) -> None:
        kinds = []
        for i, (ticket, one, row) in enumerate(zip(tickets, ended, rows, strict=True)):
            if one is None:
                continue
            if isinstance(result, Mixed) and (error := result.errors[i]) is not None:
                if not result.is_sure and ticket.request is not self._known_good:
                    self._suspect(ticket, one, error)
                elif not one.future.done():
                    one.future.set_exception(_outside(error))
                continue
            cached = result.cached[i] if result.cached else Cached()
            kinds.append(Kind(one.kind.tokens, 2 * cached.tokens > cached.of))
            self._remember(ticket.request)
            if one.future.done():  # its client has left
                continue
            _, _, _, queued, batch, transfer, compute, _, _, size = row
            items = result.items[i] if getattr(result, "items", None) else None
            one.future.set_result(
                Done(
                    Reply(result.scores[i], items), ticket.request, cached, result.fallback, int(size),
                    queued, batch, transfer, compute, self.generation,
                )
            )  # fmt: skip
        if kinds and not isinstance(result, Mixed):
            _, _, _, _, batch, transfer, compute, *_ = rows[0]
            self.measured = time.perf_counter()
            self.costs.observe(kinds, (batch + transfer + compute) / 1e3)

    def _suspect(self, ticket: Ticket, one: _Pending, error: Exception) -> None:
        """Find out whether a request or the engine is to blame, by a request that is known to be good."""
        self._pending[ticket.key] = dataclasses.replace(one, cost_s=0.0)  # until the engine has answered

        def judged(probe: asyncio.Future[Done]) -> None:
            failure = probe.exception()
            if isinstance(failure, FailedError) and failure.reason == "outside":
                self._failed(error)
            elif self._release(ticket) is not None and not one.future.done():
                one.future.set_exception(_outside(error) if failure is None else failure)

        self.submit(self._known_good, one.kind).add_done_callback(judged)

    def _remember(self, request: Request) -> None:
        if self.spec.cache.name == "none":
            return
        self._known[request.user_id] = len(request.history_items)
        self._known.move_to_end(request.user_id)
        if len(self._known) > KNOWN_USERS:
            self._known.popitem(last=False)


def _outside(error: Exception) -> FailedError:
    """Return the error of a request that a healthy engine cannot answer."""
    return FailedError("outside", f"{type(error).__name__}: {error}")
