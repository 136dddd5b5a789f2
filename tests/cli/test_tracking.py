"""Tracking with the real MLflow: sqlite, a server, a server that is down, a database that is locked."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.command import Grbench
from helpers.forks import Fork
from helpers.mlflow_store import new_database

from grbench.cli import main
from grbench.execution import records
from grbench.execution.records import RunRecord, Status
from grbench.tracking import CellTracker, import_records
from grbench.tracking.config import MlflowConfig, NoTrackingConfig, check_uri
from grbench.tracking.database import uri_of
from grbench.tracking.store import LAUNCHER_TAG, Store, launcher

SPEC = {
    "model": {"name": "hstu_tiny", "layers": 2},
    "engine": {"name": "hstu", "device": "auto"},
    "kernel": {"name": "torch"},
    "cache": {"name": "none"},
    "workload": {"name": "ml_100k"},
    "scenario": {"name": "server", "max_batch": 16},
    "seed": 0,
}


def cell(folder: Path, **changes: Any) -> tuple[RunRecord, Path]:
    """A finished cell on disk."""
    fields: dict[str, Any] = {
        "spec": SPEC,
        "spec_hash": "0123456789ab",
        "status": Status.OK,
        "started_at": "2026-01-02T03:04:05+00:00",
        "duration_s": 2.5,
        "actual": {"device": "cpu", "kernels": {"hstu_attention": "torch"}},
        "environment": {"git_sha": "abc", "gpus": [], "versions": {"torch": "2.13.0"}},
        "metrics": {"latency_ms/p50": 1.5, "latency_ms/p99.9": 9.0, "throughput_rps": 100.0},
        "intervals": {"latency_ms/p50": [1.4, 1.6]},
        "gate": {"passed": True, "error": 1e-7, "tolerance": 2e-5},
    }
    record = RunRecord(**{**fields, **changes})
    folder.mkdir(parents=True, exist_ok=True)
    records.save(record, folder)
    pd.DataFrame({"latency_ms": [1.0, 2.0]}).to_parquet(folder / "samples.parquet")
    (folder / "worker.log").write_text("hello\n")
    return record, folder


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs(uri: str, experiment: str = "grbench") -> list[Any]:
    c = client(uri)
    found = c.get_experiment_by_name(experiment)
    return list(c.search_runs([found.experiment_id])) if found else []


def sqlite_uri(root: Path) -> str:
    return f"sqlite:///{root}/mlruns.db"


def test_a_cell_is_logged_whole(tmp_path: Path) -> None:
    new_database(tmp_path)
    record, folder = cell(tmp_path / "runs" / "a", overrides=["seed=0"])
    record.metrics["broken"] = float("nan")
    assert CellTracker(MlflowConfig(), tmp_path).log(record, folder)
    [run] = runs(sqlite_uri(tmp_path))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "hstu server seed=0"
    assert run.info.end_time - run.info.start_time == 2500
    assert run.data.params == {
        "model": "hstu_tiny", "model.layers": "2", "engine": "hstu", "engine.device": "auto", "kernel": "torch",
        "cache": "none", "workload": "ml_100k", "scenario": "server", "scenario.max_batch": "16", "seed": "0",
    }  # fmt: skip
    assert run.data.metrics == {
        "latency_ms/p50": 1.5, "latency_ms/p50/ci95_low": 1.4, "latency_ms/p50/ci95_high": 1.6,
        "latency_ms/p99.9": 9.0, "throughput_rps": 100.0, "gate/error": 1e-7, "gate/tolerance": 2e-5,
    }  # fmt: skip
    expected = {"status": "OK", "git_sha": "abc", "device": "cpu", "role": "cell"}
    assert expected.items() <= run.data.tags.items()
    assert len(run.data.tags) <= 25
    names = {f.path for f in client(sqlite_uri(tmp_path)).list_artifacts(run.info.run_id)}
    assert names == {"record.json", "samples.parquet", "worker.log", "config.yaml"}
    kept = records.load(folder)
    assert kept.tracking["run_id"] == run.info.run_id
    assert [f for f, _ in records.find(tmp_path)] == [folder]  # MLflow's copy of the record is not a second one


def test_a_sweep_is_a_parent_with_a_child_for_each_cell_and_is_found_again(tmp_path: Path) -> None:
    new_database(tmp_path)
    for attempt in ("first", "resumed"):
        tracker = CellTracker(MlflowConfig(), tmp_path)
        tracker.start_sweep("s1", {"overrides": "seed=0,1"})
        good, kept = cell(tmp_path / attempt / "0", sweep_id="s1")
        tracker.log(good, kept)
        bad, folder = cell(tmp_path / attempt / "1", sweep_id="s1", status=Status.OOM, error="no memory", metrics={})
        tracker.log(bad, folder)
        tracker.end_sweep([(kept, good), (folder, bad)])
    found = runs(sqlite_uri(tmp_path))
    [parent] = [r for r in found if r.data.tags["role"] == "sweep"]
    cells = [r for r in found if r.data.tags["role"] == "cell"]
    assert len(cells) == 4
    assert {r.data.tags["mlflow.parentRunId"] for r in cells} == {parent.info.run_id}
    assert parent.info.status == "FAILED"
    assert parent.data.metrics == {"cells/OK": 1, "cells/OOM": 1}
    failed = next(r for r in cells if r.data.tags["status"] == "OOM")
    assert failed.info.status == "FAILED"
    assert failed.data.tags["mlflow.note.content"] == "**OOM**: no memory"
    assert "latency_ms/p50" not in failed.data.metrics


def test_the_answer_of_a_search_and_its_pages_are_on_the_parent_run(tmp_path: Path) -> None:
    new_database(tmp_path)
    pictures = tmp_path / "tune_files"
    pictures.mkdir()
    (pictures / "pareto.png").write_bytes(b"png")
    page = tmp_path / "tune.html"
    page.write_text("<p>the page</p>")
    tracker = CellTracker(MlflowConfig(), tmp_path)
    tracker.start_sweep("s1", {})
    good, folder = cell(tmp_path / "0", sweep_id="s1")
    tracker.log(good, folder)
    bad, other = cell(tmp_path / "1", sweep_id="s1", status=Status.STOPPED, error="the queue grew", metrics={})
    tracker.log(bad, other)
    tracker.end_sweep([(folder, good), (other, bad)], answer="Take hstu: 401 requests/s.", files=[page, pictures])
    [parent] = [r for r in runs(sqlite_uri(tmp_path)) if r.data.tags["role"] == "sweep"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"].startswith("Take hstu: 401 requests/s.\n\n")
    artifacts = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "tune.html").read_text() == "<p>the page</p>"
    assert (artifacts / "tune_files" / "pareto.png").is_file()


def test_a_kept_cell_of_another_sweep_is_a_child_of_this_one_too(tmp_path: Path) -> None:
    new_database(tmp_path)

    def sweep(name: str, *cells: tuple[RunRecord, Path, bool]) -> None:
        tracker = CellTracker(MlflowConfig(), tmp_path)
        tracker.start_sweep(name, {})
        for record, folder, kept in cells:
            tracker.log(record, folder, kept)
        tracker.end_sweep([(folder, record) for record, folder, _ in cells])

    one, two = (
        cell(tmp_path / "s1" / "0", sweep_id="s1"),
        cell(tmp_path / "s2" / "1", sweep_id="s2", spec_hash="b" * 12),
    )
    sweep("s1", (*one, False))
    for _ in range(2):  # the second time, both are kept and both are there
        sweep("s2", (*one, True), (*two, (tmp_path / "logged").exists()))
        (tmp_path / "logged").touch()
    sweep("s3", (*two, True))  # all of it is in one earlier sweep: no run says it again
    found = runs(sqlite_uri(tmp_path))
    parents = {r.info.run_id: r.data.tags["sweep_id"] for r in found if r.data.tags["role"] == "sweep"}
    children = [parents[r.data.tags["mlflow.parentRunId"]] for r in found if r.data.tags["role"] == "cell"]
    assert sorted(parents.values()) == ["s1", "s2"]
    assert sorted(children) == ["s1", "s2", "s2"]


def test_the_run_of_a_sweep_that_is_cut_short_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal that cuts its closing short changes nothing."""

    def stop(*args: Any) -> list[str]:
        raise KeyboardInterrupt

    new_database(tmp_path)
    good, folder = cell(tmp_path / "0", sweep_id="s")
    for name, cut_short in (("stopped", True), ("stopped twice", False)):
        tracker = CellTracker(MlflowConfig(), tmp_path)
        tracker.start_sweep(name, {})
        tracker.log(good, folder)
        monkeypatch.setattr(Store, "_log_comparison", stop)
        with contextlib.nullcontext() if cut_short else pytest.raises(KeyboardInterrupt):
            tracker.end_sweep([(folder, good)], cut_short)
    statuses = {r.info.run_name: r.info.status for r in runs(sqlite_uri(tmp_path)) if r.data.tags["role"] == "sweep"}
    assert statuses == {"stopped": "KILLED", "stopped twice": "KILLED"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The command `mlflow server` in a fork, which starts a server of its own."""
    port = free_port()
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]

    def work() -> None:
        os.chdir(folder)
        importlib.import_module("mlflow.cli").cli(words)

    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes that runs never use
    server = Fork(work, folder / "server.log", env=env)
    try:
        uri = f"http://127.0.0.1:{port}"
        for _ in range(900):  # three minutes: a machine with other work takes one
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    break
            assert server.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.2)
        else:
            raise AssertionError(f"MLflow's server does not answer: {(folder / 'server.log').read_text()}")
        yield uri
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def test_a_server_works_in_place_of_sqlite_and_what_it_missed_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    record, folder = cell(root / "0", sweep_id="s", overrides=["seed=0"])
    dead = f"http://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    tracker = CellTracker(MlflowConfig(uri=dead), root)
    tracker.start_sweep("s", {})
    assert not tracker.log(record, folder)
    tracker.end_sweep([(folder, record)])
    assert time.monotonic() - begun < 30
    said = capsys.readouterr().err
    assert f"{dead}: Connection refused" in said
    assert "python -m grbench import" in said
    assert records.load(folder).tracking == {}
    new_database(tmp_path, "server.db")
    with mlflow_server(tmp_path) as uri:
        assert import_records(root, uri) == (1, 0, 0)
        assert import_records(root, uri) == (0, 1, 0)  # nothing is logged twice
        live, folder = cell(root / "1", spec_hash="1" * 12)
        assert CellTracker(MlflowConfig(uri=uri), root).log(live, folder)
        found = runs(uri)
        assert sorted(r.data.tags["role"] for r in found) == ["cell", "cell", "sweep"]
        [parent] = [r for r in found if r.data.tags["role"] == "sweep"]
        assert parent.info.status == "FINISHED"
        assert parent.data.metrics == {"cells/OK": 1}
        assert parent.info.run_name == "seed=0 (s)"  # as if the sweep had logged it
        [mine] = [r for r in found if r.info.run_id == records.load(folder).tracking["run_id"]]
        assert {f.path for f in client(uri).list_artifacts(mine.info.run_id)} >= {"record.json", "samples.parquet"}
        # The same records into another store: that one has not seen them.
        assert import_records(root, new_database(tmp_path)) == (2, 0, 0)


def test_a_locked_database_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_database(tmp_path)
    first, folder = cell(tmp_path / "0")
    assert CellTracker(MlflowConfig(), tmp_path).log(first, folder)
    second, folder = cell(tmp_path / "1", spec_hash="1" * 12)
    holder = sqlite3.connect(tmp_path / "mlruns.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    assert not CellTracker(MlflowConfig(), tmp_path).log(second, folder)
    assert time.monotonic() - begun < 60
    holder.execute("ROLLBACK")
    holder.close()
    assert "database is locked" in capsys.readouterr().err
    assert import_records(tmp_path) == (1, 1, 0)
    assert len(runs(sqlite_uri(tmp_path))) == 2


def test_a_root_that_moved_is_known_and_takes_its_artifacts_along(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "my%2F new?"
    new_database(old)
    record, folder = cell(old / "0")
    assert CellTracker(MlflowConfig(), old).log(record, folder)
    (tmp_path / "link").symlink_to(old)
    assert import_records(tmp_path / "link") == (0, 1, 0)
    old.rename(new)
    cell(new / "1", spec_hash="1" * 12)
    assert import_records(new) == (1, 1, 0)
    assert import_records(new, experiment="second") == (2, 0, 0)
    assert import_records(new) == (0, 2, 0)  # whichever experiment has them
    assert not old.exists()
    (new / "2").mkdir()
    (new / "2" / "record.json").write_text('{"spec": ')
    assert import_records(new) == (0, 2, 1)  # one that can't be read is not logged
    address = uri_of(new / "mlruns.db")
    found = runs(address)
    assert len(found) == 2 and all(list(client(address).list_artifacts(run.info.run_id)) for run in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", new.name]  # nothing was made outside the root


def test_kept_cells_reach_another_store(tmp_path: Path) -> None:
    record, folder = cell(tmp_path / "0")
    for name in ("mlruns.db", "other.db"):
        new_database(tmp_path, name)
    for uri in (None, f"sqlite:///{tmp_path}/other.db", None):
        tracker = CellTracker(MlflowConfig(uri=uri), tmp_path)
        tracker.start_sweep("it's a sweep", {})
        assert tracker.log(record, folder, kept=True)
        tracker.end_sweep([(folder, record)])
    for uri in (sqlite_uri(tmp_path), f"sqlite:///{tmp_path}/other.db"):
        assert sorted(run.data.tags["role"] for run in runs(uri)) == ["cell", "sweep"]


def test_the_record_of_a_run_in_another_experiment_names_that_experiment(tmp_path: Path) -> None:
    new_database(tmp_path)
    record, folder = cell(tmp_path / "0")
    assert CellTracker(MlflowConfig(experiment="other"), tmp_path).log(record, folder)
    logged = records.load(folder).tracking
    [run] = runs(sqlite_uri(tmp_path), "other")
    assert (logged["run_id"], logged["experiment_id"]) == (run.info.run_id, run.info.experiment_id)
    cell(tmp_path / "0")  # the record as it was
    assert import_records(tmp_path) == (0, 1, 0)
    assert records.load(folder).tracking == logged


def test_a_database_whose_making_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".mlruns.db.new").write_bytes(b"SQLite format 3, half made")
    record, folder = cell(tmp_path / "0")
    assert CellTracker(MlflowConfig(), tmp_path).log(record, folder)
    assert [path.name for path in tmp_path.glob("*mlruns*")] == ["mlruns.db"]


def test_an_unusable_database_is_said_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, folder = cell(tmp_path / "0")
    (tmp_path / "mlruns.db").mkdir()
    begun = time.monotonic()
    assert not CellTracker(MlflowConfig(experiment="mine"), tmp_path).log(record, folder)
    assert time.monotonic() - begun < 30
    said = capsys.readouterr().err
    assert f"{tmp_path}/mlruns.db: " in said and "; move it away" in said
    assert f"`python -m grbench import {tmp_path} --experiment mine`" in said


@pytest.mark.parametrize(
    "uri",
    ["http://bob:secret@host:5000", "https://token@host", "postgresql://u:secret@host/db", "mysql://h/d?password=x"],
)
def test_a_password_in_an_address_is_refused_and_not_shown(grbench_here: Grbench, tmp_path: Path, uri: str) -> None:
    cell(tmp_path / "outputs" / "a")
    for words in ([f"tracking.uri='{uri}'"], ["import", "--uri", uri], ["report", "--mlflow", uri]):
        refused = grbench_here(*words)
        assert refused.returncode == 2
        assert "holds a password" in refused.stderr and "MLFLOW_TRACKING_PASSWORD" in refused.stderr
        assert "secret" not in refused.stderr + refused.stdout and "token@" not in refused.stderr
    check_uri("--uri", "http://host:5000")
    check_uri("--uri", "postgresql://user@host/db")


def test_processes_that_start_at_once_share_one_new_database(tmp_path: Path) -> None:
    def log(record: RunRecord, folder: Path) -> None:
        sys.exit(not CellTracker(MlflowConfig(), tmp_path).log(record, folder))

    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # once for all of them
    cells = [cell(tmp_path / str(i)) for i in range(4)]
    started = [Fork(partial(log, *made), tmp_path / "log.txt") for made in cells]
    assert [fork.wait() for fork in started] == [0, 0, 0, 0], (tmp_path / "log.txt").read_text()
    assert len(runs(sqlite_uri(tmp_path))) == 4


def test_the_import_command_says_what_it_did(grbench_here: Grbench, tmp_path: Path) -> None:
    refused = grbench_here("import", "nowhere")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "grbench import: nowhere: no records found; `python -m grbench` writes them under outputs/"
    ]
    new_database(tmp_path / "outputs")
    cell(tmp_path / "outputs" / "a")
    cell(tmp_path / "outputs" / "b", status=Status.INTERRUPTED)
    done = grbench_here("import")
    assert done.stdout == "1 records logged, 0 were there already, 0 failed\n", done.stderr


def listens(port: int) -> bool:
    """Return whether something accepts connections at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_ui_says_what_is_missing(grbench_here: Grbench, tmp_path: Path) -> None:
    refused = grbench_here("ui", "nowhere")
    assert refused.returncode == 2
    assert "no such database; the first run of `python -m grbench` creates it" in refused.stderr
    new_database(tmp_path / "outputs")
    record, folder = cell(tmp_path / "outputs" / "a")
    assert CellTracker(MlflowConfig(), tmp_path / "outputs").log(record, folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = grbench_here("ui", "--port", str(taken.getsockname()[1]))
    assert busy.returncode == 2
    assert "--port 99999: allowed is 1 to 65535" in grbench_here("ui", "--port", "99999").stderr
    assert "choose another with --port" in busy.stderr


def test_a_sweep_whose_process_was_killed_ends_at_the_next_start(tmp_path: Path) -> None:
    """SIGKILL leaves the sweep's run RUNNING; one whose process lives, or is on another host, stays so."""
    new_database(tmp_path)
    client = Store(None, "grbench", tmp_path)._client
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    launchers = {
        "gone": f"{socket.gethostname()} {int(gone.stdout)} 1",
        "another process has its id": f"{socket.gethostname()} {os.getpid()} 1",
        "alive": launcher(),
        "elsewhere": "another-host 1 1",
    }
    ids = {}
    for name, tag in launchers.items():
        tags = {"role": "sweep", LAUNCHER_TAG: tag}
        ids[name] = client.create_run("1", run_name=name, tags=tags).info.run_id
    Store(None, "grbench", tmp_path)
    ended = [name for name, run in ids.items() if client.get_run(run).info.status == "KILLED"]
    assert ended == ["gone", "another process has its id"]
    assert Store(None, "grbench", tmp_path).sweep_run("s", {})
    [run] = client.search_runs(["1"], "tags.sweep_id = 's'")
    assert run.data.tags[LAUNCHER_TAG] == launcher()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)


def test_the_ui_shows_the_runs_and_ends_quietly_on_ctrl_c(tmp_path: Path) -> None:
    """The page that the command names, on localhost; in a browser, where there is one, the run is on it.

    Ctrl-C reaches all processes of a terminal; the server's port is free after.
    """
    new_database(tmp_path / "outputs")
    spec = {**SPEC, "engine": {**SPEC["engine"], "precision": "bf16"}}
    record, folder = cell(tmp_path / "outputs" / "a", spec=spec, overrides=["scenario=server", "engine.precision=bf16"])
    port = free_port()

    def work() -> None:
        assert CellTracker(MlflowConfig(), tmp_path / "outputs").log(record, folder)  # here: a fork has no connection
        sys.exit(main(["ui", str(tmp_path / "outputs"), "--port", str(port)]))

    reads, writes = os.pipe()
    ui = Fork(work, Path(f"/dev/fd/{writes}"))
    os.close(writes)
    try:
        with os.fdopen(reads) as printed:
            address = next(line for line in printed if "http://" in line).split()[2]
            assert address.startswith("http://127.0.0.1:")
            assert address.endswith("/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=grbench")
            for _ in range(600):  # a busy machine takes its time
                with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2) as answer:
                    assert "MLflow" in answer.read().decode()
                    break
                time.sleep(0.2)
            else:
                raise AssertionError("the page never came")
            page = in_browser(address, tmp_path) if BROWSER else ""
            os.killpg(ui.pid, signal.SIGINT)
            output = printed.read()  # until the last process that has the pipe ends
        assert ui.wait(60) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ui.pid, signal.SIGKILL)
        ui.kill()
    assert "Traceback" not in output, output
    assert not listens(port)
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome: the page came, what it shows was not looked at")
    assert "hstu server bf16" in page
    assert "latency_ms/p50" in page and "gate/error" in page  # columns of the shared view


def in_browser(address: str, folder: Path) -> str:
    """Return what a browser makes of a page, once the run is on it."""
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--no-sandbox", "--window-size=1800,900"]
    quiet += [f"--user-data-dir={folder}/profile"]
    for _ in range(3):  # virtual time can run out before a busy machine has answered the page's requests
        page = subprocess.run(
            [str(BROWSER), "--headless", *quiet, "--virtual-time-budget=30000", "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        if "hstu server bf16" in page:
            break
    return page


def test_no_tracking_logs_nothing(tmp_path: Path) -> None:
    record, folder = cell(tmp_path / "a")
    assert not CellTracker(NoTrackingConfig(), tmp_path).log(record, folder)
    assert not (tmp_path / "mlruns.db").exists()
