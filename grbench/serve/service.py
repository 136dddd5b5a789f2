"""The work of the server for either protocol: infer, append, start, reload, close. `describe` says what it is."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from grbench.deployment import Deployment
from grbench.execution.heap import give_back, leave_out, settle
from grbench.gate.measured import tier_of
from grbench.serve.bodies import Bodies
from grbench.serve.controller import Answer, Controller, Queued
from grbench.serve.describe import VERSION
from grbench.serve.errors import RefusedError, invalid
from grbench.serve.live_gate import LiveGate
from grbench.serve.logs import Log
from grbench.serve.metrics import Metrics, StrategyFigures
from grbench.serve.options import ServeConfig
from grbench.serve.protocol import (
    APPEND_PARAMETERS,
    CALL_PARAMETERS,
    Call,
    Tensor,
    check_parameters,
    number_of,
    shown,
    typed,
    unknown_model,
    wanted,
)
from grbench.serve.requests import decode, encode, events_of, outputs_of
from grbench.serve.serving_deployment import ServingDeployment, bring_up
from grbench.serve.strategy import State

if TYPE_CHECKING:
    from grbench.serve.traces import Traces

KEPT_LATENCIES = 2048  # of the newest calls, for the page
WATCH_S = 0.1  # between two looks for batches that take too long
GIVE_BACK_S = 60.0  # between two times at which free memory is given back: each holds the threads up for milliseconds


class Service:
    """The strategies of the present deployment, and the state that outlives a reload."""

    def __init__(
        self, deployment: Deployment, source: str | None, config: ServeConfig, log: Log, load: Callable[[], Deployment]
    ) -> None:
        """load: reads the deployment again, for a reload."""
        self.config, self.log = config, log
        self._load, self._source = load, source
        self.deployment = deployment
        self.metrics = Metrics(_limit_s(deployment))
        self.bodies = Bodies(config.max_bodies_mb, self.metrics)
        self.last_ms = 0  # when the newest call ended, milliseconds of the epoch
        self.newest_ms: deque[float] = deque(maxlen=KEPT_LATENCIES)
        self.draining = False
        self.lost = asyncio.Event()  # nothing can serve any more but another process
        self.begun = time.monotonic()
        self.present: ServingDeployment | None = None
        self._controllers: list[Controller] = []  # the present one, and those that finish what they hold
        self._reloading = asyncio.Lock()
        self._gate = LiveGate(config.gate_share, config.gate_load, self.metrics)
        self.traces: Traces | None = None
        if config.otlp_endpoint is not None:
            from grbench.serve import traces  # takes 0.1 s, and few servers have traces

            self.traces = traces.Traces(traces.sent_to(config.otlp_endpoint), config.trace_share)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._watch()), loop.create_task(_give_back_often())]
        self.metrics.watch(
            self._live, lambda: len(self.present.states) if self.present else 0, lambda: (self.model, VERSION)
        )

    @property
    def ready(self) -> bool:
        return not self.draining and self.present is not None and self.present.controller.ready

    @property
    def model(self) -> str:
        """The name of the model for clients."""
        return self.config.name or (self.present.spec.model.name if self.present else "starting")

    async def start(self) -> None:
        """Bring the first deployment up. Raises what each strategy of it raised, if none serves."""
        async with self._reloading:
            if self.present is None:  # else a reload came first
                present = await self._bring_up(self.deployment)
                leave_out()
                self.present = present
                self.metrics.show_steps(self.deployment.degrade)

    async def reload(self) -> str:
        """Read the deployment again and replace the strategies; the old ones answer until then. Returns a line.

        It waits until the server has started. Raises RefusedError if the new one cannot serve, and then the old one
        goes on, and if the server ends.
        """
        async with self._reloading:
            self._refuse_if_ending()
            try:
                deployment = await asyncio.to_thread(self._load)
                new = await self._bring_up(deployment)
            except Exception as e:
                self.metrics.reloads.labels("failed").inc()
                line = f"reload: {' '.join(str(e).split())}; the deployment before it goes on"
                self.log.error("reload failed", error=line)
                raise RefusedError(409, line) from None
            if self.draining:
                await self._end(new.controller, 0.0)
            self._refuse_if_ending()
            old, self.present, self.deployment = self.present, new, deployment
            strategies = new.controller.strategies
            self.metrics.reloads.labels("done").inc()
            self.metrics.show_steps(deployment.degrade)
            self.log.info("reloaded", strategies=[s.name for s in strategies])
            if old is not None:
                await self._end(old.controller, self.config.drain_s)
                del old  # else it would be left out of collections with what lives
                settle()
            return f"serving {', '.join(s.name for s in strategies if s.state is State.READY)}"

    async def close(self, limit_s: float) -> None:
        """Finish what is in flight within the limit, and release everything but an engine that a thread is still in."""
        self.draining = True
        await asyncio.gather(*(self._end(controller, limit_s) for controller in list(self._controllers)))
        for task in self._tasks:
            task.cancel()
        self._gate.close()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)

    async def _watch(self) -> None:
        """Look for batches that take too long, and whether only another process can serve, for ever."""
        while True:
            await asyncio.sleep(WATCH_S)
            for controller in self._controllers:
                for strategy in controller.strategies:
                    strategy.check_time()
            if self.present is not None and self.present.controller.is_lost and not self.draining:
                self.lost.set()

    async def _bring_up(self, deployment: Deployment) -> ServingDeployment:
        """Bring a deployment up, and look for its batches that take too long. Raises what `bring_up` raises."""
        new = await bring_up(deployment, self._source, self.config, self.metrics, self.log, self.present)
        self._controllers.append(new.controller)
        return new

    async def _end(self, controller: Controller, limit_s: float) -> None:
        await controller.close(limit_s)
        if controller in self._controllers:  # the end of the server may meet that of a reload
            self._controllers.remove(controller)

    def _refuse_if_ending(self) -> None:
        if self.draining:
            raise RefusedError(503, "the server is ending", 1.0)

    async def infer(
        self, call: Call, model: str, version: str, begun: float
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Answer a call. Returns tensors and parameters. Raises RefusedError.

        begun: when the call began, time.perf_counter; its deadline counts from then.
        """
        present = self.serving(model, version)
        controller = present.controller
        check_parameters(call.parameters, CALL_PARAMETERS)
        names = wanted(call, outputs_of(present.bounds.task))
        limit_s = min(self._limit_s(call.parameters), call.limit_s)
        requests = decode(call.tensors, present.bounds, present.states, limit_s * 1e3, call.client)
        deadline = begun + limit_s
        begun_all: list[Queued] = []  # before anything is awaited: a reload would put another controller in place
        try:
            for request in requests:
                begun_all.append(controller.begin(request, deadline, call.came))
        except RefusedError:
            for one in begun_all:
                controller.give_up(one)
            raise
        if len(begun_all) == 1:
            answers = [await self._finish(controller, begun_all[0])]
        else:
            answers = await _all(self._finish(controller, one) for one in begun_all)
        tensors = encode([answer.done.reply for answer in answers])
        parameters = _parameters(answers)
        if call.client:  # the engine's cache may hold the events of another client's user of this number
            del parameters["cached_tokens"]
        return {name: tensors[name] for name in names}, parameters

    async def _finish(self, controller: Controller, begun: Queued) -> Answer:
        """Return an answer, and count it. A request that replaced strategies gave back goes to the present ones once.

        Raises RefusedError.
        """
        try:
            answer = await controller.finish(begun)
        except RefusedError as e:
            if e.status != 503 or self.present is None or self.present.controller is controller:
                raise
            controller = self.present.controller
            answer = await controller.answer(begun.request, begun.deadline, begun.came)
        asyncio.get_running_loop().call_soon(self._count, controller, answer)  # once it is sent
        return answer

    def append(self, call: Call, model: str, version: str) -> dict[str, Any]:
        """Append events to a user's state. Raises RefusedError."""
        present = self.serving(model, version)
        check_parameters(call.parameters, APPEND_PARAMETERS)
        user, known = (_whole(call.parameters, name) for name in APPEND_PARAMETERS)
        events = events_of(call.tensors, present.bounds)
        now, repeated = present.states.append(user, known, events, call.client)
        self.metrics.events.inc(0 if repeated else len(events))
        return {"user_id": user, "version": now, "repeated": repeated}

    def serving(self, model: str, version: str) -> ServingDeployment:
        """Return what serves a call that names this model and version. Raises RefusedError."""
        self._refuse_if_ending()
        if self.present is None:
            raise RefusedError(503, "the server is starting; GET /v2/health/ready says when it serves", 1.0)
        if model != self.model:
            raise unknown_model(model, self.model)
        if version not in ("", VERSION):
            raise RefusedError(
                404, f"version {shown(version)} of model {model}: not served here; the version is {VERSION}"
            )
        return self.present

    def _limit_s(self, parameters: Mapping[str, Any]) -> float:
        """Return the time in which a call's answer is useful. Triton's parameter `timeout` is in microseconds."""
        ms = number_of(parameters, "deadline_ms")
        if ms is None and (timeout := number_of(parameters, "timeout")) is not None:
            ms = timeout / 1e3
        limit_s = _limit_s(self.deployment) if ms is None else ms / 1e3
        return math.inf if limit_s is None else limit_s

    def _count(self, controller: Controller, answer: Answer) -> None:
        done = answer.done
        self.metrics.choices.by[answer.strategy, answer.reason].value += 1
        if answer.degraded:
            self.metrics.degraded.labels(answer.degraded).inc()
        self.metrics.observe(done.queue_ms, done.pack_ms, done.load_ms, done.compute_ms)
        self.metrics.batch_size.by[answer.strategy,].observe(done.batch_size)
        strategy = next(s for s in controller.strategies if s.name == answer.strategy)
        if strategy.spec.cache.name != "none":
            self.metrics.hit(tier_of(done.cached))
        self._gate.take(strategy, done)

    def finished(self, status: int, strategy: str, took_s: float, post_s: float) -> None:
        """Count a call that has ended, with what it took, and of that after the engine's answer."""
        self.metrics.ended(status, strategy, took_s, post_s)
        self.last_ms = int(time.time() * 1e3)
        if status == 200:
            self.newest_ms.append(took_s * 1e3)

    def _live(self) -> list[StrategyFigures]:
        return [
            StrategyFigures(
                s.name,
                str(s.state),
                s.spec.engine.name,
                s.pending,
                s.checked.host_loops,
                s.checked.state_bytes,
                s.is_lost,
            )
            for s in (self.present.controller.strategies if self.present else [])
        ]


async def _give_back_often() -> None:
    while True:
        await asyncio.sleep(GIVE_BACK_S)
        await asyncio.to_thread(give_back)


def _limit_s(deployment: Deployment) -> float | None:
    limit_ms = deployment.limits.get("latency_ms.p99")
    return None if limit_ms is None else limit_ms / 1e3


async def _all(answers: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Return all answers, or raise the first error once all have ended, so that none goes on unseen."""
    ended: list[Answer | BaseException] = await asyncio.gather(*answers, return_exceptions=True)
    found = []
    for one in ended:
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found


def _parameters(answers: list[Answer]) -> dict[str, Any]:
    """Return what ran, for the client: one value, or one for each user."""

    def joined(values: list[str]) -> str:
        return values[0] if len(set(values)) == 1 else ",".join(values)

    done = [answer.done for answer in answers]
    parameters: dict[str, Any] = {
        "strategy": joined([a.strategy for a in answers]),
        "reason": joined([a.reason for a in answers]),
        "queue_ms": round(max(d.queue_ms for d in done), 3),
        "pack_ms": round(max(d.pack_ms for d in done), 3),
        "load_ms": round(max(d.load_ms for d in done), 3),
        "compute_ms": round(max(d.compute_ms for d in done), 3),
        "cached_tokens": sum(d.cached.tokens for d in done),
    }
    engine_ms = [d.engine_ms for d in done if d.engine_ms is not None]
    if len(engine_ms) == len(done):
        parameters["engine_ms"] = round(max(engine_ms), 3)
    if any(a.degraded for a in answers):
        for name in ("degraded", "asked", "ran"):
            parameters[name] = joined([getattr(a, name) for a in answers])
        most: Mapping[str, float] = max((a.loss for a in answers if a.loss), key=_most, default={})
        parameters |= most
        if any(a.degraded and not a.loss for a in answers):
            parameters["loss"] = "unknown"
    if failed := [line for a in answers for line in a.failed]:
        parameters["fallback_from"] = "; ".join(dict.fromkeys(failed))
    return parameters


def _most(loss: Mapping[str, float]) -> float:
    """Return the largest of an answer's losses, of which there is one or more, as a share."""
    return max(value / 100 if name.endswith("_pct") else value for name, value in loss.items())


def _whole(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name)
    if type(value) is not int or not 0 <= value < 1 << 62:
        wrong = f"{name}: missing;" if value is None else f"{name}={typed(value)}:"
        raise invalid(f"parameters.{wrong} allowed is an integer >= 0")
    return value
