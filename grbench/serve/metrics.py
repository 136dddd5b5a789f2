"""Metrics for Prometheus. Names that Triton has are there under its names too.

Triton's counters have no `_total` at their end, which the library would add, so a collector writes them.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from grbench.deployment import Step
from grbench.execution.heap import in_use
from grbench.serve.tallies import Counts, Spreads

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PARTS = ("flight", "behind", "pack", "load", "compute")  # of the time of a batch
STAGES = ("queue", "pack", "load", "compute", "post")

TRITON = {  # its counters, behind nv_
    "inference_request_success": "calls that were answered",
    "inference_request_failure": "calls that were not",
    "inference_count": "requests that were answered",
    "inference_request_duration_us": "sum over calls",
    "inference_queue_duration_us": "sum over requests",
    "inference_compute_input_duration_us": "sum over requests",
    "inference_compute_infer_duration_us": "sum over requests",
    "inference_compute_output_duration_us": "sum over calls, after the engine's answer",
    "cache_num_hits_per_model": "requests whose user's state was cached",
    "cache_num_misses_per_model": "requests whose user's state was not, with a cache",
}
TRITON_GPU = {  # its gauges, behind nv_gpu_: what NVML reads for a record, and the size of its unit
    "utilization": ("gpu/utilisation_percent", 0.01, "share of the last moment in which it was busy"),
    "memory_used_bytes": ("gpu/memory_mib", 2.0**20, "memory in use"),
    "power_usage": ("gpu/power_w", 1.0, "watts"),
}


@dataclass
class Answered:
    """The batches that strategies of one name have answered, and their time together. A reload does not end it."""

    batches: int = 0
    spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


class StrategyFigures(NamedTuple):
    """The requests that a strategy holds, and what it is."""

    name: str
    state: str
    engine: str
    pending: int  # requests that it holds
    host_loops: str = ""  # as in a record: "C", or "NumPy: " and why; "": it packs no batches
    state_bytes: Mapping[str, int] = {}  # of users, by tier
    is_lost: bool = False  # only another process can let it in again


class Metrics:
    """The metrics of one server. limit_s: the latency limit, which gets a bucket of its own."""

    def __init__(self, limit_s: float | None) -> None:
        self.registry = CollectorRegistry()
        buckets = sorted({*SECONDS, *([limit_s] if limit_s else [])})
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counts("grbench_requests", "Calls by status and strategy", ["status", "strategy"], **own)
        self.duration = Spreads(
            "grbench_request_duration_seconds", "Calls from the first byte to the answer, by outcome", ["outcome"],
            buckets, **own,
        )  # fmt: skip
        self.stages = Spreads("grbench_stage_duration_seconds", "Stages of a request", ["stage"], buckets, **own)
        self.batch_size = Spreads(
            "grbench_batch_size", "Requests of the batch of each request", ["strategy"], BATCHES, **own
        )
        self.choices = Counts(
            "grbench_choices", "Requests by the strategy that was chosen and why", ["strategy", "reason"], **own
        )
        self.fallbacks = Counter(
            "grbench_fallbacks", "Requests that another strategy answered", ["from", "to", "reason"], **own
        )
        self.degraded = Counter("grbench_degraded", "Requests answered by a cheaper step", ["step"], **own)
        self.step_loss = Gauge(
            "grbench_step_loss", "Loss of a step of degrade, as the deployment gives it, with the ends of its interval",
            ["step", "loss", "part"], **own,
        )  # fmt: skip
        self.shed = Counter("grbench_shed", "Requests refused under load", ["reason"], **own)
        self.body_bytes = Gauge("grbench_body_bytes", "Bytes of the bodies of calls that are not answered yet", **own)
        self.hits = Counts("grbench_state_hits", "Requests by where the user's state was", ["tier"], **own)
        self.gate_error = Histogram(
            "grbench_gate_error",
            "Error of sampled answers against the fp32 reference, as a share of what is allowed",
            ["strategy"], buckets=[0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0, 2.0, 10.0], **own,
        )  # fmt: skip
        self.gate_wrong = Counter("grbench_gate_wrong", "Sampled answers that were wrong", ["strategy"], **own)
        self.gate_unjudged = Counter(
            "grbench_gate_unjudged", "Sampled answers that the reference could not judge", ["strategy"], **own
        )
        self.gate_seconds = Counter("grbench_gate_seconds", "Time in which the reference answered samples again", **own)
        self.routes = Counter(
            "grbench_route", "Calls of a user by why they are here: new, owner, spill or moved",
            ["replica", "reason"], **own,
        )  # fmt: skip
        self.appends = Counter("grbench_appends", "Calls that append events, by status", ["status"], **own)
        self.events = Counter("grbench_state_events", "Appended events of users", **own)
        self.reloads = Counter("grbench_reloads", "Reloads of the deployment by outcome", ["outcome"], **own)
        self._stages = [self.stages.by[stage,] for stage in STAGES]
        ProcessCollector(registry=self.registry)
        self.answered: defaultdict[str, Answered] = defaultdict(Answered)  # by name of a strategy, also of former ones
        self.gpu: Mapping[str, float] = {}  # what NVML has read for this answer, by names of a record
        self.in_flight = 0  # calls
        Gauge("grbench_inflight", "Calls in the server", **own).set_function(lambda: self.in_flight)

    def watch(
        self,
        state: Callable[[], Iterable[StrategyFigures]],
        users: Callable[[], int],
        model: Callable[[], tuple[str, str]],
    ) -> None:
        """Read what the controller holds when metrics are asked for.

        state: of each strategy. model: its name and version.
        """
        self.registry.register(_Live(state, users, self.answered))
        self.registry.register(_Triton(self.sums, self.answered, state, model))
        self.registry.register(_TritonGpu(lambda: self.gpu))

    def show_steps(self, steps: Iterable[Step]) -> None:
        """Show the losses of the steps of the present deployment; NaN for a step without one."""
        self.step_loss.clear()
        for step in steps:
            for loss, value in (step.loss or {"unknown": math.nan}).items():
                parts = {"value": value, **dict(zip(("low", "high"), step.intervals.get(loss, ()), strict=False))}
                for part, its in parts.items():
                    self.step_loss.labels(step.name, loss, part).set(its)

    def ended(self, status: int, strategy: str, took_s: float, post_s: float) -> None:
        """Count a call that has ended. strategy: of each of its users, with commas between; each counts once.

        post_s: what it took after the engine's answer.
        """
        outcome = "answered" if status == 200 else "refused" if status < 500 else "failed"
        self.requests.by[str(status), ",".join(sorted(set(strategy.split(","))))].value += 1
        self.duration.by[outcome,].observe(took_s)
        if status == 200:
            self._stages[-1].observe(post_s)

    def route(self, replica: int, owner: str) -> None:
        """Count a call of a user. owner: the header of `grbench.serve.haproxy` about the user's replica."""
        number, _, full = owner.partition(" ")
        reason = "new" if number == "0" else "owner" if number == str(replica) else "spill" if full else "moved"
        self.routes.labels(str(replica), reason).inc()

    def hit(self, tier: str) -> None:
        """Count where the user's state of an answered request was. tier: device, host, storage or miss."""
        self.hits.by[tier,].value += 1

    def observe(self, queue_ms: float, pack_ms: float, load_ms: float, compute_ms: float) -> None:
        """Take the stages of one answered request."""
        for stage, ms in zip(self._stages, (queue_ms, pack_ms, load_ms, compute_ms), strict=False):
            stage.observe(max(ms, 0.0) / 1e3)

    def sums(self) -> dict[str, float]:
        """Return the values of Triton's counters, by their names in TRITON."""
        us = {stage: one.sum * 1e6 for stage, one in zip(STAGES, self._stages, strict=True)}
        ok = [one.value for (status, _), one in self.requests.by.items() if status == "200"]
        misses = [one.value for (tier,), one in self.hits.by.items() if tier == "miss"]
        return {
            "inference_request_success": sum(ok),
            "inference_request_failure": sum(one.value for one in self.requests.by.values()) - sum(ok),
            "inference_count": self._stages[0].count,
            "inference_request_duration_us": sum(
                one.sum * 1e6 for (outcome,), one in self.duration.by.items() if outcome == "answered"
            ),
            "inference_queue_duration_us": us["queue"],
            "inference_compute_input_duration_us": us["pack"] + us["load"],
            "inference_compute_infer_duration_us": us["compute"],
            "inference_compute_output_duration_us": us["post"],
            "cache_num_hits_per_model": sum(one.value for one in self.hits.by.values()) - sum(misses),
            "cache_num_misses_per_model": sum(misses),
        }


class _Live:
    """Figures that are read when Prometheus asks."""

    def __init__(
        self,
        state: Callable[[], Iterable[StrategyFigures]],
        users: Callable[[], int],
        answered: Mapping[str, Answered],
    ) -> None:
        self._state, self._users, self._answered = state, users, answered

    def collect(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("grbench_queue_depth", "Requests that a strategy holds", labels=["strategy"])
        info = GaugeMetricFamily("grbench_strategy_info", "1 for the state it is in",
                                 labels=["strategy", "state", "engine"])  # fmt: skip
        loops = GaugeMetricFamily(
            "grbench_host_loops_info", "1 for what runs the host's loops over a batch: C, or NumPy and why",
            labels=["strategy", "loops", "reason"],
        )  # fmt: skip
        batches = CounterMetricFamily("grbench_batches", "Batches that were answered", labels=["strategy"])
        spent = CounterMetricFamily(
            "grbench_batch_seconds", "Time of all batches together: in flight, of that behind another batch, and parts",
            labels=["strategy", "part"],
        )  # fmt: skip
        held = GaugeMetricFamily(
            "grbench_state_bytes", "Bytes of users' states in a strategy's cache", labels=["strategy", "tier"]
        )
        lost = GaugeMetricFamily(
            "grbench_restart_needed", "1 for a strategy that serves again only once the process is started again",
            labels=["strategy"],
        )  # fmt: skip
        for one in self._state():
            lost.add_metric([one.name], one.is_lost)
            depth.add_metric([one.name], one.pending)
            info.add_metric([one.name, one.state, one.engine], 1)
            if one.host_loops:
                form, _, reason = one.host_loops.partition(": ")
                loops.add_metric([one.name, form, reason], 1)
            for tier, taken in one.state_bytes.items():
                held.add_metric([one.name, tier], taken)
        for name, done in self._answered.items():
            batches.add_metric([name], done.batches)
            for part, seconds in done.spent_s.items():
                spent.add_metric([name, part], seconds)
        yield from (depth, info, lost, loops, batches, spent, held)
        yield CounterMetricFamily(
            "grbench_front_end_cpu_seconds", "Processor time of the event loop's thread, which this runs on",
            value=time.thread_time(),
        )  # fmt: skip
        if (heap := in_use()) is not None:
            yield GaugeMetricFamily(
                "grbench_heap_bytes", "Allocated bytes of the C heap, without free pages", value=heap
            )
        yield GaugeMetricFamily("grbench_state_users", "Users whose appended events are kept", value=self._users())


class _Triton:
    """Triton's counters under its exact names. Their type is "unknown": that of a counter asks for `_total`."""

    def __init__(
        self,
        sums: Callable[[], Mapping[str, float]],
        answered: Mapping[str, Answered],
        state: Callable[[], Iterable[StrategyFigures]],
        model: Callable[[], tuple[str, str]],
    ) -> None:
        self._sums, self._answered, self._state, self._model = sums, answered, state, model

    def collect(self) -> Iterator[Metric]:
        labels = dict(zip(("model", "version"), self._model(), strict=True))
        counted = {name: (TRITON[name], float(value)) for name, value in self._sums().items()}
        counted["inference_exec_count"] = ("batches", float(sum(one.batches for one in self._answered.values())))
        pending = sum(one.pending for one in self._state())
        counted["inference_pending_request_count"] = ("requests waiting", float(pending))
        for name, (meaning, value) in counted.items():
            metric = Metric(f"nv_{name}", f"Triton's name: {meaning}", "unknown")
            metric.add_sample(metric.name, labels, value)
            yield metric


class _TritonGpu:
    """Triton's gauges of the GPU that engines use; none where NVML does not find one."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        read = self._read()
        for name, (key, unit, meaning) in TRITON_GPU.items():
            if key in read:
                yield GaugeMetricFamily(f"nv_gpu_{name}", f"Triton's name: {meaning}", value=read[key] * unit)
