"""Cells of a sweep side by side, each in its place: real places, real workers, real signals."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.beside import QUICK, found, measures, two_cores, until
from helpers.command import Grbench
from helpers.forks import fork_command, fork_places, fork_workers
from helpers.mlflow_store import new_database
from mlflow import MlflowClient

from grbench.config.compose import compose_spec, plan_jobs, prepare_hydra
from grbench.config.schema import ConfigError
from grbench.execution import gpu, place, places, ranks, records
from grbench.execution.records import LOG_FILE, RunRecord, Status
from grbench.signals import ENDING, Stopped, raised


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds one place")
def test_cells_run_beside_each_other_and_every_end_of_one_is_a_record(tmp_path: Path) -> None:
    """One of three cells ends well, one loses its place, one is stopped with the command. All processes are forks."""
    words = ["-m", *QUICK, "scenario.queries=64,100000000,200000000", "runner.parallel=2"]
    errors = tmp_path / "err.txt"
    begun = time.monotonic()
    with two_cores():
        command = fork_command(tmp_path, *words, forked_places=True)
    try:
        until(lambda: measures(errors.read_text(), 2) and measures(errors.read_text(), 3), command)
        fine = found(tmp_path)[64]
        assert fine.status is Status.OK, fine.error
        children = psutil.Process(command.pid).children(recursive=True)
        on_core = {child.cpu_affinity()[0]: child for child in psutil.Process(command.pid).children()}
        assert len(on_core) == 2, "a core each"
        cores = [record.environment["cpu_cores"] for record in found(tmp_path).values()]
        assert cores == [1] * len(cores)
        assert fine.environment["beside"]["cells"] == 1
        assert any("beside this one, on other cores" in note for note in fine.notes)

        [freed] = fine.environment["beside"]["cores"]  # the third cell runs there
        [other] = set(on_core) - {freed}
        on_core[other].kill()
        until(lambda: 100000000 in found(tmp_path), command)
        lost = found(tmp_path)[100000000]
        assert 0 < lost.duration_s < time.monotonic() - begun
        assert lost.status is Status.KILLED
        assert lost.error is not None
        assert f"on cores {other} to {other} ended by SIGKILL; run it again" in lost.error

        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(60) == 143, errors.read_text()
        assert found(tmp_path)[200000000].status is Status.INTERRUPTED
        printed = errors.read_text()
        assert "Traceback" not in printed
        assert "interrupted with 1 of 3 cells to go; the same sweep goes on from here" in printed
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        command.kill()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds one place")
def test_cells_of_one_engine_have_one_place_if_it_is_kept(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent alone writes to MLflow: one run for the sweep, and one for each cell with its figures."""
    fork_places(monkeypatch)
    uri = new_database(tmp_path / "tracked")
    sweep = ["scenario.max_batch=1,2", "scenario.queries=32,48"]
    tracked = [*QUICK[:-1], "tracking=mlflow", f"tracking.uri={uri}"]
    done = grbench_here("-m", *tracked, *sweep, "runner.parallel=2", "runner.keep_engine=true")
    assert done.returncode == 0, done.stderr
    cells = [record for _, record in records.find(tmp_path)]
    places_of = {(r.spec["scenario"]["max_batch"], *r.environment["beside"]["cores"]) for r in cells}
    assert len(cells) == 4
    assert len(places_of) == 2, "each engine was built on one place"
    assert len({core for _, core in places_of}) == 2
    assert sum("was not built again" in note for r in cells for note in r.notes) == 2
    logged = MlflowClient(uri).search_runs(["1"])
    [parent] = [run for run in logged if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in logged if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    rates = sorted(run.data.metrics["throughput_rps"] for run in children)
    assert rates == pytest.approx(sorted(r.metrics["throughput_rps"] for r in cells), rel=1e-4)  # six digits
    again = grbench_here("-m", *tracked, *sweep, "runner.parallel=2", "runner.keep_engine=true")
    assert again.stderr.count(", kept (rerun=true measures it again)") == 4, again.stderr
    assert len(list(records.find(tmp_path))) == 4


def a_place() -> places.Places:
    """One place, on all cores."""
    return places.Places([places.LocalPart(places.Share(tuple(os.sched_getaffinity(0))))], print)


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunRecord]:
    """Records of cells that ended, which a test fills, with workers and places that are forks."""
    monkeypatch.chdir(tmp_path)
    fork_workers(monkeypatch)
    fork_places(monkeypatch)
    return []


def a_cell(folder: Path, ended: list[RunRecord], *words: str) -> places.Cell:
    """A cell whose record goes to a list."""
    spec, run = compose_spec([*QUICK, *words])
    options: dict[str, Any] = {"on_event": lambda event: None, "on_end": lambda folder, record: ended.append(record)}
    return places.Cell(spec, run.runner, folder, None, [], None, **options)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core holds one place")
def test_a_kept_engine_gets_its_next_cell_also_if_another_place_is_free(tmp_path: Path, ended: list[RunRecord]) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    here = places.Places([places.LocalPart(places.Share((core,)), 1) for core in cores], print)
    for queries in (32, 48):
        here.give([a_cell(tmp_path / str(queries), ended, f"scenario.queries={queries}", "runner.keep_engine=true")])
        here.settle()
    here.close()
    assert [record.status for record in ended] == [Status.OK, Status.OK]
    assert ended[0].environment["beside"]["cores"] == ended[1].environment["beside"]["cores"]
    assert any("was not built again" in note for note in ended[1].notes)


def test_a_signal_while_a_place_starts_interrupts_its_cell(tmp_path: Path) -> None:
    """A place that has said nothing yet has no handlers, and leaves no record of its own."""
    ended: list[RunRecord] = []
    here, cell = a_place(), a_cell(tmp_path / "0", ended)
    here.give([cell, cell])
    assert here.busy
    here.interrupt(signal.SIGINT)
    assert not here.busy
    here.close()
    assert [record.status for record in ended] == [Status.INTERRUPTED]
    assert ended[0].error == "a signal ended the command before the cell ran"
    [(folder, record)] = records.find(tmp_path)
    assert (folder, record.status) == (tmp_path / "0", Status.INTERRUPTED)


def test_a_signal_meets_a_place_that_has_gone_on_to_its_next_cell(tmp_path: Path, ended: list[RunRecord]) -> None:
    """Messages of the place on both cells come at once."""
    words = [["scenario.queries=64"], ["scenario.queries=100000000"], ["scenario.queries=64", "seed=1"]]
    cells = [a_cell(tmp_path / str(number), ended, *word) for number, word in enumerate(words)]
    here = a_place()
    here.give(cells)
    [its] = here._busy
    until(lambda: (tmp_path / "1" / LOG_FILE).exists(), its._process)
    here.interrupt(signal.SIGTERM)
    here.close()
    assert [record.status for record in ended] == [Status.OK, Status.INTERRUPTED]
    assert [folder.name for folder, _ in records.find(tmp_path)] == ["0", "1"]


def test_a_signal_while_a_cell_is_taken_into_the_lists_loses_nothing(tmp_path: Path, ended: list[RunRecord]) -> None:
    def take(folder: Path, record: RunRecord) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        ended.append(record)

    here = a_place()
    with pytest.raises(Stopped), raised():
        here.give([dataclasses.replace(a_cell(tmp_path / "0", []), on_end=take)])
        here.settle()
    here.interrupt(signal.SIGTERM)
    here.close()
    assert [record.status for record in ended] == [Status.OK]
    assert [record.status for _, record in records.find(tmp_path)] == [Status.OK]
    for number in ENDING:  # `raised` leaves them ignored, since a command ends then
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_a_place_whose_command_has_gone_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gave it a cell, and ended while it started."""
    monkeypatch.chdir(tmp_path)
    fork_workers(monkeypatch)
    fork_places(monkeypatch)
    measure = place.measure
    monkeypatch.setattr(place, "measure", lambda *given: place._gone.wait(60) and measure(*given))
    here = a_place()
    here.give([a_cell(tmp_path / "0", [])])
    [its] = here._busy
    its.output.close()
    its._process.stdin.close()
    assert its._process.wait() == 0, (tmp_path / "places.txt").read_text()
    assert not list(records.find(tmp_path))


def test_places_share_no_core_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets have two cores of two threads each: a place has both threads of a core, and cores of one socket."""
    monkeypatch.setattr(places, "cores_here", lambda: [0, 4, 1, 5, 2, 6, 3, 7])
    monkeypatch.setattr(places, "visible_gpus", list)
    assert [share.cores for share in places.shares("4")] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [share.cores for share in places.shares("3")] == [(0, 4), (1, 5), (2, 6)]
    monkeypatch.setattr(places, "visible_gpus", lambda: ["2", "GPU-8a"])
    assert places.shares("gpus") == [places.Share((0, 1, 4, 5), "2"), places.Share((2, 3, 6, 7), "GPU-8a")]
    assert places.shares("1") == [places.Share((0, 1, 2, 3, 4, 5, 6, 7), "2")]
    with pytest.raises(ConfigError, match="has 2 GPUs, and cells never share one; allowed is at most 2"):
        places.shares("3")
    monkeypatch.setattr(places, "visible_gpus", lambda: list("56789"))
    assert [share.gpu for share in places.shares("gpus", each=2)] == ["5,6", "7,8"]
    with pytest.raises(ConfigError, match=r"has 2 times the 2 GPUs of a cell, and cells never share"):
        places.shares("3", each=2)


@pytest.mark.parametrize(
    ("overrides", "gpus", "counted"),
    [
        (["engine=hstu"], "01", 1),
        (["engine=hstu", "engine.tensor_parallel=2"], "01", 2),
        (["engine=hstu", "engine.item_shards=2"], "01", 2),
        (["engine=hstu", "engine.item_shards=2"], "0", "engine.item_shards=2: this machine has 1 of these GPUs"),
        (["engine=hstu", "engine.tensor_parallel=2"], "", 2),  # a CPU checks the answers
        (["engine=hstu", "engine.tensor_parallel=2", "engine.device=cpu"], "0", 1),
        (["engine=pipeline", "engine@engine.retrieve=hstu", "engine.rank.tensor_parallel=2"], "01", 2),
        (["engine=hstu", "engine.tensor_parallel=2"], "0", "this machine has 1 of these GPUs; allowed is at most 1"),
        (["engine=hstu", "engine.tensor_parallel=2", "runner.cluster=ray"], "01", "set runner.cluster=none"),
    ],
)
def test_gpus_of_a_cell_are_counted(
    overrides: list[str], gpus: str, counted: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "visible_gpus", lambda: list(gpus))
    spec, run = compose_spec(["model=hstu_tiny", "workload=synthetic", *overrides])
    if isinstance(counted, int):
        assert ranks.require_gpus([spec], run.runner.cluster) == counted
        return
    with pytest.raises(ConfigError, match=re.escape(counted)):
        ranks.require_gpus([spec], run.runner.cluster)


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        (["engine=vllm", "engine.cuda_graphs=true"], "engine.cuda_graphs"),
        (["engine=pipeline", "engine.retrieve.cuda_graphs=true"], "engine.retrieve.cuda_graphs"),
    ],
)
def test_cuda_graphs_without_a_gpu_are_refused_before_a_worker_starts(
    engine: list[str], key: str, grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = grbench_here(*engine)
    assert done.returncode == 2 and not list(tmp_path.rglob(records.LOG_FILE))
    why = (
        f"this machine has no GPU, so device=auto is cpu: {key}=true and {key.replace('cuda_graphs', 'device')}=cpu: a "
        f"CPU has no CUDA graphs; set {key}=false, or {key.replace('cuda_graphs', 'device')}=cuda"
    )
    assert done.stderr == f"grbench: {why}\n"
    sweep = [*engine[:1], f"{key}=true,false", "skip_invalid=true"]
    prepare_hydra()
    invocation, jobs = plan_jobs("config", ranks.to_spec_here, sweep, multirun=True)
    assert len(jobs) == 1 and invocation.skipped == (f"{key}=True: {why}",)
    device = key.replace("cuda_graphs", "device")
    for words in ([*engine, "runner.cluster=slurm"], [*engine, f"{device}=cuda"], [*engine[:1], f"{key}=auto"]):
        assert len(plan_jobs("config", ranks.to_spec_here, words)[1]) == 1


def test_a_precision_that_a_cpu_lacks_is_refused_before_a_worker_starts(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = grbench_here("engine=onnxruntime", "engine.precision=bf16")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    why = "engine.precision=bf16 and engine.device=cpu: ONNX Runtime has no bf16 kernels there; use fp32 or fp16"
    assert done.stderr == f"grbench: this machine has no GPU, so device=auto is cpu: {why}\n"


@pytest.mark.parametrize(
    ("allowed", "found"),
    [(None, ["0", "1"]), ("1", ["1"]), ("1,0", ["1", "0"]), ("0,0", ["0"]), ("-1", []), ("", []), ("0,-1,1", ["0"]),
     ("0,7", ["0"]), ("GPU-8a, 1", ["GPU-8a", "1"])],
)  # fmt: skip
def test_gpus_are_those_that_cuda_sees(monkeypatch: pytest.MonkeyPatch, allowed: str | None, found: list[str]) -> None:
    monkeypatch.setattr(gpu, "describe_gpus", lambda: [{"name": "one"}, {"name": "two"}])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert gpu.visible_gpus() == found


def test_the_threads_of_a_core_stand_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core in range(8):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{core % 2}\n")
        (folder / "core_id").write_text(f"{core % 4 // 2}\n")
    monkeypatch.setattr(places, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(places, "visible_gpus", list)
    assert [share.cores for share in places.shares("4")] == [(0, 4), (2, 6), (1, 5), (3, 7)]


@pytest.mark.parametrize(
    ("parallel", "why"),
    [
        ("gpus", "this machine has no GPU; runner.parallel=2 measures two cells at a time"),
        ("0", "allowed are gpus and a number of cells from 1"),
        ("two", "allowed are gpus and a number of cells from 1"),
        ("9999", "cores, and cells never share one; allowed is at most"),
    ],
)
def test_what_a_machine_has_not_is_refused(
    grbench_here: Grbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parallel: str, why: str
) -> None:
    monkeypatch.setattr(places, "visible_gpus", list)
    done = grbench_here("-m", *QUICK, "seed=0,1", f"runner.parallel={parallel}")
    assert done.returncode == 2
    assert f"runner.parallel={parallel}: " in done.stderr
    assert why in done.stderr
    assert not list(records.find(tmp_path))
