"""One strategy that serves: its engine, its gate, its batcher, and what becomes of it when the engine fails.

`start` builds the engine, checks it against the fp32 reference, warms it up and measures its costs. Then requests go
through the batcher of measurements, on threads of this process. Everything else here runs on the event loop, so no
state needs a lock. A strategy that fails goes out: the requests that it held are given back, and after a growing
pause the engine is checked again, rebuilt if need be, and let in.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from grbench.config.schema import RunSpec
from grbench.deployment import Serves
from grbench.gate import gate_for
from grbench.gate.base import Gate, sample
from grbench.gate.measured import Answer
from grbench.scenarios.batcher import Batcher, ContinuousBatcher, RequestLoop, Ticket
from grbench.scenarios.waiting import order_key
from grbench.serve.costs import Costs, Kind
from grbench.serve.requests import Reply
from grbench.workloads.trace import Trace
from grengines import registry
from grengines.api import BatchResult, Cached, ContinuousEngine, Request, Retrieval
from grengines.numerics import IncorrectError

FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0  # before a strategy that went out is tried again
KNOWN_USERS = 100_000
WARM_UP = 512  # requests of the workload that costs are measured with


class State(StrEnum):
    """The state of a strategy."""

    STARTING = "starting"
    READY = "ready"
    OUT = "out"
    CLOSED = "closed"


class FailedError(Exception):
    """A strategy did not answer. reason: raised, hung, device, wrong, outside or out."""

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


@dataclass
class _Mixed(BatchResult):
    """A batch whose requests were answered one by one, because together they failed."""

    scores: list[Any]
    items: list[Any]
    errors: list[Exception | None]


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
        self._running: dict[int, float] = {}  # begin of each batch on a thread, by a number
        self._loop = asyncio.get_running_loop()
        self._known: OrderedDict[int, int] = OrderedDict()  # events of each user's last request
        self._pause_s = FIRST_PAUSE_S
        self._retry: asyncio.Task[None] | None = None
        self._generation = 0  # of the batcher; messages of an earlier one are late

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

    def submit(self, request: Request, kind: Kind) -> asyncio.Future[Done]:
        """Queue a request. The future raises FailedError if the strategy does not answer it."""
        future: asyncio.Future[Done] = self._loop.create_future()
        if self.state is not State.READY or self._batcher is None:
            future.set_exception(FailedError("out", f"strategy {self.name} is {self.state}"))
            return future
        key, cost_s = next(self._keys), self.costs.each_s(kind)
        self._pending[key] = _Pending(future, kind, cost_s)
        self.waiting_s += cost_s
        self._batcher.submit([Ticket(request, time.perf_counter(), key)])
        return future

    def check_time(self) -> None:
        """Take the strategy out if a batch has taken longer than the limit. Called now and then."""
        if self.state is State.READY and (begun := list(self._running.values())):
            took = time.perf_counter() - min(begun)
            if took > self._time_limit_s:
                limit = f"serve.time_limit_s={self._time_limit_s:g}"
                self.take_out("hung", f"a batch has taken {took:.1f} s, longer than {limit}")

    def take_out(self, reason: str, message: str) -> None:
        """Give the requests back and try again later."""
        if self.state is not State.READY:
            return
        self.state, self.why = State.OUT, f"{reason}: {message}"
        self._generation += 1
        self._known.clear()
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            batcher.fail(FailedError(reason, message))
        pending, self._pending, self.waiting_s = self._pending, {}, 0.0
        for one in pending.values():
            if not one.future.done():
                one.future.set_exception(FailedError(reason, message))
        self._retry = self._loop.create_task(self._come_back())
        self._on_change(self, reason)

    async def close(self, limit_s: float) -> None:
        """Answer what is queued, within a limit, and release the engine."""
        closing, self.state = self.state, State.CLOSED
        if self._retry is not None:
            self._retry.cancel()
        if self._batcher is not None:
            waiting = [one.future for one in self._pending.values()]
            if waiting:
                await asyncio.wait(waiting, timeout=limit_s)
            self._batcher.fail(FailedError("out", f"strategy {self.name} is closed"))
        if self._engine is not None and closing is not State.STARTING and not self._running:
            await asyncio.to_thread(self._engine.close)

    def _build(self) -> None:
        """Make the engine, check it, warm it up and measure its costs. Raises what fails."""
        spec, trace = self.spec, self._trace
        engine: Any = registry.build(
            spec.engine,
            spec.model,
            spec.kernel,
            trace.catalogue,
            spec.seed,
            spec.cache,
            task=spec.task,
            retrieval=self._retrieval,
        )
        try:
            engine.prepare(trace.requests, spec.scenario.max_batch)
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
        self._generation += 1
        scenario = self.spec.scenario
        watch, answered = self._watcher(self._generation)
        key = order_key(scenario.order, self._engine)
        if isinstance(self._engine, ContinuousEngine):
            guarded = _Guarded(self._engine, lambda e: self._post(self._generation, self._failed, e))
            self._batcher = ContinuousBatcher(guarded, scenario.max_batch, answered, watch, key)
        else:
            answer = self._answerer(self._generation)
            self._batcher = Batcher(
                answer, scenario.max_batch, scenario.max_wait_ms / 1e3, answered, scenario.in_flight, watch, key
            )
        self.state, self.why = State.READY, ""
        self._on_change(self, "ready")

    async def _come_back(self) -> None:
        """Check the engine after a pause; from the second time on, rebuild it. The pause doubles each time."""
        rebuild = False
        while self.state is State.OUT:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)
            if self._running:  # its thread is still in the engine
                continue
            try:
                await asyncio.to_thread(self._rebuild if rebuild else self._check)
            except Exception as e:
                self.why = f"{self.why.partition(';')[0]}; tried again: {type(e).__name__}: {' '.join(str(e).split())}"
                self._on_change(self, "still out")
                rebuild = True
                continue
            self._let_in()

    def _check(self) -> None:
        self.gate.check(self._engine, self.spec.scenario.max_batch)

    def _rebuild(self) -> None:
        self._engine.close()
        self._build()

    # What follows runs on the batcher's threads, and posts messages to the event loop.

    def _post(self, generation: int, call: Callable[..., None], *values: Any) -> None:
        def deliver() -> None:
            if generation == self._generation:
                call(*values)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def _answerer(self, generation: int) -> Callable[[Sequence[Request]], BatchResult]:
        """Return the function that answers a batch. If it fails, the engine is asked about each request alone."""
        answer = getattr(self._engine, self.spec.task)
        numbers, [known_good, _] = itertools.count(), sample(self._trace.requests, 2, self.spec.seed)

        def guarded(requests: Sequence[Request]) -> BatchResult:
            number = (generation << 32) + next(numbers)
            self._running[number] = time.perf_counter()
            try:
                return answer(requests)  # type: ignore[no-any-return]
            except Exception as e:
                try:
                    if _device_is_lost(e):
                        raise
                    answer([known_good])  # raises if the engine is to blame
                    return _one_by_one(answer, requests)
                except Exception as worse:
                    self._post(generation, self._failed, worse)
                    raise
            finally:
                del self._running[number]

        return guarded

    def _watcher(
        self, generation: int
    ) -> tuple[Callable[[Sequence[Request], BatchResult, int], None], Callable[[list[Ticket]], None]]:
        """Return the two functions that the batcher calls after each batch."""
        form = self.gate.form
        last: list[BatchResult] = []

        def watch(requests: Sequence[Request], result: BatchResult, size: int) -> None:
            last[:] = [result]
            if not isinstance(result, _Mixed) and (problem := form.problem(requests, result)):
                error = IncorrectError(problem)
                self._post(generation, self._failed, error)
                raise error

        def answered(tickets: list[Ticket]) -> None:
            assert self._batcher is not None or generation != self._generation
            if (batcher := self._batcher) is not None:
                self._post(generation, self._deliver, tickets, last[0], batcher.take_rows()[-len(tickets) :])

        return watch, answered

    # What follows runs on the event loop again.

    def _failed(self, error: BaseException) -> None:
        reason = "wrong" if isinstance(error, IncorrectError) else "device" if _device_is_lost(error) else "raised"
        self.take_out(reason, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")

    def _deliver(self, tickets: list[Ticket], result: Any, rows: list[tuple[float, ...]]) -> None:
        self.batches += 1
        kinds = []
        for i, (ticket, row) in enumerate(zip(tickets, rows, strict=True)):
            one = self._pending.pop(ticket.key, None)
            if one is None:
                continue
            cached = result.cached[i] if result.cached else Cached()
            kinds.append(Kind(one.kind.tokens, 2 * cached.tokens > cached.of))
            self._remember(ticket.request)
            self.waiting_s = max(self.waiting_s - one.cost_s, 0.0) if self._pending else 0.0
            if one.future.done():  # its client has left
                continue
            if isinstance(result, _Mixed) and (error := result.errors[i]) is not None:
                one.future.set_exception(FailedError("outside", f"{type(error).__name__}: {error}"))
                continue
            _, _, _, queued, batch, transfer, compute, _, _, size = row
            items = result.items[i] if getattr(result, "items", None) else None
            reply = Reply(result.scores[i], items)
            done = Done(reply, ticket.request, cached, result.fallback, int(size), queued, batch, transfer, compute)
            one.future.set_result(done)
        if kinds and not isinstance(result, _Mixed):
            self._pause_s = FIRST_PAUSE_S
            _, _, _, _, batch, transfer, compute, *_ = rows[0]
            self.measured = time.perf_counter()
            self.costs.observe(kinds, (batch + transfer + compute) / 1e3)

    def _remember(self, request: Request) -> None:
        if self.spec.cache.name == "none":
            return
        self._known[request.user_id] = len(request.history_items)
        self._known.move_to_end(request.user_id)
        if len(self._known) > KNOWN_USERS:
            self._known.popitem(last=False)


class _Guarded:
    """An engine with continuous batching that reports what it raises. Satisfies grengines.api.ContinuousEngine."""

    def __init__(self, engine: ContinuousEngine, failed: Callable[[BaseException], None]) -> None:
        self._engine, self._failed = engine, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def admit(self, key: int, request: Request) -> None:
        try:
            self._engine.admit(key, request)
        except Exception as e:
            self._failed(e)
            raise

    def step(self) -> Any:
        try:
            return self._engine.step()
        except Exception as e:
            self._failed(e)
            raise


def _one_by_one(answer: Callable[[Sequence[Request]], Any], requests: Sequence[Request]) -> BatchResult:
    """Answer each request alone. Those that fail have an error instead of an answer."""
    results: list[Any] = []
    errors: list[Exception | None] = []
    for request in requests:
        try:
            results.append(answer([request]))
            errors.append(None)
        except Exception as e:
            results.append(None)
            errors.append(e)
    good = [r for r in results if r is not None]
    totals = {f.name: sum(getattr(r, f.name) for r in good) for f in _summed()}
    return _Mixed(
        **totals,
        scores=[r and r.scores[0] for r in results],
        items=[r.items[0] if r else None for r in results] if good and hasattr(good[0], "items") else [],
        cached=[r.cached[0] if r and r.cached else Cached() for r in results],
        errors=errors,
    )


def _summed() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(BatchResult) if f.default in (dataclasses.MISSING, 0.0)
            and f.default_factory is dataclasses.MISSING]  # fmt: skip


def _device_is_lost(error: BaseException) -> bool:
    """Return whether an error means that the process can't use its GPU any more."""
    text = f"{type(error).__name__} {error}"
    return any(words in text for words in ("CUDA error", "AcceleratorError", "device-side assert", "NVML"))
