"""Scenarios: how a trace's requests arrive at an engine, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grbench.scenarios.batcher import Batcher, Ticket
from grbench.scenarios.config import ClosedLoopConfig, LoadGenConfig, ScenarioConfig, TraceReplayConfig
from grengines.api import Engine, Request


@dataclass
class Measurement:
    """Raw outcome of one scenario: a row a request, sums over batches, the load generator's own figures."""

    samples: dict[str, np.ndarray]
    tokens: int
    padded_tokens: int
    details: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run_scenario(
    config: ScenarioConfig,
    engine: Engine,
    requests: list[Request],
    *,
    latency_limit_ms: float,
    seed: int,
    folder: Path,
    progress: Callable[[int], None] = lambda answered: None,
) -> Measurement:
    """Drive `engine` with `requests` as `config` says. Raises what the engine raises.

    `progress` is called with the number of requests answered, on the engine's thread, after each batch.
    """
    answered = 0

    def start(on_answer: Callable[[list[Ticket]], None]) -> Batcher:
        def after_batch(tickets: list[Ticket]) -> None:
            nonlocal answered
            answered += len(tickets)
            on_answer(tickets)
            progress(answered)

        return Batcher(engine, config.max_batch, config.max_wait_ms / 1e3, after_batch)

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
    return Measurement(samples, batcher.tokens, batcher.padded_tokens, batcher.details, metrics, notes)
