"""One strategy that serves: the requests that it holds, and what becomes of it when its engine fails.

`start` builds the engine and checks it (`checked`), and lets the strategy in. Then requests go through the batcher of
measurements, on threads of this process (`batches`). Everything here runs on the event loop, so no state needs a lock.
A strategy that fails goes out: the requests that it held are given back, and it comes back when its engine passes the
gate again (`recovery`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from grbench.config.schema import RunSpec
from grbench.deployment import Serves
from grbench.scenarios.batcher import RequestLoop, Ticket
from grbench.serve import batches
from grbench.serve.blame import Mixed, device_is_lost
from grbench.serve.checked import CheckedEngine
from grbench.serve.costs import Costs, Kind
from grbench.serve.held import Done, FailedError, Held, next_batch, outside
from grbench.serve.metrics import PARTS, Answered
from grbench.serve.recovery import Recovery
from grbench.serve.requests import Reply
from grbench.workloads.trace import Trace
from grengines.api import Cached, Request, Retrieval
from grengines.numerics import IncorrectError

STOP_S = 1.0  # for the threads of a strategy that is closed to end
KNOWN_USERS = 100_000


class State(StrEnum):
    """The state of a strategy."""

    STARTING = "starting"
    READY = "ready"
    OUT = "out"
    CLOSED = "closed"


class Strategy:
    """A strategy. answered: counts its batches. on_change: called after its state has changed, with what happened."""

    def __init__(
        self,
        name: str,
        spec: RunSpec,
        serves: Serves,
        trace: Trace,
        retrieval: Retrieval | None,
        time_limit_s: float,
        answered: Answered,
        on_change: Callable[[Strategy, str], None],
    ) -> None:
        self.name, self.spec, self.serves = name, spec, serves
        self.state, self.why = State.STARTING, ""
        self.is_lost = False  # only another process can let it in again
        self.checked = CheckedEngine(spec, trace, retrieval)
        self.costs = Costs(0.0, {Kind(0): 0.0})
        self.waiting_s = 0.0  # what the requests that it holds add to batches
        self.answered = answered
        self.measured = 0.0  # when costs were measured last, time.perf_counter
        self.generation = 0  # of the batcher; messages of an earlier one are late
        self._time_limit_s, self._on_change = time_limit_s, on_change
        self._recovery = Recovery(self.checked, self._let_in, self._still_out)
        self._in_since = 0.0  # time.perf_counter
        self._batcher: RequestLoop | None = None
        self._work: batches.Work | None = None  # of the batcher's threads
        self._held: dict[int, Held] = {}  # by key of the ticket
        self._keys = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._releasing: asyncio.Task[None] | None = None  # of an engine that a thread did not leave in time
        self._known: OrderedDict[int, int] = OrderedDict()  # events of each user's last request

    # Life: it is let in, goes out when the engine fails, comes back, and is closed.

    async def start(self) -> None:
        """Build, check, warm up and let in. Raises what fails."""
        try:
            self._let_in(await asyncio.to_thread(self.checked.build))
        except asyncio.CancelledError:
            self.checked.unwanted.set()  # its thread goes on, and the process would wait for it
            raise

    def _let_in(self, costs: Costs | None) -> None:
        """Start a batcher and take requests. costs: measured anew; None: as before."""
        self.generation += 1
        self.costs = self.costs if costs is None else costs
        post = functools.partial(self._post, self.generation)
        drop = functools.partial(post, self._drop)
        self._work = batches.Work(functools.partial(post, self._failed))
        self._batcher = batches.start(
            self.checked,
            self._work,
            lambda tickets: next_batch(tickets, self._held, self.costs.fixed_s, drop),
            functools.partial(post, self._deliver),
            functools.partial(post, self._refuse),
        )
        self.state, self.why, self.is_lost, self._in_since = State.READY, "", False, time.perf_counter()
        self._on_change(self, "ready")

    def _post(self, generation: int, call: Callable[..., None], *values: Any) -> None:
        """Have the event loop call a method, unless a later batcher is in place then. The batcher's threads call it."""

        def deliver() -> None:
            if generation == self.generation:
                call(*values)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def check_time(self) -> None:
        """Take the strategy out if a batch has taken longer than the limit or its batcher has died. Called often.

        One that is out is lost if a thread stays in its engine.
        """
        if self._batcher is None or self._work is None:
            return
        if self.state is State.OUT:
            batch_s, try_s = self._work.longest_s(), self._recovery.trying_s
            if batch_s > 2 * self._time_limit_s:
                self._lose(f"a batch has not ended after {batch_s:.1f} s")
            elif try_s > 2 * (self._time_limit_s + self.checked.built_s):
                self._lose(f"a check or rebuild has not ended after {try_s:.1f} s")
            return
        if (error := self._batcher.failure) is not None:
            self._failed(error)
        elif (took := self._work.longest_s()) > self._time_limit_s:
            limit = f"serve.time_limit_s={self._time_limit_s:g}"
            self.take_out("hung", f"a batch has taken {took:.1f} s, longer than {limit}")

    def _failed(self, error: BaseException) -> None:
        reason = "wrong" if isinstance(error, IncorrectError) else "device" if device_is_lost(error) else "raised"
        self.take_out(reason, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")

    def take_out(self, reason: str, message: str) -> None:
        """Give the requests back and try again later. One that closes only gives its requests back."""
        error = FailedError(reason, message)
        if self.state is not State.READY or self._batcher is None:
            self._give_back(error)
            return
        self.state, self.why = State.OUT, f"{reason}: {message}"
        self.generation += 1
        self._known.clear()
        self._give_back(error)
        self._recovery.begin(time.perf_counter() - self._in_since, self._batcher.has_ended)
        self._on_change(self, reason)

    @property
    def may_return(self) -> bool:
        """True if it is out and no try to let it in again has failed yet."""
        return self.state is State.OUT and not self.is_lost and not self._recovery.has_failed

    def _still_out(self, error: Exception, rebuilt: bool) -> None:
        tried = f"tried again: {type(error).__name__}: {' '.join(str(error).split())}"
        if rebuilt and device_is_lost(error):  # a CUDA context stays broken, and a process has one
            self._lose(tried)
            return
        self._is_out_by(tried, "still out")

    def _lose(self, why: str) -> None:
        """Note that this process can't let the strategy in any more. It goes on trying: the note may be wrong."""
        if not self.is_lost:
            self.is_lost = True
            self._is_out_by(why, "lost until the process is started again")

    def _is_out_by(self, why: str, what: str) -> None:
        self.why = f"{self.why.partition(';')[0]}; {why}"
        self._on_change(self, what)

    async def close(self, limit_s: float) -> None:
        """Answer what is queued, within a limit, and release the engine, later if a thread is still in it."""
        self.state = State.CLOSED
        self._recovery.stop()
        if waiting := [one.future for one in self._held.values()]:
            await asyncio.wait(waiting, timeout=limit_s)
        self._give_back(FailedError("out", f"strategy {self.name} is closed"))
        if await self._is_free(STOP_S):
            await asyncio.to_thread(self.checked.close)
        else:
            self._releasing = self._loop.create_task(self._release_once_free())  # after a reload its memory is needed

    async def _is_free(self, limit_s: float) -> bool:
        """Wait until no thread is in the engine. Returns False after the limit."""
        is_free = await self._recovery.has_ended(limit_s)
        return self._batcher is None or (await asyncio.to_thread(self._batcher.has_ended, limit_s) and is_free)

    async def _release_once_free(self) -> None:
        while not await self._is_free(0.0):
            await asyncio.sleep(STOP_S)
        await asyncio.to_thread(self.checked.close)

    def _give_back(self, error: FailedError) -> None:
        """Stop the batcher, and fail what the strategy holds."""
        if self._batcher is not None:
            self._batcher.fail(error)
        held, self._held, self.waiting_s = self._held, {}, 0.0
        for one in held.values():
            one.fail(error)

    # Requests: each is queued, and the batcher answers, refuses or drops it.

    @property
    def pending(self) -> int:
        """Number of requests that it holds."""
        return len(self._held)

    def kind_of(self, request: Request) -> Kind:
        """Return the kind of a request, with the user's state cached if this strategy answered the user before."""
        return Kind.of(request, self.known_events(request.user_id) > 0)

    def known_events(self, user: int) -> int:
        """Return the events that the user's cached state has, by the last answer; 0 without a cache."""
        return self._known.get(user, 0)

    def submit(
        self, request: Request, kind: Kind, deadline: float = math.inf, came: float | None = None
    ) -> asyncio.Future[Done]:
        """Queue a request. The future raises FailedError if the strategy does not answer it.

        deadline: seconds, time.perf_counter. A request that waits longer, or whose future is cancelled, is dropped.
        came: when all of its call was there; None: now. Its batch closes as long after that as `scenario.max_wait_ms`
        says, so the reading of the call is a part of this wait. `queue_ms` counts from here.
        """
        future: asyncio.Future[Done] = self._loop.create_future()
        if self.state is not State.READY or self._batcher is None:
            future.set_exception(FailedError("out", f"strategy {self.name} is {self.state}"))
            return future
        key, cost_s = next(self._keys), self.costs.each_s(kind)
        now = time.perf_counter()
        came = now if came is None else came
        self._held[key] = Held(future, kind, cost_s, deadline, now - came)
        self.waiting_s += cost_s
        self._batcher.submit([Ticket(request, came, key)])
        return future

    def withdraw(self, future: asyncio.Future[Done]) -> None:
        """Forget a request whose client has left, by its future, unless a batch has it already."""
        future.cancel()
        key = next((key for key, one in reversed(self._held.items()) if one.future is future), None)
        if key is not None and self._batcher is not None and self._batcher.withdraw(key):
            self._release(key)

    def _release(self, key: int) -> Held | None:
        """Forget a request that was queued, by the key of its ticket, and return what is known of it."""
        one = self._held.pop(key, None)
        if one is not None:
            self.waiting_s = max(self.waiting_s - one.cost_s, 0.0) if self._held else 0.0
        return one

    def _drop(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if (one := self._release(ticket.key)) is not None:
                one.fail(FailedError("late", "the deadline passed while the request waited"))

    def _refuse(self, ticket: Ticket, error: ValueError) -> None:
        if (one := self._release(ticket.key)) is not None:
            one.fail(outside(error))

    def _deliver(self, tickets: list[Ticket], result: Any, rows: batches.Rows, engine_ms: float | None) -> None:
        self.answered.batches += 1
        ended = [self._release(ticket.key) for ticket in tickets]
        try:
            self._hand_out(tickets, ended, result, rows, engine_ms)
        except Exception as e:  # the result is not as it should be
            for one in ended:
                if one is not None:
                    one.fail(FailedError("raised", f"{type(e).__name__}: {e}"))
            self._failed(e)

    def _hand_out(
        self, tickets: list[Ticket], ended: list[Held | None], result: Any, rows: batches.Rows, engine_ms: float | None
    ) -> None:
        kinds = []
        for i, (ticket, one, row) in enumerate(zip(tickets, ended, rows, strict=True)):
            if one is None:
                continue
            if isinstance(result, Mixed) and (error := result.errors[i]) is not None:
                if not result.is_sure and ticket.request is not self.checked.known_good:
                    self._suspect(ticket, one, error)
                else:
                    one.fail(outside(error))
                continue
            cached = result.cached[i] if result.cached else Cached()
            kinds.append(one.kind._replace(cached=2 * cached.tokens > cached.of))
            self._remember(ticket.request)
            if one.future.done():  # its client has left
                continue
            _, _, _, queued, batch, transfer, compute, _, _, size = row
            items = result.items[i] if getattr(result, "items", None) else None
            one.future.set_result(
                Done(
                    Reply(result.scores[i], items), ticket.request, cached, result.fallback, int(size),
                    queued - one.before_s * 1e3, batch, transfer, compute, engine_ms, self.generation,
                )
            )  # fmt: skip
        if kinds and not isinstance(result, Mixed):
            self._loop.call_soon(self._learn, kinds, result, rows[0])  # once the answers are sent

    def _learn(self, kinds: list[Kind], result: Any, row: tuple[float, ...]) -> None:
        """Follow the costs of a batch, and add its times up. row: of its first request."""
        _, _, _, queued, batch, transfer, compute, latency, *_ = row
        self.measured = time.perf_counter()
        self.costs.observe(kinds, (batch + transfer + compute) / 1e3)
        if result.compute_ms:  # else it is a step of continuous batching, whose rows are of requests
            flight = latency - queued + result.wait_ms  # the row counts the wait behind another batch as queued
            for part, ms in zip(PARTS, (flight, result.wait_ms, batch, transfer, compute), strict=True):
                self.answered.spent_s[part] += ms / 1e3

    def _suspect(self, ticket: Ticket, one: Held, error: Exception) -> None:
        """Find out whether a request or the engine is to blame, by a request that is known to be good."""
        self._held[ticket.key] = dataclasses.replace(one, cost_s=0.0)  # until the engine has answered

        def judged(probe: asyncio.Future[Done]) -> None:
            failure = probe.exception()
            if isinstance(failure, FailedError) and failure.reason == "outside":
                self._failed(error)
            elif self._release(ticket.key) is not None:
                one.fail(outside(error) if failure is None else failure)

        self.submit(self.checked.known_good, one.kind).add_done_callback(judged)

    def _remember(self, request: Request) -> None:
        if self.spec.cache.name == "none":
            return
        self._known[request.user_id] = len(request.history_items)
        self._known.move_to_end(request.user_id)
        if len(self._known) > KNOWN_USERS:
            self._known.popitem(last=False)
