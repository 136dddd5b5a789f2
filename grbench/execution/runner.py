"""Runs one cell in a fresh worker process and returns its record, whatever happens to the worker."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grbench.config.schema import RunnerConfig, RunSpec, spec_to_json
from grbench.execution import records
from grbench.execution.environment import describe_environment
from grbench.execution.records import LOG_FILE, RunRecord, Status

JOB_FILE = "job.json"
Event = dict[str, Any]


def run_cell(
    spec: RunSpec,
    runner: RunnerConfig,
    folder: Path,
    *,
    sweep_id: str | None = None,
    overrides: list[str] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[RunRecord, Path]:
    """Measure one cell and keep its record; returns it and the folder it was kept in.

    That is `folder`, or one beside it where `folder` has a record already: none is ever overwritten.
    `on_event` receives the worker's {"stage": ...} and {"answered": n} messages. Only
    KeyboardInterrupt is raised, after the worker is stopped and its record kept.
    """
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    folder = _unused(folder)
    interrupted: KeyboardInterrupt | None = None
    try:
        records.reserve(folder)
        outcome = _work(spec, runner, folder, on_event)
    except OSError as e:
        status = Status.DISK_FULL if e.errno in (errno.ENOSPC, errno.EDQUOT) else Status.ERROR
        outcome = {
            "status": status,
            "error": f"{folder}: {e.strerror or e}; free some space or set runner.output_root",
        }
    except KeyboardInterrupt as e:
        interrupted = e
        outcome = {"status": Status.INTERRUPTED, "error": "interrupted while it ran"}
    record = RunRecord(
        spec=spec.to_dict(),
        spec_hash=spec.hash,
        started_at=started.isoformat(timespec="seconds"),
        duration_s=round(time.monotonic() - begun, 3),
        requested=_requested(spec),
        environment=describe_environment(),
        sweep_id=sweep_id,
        overrides=overrides or [],
        **{**outcome, "status": Status(outcome["status"])},
    )
    folder = keep(record, folder)
    if interrupted is not None:
        raise Interrupted(record, folder) from interrupted
    return record, folder


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a cell ran; carries the cell's record and folder."""

    def __init__(self, record: RunRecord, folder: Path) -> None:
        super().__init__()
        self.record, self.folder = record, folder


def keep(record: RunRecord, folder: Path) -> Path:
    """Save the record in `folder`, or, where the disk refuses, in a temporary folder that the record names."""
    try:
        records.save(record, folder)
        return folder
    except OSError as e:
        spare = Path(tempfile.mkdtemp(prefix=f"grbench-{record.spec_hash}-"))
        record.notes.append(f"{folder} could not be written ({e.strerror or e}): this record is kept in {spare}")
        records.save(record, spare)
        return spare


def _unused(folder: Path) -> Path:
    """`folder`, or the first of folder.1, folder.2, ... that holds no record."""
    names = itertools.chain([folder.name], (f"{folder.name}.{i}" for i in itertools.count(1)))
    return next(path for name in names if not ((path := folder.with_name(name)) / records.RECORD_FILE).exists())


def _work(spec: RunSpec, runner: RunnerConfig, folder: Path, on_event: Callable[[Event], None]) -> Event:
    """Start the worker, pass its messages on, and say how it ended (the fields of a record)."""
    read_end, write_end = os.pipe()
    job, log = folder / JOB_FILE, folder / LOG_FILE
    limit = int(runner.memory_limit_gb * 1e9) if runner.memory_limit_gb else None
    parameters = {
        "spec": spec_to_json(spec),
        "folder": str(folder),
        "report_fd": write_end,
        "memory_limit_bytes": limit,
    }
    job.write_text(json.dumps(parameters))
    kills_before = _oom_kills()
    with log.open("wb") as log_file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "grbench.execution.worker", str(job)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=[write_end],
            start_new_session=True,  # Ctrl-C is the parent's to handle, and the whole group can be stopped
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    os.close(write_end)
    outcome: Event | None = None
    timed_out, grace_s = False, 0.0  # Ctrl-C and the time limit stop the worker at once
    try:
        with os.fdopen(read_end, "rb", buffering=0) as channel:
            for event in _messages(channel, time.monotonic() + runner.timeout_s):
                if "outcome" in event:
                    outcome = event["outcome"]
                else:
                    on_event(event)
        grace_s = 5.0
    except TimeoutError:
        timed_out = True
    finally:
        _stop(worker, grace_s)
    if outcome is not None:
        return outcome
    if timed_out:
        error = f"stopped after runner.timeout_s={runner.timeout_s:g} s; its log ends: {last_line(log)}"
        return {"status": Status.TIMEOUT, "error": error}
    if _oom_kills() > kills_before:
        return {
            "status": Status.OOM,
            "error": "the kernel's out-of-memory killer ended the worker; use a smaller cell",
        }
    if worker.returncode < 0:
        name = signal.Signals(-worker.returncode).name
        return {"status": Status.KILLED, "error": f"{name} ended the worker; its log ends: {last_line(log)}"}
    error = f"the worker exited with {worker.returncode} and no result; its log ends: {last_line(log)}"
    return {"status": Status.ERROR, "error": error}


def _messages(channel: Any, deadline: float) -> Iterator[Event]:
    """Yield the worker's messages until it closes its end. Raises TimeoutError at the deadline (monotonic seconds)."""
    pending = b""
    while True:
        if not select.select([channel], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            raise TimeoutError
        chunk = channel.read(65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _stop(worker: subprocess.Popen[bytes], grace_s: float) -> None:
    """Give the worker time to leave, then end its whole process group, helpers included."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(grace_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return "(no log)"
    return next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")


def _oom_kills() -> int:
    """How many processes the kernel's out-of-memory killer has ended so far; 0 where it doesn't say."""
    try:
        pairs = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return next((int(value) for name, value in pairs if name == "oom_kill"), 0)
    except OSError:
        return 0


def _requested(spec: RunSpec) -> dict[str, Any]:
    """What the user asked of the machine, to stand beside what ran (`actual`)."""
    asked = {f"engine.{k}": v for k, v in dataclasses.asdict(spec.engine).items()}
    return asked | {f"kernel.{family}": name for family, name in spec.kernel.requested().items()}
