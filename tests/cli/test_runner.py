"""Whole runs through the command line, and every way in which a worker can end. Each is caused for real."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from helpers.cells import write_cell
from helpers.command import Grbench
from helpers.forks import fork_command, fork_workers, in_fork
from rich.console import Console

from grbench.cli import main
from grbench.config.compose import compose_spec
from grbench.config.jobs import Invocation, Job
from grbench.config.schema import RunSpec
from grbench.execution import measure, records, runner, session, workers
from grbench.execution.clock import pace
from grbench.execution.records import Outcome, RunRecord, Status
from grbench.execution.session import CellProgress, progress_of
from grbench.execution.workers import Event, KeptWorker, Worker
from grbench.gate.measured import MeasuredAnswers
from grbench.report import rows
from grbench.signals import Stopped
from grengines.api import RankResult, Request
from grengines.cache.storage import StorageTier
from grengines.hstu.engine import HSTUEngine

# Small and quick: what matters here is how cells end, not how fast they are.
QUICK = [
    "engine=hstu",
    "workload=synthetic",
    "workload.max_requests=64",
    "workload.max_history=64",
    "scenario=closed_loop",
    "scenario.queries=64",
    "engine.cpu_threads=1",
    "warmup_batches=1",
    "gate.requests=2",
    "tracking=none",
]


def found(root: Path) -> list[RunRecord]:
    return [record for _, record in records.find(root)]


def test_one_run_leaves_a_whole_record_and_samples(grbench: Grbench, tmp_path: Path) -> None:
    done = grbench(*QUICK)
    assert done.returncode == 0, done.stderr + done.stdout
    [(folder, record)] = list(records.find(tmp_path / "outputs"))
    assert record.status is Status.OK
    assert record.requested["engine.device"] == "auto"
    assert record.actual["device"] in ("cpu", "cuda")
    assert record.actual["batching"]["max_batch"] == "16, the default: docs/PERFORMANCE.md, Size of a batch"
    assert record.actual["kernel_choice"].keys() == record.actual["kernels"].keys()
    assert record.gate["passed"] and 0 <= record.gate["error"] <= record.gate["tolerance"]
    assert min(record.gate["zero_attention_error"], record.gate["stale_error"]) > 2 * record.gate["tolerance"]
    assert record.environment["versions"]["torch"]
    samples = pd.read_parquet(folder / "samples.parquet")
    assert len(samples) == record.metrics["samples"] == 64
    assert (samples.latency_ms > 0).all()
    assert record.metrics["latency_ms/p50"] in set(samples.latency_ms)
    assert "latency_ms/p99" not in record.metrics  # 64 samples say nothing of p99
    assert any("p99" in note for note in record.notes)
    assert record.metrics["throughput_rps"] == pytest.approx(64 / record.metrics["duration_s"])
    steps = {name: seconds for name, seconds in record.metrics.items() if name.startswith("step_s/")}
    names = {name.removeprefix("step_s/") for name in steps}
    assert names == {"load", "start", "check", "warm_up", "measure", "figures", "compare", "write"}
    assert steps["step_s/measure"] >= record.metrics["duration_s"] and min(steps.values()) >= 0
    assert "OK" in done.stdout
    assert "closed_loop" in done.stdout


@pytest.mark.usefixtures("forked_workers")
def test_a_cache_with_three_tiers_is_gated_from_each_and_counted(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store(tier: StorageTier, *args: Any) -> bool:
        taken = write(tier, *args)
        tier.finish_writes()  # a state that is being written would have the next one refused, on a slow disk
        return taken

    write = StorageTier.store
    monkeypatch.setattr(StorageTier, "store", store)  # also in the worker, a fork of this process
    # 4 pages of 65536 bytes on the device: fewer than users. One request at a time: none is answered without the cache.
    done = grbench_here(
        *QUICK,
        "engine.device=cpu",
        "engine.precision=fp32",
        "workload.revisit_rate=0.8",
        "scenario.clients=1",
        "workload.history_median=16",  # below max_history: what is cached of a history that was cut is of no use
        "cache=lru",
        "cache.memory_gb=0.00027",
        "cache.host_gb=0.0004",
        "cache.storage_gb=0.01",
        "cache.host_admit_visit=1",
        "cache.onload_share=1",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    [record] = found(tmp_path)
    assert record.status is Status.OK
    for name in ("error", "error_again", "error_from_host", "error_from_storage", "error_after"):
        assert record.gate[name] <= record.gate["tolerance"], name
    rates = [record.metrics[f"cache/{tier}_hit_rate"] for tier in ("device", "host", "storage")]
    assert min(rates) > 0 and record.metrics["cache/hit_rate"] == pytest.approx(sum(rates))
    assert record.metrics["engine/cache_storage_read_bytes"] > 0 == record.metrics["engine/cache_corrupt_pages"]
    assert not Path(record.actual["cache_storage_path"]).exists()
    metrics = record.metrics
    assert metrics["engine/cache_storage_refused"] == metrics["engine/cache_storage_busy"] == 0
    assert metrics["cache/device_hit_rate"] > 0 and metrics["cache/host_hit_rate"] > 0
    assert metrics["engine/cache_offloads"] > 0 and metrics["engine/cache_faults"] == 0
    assert 0 < metrics["cache/token_hit_rate"] < 1
    assert record.actual["cache_pages"] == 4


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_resumes_and_goes_on_past_a_cell_that_failed(grbench_here: Grbench, tmp_path: Path) -> None:
    sweep = ["-m", *QUICK, "engine.precision=fp32,bf16", "engine.device=cpu,cuda"]
    first = grbench_here(*sweep)
    if any(r.actual.get("device") == "cuda" for r in found(tmp_path)):
        pytest.skip("this machine has a GPU: nothing is unavailable")
    assert first.returncode == 1
    statuses = sorted(r.status for r in found(tmp_path))
    assert statuses == ["OK", "OK", "UNAVAILABLE", "UNAVAILABLE"]
    unavailable = next(r for r in found(tmp_path) if r.status is Status.UNAVAILABLE)
    assert "cuda" in (unavailable.error or "").lower()
    assert not any(name.startswith(("latency", "throughput")) for name in unavailable.metrics)
    again = grbench_here(*sweep)
    assert again.returncode == 1
    assert again.stderr.count("kept") == 4
    assert again.stderr.count("rerun_failed=true measures it again") == 2
    assert re.search(r"bf16 (device=)?cuda: UNAVAILABLE in a record of ", again.stderr)
    titles = [line.partition(":")[0] for line in again.stderr.splitlines() if "kept" in line]
    cells = [f"{precision} device={device}" for precision in ("fp32", "bf16") for device in ("cpu", "cuda")]
    assert titles == [f"{i}/4 hstu closed_loop {cell}" for i, cell in enumerate(cells, 1)]  # not what all share
    assert len(found(tmp_path)) == 4
    failed_again = grbench_here(*sweep, "rerun_failed=true")
    assert failed_again.stderr.count("kept") == 2
    assert len(found(tmp_path)) == 6
    assert grbench_here(*QUICK).returncode == 0  # a single run is never skipped
    assert len(found(tmp_path)) == 7


@pytest.mark.usefixtures("forked_workers")
def test_repeats_go_round_by_round_with_fresh_seeds(grbench_here: Grbench, tmp_path: Path) -> None:
    sweep = ["-m", *QUICK, "scenario.clients=2,4", "seed=5", "runner.repeats=2"]
    done = grbench_here(*sweep)
    assert done.returncode == 0, done.stderr + done.stdout
    ran = [(r.spec["scenario"]["clients"], r.spec["seed"]) for r in found(tmp_path)]
    assert sorted(ran) == [(2, 5), (2, 6), (4, 5), (4, 6)]
    began = [line.partition(":")[0] for line in done.stderr.splitlines() if ": loading the workload" in line]
    assert [title.split()[0] for title in began] == ["1/4", "2/4", "3/4", "4/4"]
    assert [title.partition("clients=")[2] for title in began] == [
        f"{clients} seed={seed}" for seed in (5, 6) for clients in (2, 4)
    ]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("hstu clients=")]
    assert sorted(row[1:3] for row in rows) == [["clients=2", "OK"], ["clients=4", "OK"]]  # a row for both runs
    assert [row[-2] for row in rows] == ["2", "2"]  # runs, beside the gate
    assert {tuple(r.overrides[-2:]) for r in found(tmp_path)} == {
        (f"seed={seed}", "runner.repeats=1") for seed in (5, 6)
    }  # the command that measures one of them again
    again = grbench_here(*sweep)
    assert again.stderr.count("kept") == 4


def test_a_pace_says_what_is_left() -> None:
    assert pace(35) == "35 s so far"
    assert pace(30, 1, 4) == "30 s so far, about 90 s left"
    assert pace(3000, 500, 1000) == "50 min so far, about 50 min left"
    assert pace(9000, 500, 1000) == "2.5 h so far, about 2.5 h left"
    assert pace(5, 0, 1000) == "5 s so far"
    assert pace(5, 3, 2) == "5 s so far"  # more than was planned
    assert pace(30, 1, 4, most_s=50) == "30 s so far, about 20 s left"
    assert pace(55, 1, 4, most_s=50) == "55 s so far, about 0 s left"


def test_a_sweep_says_how_many_cells_are_left_and_for_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measured(spec: RunSpec, runner: object, folder: Path, **options: object) -> tuple[RunRecord, Path]:
        now[0] += 20.0
        return write_cell(folder, status=Status.OOM), folder

    monkeypatch.setattr(session, "run_cell", measured)
    spec, run = compose_spec(["engine=hstu", f"runner.output_root={tmp_path}", "tracking=none"])
    cells = session.CellSession(run, Invocation((), 5, None))
    cells._finish(tmp_path / "earlier", write_cell(tmp_path / "earlier", status=Status.OOM), kept=True)
    for number in range(4):
        cells.run(Job((spec, run), tmp_path / str(number), ()))
    cells.end()
    assert [line for line in capsys.readouterr().err.splitlines() if "done" in line] == [
        "2 of 5 cells done, 3 left; 20 s so far",
        "3 of 5 cells done, 2 left; 40 s so far, about 40 s left",  # an earlier record takes no time
        "4 of 5 cells done, 1 left; 60 s so far, about 20 s left",
    ]


def test_progress_in_a_log_has_the_time_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = io.StringIO()
    progress = CellProgress(Console(file=log, width=200), "1/4 hstu server", queries=1000)
    for seconds, event in (
        (0, {"stage": "loading the workload"}),
        (8, {"stage": "measuring"}),
        (10, {"answered": 100}),
        (30, {"answered": 440}),
        (55, {"stage": "computing the figures"}),
        (70, {}),  # the worker was silent
    ):
        now[0] = 100.0 + seconds
        progress.show(event)
    assert log.getvalue().splitlines() == [
        "1/4 hstu server: loading the workload",
        "1/4 hstu server: measuring (8 s so far)",
        "1/4 hstu server: 440 of 1000 answers, 30 s so far, about 28 s of answers left",
        "1/4 hstu server: computing the figures (55 s so far)",
        "1/4 hstu server: computing the figures (70 s so far)",
    ]
    progress = CellProgress(Console(file=log, width=200), "2/4 hstu server", queries=1000, least_s=600)
    progress.show({"stage": "measuring"})
    now[0] += 50
    progress.show({"answered": 900})
    assert log.getvalue().endswith(
        "\n2/4 hstu server: 900 of about 10800 answers, 50 s so far, about 9 min of answers left\n"
    )


def test_progress_that_is_rare_has_a_line_each_fifteen_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search has a line for each probe, so that only a long one needs others."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = io.StringIO()
    progress = CellProgress(Console(file=log, width=200, force_terminal=True), "hstu server", queries=1000, rare=True)
    for seconds, event in (
        (0, {"stage": "loading the workload"}),
        (16, {"stage": "checking answers"}),
        (18, {"stage": "measuring"}),
        (30, {"answered": 200}),
        (32, {"answered": 280}),
        (40, {"answered": 440}),
    ):
        now[0] = 100.0 + seconds
        with progress:
            progress.show(event)
    assert log.getvalue().splitlines() == [
        "hstu server: checking answers (16 s so far)",
        "hstu server: 280 of 1000 answers, 32 s so far, about 36 s of answers left",
    ]


def test_a_silent_worker_is_no_silent_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker imports PyTorch before its first word, which takes longer than this limit of a silence."""
    monkeypatch.setattr(workers, "SILENCE_S", 0.2)
    spec, run = compose_spec([*QUICK, "runner.timeout_s=1.5"])
    heard: list[Event] = []
    record, _ = runner.run_cell(spec, run.runner, tmp_path / "cell", on_event=heard.append)
    assert record.status is Status.TIMEOUT and heard.count({}) >= 2


@pytest.mark.parametrize(
    "scenario, said",
    [
        (
            ["scenario=offline", "scenario.expected_qps=50"],
            "395 of 550 answers, 20 s so far, about 8 s of answers left",
        ),
        (["scenario=server"], "395 of about 395 answers, 20 s so far, about 0 s of answers left"),
        (["scenario=multi_stream", "scenario.queries=395", "scenario.min_duration_s=0"], "395 of 400 answers, 20 s"),
    ],
)
def test_progress_never_counts_past_its_total(scenario: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in QUICK if not word.startswith("scenario")]
    spec, _ = compose_spec([*words, "scenario.queries=32", "scenario.min_duration_s=10", *scenario])
    now, log = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = progress_of(spec, Console(file=log, width=200), "cell")
    progress.show({"stage": "measuring"})
    now[0] += 20
    progress.show({"answered": 395})
    assert log.getvalue().splitlines()[-1].startswith(f"cell: {said}")


@pytest.mark.parametrize("moves", [1, 2])
def test_a_cell_whose_clock_was_set_is_measured_once_more(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grbench.config.compose import compose_spec

    spec, run = compose_spec(QUICK)
    started = []

    class Asking:
        pid, gpu, returncode = os.getpid(), None, 0

        def __init__(self, spec: Any, runner: Any, folder: Path, keep: bool) -> None:
            started.append(folder)

        def messages(self, deadline: float) -> Iterator[dict[str, Any]]:
            if len(started) <= moves:
                yield {"again": "the clock moved"}
                yield {"outcome": {"status": "ERROR", "error": "the clock moved"}}
            else:
                yield {"outcome": {"status": "OK", "actual": {"device": "cpu"}}}

        def stop(self, grace_s: float) -> None:
            pass

    monkeypatch.setattr(runner, "Worker", Asking)
    record, _ = runner.run_cell(spec, run.runner, tmp_path / "cell")
    assert len(started) == 2
    assert record.status is (Status.OK if moves == 1 else Status.ERROR)
    assert record.notes == ["measured a second time, because the clock moved"]


@pytest.mark.parametrize("when", ["before the record is kept", "after it"])
def test_a_signal_between_the_work_and_its_record_loses_neither(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grbench.config.compose import compose_spec

    spec, run = compose_spec(QUICK)
    signals = [Stopped(signal.SIGTERM)]

    @contextlib.contextmanager
    def late() -> Iterator[None]:
        if signals and when == "before the record is kept":
            raise signals.pop()
        yield
        if signals:
            raise signals.pop()

    monkeypatch.setattr(runner._Work, "outcome", lambda self: records.Outcome(Status.OK))
    monkeypatch.setattr(runner, "deferred", late)
    with pytest.raises(runner.Interrupted) as interrupted:
        runner.run_cell(spec, run.runner, tmp_path / "cell")
    assert interrupted.value.number == signal.SIGTERM
    [(folder, record)] = list(records.find(tmp_path))
    assert folder == interrupted.value.folder and record.status is interrupted.value.record.status is Status.OK


@pytest.mark.usefixtures("forked_workers")
def test_a_signal_just_after_a_worker_has_started_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first message the launcher looks for the processes of servers, which takes a while."""
    spec, run = compose_spec(QUICK)
    started = []

    def stopped(worker: int, *given: object) -> None:
        started.append(worker)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "LoadWatch", stopped)
    with pytest.raises(runner.Interrupted) as interrupted:
        runner.run_cell(spec, run.runner, tmp_path / "cell")
    assert interrupted.value.record.status is Status.INTERRUPTED
    [worker] = started
    assert not psutil.pid_exists(worker)


@pytest.mark.usefixtures("forked_workers")
def test_a_signal_while_a_kept_engine_is_closed_ends_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is closed once more then."""
    monkeypatch.setattr(HSTUEngine, "close", lambda self: time.sleep(600))
    monkeypatch.setattr(workers, "GRACE_S", 60.0)
    spec, run = compose_spec(QUICK)
    kept = KeptWorker()
    record, _ = runner.run_cell(spec, run.runner, tmp_path / "cell", kept=kept)
    assert record.ok, record.error
    assert kept._worker is not None
    worker = kept._worker.pid
    late = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        late.start()
        kept.close()
    kept.close()
    late.join()
    assert not psutil.pid_exists(worker)


STARTING, SUMMARISING, WRITING = "building the engine", "computing the figures", "writing"
COMPARING = "comparing measured answers with the fp32 reference"
CLOSING = "closing the engine"
HANGS = {  # the part that hangs in each step
    STARTING: (HSTUEngine, "prepare"),
    SUMMARISING: (measure, "summarise"),
    COMPARING: (MeasuredAnswers, "compare"),
    WRITING: (measure, "write_samples"),
    CLOSING: (HSTUEngine, "close"),
}


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("step", "status"),
    [*((step, Status.TIMEOUT) for step in HANGS), (COMPARING, Status.KILLED), (COMPARING, Status.INTERRUPTED)],
)
def test_a_cell_that_is_ended_keeps_what_it_measured_and_names_its_step(
    step: str, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is not waited for: it passes when the worker has said that it begins the step, and hangs there."""
    spec, run = compose_spec(QUICK)
    messages = Worker.messages

    def until_the_step(self: Worker, deadline: float) -> Iterator[Event]:
        for event in messages(self, deadline):
            yield event
            if event.get("stage") == step and status is Status.KILLED:
                os.kill(self.pid, signal.SIGKILL)
            elif event.get("stage") == step:
                raise TimeoutError if status is Status.TIMEOUT else KeyboardInterrupt

    monkeypatch.setattr(Worker, "messages", until_the_step)
    monkeypatch.setattr(*HANGS[step], lambda *given, **named: time.sleep(600))
    with contextlib.suppress(runner.Interrupted):
        runner.run_cell(spec, run.runner, tmp_path / "cell")
    [(folder, record)] = list(records.find(tmp_path))
    assert record.status is status and record.error is not None
    if status is Status.TIMEOUT:
        assert record.error.startswith(f"stopped after runner.timeout_s=1800 s, while {step}; its log ends: ")
    elif status is Status.KILLED:
        assert record.error.startswith(f"SIGKILL ended the worker, while {step}; its log ends: ")
    assert record.metrics["workload/requests"] == 64
    ungated = record.ungated.get("metrics", {})
    assert ("throughput_rps" in record.metrics) is (step in (WRITING, CLOSING))
    assert ("throughput_rps" in ungated) is (step == COMPARING)
    if step == COMPARING:
        assert ungated["samples"] == 64 and any("p99" in note for note in record.ungated["notes"])
        assert "not all of its answers were checked" in record.notes[-1]
        assert record.gate["passed"] and "measured" not in record.gate
    assert (folder / records.SAMPLES_FILE).exists() is (step == CLOSING)
    [row] = json.loads(rows.as_json([(folder, record)]))["cells"]
    assert row["metrics"] == row["intervals"] == {}  # no result


class Running:
    """grbench as a background process, with access to its workers. All are forks of this process."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder, self.root = folder, folder / "outputs"
        self.process = fork_command(folder, *args)

    def worker(self, cell: int) -> psutil.Process:
        """The worker of a sweep's cell, once it is measuring."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                if any(f.endswith(f"/{cell}/worker.log") for f in _files(child)) and child.num_threads() > 1:
                    return child
            time.sleep(0.05)
        raise AssertionError(f"cell {cell} never ran: {self.printed()}")

    def end(self) -> tuple[int, str]:
        return self.process.wait(timeout=120), self.printed()

    def printed(self) -> str:
        return "".join((self.folder / name).read_text() for name in ("out.txt", "err.txt"))


def _files(process: psutil.Process) -> list[str]:
    """Files that a process has open, and its folder."""
    try:
        return [*(f.path for f in process.open_files()), process.cwd()]
    except (psutil.Error, OSError):
        return []


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[Running]]:
    started: list[Running] = []
    yield started
    for r in started:
        for child in psutil.Process(r.process.pid).children(recursive=True) if r.process.poll() is None else []:
            child.kill()
        r.process.kill()


def test_a_killed_and_a_hanging_worker_are_records_and_the_sweep_goes_on(
    tmp_path: Path, running: list[Running]
) -> None:
    """The first two cells go on until they are ended, the second one by the time limit."""
    endless = [10**8, 2 * 10**8]
    args = ["-m", *QUICK, f"scenario.queries={endless[0]},{endless[1]},64", "runner.timeout_s=15"]
    running.append(run := Running(tmp_path, *args))
    run.worker(0).send_signal(signal.SIGKILL)
    run.worker(1).send_signal(signal.SIGSTOP)  # hangs until the time limit
    code, output = run.end()
    assert code == 1, output
    ended = {r.spec["scenario"]["queries"]: r for r in found(run.root)}
    killed, hanging, fine = (ended[queries] for queries in (*endless, 64))
    assert killed.status is Status.KILLED
    assert "SIGKILL" in (killed.error or "")
    assert hanging.status is Status.TIMEOUT
    assert "runner.timeout_s=15" in (hanging.error or "")
    assert fine.status is Status.OK, fine.error
    assert not [p for p in psutil.process_iter() if any(str(tmp_path) in name for name in _files(p))], (
        "a worker is left"
    )


@pytest.mark.usefixtures("forked_workers")
def test_exhausted_memory_is_a_record_and_the_sweep_goes_on(grbench_here: Grbench, tmp_path: Path) -> None:
    # A position table of 5e5 x 4096 floats is 8 GB; the worker may have 4.
    done = grbench_here(
        "-m", *QUICK, "model.embedding_dim=4096,64", "model.max_positions=500000", "runner.memory_limit_gb=4"
    )
    assert done.returncode == 1
    statuses = {r.spec["model"]["embedding_dim"]: r for r in found(tmp_path)}
    assert statuses[4096].status is Status.OOM, statuses[4096].error
    assert "memory" in (statuses[4096].error or "")
    assert statuses[64].status is Status.OK, statuses[64].error


@pytest.mark.parametrize(
    "words, again", [([], "goes on from here"), (["rerun=true"], "measures all again (rerun=true)")]
)
def test_a_signal_keeps_what_is_done(tmp_path: Path, running: list[Running], words: list[str], again: str) -> None:
    args = [
        "-m",
        *QUICK,
        *words,
        "seed=0,1,2",
        "scenario.queries=500,100000000",
    ]  # the second goes on until it is stopped
    running.append(run := Running(tmp_path, *args))
    worker = run.worker(1)
    os.kill(run.process.pid, signal.SIGTERM)
    code, output = run.end()
    assert code == 143, output
    assert "Traceback" not in output
    assert sorted(r.status for r in found(run.root)) == ["INTERRUPTED", "OK"]
    assert "SIGTERM ended the command while the cell ran" in output
    assert f"5 of 6 cells to go; the same sweep {again}" in " ".join(output.split())
    assert not worker.is_running()


NO_MOUNTS = 3


def mount_disk() -> None:
    """Mount a file system of 4 MB at disk/, which this process and its children alone see."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER, CLONE_NEWNS; os.unshare comes with Python 3.12
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    Path("disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", "disk"], check=True)


def test_a_full_disk_is_a_record_and_the_sweep_goes_on(tmp_path: Path) -> None:
    """The output root is a small file system of its own, which is full from a batch of the first cell on."""
    args = [
        "-m",
        *[a for a in QUICK if not a.startswith("scenario")],
        "scenario=server",
        "scenario.queries=600",
        "scenario.target_qps=500",
        "seed=0,1",
        "runner.output_root=disk/root",
        "hydra.sweep.dir=disk/root/sweeps/s",
    ]

    rank, ranked, filler = HSTUEngine.rank, [0], tmp_path / "disk" / "filler"

    def filling(engine: HSTUEngine, requests: Sequence[Request]) -> RankResult:
        ranked[0] += 1
        if ranked[0] == 20 and not (tmp_path / "filled").exists():
            (tmp_path / "filled").touch()
            subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True)
        return rank(engine, requests)

    def work() -> None:
        """Sweep on the full disk, and again with room."""
        os.chdir(tmp_path)
        try:
            mount_disk()
        except (OSError, subprocess.CalledProcessError) as e:
            print(e, file=sys.stderr)
            sys.exit(NO_MOUNTS)
        sys.argv, tempfile.tempdir = ["grbench"], str(tmp_path)
        fork_workers(pytest.MonkeyPatch())
        pytest.MonkeyPatch().setattr(HSTUEngine, "rank", filling)
        codes = []
        for name in ("full", "room"):
            with (
                Path(f"{name}.out").open("w") as out,
                Path(f"{name}.err").open("w") as err,
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                codes.append(main(args))
            filler.unlink(missing_ok=True)
        shutil.copytree("disk/root", "kept")
        Path("code").write_text(str(codes[0]))

    done = in_fork(work, tmp_path)
    if done.returncode == NO_MOUNTS:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "code").read_text() == "1"
    kept = {r.spec["seed"]: r for r in [*found(tmp_path / "kept"), *_spares(tmp_path)]}
    first = kept[0]
    assert first.status is Status.DISK_FULL, first.error
    assert kept[1].status in (Status.DISK_FULL, Status.OK)
    assert (tmp_path / "full.out").read_text().count("DISK_FULL") >= 2
    assert "Traceback" not in "".join((tmp_path / f"{name}.err").read_text() for name in ("full", "room"))


def _spares(folder: Path) -> list[RunRecord]:
    """Records that found no room in their own folder."""
    return [records.load(p) for p in folder.glob("grbench-*/record.json")]


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_folder_used_again_keeps_the_records_in_it(grbench_here: Grbench, tmp_path: Path) -> None:
    for seeds in ("0,0", "1"):  # and a cell that is asked for twice is measured once
        assert grbench_here("-m", *QUICK, f"seed={seeds}", "hydra.sweep.dir=same").returncode == 0
    assert sorted(r.spec["seed"] for r in found(tmp_path / "same")) == [0, 1]


def test_code_that_was_edited_after_the_command_began_is_noted() -> None:
    """The worker imports what is on disk as it starts, and reports its digest."""
    spec, _ = compose_spec(["engine=hstu"])
    began = runner.describe_environment(spec.packages)
    same = runner._environment(spec, Outcome(Status.OK, code=began["code"], notes=["a note"]), None, {})
    assert same == (began, ["a note"])
    assert runner._environment(spec, Outcome(Status.KILLED), None, {}) == (began, [])  # it could not say
    environment, notes = runner._environment(spec, Outcome(Status.OK, code="0123456789ab", notes=["a note"]), None, {})
    assert environment == {**began, "code": "0123456789ab"}
    assert notes == [
        "a note",
        "the code was edited after this command began: the cell ran code 0123456789ab, and not that of git_sha",
    ]


def test_kernels_compiled_while_measuring_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grbench import scenarios
    from grbench.config.compose import compose_spec
    from grbench.execution.cell import Cell
    from grkernels import tuning

    spec, _ = compose_spec(QUICK)
    run, outcome = scenarios.run_scenario, records.Outcome()

    def compiling(*args: Any, **options: Any) -> Any:
        tuning.note_compiled("grkernels.layer_norm.triton")
        return run(*args, **options)

    monkeypatch.setattr(scenarios, "run_scenario", compiling)
    tuning.note_compiled("grkernels.norm_gate.triton")  # before: no note
    Cell(spec, tmp_path, outcome, lambda message: None).run()
    (note,) = [n for n in outcome.notes if "compiled" in n]
    assert note.startswith("1 kernels were compiled while latencies were taken") and "(layer_norm.triton)" in note


@pytest.mark.parametrize("more", [0, 2])
def test_memory_asked_of_the_gpu_while_measuring_is_noted(
    more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grbench.config.compose import compose_spec
    from grbench.execution import measure
    from grbench.execution.cell import Cell

    spec, outcome, asked = compose_spec(QUICK)[0], records.Outcome(), iter([3, 3 + more])
    monkeypatch.setattr(measure, "gpu_allocations", lambda device: next(asked))
    Cell(spec, tmp_path, outcome, lambda message: None).run()
    found = [n for n in outcome.notes if n.startswith(f"PyTorch asked the GPU {more} times for memory")]
    assert len(found) == bool(more) and not list(asked)


@pytest.mark.gpu
def test_memory_that_is_asked_of_the_gpu_is_counted() -> None:
    torch.cuda.empty_cache()  # else PyTorch may keep a free block of this size
    before = measure.gpu_allocations("cuda")
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    asked = measure.gpu_allocations("cuda")
    assert asked > before
    del block
    torch.empty(2**30, dtype=torch.uint8, device="cuda")
    assert measure.gpu_allocations("cuda") == asked  # PyTorch kept the block


def test_the_peak_of_the_gpu_leaves_the_gate_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    peak = [900 * mib]  # of the gate's checks
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 70 * mib)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 70 * mib))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 1000 * mib)
    assert measure.gpu_allocated_mib("cuda") == 70
    found = measure.memory("cuda", 20.0)
    assert (found["gpu_memory_mib/peak"], found["gpu_memory_mib/reserved"]) == (50.0, 1000.0)
    assert measure.gpu_allocated_mib("cpu") == 0.0
    assert set(measure.memory("cpu", 0.0)) == {"host_memory_mib/peak"}
