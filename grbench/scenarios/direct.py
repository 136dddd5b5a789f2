"""Scenarios that LoadGen lacks: replay of a trace at its own times, and a closed loop of clients."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grbench.scenarios.batcher import Driven, RequestAt, Start, Ticket
from grbench.scenarios.config import ClosedLoopConfig, TraceReplayConfig

Floats = npt.NDArray[np.float64]


def replay(
    config: TraceReplayConfig,
    start: Start,
    request_at: RequestAt,
    arrivals_s: Sequence[float] | Floats,
) -> Driven:
    """Issue requests at their arrival times, all divided by one speed-up factor.

    arrivals_s: of the whole trace, as `schedule` takes them. Requests are not asked for them: each would be made.
    Latency counts from the *scheduled* arrival, so that a wait shows when the system falls behind.
    Raises ValueError where there are no times to scale.
    """
    due_s, speedup = schedule(config, arrivals_s)
    batcher = start(lambda tickets: None)
    begin = time.perf_counter()
    for k, offset in enumerate(due_s.tolist()):
        due = begin + offset
        if (early := due - time.perf_counter()) > 0 and batcher.stopped.wait(early):
            break
        batcher.submit([Ticket(request_at(k), due)])
    batcher.close()
    own = f"the trace's own clock: {len(due_s)} requests within {due_s[-1]:.3g} s"
    return Driven(batcher, {"replay_speedup": speedup}, [own] if config.mean_qps is None else [])


def schedule(config: TraceReplayConfig, arrivals_s: Sequence[float] | Floats) -> tuple[Floats, float]:
    """Return when each of `queries` requests is due, in seconds from the first, and the speed-up factor.

    arrivals_s: of the whole trace, ascending. The requests that are issued have the mean rate `mean_qps`, whatever the
    rate of the rest of the trace. A trace shorter than `queries` is repeated, one mean interval after its end.
    Raises ValueError for a rate that requests of one instant cannot have.
    """
    times, length = np.asarray(arrivals_s) - arrivals_s[0], len(arrivals_s)
    period = times[-1] * length / max(length - 1, 1)
    order = np.arange(config.queries)
    due = times[order % length] + period * (order // length)
    if config.mean_qps is None or config.queries == 1:
        return due, 1.0
    if due[-1] == 0:
        raise ValueError(
            f"scenario.mean_qps={config.mean_qps:g}: the first {min(config.queries, length)} requests of the trace "
            "arrive at one instant, so there are no times to scale; set scenario.mean_qps=null to replay them at once, "
            f"or scenario=server scenario.target_qps={config.mean_qps:g} for random arrivals"
        )
    speedup = due[-1] * config.mean_qps / (config.queries - 1)
    return due / speedup, float(speedup)


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
