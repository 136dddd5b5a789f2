"""LoadGen's accuracy mode: its own log has the engine's answers, and figures from the log are those of `evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Grbench
from helpers.sleepy_engine import SleepyEngine, drive, make_requests

from grbench.scenarios import loadgen
from grbench.scenarios.accuracy import LOG, AccuracyRun
from grbench.scenarios.batcher import Ticket
from grbench.scenarios.config import (
    LoadGenConfig,
    MultiStreamConfig,
    OfflineConfig,
    ServerConfig,
    SingleStreamConfig,
)
from grengines.api import RankResult, Request
from grengines.numerics import IncorrectError

COUNT = 50
SCENARIOS = [
    OfflineConfig("offline", max_batch=16, mode="accuracy"),
    ServerConfig("server", max_batch=4, target_qps=2000, mode="accuracy"),
    SingleStreamConfig("single_stream", max_batch=1, mode="accuracy"),
    MultiStreamConfig("multi_stream", max_batch=8, samples_per_query=8, mode="accuracy"),  # 50 is no multiple of 8
]


def scores_of(request: Request) -> np.ndarray[Any, Any]:
    return np.random.default_rng(request.request_id).standard_normal((3, 2)).astype(np.float32)


class ScoringEngine(SleepyEngine):
    """Gives each request scores of its own, in memory that it uses again."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.memory = np.empty((2, 16, 3, 2), np.float32)

    def rank(self, requests: Sequence[Request]) -> RankResult:
        result = super().rank(requests)
        memory = self.memory[len(self.batches) % 2]
        memory[: len(requests)] = [scores_of(request) for request in requests]
        return replace(result, scores=list(memory[: len(requests)]))


@pytest.mark.parametrize("config", SCENARIOS, ids=lambda c: c.name)
def test_the_log_has_every_answer_once(config: LoadGenConfig, tmp_path: Path) -> None:
    engine = ScoringEngine()
    m = drive(config, engine, tmp_path, requests=COUNT)
    served = [i for batch in engine.batches for i in batch]
    assert set(served) == set(range(COUNT)) and served != sorted(served)  # LoadGen chooses the order
    assert len(m.logged) == COUNT and "loadgen_valid" not in m.metrics
    for index, logged in enumerate(m.logged):
        expected = np.random.default_rng(index).standard_normal((3, 2)).astype(np.float32)
        assert logged.dtype == np.float32 and np.array_equal(logged, expected)


Respond = Callable[[AccuracyRun, Sequence[Ticket]], list[Any]]
right: Respond = AccuracyRun.responses


def none_at_all(run: AccuracyRun, tickets: Sequence[Ticket]) -> list[Any]:
    return [loadgen.lg.QuerySampleResponse(ticket.key, 0, 0) for ticket in tickets]


def those_of_others(run: AccuracyRun, tickets: Sequence[Ticket]) -> list[Any]:
    run._batch = run._batch[::-1]
    return right(run, tickets)


def a_bit_off(run: AccuracyRun, tickets: Sequence[Ticket]) -> list[Any]:
    if any(ticket.request.request_id == COUNT - 1 for ticket in tickets):
        run._batch = [np.nextafter(answer, np.float32(9)) for answer in run._batch]
    return right(run, tickets)


@pytest.mark.parametrize(
    "respond, words",
    [(none_at_all, "has 0 bytes that are not"), (those_of_others, "has 24 bytes"), (a_bit_off, "has 24 bytes")],
)
def test_a_driver_that_sends_no_data_or_wrong_data_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, respond: Respond, words: str
) -> None:
    monkeypatch.setattr(AccuracyRun, "responses", respond)
    with pytest.raises(IncorrectError, match=words):
        drive(SCENARIOS[0], ScoringEngine(), tmp_path, requests=COUNT)


@pytest.mark.parametrize("damage, words", [("lost", "answers to 49 of the 50"), ("cut", "not written its whole")])
def test_a_log_that_lacks_answers_fails(tmp_path: Path, damage: str, words: str) -> None:
    engine, requests = ScoringEngine(), make_requests(COUNT)
    run = AccuracyRun(requests)
    run.watching(lambda *batch: None)(requests[:1], engine.rank(requests[:1]), 1)
    for k in range(1, COUNT):
        run.watching(lambda *batch: None)([requests[k]], engine.rank([requests[k]]), 1)
    rows = [{"seq_id": k, "qsl_idx": k, "data": scores_of(requests[k]).tobytes().hex()} for k in range(COUNT)]
    (tmp_path / LOG).write_text(json.dumps(rows))
    assert len(run.logged(tmp_path)) == COUNT
    (tmp_path / LOG).write_text(json.dumps(rows[1:] if damage == "lost" else rows)[: -5 if damage == "cut" else None])
    with pytest.raises(IncorrectError, match=words):
        run.logged(tmp_path)


SMALL = ["model.layers=1", "model.embedding_dim=16", "model.heads=1", "model.qk_dim=16", "model.v_dim=16",
         "model.max_positions=48", "model.scaling_seqlen=48", "model.tasks=[rated]", "workload=csv",
         "workload.path=walks.txt", "workload.max_history=12", "workload.num_candidates=6"]  # fmt: skip
ACCURACY = ["scenario=offline", "scenario.mode=accuracy", "tracking=none"]


def walks(folder: Path) -> None:
    """Users who walk around a ring of items."""
    starts = np.random.default_rng(0).integers(24, size=60)
    lines = [" ".join(map(str, [f"u{u}", *((s + np.arange(9)) % 24)])) for u, s in enumerate(starts)]
    (folder / "walks.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("task, figures", [("rank", 4), ("generate", 6)])
def test_figures_from_the_log_are_those_of_evaluate(
    grbench_here: Grbench, grbench_forked: Grbench, tmp_path: Path, task: str, figures: int
) -> None:
    walks(tmp_path)
    words = [*SMALL, "retrieval.levels=1", f"task={task}"]
    fast = ["training.epochs=2", "training.batch=8", "training.rate=0.01", "held_out=60"]
    done = grbench_here("train", *words, *fast, "tracking=none", "out=model")
    assert done.returncode == 0, done.stderr
    weights = {"rank": "model", "generate": "retrieval"}[task] + ".weights=model/weights.safetensors"
    if task == "rank":
        words.remove("retrieval.levels=1")
    else:
        words.remove("model.tasks=[rated]")
    run = ["engine=hstu", *words, weights, "gate.quality_requests=40"]
    users = ["--users", "40"] if task == "generate" else []
    found = grbench_here("evaluate", *run, "--out", "found", *users)
    assert found.returncode == 0, found.stderr
    [row] = json.loads((tmp_path / "found" / "results.json").read_text())["rows"]

    done = grbench_forked(*run, *ACCURACY)
    assert done.returncode == 0, done.stderr
    record = json.loads(next((tmp_path / "outputs").rglob("record.json")).read_text())
    logged = {k: v for k, v in record["metrics"].items() if k.startswith("quality/loadgen/")}
    assert len(logged) == figures
    for name, value in logged.items():
        assert value == pytest.approx(row["metrics"][name.replace("loadgen/", "")], abs=1e-5)
        assert record["intervals"][name] == pytest.approx(row["intervals"][name.replace("loadgen/", "")], abs=1e-5)
    assert record["metrics"]["samples"] == row["requests"] > 10
    assert any("bit for bit as the engine gave them" in note for note in record["notes"])


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "model.weights=null: random weights have no quality"),
        (["workload=synthetic"], "workload=synthetic: its events are random"),
        (
            ["model.weights=walks.txt", "gate.quality_requests=0"],
            "gate.quality_requests=0: scenario.mode=accuracy",
        ),
        (["model.weights=walks.txt", "scenario.min_duration_s=3"], "scenario.min_duration_s=3: scenario.mode=accuracy"),
    ],
)
def test_a_run_without_a_ground_truth_is_refused(
    grbench_here: Grbench, tmp_path: Path, words: list[str], message: str
) -> None:
    walks(tmp_path)
    done = grbench_here("engine=hstu", *ACCURACY, *(words if "workload=synthetic" in words else [*SMALL, *words]))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
