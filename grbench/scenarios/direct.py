"""Scenarios that LoadGen lacks: replay of a trace at its own times, and a closed loop of clients."""

from __future__ import annotations

import itertools
import time

from grbench.scenarios.batcher import Driven, RequestAt, Start, Ticket
from grbench.scenarios.config import ClosedLoopConfig, TraceReplayConfig


def replay(
    config: TraceReplayConfig,
    start: Start,
    request_at: RequestAt,
    trace_length: int,
) -> Driven:
    """Issue requests at their arrival times, all divided by one speed-up factor.

    Latency counts from the *scheduled* arrival, so that a wait shows when the system falls behind. A trace shorter than
    `queries` is repeated, one mean interval after its end.
    """
    span = request_at(trace_length - 1).arrival_s
    period = span * trace_length / max(trace_length - 1, 1)
    own_rate = trace_length / period if period else float("inf")
    speedup = config.mean_qps / own_rate if config.mean_qps else 1.0
    batcher = start(lambda tickets: None)
    begin = time.perf_counter()
    for k in range(config.queries):
        request = request_at(k)
        due = begin + (request.arrival_s + period * (k // trace_length)) / speedup
        if (early := due - time.perf_counter()) > 0 and batcher.stopped.wait(early):
            break
        batcher.submit([Ticket(request, due)])
    batcher.close()
    return Driven(batcher, {"replay_speedup": speedup}, [])


def closed_loop(
    config: ClosedLoopConfig,
    start: Start,
    request_at: RequestAt,
) -> Driven:
    """Keep `clients` requests in the system until `queries` have been answered."""
    order = itertools.count()

    def send(count: int) -> None:
        now = time.perf_counter()
        tickets = [Ticket(request_at(k), now) for k in itertools.islice(order, count) if k < config.queries]
        if tickets:
            batcher.submit(tickets)

    answered = 0

    def on_answer(tickets: list[Ticket]) -> None:
        nonlocal answered
        answered += len(tickets)
        if answered >= config.queries:
            batcher.stopped.set()
        send(len(tickets))

    batcher = start(on_answer)
    send(config.clients)
    batcher.stopped.wait()
    batcher.close()
    return Driven(batcher, {}, [])
