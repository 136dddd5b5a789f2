"""Faults that are planted in an engine while it is measured: each ends its cell as INCORRECT.

The engine is right before and after the measurement, so only the check of the measured answers can notice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import grkernels.hstu_attention.torch as eager_attention
from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import RunSpec
from grbench.execution.cell import Cell
from grbench.execution.records import Outcome, Status
from grbench.execution.worker import classify
from grengines.cache.pool import PagePool
from grengines.hstu.engine import HSTUEngine
from grengines.hstu.retriever import HSTURetriever
from grengines.runtime.native import native
from grkernels.operators import Operators

BASE = [
    "model=hstu_tiny",
    "engine=hstu",
    "engine.device=cpu",
    "engine.precision=fp32",
    "engine.cpu_threads=1",
    "workload=synthetic",
    "workload.max_requests=192",
    "workload.max_history=48",
    "workload.history_median=16",
    "workload.revisit_rate=0.8",
    "workload.num_candidates=8",
    "scenario=closed_loop",  # LoadGen can't run again in a process in which an engine has failed
    "scenario.clients=16",
    "scenario.max_batch=16",
    "scenario.queries=192",
    "warmup_batches=0",
]
THREE = [*BASE, "scenario.clients=3"]
CACHE = [*BASE, "cache=lru", "cache.memory_gb=0.02"]
HOST = [*BASE, "scenario.clients=1", "cache=lru", "cache.memory_gb=0.00027"]
HOST += ["cache.host_gb=0.01", "scenario.queries=120"]
GENERATE = [*BASE, "task=generate", "gate.measured=12", "scenario.queries=32", "gate.requests=2"]
GENERATE += ["retrieval.k=5", "retrieval.beam_width=6"]
RECOMMEND = [word for word in GENERATE if not word.startswith(("engine", "task"))]
RECOMMEND += ["engine=pipeline", "engine@engine.retrieve=hstu", "engine.rank.device=cpu", "engine.retrieve.device=cpu"]
RECOMMEND += ["engine.rank.precision=fp32", "engine.retrieve.precision=fp32"]
BF16, FP16 = ([*BASE, f"engine.precision={p}", "gate.measured=16", "scenario.queries=64"] for p in ("bf16", "fp16"))


@dataclass
class Run:
    """A cell under way."""

    measuring: bool = False
    before: list[Any] = field(default_factory=list)  # scores of the batch before
    answered: int = 0
    wrong: int = 0


Fault = Callable[[Run, Any, Any], None]  # changes the answers (the last argument) to requests


def each(condition: Callable[..., bool], change: Callable[..., Any] = lambda s, _: np.zeros_like(s)) -> Fault:
    """Change the scores of each answer that meets the condition: of (run, requests, result, place)."""

    def plant(run: Run, requests: Any, result: Any) -> None:
        for i, scores in enumerate(result.scores):
            if condition(run, requests, result, i):
                result.scores[i] = change(scores, result.scores)
                run.wrong += 1

    return plant


def with_nan(scores: Any, _: Any) -> Any:
    return np.where(np.arange(scores.size).reshape(scores.shape) == 1, np.nan, scores).astype(np.float32)


def copies_of_the_first_four(run: Run, requests: Any, result: Any) -> None:
    for i in range(4, len(requests)):
        result.scores[i] = result.scores[i - 4].copy()
        run.wrong += 1


def fewer(run: Run, requests: Any, result: Any, left: int = 0) -> None:
    if len(requests) > 4:
        result.scores, run.wrong = result.scores[:left], run.wrong + 1


def stale_in_one_place(run: Run, requests: Any, result: Any) -> None:
    mine = [s.copy() for s in result.scores]
    if len(run.before) > 3 and len(mine) > 3:
        result.scores[3], run.wrong = run.before[3], run.wrong + 1
    run.before = mine


def swapped_users(run: Run, requests: Any, result: Any) -> None:
    if len(result.scores) > 1:
        result.scores[0], result.scores[1] = result.scores[1], result.scores[0]
        run.wrong += 2


def an_item_twice(run: Run, requests: Any, result: Any) -> None:
    """The second item is the first one again: it is in the catalogue, and its score looks right."""
    for items in result.items:
        items[1], run.wrong = items[0], run.wrong + 1


def in_another_order(run: Run, requests: Any, result: Any) -> None:
    for i in range(len(requests)):
        result.items[i], result.scores[i] = result.items[i][::-1].copy(), result.scores[i][::-1].copy()
        run.wrong += 1


def no_items(run: Run, requests: Any, result: Any) -> None:
    result.items, run.wrong = [], run.wrong + 1


def other_items(run: Run, requests: Any, result: Any) -> None:
    if len(requests) > 8:
        for i, items in enumerate(result.items):
            result.items[i] = np.arange(len(items))
            run.wrong += 1


RANK: dict[str, tuple[list[str], Fault]] = {
    "zeros in large batches": (BASE, each(lambda run, requests, result, i: len(requests) >= 8)),
    "copies of the first four": (BASE, copies_of_the_first_four),
    "no answers in large batches": (BASE, fewer),
    "fewer answers in large batches": (BASE, partial(fewer, left=-1)),
    "zeros in one of fifty": (BASE, each(lambda run, requests, result, i: requests[i].request_id % 50 == 7)),
    "NaN in one of fifty": (BASE, each(lambda run, requests, result, i: requests[i].request_id % 50 == 7, with_nan)),
    "last place of a batch": (BASE, each(lambda run, requests, result, i: 0 < i == len(requests) - 1)),
    "odd batch sizes": (THREE, each(lambda run, requests, result, i: len(requests) % 2 == 1)),
    "after a hundred answers": (BASE, each(lambda run, requests, result, i: run.answered > 100)),
    "the last batch": (BASE, each(lambda run, requests, result, i: run.answered > 176)),
    "the first answer": (BASE, each(lambda run, requests, result, i: run.answered <= 16 and i == 0)),
    "stale in one place": (BASE, stale_in_one_place),
    "two users swapped": (BASE, swapped_users),
    "another type": (BASE, each(lambda *_: True, lambda s, _: s.astype(np.float64))),
    "another shape": (BASE, each(lambda run, requests, result, i: i == 2, lambda s, _: s.T.copy())),
    "longest histories": (BASE, each(lambda run, requests, result, i: len(requests[i].history_items) == 48)),
    "one candidate of eight": (BASE, each(lambda *_: True, lambda s, _: s * (np.arange(8) != 5)[:, None])),
    "rounded to fp16": (BASE, each(lambda *_: True, lambda s, _: s.astype(np.float16).astype(np.float32))),
    "returning users with new events": (
        CACHE,
        each(lambda run, requests, result, i: 0 < result.cached[i].tokens < result.cached[i].of),
    ),
    "loaded from the host": (HOST, each(lambda run, requests, result, i: result.cached[i].from_host > 0)),
}
GENERATED: dict[str, tuple[list[str], Fault]] = {
    "other items": (GENERATE, other_items),
    "no items": (GENERATE, no_items),
    "an item twice": (GENERATE, an_item_twice),
    "in another order": (GENERATE, in_another_order),
    "two users swapped": (GENERATE, swapped_users),
}
RETRIEVED: dict[str, tuple[list[str], Fault]] = {"stage retrieve": (RECOMMEND, other_items)}
RANKED = {"stage rank": (RECOMMEND, each(lambda run, requests, result, i: i == 1))}


def planted(method: Any, run: Run, fault: Fault) -> Any:
    def answer(self: Any, requests: Any) -> Any:
        result = method(self, requests)
        if run.measuring:
            run.answered += len(requests)
            fault(run, requests, result)
        return result

    return answer


def lost_pages(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """A returning user's new events don't see the first page of what was cached."""
    original = eager_attention.VARIANT.fn

    def attention(*args: Any, **given: Any) -> Any:
        if given.get("k_pages") is not None and run.measuring:
            new = given["q_offsets"].diff() - given["num_targets"]
            for b in torch.nonzero((given["paged_lengths"] > 0) & (new > 0)).flatten().tolist():
                given["v_pages"] = given["v_pages"].clone()
                given["v_pages"][given["page_table"][b, 0].long()] = 0
                run.wrong += 1
        return original(*args, **given)

    with_attention(monkeypatch, attention)


def shifted_slots(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """New events of returning users are stored one slot too far."""
    original = PagePool.slots

    def slots(self: PagePool, pages: Any, begin: int, end: int) -> Any:
        found = original(self, pages, begin, end)
        if run.measuring and begin and len(found) > 1:
            found, run.wrong = np.append(found[1:], found[-1:]), run.wrong + 1
        return found

    monkeypatch.setattr(PagePool, "slots", slots)
    monkeypatch.setattr(native(), "functions", None)  # the loops in C call no method


def blind_candidates(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """The torch variant itself is wrong, all the time: candidates don't see themselves."""

    def hidden(rows: Any, columns: Any, row_positions: Any, column_positions: Any, m: Any, *_: int) -> Any:
        row, column = row_positions[:, :, None], column_positions[:, None, :]
        run.wrong += 1
        return ~((row > column) | ((rows[:, :, None] == columns) & (row < m[:, :, None])))

    monkeypatch.setattr(eager_attention, "_hidden", hidden)


def with_attention(monkeypatch: pytest.MonkeyPatch, attention: Any) -> None:
    original = Operators.of
    monkeypatch.setattr(Operators, "of", lambda names: original(names).replace(hstu_attention=attention))


INSIDE = {
    "new events lose a page": (CACHE, lost_pages),
    "slots off by one": (CACHE, shifted_slots),
    "mask in bf16": (BF16, blind_candidates),
    "mask in fp16": (FP16, blind_candidates),
}


@cache
def spec_of(*overrides: str) -> RunSpec:
    return compose_spec(list(overrides))[0]


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    return {}


@pytest.fixture
def outcome(traces: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a cell in this process. The trace is made once."""
    build = workloads.build

    def kept(*key: Any) -> Any:
        name = repr(key[:3])  # without the function that shows the progress
        if name not in traces:
            traces[name] = build(*key)
        return traces[name]

    monkeypatch.setattr(workloads, "build", kept)

    def run(overrides: list[str], run: Run) -> Outcome:
        outcome = Outcome()

        def report(message: dict[str, Any]) -> None:
            run.measuring = message.get("stage", "measuring") == "measuring"

        try:
            Cell(spec_of(*overrides), tmp_path, outcome, report).run()
            outcome.status = Status.OK
        except Exception as e:
            outcome.status, outcome.error = classify(e)
        return outcome

    return run


@pytest.mark.parametrize("overrides", [BASE, CACHE, HOST, GENERATE, RECOMMEND, BF16, FP16])
def test_a_cell_without_a_fault_is_ok(outcome: Callable[..., Outcome], overrides: list[str]) -> None:
    ended = outcome(overrides, Run())
    assert ended.status is Status.OK, ended.error
    measured = ended.gate["measured"]
    assert measured["passed"] and measured["wrong"] == 0
    assert measured["answers"] == ended.metrics["samples"]
    assert measured["at_random"] == min(measured["answers"], spec_of(*overrides).gate.measured)
    assert all(0 < checked <= there for there, checked in measured["classes"].values())


EVERY = [
    *((HSTUEngine, "rank", name, *case) for name, case in RANK.items()),
    *((HSTURetriever, "generate", name, *case) for name, case in GENERATED.items()),
    *((HSTURetriever, "generate", name, *case) for name, case in RETRIEVED.items()),
    *((HSTUEngine, "rank", name, *case) for name, case in RANKED.items()),
    *((None, "", name, *case) for name, case in INSIDE.items()),
]


@pytest.mark.parametrize(
    ("engine", "method", "overrides", "fault"),
    [pytest.param(e, m, o, f, id=f"{m} {name}".strip()) for e, m, name, o, f in EVERY],
)
def test_a_fault_while_measuring_is_found(
    outcome: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    engine: Any,
    method: str,
    overrides: list[str],
    fault: Any,
) -> None:
    run = Run()
    if engine is None:
        fault(monkeypatch, run)
    else:
        monkeypatch.setattr(engine, method, planted(getattr(engine, method), run, fault))
    ended = outcome(overrides, run)
    assert run.wrong > 0, "the fault was never planted"
    assert ended.status is Status.INCORRECT, ended.error or ended.gate
    assert "latency_ms/p50" not in ended.metrics and not ended.ungated
