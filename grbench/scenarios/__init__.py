"""Scenarios: how a trace's requests arrive at an engine, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grbench.execution.clock import wake_on_time
from grbench.scenarios.batcher import (
    Answered,
    Batcher,
    ContinuousBatcher,
    Driven,
    RequestLoop,
    Start,
    Ticket,
    Watch,
    unwatched,
)
from grbench.scenarios.config import (
    ClosedLoopConfig,
    LoadGenConfig,
    ScenarioConfig,
    TraceReplayConfig,
    is_accuracy,
    issuer_waits,
)
from grbench.scenarios.waiting import order_key
from grengines.api import ContinuousEngine, Engine, Request


@dataclass
class Measurement:
    """Raw results of one scenario: a row per request, sums over batches, the load generator's own figures."""

    samples: dict[str, np.ndarray]
    tokens: int
    padded_tokens: int
    details: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    busy_s: float = 0.0  # seconds in which the engine computed
    batch_mean: float = 0.0  # requests of a batch; with continuous batching, requests in a step
    whole: list[int] = field(default_factory=list)  # batches whose last layer computed rows that nothing reads
    logged: list[np.ndarray[Any, Any]] = field(default_factory=list)  # each request's answer by LoadGen's accuracy log


def run_scenario(
    config: ScenarioConfig,
    engine: Engine,
    requests: Sequence[Request],
    *,
    task: str = "rank",
    latency_limit_ms: float,
    seed: int,
    folder: Path,
    progress: Callable[[int], None] = lambda answered: None,
    watch: Watch = unwatched,
) -> Measurement:
    """Drive `engine` with `requests` as `config` says, at one of the engine's tasks.

    Raises what the engine raises, and ValueError for an order that the engine does not support. In LoadGen's accuracy
    mode each request is issued once, in LoadGen's order; raises IncorrectError where its log lacks an answer.

    folder: for the load generator's logs. progress: called after each batch with the number of requests answered so
    far. watch: called before it with the batch's requests, answers and size; what it raises ends the scenario. Both are
    called on a thread of the request loop, or on LoadGen's where it waits for each batch, as in `single_stream`.
    """
    wake_on_time()
    accuracy = None
    if is_accuracy(config):
        from grbench.scenarios.accuracy import AccuracyRun

        accuracy = AccuracyRun(requests)
        watch = accuracy.watching(watch)
    start = _starter(config, engine, task, progress, watch)

    def request_at(k: int) -> Request:
        return requests[k % len(requests)]

    match config:
        case LoadGenConfig():
            from grbench.scenarios import loadgen

            driven = loadgen.run(config, start, request_at, latency_limit_ms, seed, folder, accuracy)
        case TraceReplayConfig():
            from grbench.scenarios import direct
            from grbench.workloads.trace import arrivals_s

            driven = direct.replay(config, start, request_at, arrivals_s(requests))
        case ClosedLoopConfig():
            from grbench.scenarios import direct

            driven = direct.closed_loop(config, start, request_at)
        case _:
            raise TypeError(f"unknown scenario {type(config).__name__}")
    if config.order != "fifo":
        driven.metrics["passed_over/max"] = float(driven.loop.most_passed)
    measurement = _measurement(driven, len(requests))
    if accuracy:
        measurement.logged = accuracy.logged(folder)
    return measurement


def _starter(config: ScenarioConfig, engine: Engine, task: str, progress: Callable[[int], None], watch: Watch) -> Start:
    """Return the function that starts the request loop of this engine, and counts answers for `progress`."""
    answered, key = 0, order_key(config.order, engine)

    def start(on_answer: Answered) -> RequestLoop:
        def after_batch(tickets: list[Ticket]) -> None:
            nonlocal answered
            answered += len(tickets)
            on_answer(tickets)
            progress(answered)

        if isinstance(engine, ContinuousEngine):
            return ContinuousBatcher(engine, config.max_batch, after_batch, watch, key)
        answer, wait_s = getattr(engine, task), config.max_wait_ms / 1e3
        in_flight = 0 if issuer_waits(config) else max(config.in_flight, 1)
        return Batcher(answer, config.max_batch, wait_s, after_batch, in_flight, watch, key)

    return start


def _measurement(driven: Driven, trace_length: int) -> Measurement:
    loop, samples, notes = driven.loop, driven.loop.samples(), list(driven.notes)
    if (issued := len(samples["request_id"])) > trace_length:
        notes.append(f"the trace of {trace_length} requests was issued {issued / trace_length:.1f} times over")
    return Measurement(
        samples,
        loop.tokens,
        loop.padded_tokens,
        loop.details,
        driven.metrics,
        notes,
        busy_s=loop.busy_s,
        batch_mean=loop.batched / loop.batches,
        whole=sorted(loop.whole),
    )
