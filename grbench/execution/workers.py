"""Worker processes as the launcher sees them: started, given cells, listened to, stopped.

`KeptWorker` holds one idle worker with its engine, for the next cell that has the same engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grbench.config.schema import RunnerConfig, RunSpec, spec_to_json
from grbench.execution.clock import SILENCE_S
from grbench.execution.environment import code_digest
from grbench.execution.gpu import GpuUse
from grbench.execution.kept import engine_key
from grbench.execution.load import gpu_in_use
from grbench.execution.records import JOB_FILE, LOG_FILE

GRACE_S = 5.0  # for an engine to be closed
Event = dict[str, Any]
_living: list[Worker] = []  # of this process


class Worker:
    """A worker process. gpu: use of the GPU before its first cell; None: not known, as where other workers live."""

    def __init__(self, spec: RunSpec, runner: RunnerConfig, folder: Path, keep: bool) -> None:
        """Start a process with its first cell. keep: it waits for another one afterwards. Raises OSError."""
        # Work of this process's workers, also of idle ones, would count as that of others.
        self.gpu: GpuUse | None = None if _living else gpu_in_use()
        read, self._report_fd = os.pipe()
        self._jobs_fd, self._jobs = os.pipe()
        self._channel = open(read, "rb", buffering=0)  # noqa: PTH123, SIM115  (a file descriptor)
        self._pending = b""
        try:
            job = self._job(spec, runner, folder, keep)
            with (folder / LOG_FILE).open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "grbench.execution.worker", str(job)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[self._report_fd, self._jobs_fd],
                    start_new_session=True,  # Ctrl-C is the parent's to handle, and the whole group can be stopped
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
        except BaseException:
            os.close(self._jobs)
            self._channel.close()
            raise
        finally:
            os.close(self._report_fd)
            os.close(self._jobs_fd)
        _living.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int:
        """The exit code of a stopped worker, negative for a signal."""
        code = self._process.returncode
        assert code is not None, "it was stopped"
        return code

    @property
    def idle(self) -> bool:
        """True if the process lives."""
        return self._process.poll() is None

    def give(self, spec: RunSpec, runner: RunnerConfig, folder: Path) -> None:
        """Give an idle worker its next cell. Raises OSError, BrokenPipeError if the worker has ended."""
        self.gpu = None  # the reading is that before the first cell
        job = self._job(spec, runner, folder, keep=True)
        os.write(self._jobs, f"{job}\n".encode())

    def _job(self, spec: RunSpec, runner: RunnerConfig, folder: Path, keep: bool) -> Path:
        """Write the job file of a cell. Returns its path."""
        job = folder / JOB_FILE
        parameters = {
            "spec": spec_to_json(spec),
            "folder": str(folder),
            "log": str(folder / LOG_FILE),
            "report_fd": self._report_fd,
            "jobs_fd": self._jobs_fd,
            "keep": keep,
            "timeout_s": runner.timeout_s,
            "memory_limit_bytes": int(runner.memory_limit_gb * 1e9) if runner.memory_limit_gb else None,
        }
        job.write_text(json.dumps(parameters))
        return job

    def messages(self, deadline: float) -> Iterator[Event]:
        """Yield the worker's messages up to a cell's outcome, or until it ends, and {} after SILENCE_S without any.

        Raises TimeoutError at the deadline (monotonic seconds).
        """
        while True:
            left_s = max(deadline - time.monotonic(), 0.0)
            if not select.select([self._channel], [], [], min(left_s, SILENCE_S))[0]:
                if left_s <= SILENCE_S:
                    raise TimeoutError
                yield {}
                continue
            chunk = self._channel.read(65536)
            if not chunk:
                return
            *lines, self._pending = (self._pending + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                yield event
                if "outcome" in event:
                    return

    def stop(self, grace_s: float = 0.0) -> None:
        """Give the worker time to leave, then end its whole process group, helpers included."""
        _living.remove(self)
        os.close(self._jobs)  # one that waits for a cell ends
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._channel.close()  # at the end: a worker without a reader ends itself at once


class KeptWorker:
    """At most one idle worker. `give` gives it a cell of the same engine, and ends it before any other cell."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._key: tuple[str, str | None] = "", None

    def give(self, spec: RunSpec, runner: RunnerConfig, folder: Path) -> Worker | None:
        """Give the idle worker this cell if it has its engine and the code that is here now. Any other one is stopped.

        Returns None without a worker that takes the cell. Raises OSError.
        """
        worker, self._worker = self._worker, None
        if worker is None:
            return None
        try:
            if worker.idle and self._key == (engine_key(spec), code_digest()):
                worker.give(spec, runner, folder)
                return worker
        except BrokenPipeError:  # it has ended since
            pass
        except BaseException:
            worker.stop()
            raise
        worker.stop(GRACE_S)
        return None

    def keep(self, worker: Worker, spec: RunSpec, code: str | None) -> None:
        """Keep the worker of a cell that has ended well. code: the digest of its code."""
        self._worker, self._key = worker, (engine_key(spec), code)

    def close(self) -> None:
        """Stop the idle worker, once: a signal may end the wait for its engine."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop(GRACE_S)
