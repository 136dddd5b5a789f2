"""The controller: it chooses a strategy for each request, falls back, degrades and refuses.

A choice goes by what a strategy's batches cost (`costs`), what waits before the request on the same device, and the
request's deadline. The cheapest strategy that can meet the deadline answers. If none can, the steps of the deployment
are tried in their order, and then the request is refused with the time after which it may come again. Such a refusal
means that the answers before it were too dear, so the next requests begin with a step (`Overload`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from grbench.deployment import Deployment, Step
from grbench.serve.errors import RefusedError, invalid
from grbench.serve.held import Done, FailedError
from grbench.serve.metrics import Metrics
from grbench.serve.strategy import State, Strategy
from grengines.api import Request

EXPLORE = 64  # one request of this number goes to the second choice, so that its costs stay known
MARGIN = 1.1  # on predictions
RISE_S = 0.1  # in which a further step takes effect
CALM_S = 1.0  # without a refusal, after which requests begin one step earlier
FRESH_S = 1.0  # an idle strategy whose costs are older answers a request that seems too late, which measures them anew


@dataclass(slots=True)
class Answer:
    """An answer and how it came about."""

    done: Done
    strategy: str
    reason: str
    degraded: str = ""
    asked: str = ""  # what the step changed, as it was asked: events=400
    ran: str = ""  # the same, as it was answered: events=64
    loss: dict[str, float] = field(default_factory=dict)  # of the step
    failed: list[str] = field(default_factory=list)  # strategies that were tried before, and why they failed


@dataclass(slots=True)
class _Choice:
    strategy: Strategy
    request: Request
    reason: str
    step: Step | None = None


@dataclass(slots=True)
class Queued:
    """A request in the queue of the strategy that was chosen for it."""

    request: Request
    deadline: float  # seconds, time.perf_counter
    came: float | None  # when its call was there; None: as it was queued
    choice: _Choice
    future: asyncio.Future[Done]


class Overload:
    """The step that requests begin with: a later one while requests are refused, and an earlier one when none is.

    Else the requests that come first fill the queue with whole answers, and those behind them are refused.
    """

    def __init__(self, steps: int) -> None:
        self._steps, self._level = steps, 0
        self._risen = self._refused = -math.inf  # time.perf_counter

    def refused(self) -> None:
        """Note that a request was refused for what waits before it."""
        now = time.perf_counter()
        self._refused = now
        if self._level < self._steps and now - self._risen >= RISE_S:
            self._level, self._risen = self._level + 1, now

    def level(self) -> int:
        """Return the number of the step to begin with, from 1; 0: the whole request."""
        now = time.perf_counter()
        if self._level and (calm := int((now - self._refused) / CALM_S)):
            self._level, self._refused = max(self._level - calm, 0), now
        return self._level


class Controller:
    """The strategies of one deployment. Runs on the event loop."""

    def __init__(
        self, deployment: Deployment, strategies: Sequence[Strategy], metrics: Metrics, max_queue: int
    ) -> None:
        self.deployment, self.strategies = deployment, list(strategies)
        self._metrics, self._max_queue = metrics, max_queue
        steps = {step.strategy for step in deployment.degrade}
        self._usual = [s for s in self.strategies if s.name not in steps] or self.strategies
        self._asked = 0
        self._overload = Overload(len(deployment.degrade))

    @property
    def ready(self) -> bool:
        """True if a strategy serves."""
        return any(s.state is State.READY for s in self.strategies)

    @property
    def is_lost(self) -> bool:
        """True if no strategy serves or is about to, and another process might: one of them is lost in this one."""
        return any(s.is_lost for s in self.strategies) and not any(
            s.state is State.READY or s.may_return for s in self.strategies
        )

    @property
    def pending(self) -> int:
        """Requests in the server."""
        return sum(s.pending for s in self.strategies)

    async def close(self, limit_s: float) -> None:
        """Finish what the strategies hold within the limit, and release them."""
        await asyncio.gather(*(s.close(limit_s) for s in self.strategies))

    async def answer(self, request: Request, deadline: float, came: float | None = None) -> Answer:
        """Answer a request. Parameters as of `begin`. Raises RefusedError."""
        return await self.finish(self.begin(request, deadline, came))

    def begin(self, request: Request, deadline: float, came: float | None = None) -> Queued:
        """Choose a strategy for a request and queue it there. Raises RefusedError.

        deadline: seconds, time.perf_counter; may be infinite. came: when its call was there; None: now.
        """
        if self.pending >= self._max_queue:
            self._metrics.shed.labels("queue").inc()
            self._overload.refused()
            raise RefusedError(429, f"{self._max_queue} requests wait already (serve.max_queue)", self._clears_s())
        choice = self._choose(request, deadline)
        return Queued(request, deadline, came, choice, self._submit(choice, deadline, came))

    @staticmethod
    def give_up(begun: Queued) -> None:
        """Take a request back that nobody waits for."""
        begun.choice.strategy.withdraw(begun.future)

    async def finish(self, begun: Queued) -> Answer:
        """Wait for the answer to a request, from other strategies if the first one fails. Raises RefusedError."""
        request, deadline, choice, future = begun.request, begun.deadline, begun.choice, begun.future
        failed: list[str] = []
        tried: set[Strategy] = set()
        while True:
            try:
                done = await future
                break
            except asyncio.CancelledError:
                choice.strategy.withdraw(future)
                raise
            except FailedError as e:
                e.__traceback__ = None  # else a cycle of this frame, the future and the error keeps the call
                if e.reason == "late":
                    self._overload.refused()
                    raise self._too_late(f"deadline: {e}", self._clears_s()) from None
                tried.add(choice.strategy)
                failed.append(f"{choice.strategy.name}: {e.reason}")
                following = self._following(tried, request, deadline, e, failed)
                self._metrics.fallbacks.labels(choice.strategy.name, following.name, e.reason).inc()
                choice = _Choice(following, request, "fallback")
                future = self._submit(choice, deadline, begun.came)
        step = choice.step or self._step_of(choice.strategy)
        answer = Answer(done, choice.strategy.name, choice.reason, failed=failed)
        if step is not None:
            answer.degraded, answer.loss = step.name, step.loss
            answer.asked, answer.ran = self._change(step, choice.strategy, request, done.request)
        return answer

    @staticmethod
    def _submit(choice: _Choice, deadline: float, came: float | None) -> asyncio.Future[Done]:
        return choice.strategy.submit(choice.request, choice.strategy.kind_of(choice.request), deadline, came)

    def _following(
        self, tried: set[Strategy], request: Request, deadline: float, error: FailedError, failed: Sequence[str]
    ) -> Strategy:
        """Return the strategy after those that failed. Raises RefusedError if none is left or none can be in time."""
        left = [s for s in self.strategies if s not in tried and self._can(s, request)]
        if not left:
            raise _nothing_left(error, failed)
        predicted = {s: self.predicted_s(s, request) for s in left}
        in_time = [s for s in left if predicted[s] <= deadline - time.perf_counter()]
        if not in_time:
            soonest = min(predicted.values())
            line = f"deadline: {'; '.join(failed)}; another strategy would take {soonest * 1e3:.1f} ms more"
            raise RefusedError(503, line, soonest)  # no overload: HAProxy tries another replica
        return min(in_time, key=lambda s: self._usual.index(s) if s in self._usual else math.inf)

    def _too_late(self, message: str, retry_after_s: float) -> RefusedError:
        """Return the error for a request that misses its deadline, and count it."""
        self._metrics.shed.labels("deadline").inc()
        return RefusedError(429, message, retry_after_s)

    def _step_of(self, strategy: Strategy) -> Step | None:
        """Return the step that a strategy is there for; None for a usual one."""
        if strategy in self._usual:
            return None
        return next((step for step in self.deployment.degrade if step.strategy == strategy.name), None)

    def _change(self, step: Step, strategy: Strategy, asked: Request, ran: Request) -> tuple[str, str]:
        """Return what a step changed, as it was asked and as it ran."""
        usual = next((s.name for s in self._usual if s.serves.takes(asked)), strategy.name)
        changes = {
            "strategy": (usual, strategy.name) if step.strategy else ("", ""),
            "events": (len(asked.history_items), len(ran.history_items)),
            "candidates": (len(asked.candidates), len(ran.candidates)),
        }
        parts = [(f"{key}={before}", f"{key}={after}") for key, (before, after) in changes.items() if before != after]
        return " ".join(before for before, _ in parts), " ".join(after for _, after in parts)

    def backlog_s(self, device: str) -> float:
        """Return the time until the requests on a device are answered."""
        return sum(
            s.waiting_s + s.costs.fixed_s * math.ceil(s.pending / s.spec.scenario.max_batch)
            for s in self.strategies
            if s.checked.device == device and s.state is State.READY
        )

    def predicted_s(self, strategy: Strategy, request: Request) -> float:
        """Return the time until an answer: what waits on the device, and the request's own batch."""
        own = strategy.costs.batch_s([strategy.kind_of(request)])
        return MARGIN * (self.backlog_s(strategy.checked.device) + own) + strategy.spec.scenario.max_wait_ms / 1e3

    def _choose(self, request: Request, deadline: float) -> _Choice:
        """Return the choice for a request. Raises RefusedError."""
        able = [s for s in self._usual if self._can(s, request)]
        if not able:
            able = [s for s in self.strategies if self._can(s, request)]
        if not able:
            raise self._nothing_serves(request)
        left = deadline - time.perf_counter()
        first = self._first_step(able, request) if left < math.inf else None
        if first is not None and (choice := self._cheaper(first, able, request, left)):
            return choice
        predicted = {s: self.predicted_s(s, request) for s in able}
        in_time = [s for s in able if predicted[s] <= left]
        if len(in_time) > 1:
            in_time.sort(key=lambda s: s.costs.batch_s([s.kind_of(request)]))
        if in_time:
            return self._among(in_time, len(able), request)
        if choice := self._cheaper(0, able, request, left):
            return choice
        if stale := [s for s in able if not s.pending and time.perf_counter() - s.measured > FRESH_S]:
            return _Choice(stale[0], request, "measure")
        if any(predicted[s] - MARGIN * self.backlog_s(s.checked.device) <= left for s in able):
            self._overload.refused()
        soonest = min(predicted.values())
        raise self._too_late(
            f"deadline: the answer would take {soonest * 1e3:.1f} ms and {max(left, 0.0) * 1e3:.1f} ms are left",
            max(soonest - left, 0.0),
        )

    def _among(self, in_time: list[Strategy], able: int, request: Request) -> _Choice:
        """Choose the cheapest strategy, and now and then the next one."""
        self._asked += 1
        if len(in_time) > 1 and self._asked % EXPLORE == 0:
            return _Choice(in_time[1], request, "explore")
        reason = "only" if able == 1 else "cheapest" if len(in_time) == able else "deadline"
        return _Choice(in_time[0], request, reason)

    def _first_step(self, able: Sequence[Strategy], request: Request) -> int | None:
        """Return the step to begin with: the last one up to the overload's level that changes the request.

        None: the whole request, because no such step changes it.
        """
        steps = self.deployment.degrade
        levels = reversed(range(self._overload.level()))
        return next((number for number in levels if any(self._degraded(steps[number], able, request))), None)

    def _cheaper(self, first: int, able: Sequence[Strategy], request: Request, left_s: float) -> _Choice | None:
        """Return the first step, from number `first` on, that meets the deadline; None if none does."""
        for step in self.deployment.degrade[first:]:
            for strategy, cheaper in self._degraded(step, able, request):
                if self.predicted_s(strategy, cheaper) <= left_s:
                    return _Choice(strategy, cheaper, "degraded", step)
        return None

    def _degraded(self, step: Step, able: Sequence[Strategy], request: Request) -> Iterator[tuple[Strategy, Request]]:
        """Yield the strategies of a step, each with the request as it would answer it."""
        if step.strategy is not None:
            yield from ((s, request) for s in self.strategies if s.name == step.strategy and self._can(s, request))
            return
        for strategy in able:
            cheaper = request
            if step.max_candidates:
                cheaper = _first(request, step.max_candidates)
            elif step.max_history:
                cheaper = _newest(request, step.max_history)
            elif 0 < (known := strategy.known_events(request.user_id)) < len(request.history_items):
                cheaper = _oldest(request, known)
            if cheaper is not request:
                yield strategy, cheaper

    @staticmethod
    def _can(strategy: Strategy, request: Request) -> bool:
        return strategy.state is State.READY and strategy.serves.takes(request)

    def _nothing_serves(self, request: Request) -> RefusedError:
        takers = [s for s in self.strategies if s.serves.takes(request)]
        sizes = f"{len(request.history_items)} events and {len(request.candidates)} candidates"
        if not takers:
            return invalid(f"TOKEN_LENGTHS: no strategy takes {sizes}; see serves in the deployment")
        states = ", ".join(f"{s.name} is {s.state}" for s in takers)
        what = f"no strategy in service takes {sizes}" if self.ready else "no strategy serves"
        return RefusedError(503, f"{what}: {states}", 1.0)

    def _clears_s(self) -> float:
        return max((self.backlog_s(s.checked.device) for s in self.strategies), default=0.0)


def _nothing_left(error: FailedError, failed: Sequence[str]) -> RefusedError:
    """Return the error for a request that every strategy has failed to answer."""
    if error.reason == "outside":
        return invalid(f"no strategy can answer this request: {error}")
    return RefusedError(503, f"no strategy answered: {'; '.join(failed)}", 1.0)


def _first(request: Request, candidates: int) -> Request:
    few = len(request.candidates) <= candidates
    return request if few else replace(request, candidates=request.candidates[:candidates])


def _newest(request: Request, events: int) -> Request:
    return request if len(request.history_items) <= events else request.with_events(slice(-events, None))


def _oldest(request: Request, events: int) -> Request:
    return request.with_events(slice(0, events))
