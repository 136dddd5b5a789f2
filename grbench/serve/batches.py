"""The batches of a strategy: the batcher of measurements in front of a checked engine, on threads of its own."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from grbench.scenarios.batcher import Batcher, ContinuousBatcher, Refused, RequestLoop, Ticket, Wanted
from grbench.scenarios.waiting import order_key
from grbench.serve.blame import Guarded, device_is_lost, judged_alone, one_by_one
from grbench.serve.checked import CheckedEngine
from grengines.api import BatchResult, ContinuousEngine, Request
from grengines.numerics import IncorrectError

Rows = list[tuple[float, ...]]  # of the batcher, one for each request
Answered = Callable[[list[Ticket], BatchResult, Rows, float | None], None]  # the last: of `Called`


class Called(threading.local):
    """Milliseconds of the engine's last call on a thread, without its wait for other batches; None: unknown.

    A thread that runs a batch also hands it out.
    """

    ms: float | None = None


class Work:
    """The engine's work on the batcher's threads: how long it has gone on, and what it raises."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        """failed: takes what the engine raises."""
        self._failed = failed
        self._begun: dict[int, float] = {}  # of each piece of work, time.perf_counter, by a number
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note when a piece of work begins and ends, and report what it raises."""
        number = next(self._numbers)
        self._begun[number] = time.perf_counter()
        try:
            yield
        except Exception as e:
            self._failed(e)
            raise
        finally:
            del self._begun[number]

    def longest_s(self) -> float:
        """Return the time that the oldest piece of work has taken so far; 0 if the engine is idle."""
        begun = list(self._begun.values())
        return time.perf_counter() - min(begun) if begun else 0.0


def start(checked: CheckedEngine, work: Work, wanted: Wanted, answered: Answered, refused: Refused) -> RequestLoop:
    """Start and return the batcher. It works until its `fail` is called.

    wanted: chooses the requests of a batch. answered: takes those that ended together. refused: takes one that an
    engine with continuous batching does not admit.
    """
    scenario, engine, form = checked.spec.scenario, checked.engine, checked.gate.form
    is_continuous = isinstance(engine, ContinuousEngine)
    key = order_key(scenario.order, engine)
    last: list[BatchResult] = []
    called = Called()
    batcher: RequestLoop

    def watch(requests: Sequence[Request], result: BatchResult, size: int) -> None:
        last[:] = [judged_alone(form, requests, result) if is_continuous else result]

    def ended(tickets: list[Ticket]) -> None:
        answered(tickets, last[0], batcher.take_rows()[-len(tickets) :], called.ms)

    if is_continuous:
        guarded = Guarded(engine, work.watched)
        batcher = ContinuousBatcher(guarded, scenario.max_batch, ended, watch, key, wanted, refused)
    else:
        answer, max_wait_s = _answerer(checked, work, called), scenario.max_wait_ms / 1e3
        batcher = Batcher(answer, scenario.max_batch, max_wait_s, ended, scenario.in_flight, watch, key, wanted)
    return batcher


def _answerer(checked: CheckedEngine, work: Work, called: Called) -> Callable[[Sequence[Request]], BatchResult]:
    """Return the function that answers a batch. If it fails, the engine is asked about each request alone."""
    ask, form, known_good = getattr(checked.engine, checked.spec.task), checked.gate.form, checked.known_good

    def answer(requests: Sequence[Request]) -> BatchResult:
        begun = time.perf_counter()
        result: BatchResult = ask(requests)
        called.ms = (time.perf_counter() - begun) * 1e3 - result.wait_ms
        if problem := form.problem(requests, result):
            raise IncorrectError(problem)
        return result

    def guarded(requests: Sequence[Request]) -> BatchResult:
        with work.watched():
            try:
                return answer(requests)
            except Exception as e:
                if device_is_lost(e):
                    raise
            answer([known_good])  # raises if the engine is to blame
            mixed = one_by_one(answer, requests)
            called.ms = None  # there were several
            return mixed

    return guarded
