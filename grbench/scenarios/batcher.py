"""Dynamic batching: requests come in one by one, leave in batches, and every step is timed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from grengines.api import Engine, Request


@dataclass(slots=True)
class Ticket:
    """One request on its way: when it arrived, and what the load generator knows it by."""

    request: Request
    arrived: float  # seconds, time.perf_counter
    key: int = 0


class Batcher:
    """Runs the engine on its own thread, one batch at a time.

    A batch closes when it holds `max_batch` requests or its oldest has waited `max_wait_s`. `answered` is
    called on that thread with each finished batch. If the engine raises, `failure` holds the exception,
    `stopped` is set and nothing more is answered.
    """

    COLUMNS = (
        "request_id", "user_id", "arrival_s", "queue_ms", "batch_ms", "transfer_ms", "compute_ms",
        "latency_ms", "batch_index", "batch_size",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        max_batch: int,
        max_wait_s: float,
        answered: Callable[[list[Ticket]], None],
    ) -> None:
        self.failure: BaseException | None = None
        self.stopped = threading.Event()
        self.tokens = 0
        self.padded_tokens = 0
        self.details: dict[str, float] = {}
        self._engine, self._max_batch, self._max_wait_s, self._answered = (
            engine,
            max_batch,
            max_wait_s,
            answered,
        )
        self._queue: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._rows: list[tuple[float, ...]] = []
        self._batches = 0
        self.started = time.perf_counter()
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, tickets: Iterable[Ticket]) -> None:
        """Queue requests; those of one call can share a batch at once."""
        with self._changed:
            self._queue.extend(tickets)
            self._changed.notify()

    def close(self) -> None:
        """Answer what is queued, then stop. Raises what the engine raised, if it did."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def samples(self) -> dict[str, np.ndarray]:
        """One row a request, by column (COLUMNS); times in milliseconds, arrival_s from the first arrival."""
        table = np.array(self._rows, dtype=np.float64).reshape(-1, len(self.COLUMNS))
        columns = {name: table[:, i] for i, name in enumerate(self.COLUMNS)}
        if len(table):
            columns["arrival_s"] = columns["arrival_s"] - columns["arrival_s"].min()
        integers = ("request_id", "user_id", "batch_index", "batch_size")
        return {name: c.astype(np.int64) if name in integers else c for name, c in columns.items()}

    def _loop(self) -> None:
        try:
            while batch := self._next_batch():
                self._run(batch)
        except BaseException as e:
            self.failure = e
        finally:
            self.stopped.set()

    def _next_batch(self) -> list[Ticket]:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if self._max_wait_s and self._queue:
                closes = self._queue[0].arrived + self._max_wait_s
                while len(self._queue) < self._max_batch and not self._closing:
                    if (left := closes - time.perf_counter()) <= 0:
                        break
                    self._changed.wait(left)
            return [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]

    def _run(self, batch: list[Ticket]) -> None:
        begun = time.perf_counter()
        result = self._engine.rank([t.request for t in batch])
        done = time.perf_counter()
        for ticket in batch:
            self._rows.append(
                (
                    ticket.request.request_id,
                    ticket.request.user_id,
                    ticket.arrived,
                    (begun - ticket.arrived) * 1e3,
                    result.batch_ms,
                    result.transfer_ms,
                    result.compute_ms,
                    (done - ticket.arrived) * 1e3,
                    self._batches,
                    len(batch),
                )
            )
        self._batches += 1
        self.tokens += result.tokens
        self.padded_tokens += result.padded_tokens
        for name, value in result.details.items():
            self.details[name] = self.details.get(name, 0.0) + value
        self._answered(batch)

    def facts(self) -> dict[str, Any]:
        return {"batches": self._batches, "answered": len(self._rows)}
