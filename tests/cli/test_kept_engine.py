"""Cells that share one engine in one process measure what a fresh process measures."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from helpers import faulty_engine, forks
from helpers.command import Grbench

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import RunnerConfig
from grbench.execution import records, worker, workers
from grbench.execution.cell import Cell
from grbench.execution.environment import code_digest
from grbench.execution.gpu import GpuUse
from grbench.execution.kept import engine_key
from grbench.execution.workers import KeptWorker, Worker
from grbench.scenarios import loadgen
from grbench.scenarios.batcher import Answered, Batcher
from grbench.scenarios.config import ServerConfig
from grbench.scenarios.growth import HopelessError
from grengines import registry
from grengines.api import RankResult, Request

SMALL = (
    *("engine=hstu", "kernel=torch", "engine.cpu_threads=1", "cache=lru", "cache.memory_gb=0.0012"),
    *("model.layers=1", "workload=synthetic", "workload.users=40", "workload.items=100", "workload.visits=300"),
    *("workload.max_history=200", "workload.num_candidates=4", "warmup_batches=3", "gate.requests=2"),
    *("gate.measured=40", "tracking=none", "scenario=offline", "scenario.max_batch=4", "scenario.in_flight=1"),
)
DROPPED = ("engine", "scenario", "scenario.max_batch", "scenario.in_flight", "cache", "cache.memory_gb")  # if hopeless
HITS = ("cache/hit_rate", "cache/token_hit_rate", "engine/cache_misses", "engine/cache_partial_hits")


def test_a_kept_engine_answers_as_a_fresh_one_and_its_cache_begins_empty(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code_digest()
    monkeypatch.setattr(worker, "code_digest", iter([code, "edited"]).__next__)  # of each process
    words = [*SMALL, "scenario.queries=150,250"]
    kept = grbench_here("-m", *words, "runner.output_root=kept", "runner.keep_engine=true")
    assert kept.returncode == 0, kept.stderr
    fresh = grbench_here("-m", *words, "runner.output_root=fresh")
    assert fresh.returncode == 0, fresh.stderr
    found = {
        root: {record.spec["scenario"]["queries"]: record for _, record in records.find(tmp_path / root)}
        for root in ("kept", "fresh")
    }
    second, alone = found["kept"][250], found["fresh"][250]
    assert second.spec_hash == alone.spec_hash
    assert second.environment["code"] == alone.environment["code"] == code  # that was imported for the first cell
    assert 0 < alone.metrics["cache/hit_rate"] < 1
    for name in HITS:
        assert second.metrics[name] == alone.metrics[name], name
    for name in ("error", "error_after", "tolerance"):
        assert second.gate[name] == pytest.approx(alone.gate[name], rel=1e-4), name
    assert second.gate["measured"]["classes"] == alone.gate["measured"]["classes"]
    assert second.actual["cache_pages_most_used"] == alone.actual["cache_pages_most_used"]
    assert second.metrics["engine_start_s"] == found["kept"][150].metrics["engine_start_s"]
    assert any("had measured 1 other loads before" in note for note in second.notes)
    assert not any("other loads" in note for record in found["fresh"].values() for note in record.notes)
    logs = [folder / records.LOG_FILE for folder, _ in records.find(tmp_path / "kept")]
    assert all(log.is_file() for log in logs)


@pytest.mark.parametrize(
    "words, same",
    [
        (["scenario=server", "scenario.target_qps=50"], True),
        (["scenario.in_flight=2", "scenario.queries=7"], True),
        (["gate.measured=5", "gate.quality_requests=0", "warmup_batches=1"], True),
        (["scenario.max_batch=8"], False),
        (["seed=1"], False),
        (["cache.memory_gb=0.001"], False),
        (["workload.visits=200"], False),
        (["latency_limit_ms=20"], False),  # the deadline of its requests
        (["gate.requests=3"], False),
    ],
)
def test_cells_share_an_engine_only_if_it_cannot_tell_them_apart(words: list[str], same: bool) -> None:
    changed = [word for word in SMALL if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    one, other = compose_spec(list(SMALL))[0], compose_spec([*changed, *words])[0]
    assert (engine_key(one) == engine_key(other)) is same


class Idle:
    """An idle worker. error: of giving it a cell."""

    def __init__(self, error: OSError | None = None) -> None:
        self.idle, self.stopped, self._error = True, False, error

    def give(self, *cell: object) -> None:
        if self._error:
            raise self._error

    def stop(self, grace_s: float = 0.0) -> None:
        self.stopped = True


def offered(idle: Idle, code: str) -> Worker | None:
    """Return the worker that takes a second cell, of an idle one with its engine."""
    kept, spec = KeptWorker(), compose_spec(list(SMALL))[0]
    kept.keep(cast(Worker, idle), spec, code)
    return kept.give(spec, RunnerConfig(), Path("unused"))


def test_an_idle_worker_takes_the_next_cell_unless_it_has_ended_or_its_code_was_edited() -> None:
    fine, ended, edited = Idle(), Idle(BrokenPipeError()), Idle()
    assert offered(fine, code_digest()) is cast(Worker, fine) and not fine.stopped
    assert offered(ended, code_digest()) is None and ended.stopped
    assert offered(edited, "another") is None and edited.stopped


def test_an_idle_worker_that_cannot_be_given_a_cell_is_stopped() -> None:
    full = Idle(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        offered(full, code_digest())
    assert full.stopped


def test_what_idle_workers_do_on_the_gpu_is_not_work_of_others(
    forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [GpuUse(processes, 0.0) for processes in range(3)]
    monkeypatch.setattr(workers, "gpu_in_use", iter(others).__next__)
    spec = compose_spec(list(SMALL))[0]

    def started(name: str) -> Worker:
        (tmp_path / name).mkdir()
        return Worker(spec, RunnerConfig(), tmp_path / name, keep=True)

    one, beside = started("one"), started("beside")
    assert (one.gpu, beside.gpu) == (others[0], None)
    one.give(spec, RunnerConfig(), tmp_path / "one")
    assert one.gpu is None, "its reading is that before its first cell"
    one.stop()
    beside.stop()
    alone = started("alone")
    alone.stop()
    assert alone.gpu == others[1]


def test_a_hopeless_rate_ends_early_without_a_latency(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.ENGINES, "faulty", faulty_engine.SPEC)
    load = ["scenario=server", "scenario.target_qps=1500", "scenario.queries=6000", "scenario.max_batch=1"]
    slow = ["engine=faulty", "engine.delay_ms=10", *load]
    words = [word for word in SMALL if word.partition("=")[0] not in DROPPED]
    done = grbench_here(*words, *slow, "latency_limit_ms=20", "scenario.stop_hopeless=true")
    assert done.returncode == 1, done.stderr
    [(folder, record)] = list(records.find(tmp_path))
    assert record.status is records.Status.STOPPED and "the queue grew to" in (record.error or "")
    said = (folder / records.LOG_FILE).read_text()
    assert "Traceback" not in said and said.splitlines()[-1] == record.error
    assert not any(name.startswith(("latency", "throughput", "goodput")) for name in record.metrics)
    assert not record.intervals and not (folder / records.SAMPLES_FILE).exists()


def test_an_engine_that_fails_while_a_probe_is_stopped_is_not_kept_and_its_error_is_reported(tmp_path: Path) -> None:
    words = ["scenario=server", "scenario.target_qps=1000", "scenario.queries=3000", "scenario.stop_hopeless=true"]
    spec, _ = compose_spec([*(w for w in SMALL if w.partition("=")[0] not in DROPPED), "engine=hstu", *words])
    requests, loops = workloads.build(spec.workload, 0, 20.0).requests, list[Batcher]()

    def answer(requests: Sequence[Request]) -> RankResult:
        time.sleep(0.01)
        if loops[0].failure is not None:
            raise RuntimeError("the device is lost")
        return RankResult(
            scores=len(requests) * [np.zeros((1, 1), np.float32)],
            **dict.fromkeys(("batch_ms", "transfer_ms", "compute_ms"), 0.0),
            **dict.fromkeys(("tokens", "padded_tokens"), 1),
        )

    def start(answered: Answered) -> Batcher:
        loops.append(Batcher(answer, 1, 0.0, answered))
        return loops[0]

    assert isinstance(spec.scenario, ServerConfig)

    def work() -> None:
        with pytest.raises(RuntimeError, match="the device is lost") as caught:
            loadgen.run(spec.scenario, start, lambda k: requests[k % len(requests)], 20.0, 0, tmp_path)
        assert isinstance(caught.value.__cause__, HopelessError)

    done = forks.in_fork(work, tmp_path)  # LoadGen goes on in its process
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start_s", [1e6, 0.0])
def test_the_engine_of_a_stopped_probe_is_kept_if_its_start_takes_longer_than_the_rest_of_the_probe(
    start_s: float, grbench_here: Grbench, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Cell._build
    monkeypatch.setattr(Cell, "_build", lambda *arguments: replace(build(*arguments), start_s=start_s))
    monkeypatch.setitem(registry.ENGINES, "faulty", faulty_engine.SPEC)
    words = [word for word in SMALL if word.partition("=")[0] not in DROPPED]
    words += ["engine=faulty", "engine.delay_ms=10", "scenario=server", "scenario.max_batch=1", "latency_limit_ms=20"]
    words += ["scenario.queries=3000", "scenario.stop_hopeless=true", "runner.keep_engine=true"]
    done = grbench_here("-m", *words, "scenario.target_qps=1200,1300")
    assert done.returncode == 1, done.stderr
    found = {r.spec["scenario"]["target_qps"]: r for _, r in records.find(tmp_path)}
    assert [r.status for r in found.values()] == 2 * [records.Status.STOPPED], done.stderr
    assert found[1300].gate["passed"]  # of the same engine, once nothing of the first probe was left
    assert ("step_s/start" in found[1300].metrics) is not bool(start_s)
    assert "step_s/start" in found[1200].metrics
