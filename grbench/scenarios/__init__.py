"""Scenarios: how a trace's requests arrive at an engine, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grbench.scenarios.batcher import Batcher, ContinuousBatcher, RequestLoop, Ticket
from grbench.scenarios.config import ClosedLoopConfig, LoadGenConfig, ScenarioConfig, TraceReplayConfig
from grengines.api import ContinuousEngine, Engine, Request


@dataclass
class Measurement:
    """Raw outcome of one scenario: a row a request, sums over batches, the load generator's own figures."""

    samples: dict[str, np.ndarray]
    tokens: int
    padded_tokens: int
    details: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    busy_s: float = 0.0  # that the engine computed
    batch_mean: float = 0.0  # requests of a batch; with continuous batching, under way in a step


def run_scenario(
    config: ScenarioConfig,
    engine: Engine,
    requests: list[Request],
    *,
    task: str = "rank",
    latency_limit_ms: float,
    seed: int,
    folder: Path,
    progress: Callable[[int], None] = lambda answered: None,
) -> Measurement:
    """Drive `engine` with `requests` as `config` says, at a task that it has. Raises what the engine raises.

    `progress` is called with the number of requests answered, on a thread of the engine's, after each batch.
    """
    answered = 0

    def start(on_answer: Callable[[list[Ticket]], None]) -> RequestLoop:
        def after_batch(tickets: list[Ticket]) -> None:
            nonlocal answered
            answered += len(tickets)
            on_answer(tickets)
            progress(answered)

        if isinstance(engine, ContinuousEngine):
            return ContinuousBatcher(engine, config.max_batch, after_batch)
        return Batcher(getattr(engine, task), config.max_batch, config.max_wait_ms / 1e3, after_batch, config.in_flight)

    def request_at(k: int) -> Request:
        return requests[k % len(requests)]

    match config:
        case LoadGenConfig():
            from grbench.scenarios import loadgen

            batcher, metrics, notes = loadgen.run(config, start, request_at, latency_limit_ms, seed, folder)
        case TraceReplayConfig():
            from grbench.scenarios import direct

            batcher, metrics, notes = direct.replay(config, start, request_at, len(requests))
        case ClosedLoopConfig():
            from grbench.scenarios import direct

            batcher, metrics, notes = direct.closed_loop(config, start, request_at)
        case _:
            raise TypeError(f"unknown scenario {type(config).__name__}")
    samples = batcher.samples()
    if len(samples["request_id"]) > len(requests):
        times = len(samples["request_id"]) / len(requests)
        notes.append(f"the trace of {len(requests)} requests was issued {times:.1f} times over")
    return Measurement(
        samples,
        batcher.tokens,
        batcher.padded_tokens,
        batcher.details,
        metrics,
        notes,
        busy_s=batcher.busy_s,
        batch_mean=batcher.batched / batcher.batches,
    )
