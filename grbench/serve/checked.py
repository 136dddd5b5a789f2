"""The engine of a strategy: built, checked against the fp32 reference, warmed up, and its costs measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cached_property
from operator import sub
from typing import Any

from grbench.config.schema import RunSpec
from grbench.execution import engines
from grbench.gate import gate_for
from grbench.gate.base import Gate, sample
from grbench.gate.measured import Answer, Verdict
from grbench.serve.costs import Costs
from grbench.workloads.trace import Trace
from grengines.api import CachingEngine, Request, Retrieval

WARM_UP = 512  # requests of the workload that costs are measured with


class UnwantedError(Exception):
    """The engine is not wanted any more."""


class CheckedEngine:
    """An engine behind its gate. Every method takes seconds, so a thread calls it."""

    def __init__(self, spec: RunSpec, trace: Trace, retrieval: Retrieval | None) -> None:
        self.spec = spec
        self.engine: Any = None
        self.actual: dict[str, Any] = {}
        self.device = "cpu"  # of `actual`: each call asks for it
        self.gate_figures: dict[str, Any] = {}
        self.start_s: dict[str, float] = {}  # seconds of the parts of `build`
        self.built_s = 0.0  # what `build` took
        self._trace, self._retrieval = trace, retrieval
        self._gate: Gate | None = None
        self.unwanted = threading.Event()  # the server ends: `build` stops after the part that it is in

    @property
    def host_loops(self) -> str:
        """Name and reason of the host's loops, as in a record; in a pipeline, the ranker's. Empty: it packs nothing."""
        return str(self.actual.get("rank", self.actual).get("host_loops", ""))

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of users' states by the name of their tier; empty without a cache or an engine."""
        engine = self.engine
        found = engine.state_bytes() if isinstance(engine, CachingEngine) else {}
        return {tier.name.lower(): taken for tier, taken in found.items()}

    @property
    def gate(self) -> Gate:
        assert self._gate is not None, "an engine that has answered was checked"
        return self._gate

    @cached_property
    def known_good(self) -> Request:
        """A request of the workload, which an engine that works can answer."""
        return sample(self._trace.requests, 2, self.spec.seed)[0]

    def build(self) -> Costs:
        """Make the engine, check it, warm it up and measure its costs. Raises what fails, and UnwantedError."""
        spec, trace, times = self.spec, self._trace, [time.perf_counter()]
        engine: Any = engines.build(spec, trace.catalogue, self._retrieval)
        times.append(time.perf_counter())
        try:
            self._go_on()
            engine.prepare(trace.requests.some(engines.MOST_PREPARED), spec.scenario.max_batch)
            times.append(time.perf_counter())
            self._go_on()
            self.actual = engine.actual()
            self.device = str(self.actual.get("device", "cpu"))
            if self._gate is None:
                self._gate = gate_for(spec, trace, self._retrieval, self.actual, keeps=False)
            times.append(time.perf_counter())
            self._go_on()
            self.gate_figures = self._gate.check(engine, spec.scenario.max_batch).to_dict()
            times.append(time.perf_counter())
            costs = self._measure(engine)
            times.append(time.perf_counter())
        except BaseException:
            engine.close()
            raise
        self.engine, self.built_s = engine, times[-1] - times[0]
        took = dict(zip(("import", "prepare", "reference", "check", "costs"), map(sub, times[1:], times), strict=True))
        self.start_s = took | getattr(engine, "start_s", {})  # parts of `prepare`, where the engine reports them
        return costs

    def _go_on(self) -> None:
        if self.unwanted.is_set():
            raise UnwantedError

    def _measure(self, engine: Any) -> Costs:
        """Warm up and measure costs with requests of the workload."""
        answer = getattr(engine, self.spec.task)

        def seconds(requests: Sequence[Request]) -> float:
            self._go_on()
            engine.reset_cache()
            begun = time.perf_counter()
            answer(requests)
            return time.perf_counter() - begun

        requests, size = self._trace.requests[:WARM_UP], self.spec.scenario.max_batch
        for i in range(self.spec.warmup_batches):
            self._go_on()
            first = i * size % len(requests)
            answer(requests[first : first + max(size >> i % 3, 1)])
        costs = Costs.measured(requests, size, seconds)
        engine.reset_cache()
        return costs

    def check(self) -> None:
        """Check the engine with an empty cache: what is in it may be what was wrong. Raises what fails."""
        self.engine.reset_cache()
        self.gate.check(self.engine, self.spec.scenario.max_batch)
        self.engine.reset_cache()

    def judge(self, answer: Answer) -> Verdict:
        """Compare an answer with the reference's. On a GPU batches go on beside it, on another stream."""
        import torch  # takes seconds, and the server listens before that

        with torch.cuda.stream(self._stream):
            [verdict] = self.gate.judge([answer])
        return verdict

    @cached_property
    def _stream(self) -> Any:
        """The reference's stream of the GPU; None on a CPU. There is one, because each keeps memory of its own."""
        import torch

        return torch.cuda.Stream() if self.device == "cuda" else None

    def rebuild(self) -> Costs:
        """Release the engine and build another. Raises what fails."""
        self.close()
        return self.build()

    def close(self) -> None:
        """Release the engine, if there is one."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()
