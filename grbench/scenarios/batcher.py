"""Batching: requests arrive one by one, and each is timed to its end.

`Batcher` forms batches for engines that answer batches. `ContinuousBatcher` feeds engines that batch by themselves.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from grbench.execution.records import SAMPLE_COLUMNS
from grbench.scenarios.waiting import Key, Waiting
from grengines.api import BatchResult, ContinuousEngine, Finished, GenerateResult, Request
from grengines.last_layer import WHOLE


@dataclass(slots=True)
class Ticket:
    """One request in the system, with its arrival and the load generator's key."""

    request: Request
    arrived: float  # seconds, time.perf_counter
    key: int = 0
    passed: int = 0  # younger requests that were taken before it


Answered = Callable[[list[Ticket]], None]  # takes requests that ended together
Watch = Callable[[Sequence[Request], BatchResult, int], None]  # takes a batch, its answers and its size; may raise
Wanted = Callable[[list[Ticket]], tuple[list[Ticket], list[Ticket]]]  # returns those to answer, and those that wait on
Refused = Callable[[Ticket, ValueError], None]  # takes a request that the engine does not admit


def unwatched(requests: Sequence[Request], result: BatchResult, size: int) -> None:
    """Take a batch and do nothing."""


def all_wanted(tickets: list[Ticket]) -> tuple[list[Ticket], list[Ticket]]:
    """Return all requests to be answered."""
    return tickets, []


class RequestLoop:
    """Threads that answer submitted requests and keep a row of each. Without any, the thread that submits does.

    `watch` and then `answered` are called on one of these threads at a time, with requests that ended together: a
    client that sends its next request upon an answer does not wait for the check within that request. If the engine or
    one of them raises, `failure` holds the exception, `stopped` is set and no further batch begins. `later` holds one
    that a batch under way raises after that. key: which requests go together (grbench.scenarios.waiting); None: they go
    in order of arrival. wanted: is asked about the requests that are taken next, on one of these threads; those that it
    leaves out of both its lists are not answered.
    """

    def __init__(
        self,
        max_batch: int,
        answered: Answered,
        threads: int = 1,
        watch: Watch = unwatched,
        key: Key | None = None,
        wanted: Wanted = all_wanted,
    ) -> None:
        self.failure: BaseException | None = None
        self.later: BaseException | None = None
        self.stopped = threading.Event()
        self.tokens = 0
        self.padded_tokens = 0
        self.details: dict[str, float] = {}
        self.whole: set[int] = set()  # batches whose details have WHOLE
        self.busy_s = 0.0  # seconds in which the engine computed
        self.batches = 0
        self.batched = 0  # requests of all batches
        self.submitted = 0  # requests
        self._max_batch, self._answered, self._watch, self._wanted = max_batch, answered, watch, wanted
        self._waiting = Waiting(key, max_batch)
        self._changed = threading.Condition()
        self._closing = False
        self._rows: list[tuple[float, ...]] = []
        self._stages: list[dict[str, float]] = []  # of each row
        self._threads = [threading.Thread(target=self._loop, name="batcher", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, tickets: Iterable[Ticket]) -> None:
        """Queue requests. Those of one call can share a batch at once."""
        tickets = list(tickets)
        with self._changed:
            self._waiting.add(tickets)
            self.submitted += len(tickets)
            self._changed.notify(len(tickets))  # each may be a batch; a thread that wakes for nothing takes time

    def withdraw(self, key: int) -> bool:
        """Take the request of a ticket's key out of the queue. Returns False if a batch has it, or had."""
        with self._changed:
            return self._waiting.remove(key)

    def fail(self, error: BaseException) -> None:
        """Begin no further batch, because a thread of the scenario has raised."""
        with self._changed:
            if self.failure is None:
                self.failure = error
            else:
                self.later = self.later or error
            self._changed.notify_all()
        self.stopped.set()

    def close(self) -> None:
        """Answer the queued requests, then stop. Raises what the engine raised."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def has_ended(self, limit_s: float = 0.0) -> bool:
        """Wait for the threads to end, after `fail`. Return whether all have ended within the limit."""
        end = time.perf_counter() + limit_s
        for thread in self._threads:
            thread.join(max(end - time.perf_counter(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def waiting(self) -> list[Ticket]:
        """Return the requests that wait after a failed loop has closed. None waits any more."""
        return self._waiting.take(len(self._waiting), time.perf_counter())

    @property
    def most_passed(self) -> int:
        """Most younger requests that were taken before a request."""
        return self._waiting.most_passed

    def samples(self) -> dict[str, np.ndarray]:
        """Return one row per request, by column: SAMPLE_COLUMNS, and one for each stage of an engine with several.

        Times are in milliseconds, but arrival_s is in seconds from the first arrival.
        """
        table = np.array(self._rows, dtype=np.float64).reshape(-1, len(SAMPLE_COLUMNS))
        columns = {name: table[:, i] for i, name in enumerate(SAMPLE_COLUMNS)}
        if len(table):
            columns["arrival_s"] = columns["arrival_s"] - columns["arrival_s"].min()
        integers = ("request_id", "user_id", "batch_index", "batch_size")
        columns = {name: c.astype(np.int64) if name in integers else c for name, c in columns.items()}
        stages = self._stages[0] if self._stages else {}
        return columns | {f"{stage}_ms": np.array([row[stage] for row in self._stages]) for stage in stages}

    @property
    def answered(self) -> int:
        """Requests that were answered since `take_rows`."""
        return len(self._rows)

    def take_rows(self) -> list[tuple[float, ...]]:
        """Return the rows since the last call and forget them, for a server that runs on. `answered` may call it."""
        rows, self._rows, self._stages = self._rows, [], []
        self.whole.clear()
        return rows

    def _loop(self) -> None:
        try:
            self._work()
        except BaseException as e:
            self.fail(e)
        finally:
            self.stopped.set()

    def _take(self, count: int) -> list[Ticket]:
        """Remove and return the next requests that are wanted, at most `count`."""
        if not count or not self._waiting:
            return []
        taken, others = self._wanted(self._waiting.take(count, time.perf_counter()))
        self._waiting.put_back(others)
        return taken

    def _work(self) -> None:
        """Answer requests until the loop is closing and none waits."""
        raise NotImplementedError

    def _note(self, ticket: Ticket, begun: float, parts: tuple[float, float, float], done: float, size: int) -> None:
        """Add the row of a request.

        begun: end of its wait. parts: batch, transfer and compute, milliseconds.
        """
        queued, latency = (begun - ticket.arrived) * 1e3, (done - ticket.arrived) * 1e3
        request = ticket.request
        self._rows.append(
            (request.request_id, request.user_id, ticket.arrived, queued, *parts, latency, self.batches, size)
        )

    def _count(self, busy_s: float, size: int) -> None:
        self.busy_s += busy_s
        self.batches += 1
        self.batched += size

    def _add(self, details: dict[str, float]) -> None:
        for name, value in details.items():
            self.details[name] = self.details.get(name, 0.0) + value


class Batcher(RequestLoop):
    """A loop that forms batches. One closes when it holds `max_batch` requests or its oldest has waited `max_wait_s`.

    answer: the engine's method for the task. in_flight: the most batches at the same time. A batch behind another one
    closes only when it is full, because it can still grow until the device is free. 0: there is no thread, and `submit`
    answers its requests itself, for a load generator that waits for them before it sends others. So no thread has to
    wake up for a request.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], BatchResult],
        max_batch: int,
        max_wait_s: float,
        answered: Answered,
        in_flight: int = 1,
        watch: Watch = unwatched,
        key: Key | None = None,
        wanted: Wanted = all_wanted,
    ) -> None:
        self._answer, self._max_wait_s, self._under_way = answer, max_wait_s, 0
        self._noting = threading.Lock()
        super().__init__(max_batch, answered, in_flight, watch, key, wanted)

    def submit(self, tickets: Iterable[Ticket]) -> None:
        super().submit(tickets)
        while not self._threads and self._waiting and (batch := self._next_batch()):
            self._run(batch)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._run(batch)
            del batch  # its requests would stay until the next one

    def _next_batch(self) -> list[Ticket]:
        """Return the next batch. It is empty when the loop has ended or the engine has failed."""
        with self._changed:
            while self.failure is None:
                left = 0.0 if self._closing else self._closes_in_s()
                if left is None or left > 0:
                    self._changed.wait(left)
                elif batch := self._take(self._max_batch):
                    self._under_way += 1
                    return batch
                elif self._closing and not self._waiting:
                    break
            return []

    def _closes_in_s(self) -> float | None:
        """Return the seconds until the next batch closes; None: not before a request arrives or a batch ends."""
        if len(self._waiting) >= self._max_batch:
            return 0.0
        if not self._waiting or self._under_way:
            return None
        return self._waiting.oldest.arrived + self._max_wait_s - time.perf_counter()

    def _run(self, batch: list[Ticket]) -> None:
        requests = [t.request for t in batch]
        begun = time.perf_counter()
        result = self._answer(requests)
        done = time.perf_counter()
        with self._changed:
            self._under_way -= 1
            if self._waiting:
                self._changed.notify()
        parts = (result.batch_ms, result.transfer_ms, result.compute_ms)
        begun += result.wait_ms / 1e3  # behind the batches before it
        with self._noting:
            for ticket in batch:
                self._note(ticket, begun, parts, done, len(batch))
                if result.stages:
                    self._stages.append(result.stages)
            if WHOLE in result.details:
                self.whole.add(self.batches)
            self._count(result.compute_ms / 1e3, len(batch))
            self.tokens += result.tokens
            self.padded_tokens += result.padded_tokens
            self._add(result.details)
            self._watch(requests, result, len(batch))
            self._answered(batch)


class ContinuousBatcher(RequestLoop):
    """A loop that admits at most `max_batch` requests to an engine that batches by itself, between the engine's steps.

    A row's compute is the time from its admission to its end. Its batch is the call of `step` that returned it, which
    may be a step later, and its batch size the number of requests under way then. `busy_s` is the time in these calls.
    """

    def __init__(
        self,
        engine: ContinuousEngine,
        max_batch: int,
        answered: Answered,
        watch: Watch = unwatched,
        key: Key | None = None,
        wanted: Wanted = all_wanted,
        refused: Refused | None = None,
    ) -> None:
        """refused: takes a request that the engine cannot admit; None: the loop fails."""
        self._engine, self._refused = engine, refused
        self._under_way: dict[int, tuple[Ticket, float]] = {}
        self._keys = itertools.count()
        super().__init__(max_batch, answered, watch=watch, key=key, wanted=wanted)

    def _work(self) -> None:
        while self._admit_arrived():
            if self._under_way:
                self._step(len(self._under_way))

    def _step(self, size: int) -> None:
        """Let the engine work, and hand out what ends. size: requests under way."""
        begun = time.perf_counter()
        finished = self._engine.step()
        done = time.perf_counter()
        tickets = []
        for end in finished:
            ticket, admitted = self._under_way.pop(end.key)
            self._note(ticket, admitted, (0.0, 0.0, (done - admitted) * 1e3), done, size)
            if end.stages:
                self._stages.append(end.stages)
            self.tokens += end.tokens
            self.padded_tokens += end.tokens
            self._add(end.details)
            tickets.append(ticket)
        self._count(done - begun, size)
        if tickets:
            self._watch([t.request for t in tickets], _as_batch(finished), size)
            self._answered(tickets)

    def _admit_arrived(self) -> bool:
        """Admit the requests that may join now. Returns False at the end."""
        arrived = self._arrived()
        if self.failure is not None or not (arrived or self._under_way):
            return False
        for ticket in arrived:
            self._admit(ticket)
        return True

    def _admit(self, ticket: Ticket) -> None:
        key, admitted = next(self._keys), time.perf_counter()
        try:
            self._engine.admit(key, ticket.request)
        except ValueError as e:
            if self._refused is None:
                raise
            self._refused(ticket, e)
        else:
            self._under_way[key] = ticket, admitted

    def _arrived(self) -> list[Ticket]:
        """Return the requests that may join now. Waits only while the engine is idle; empty then means the end."""
        with self._changed:
            while self.failure is None:
                taken = self._take(self._max_batch - len(self._under_way))
                if taken or self._under_way or (self._closing and not self._waiting):
                    return taken
                if not self._waiting:
                    self._changed.wait()
            return []


def _as_batch(finished: Sequence[Finished]) -> GenerateResult:
    """Return the answers of one step as a batch's. Its times are in the rows."""
    return GenerateResult(
        items=[end.items for end in finished],
        scores=[end.scores for end in finished],
        cached=[end.cached for end in finished],
        fallback=finished[0].fallback,
        batch_ms=0.0,
        transfer_ms=0.0,
        compute_ms=0.0,
        tokens=0,
        padded_tokens=0,
    )


Start = Callable[[Answered], RequestLoop]  # starts the request loop; it passes on answered requests
RequestAt = Callable[[int], Request]  # the k-th request of the trace, from the start again when it ends


class Driven(NamedTuple):
    """A scenario that has ended: the request loop, the scenario's own figures, and notes for the reader."""

    loop: RequestLoop
    metrics: dict[str, float]
    notes: list[str]
