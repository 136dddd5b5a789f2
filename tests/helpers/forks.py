"""Forks of the test's process: real processes that need not import anything.

A start of Python with torch takes three seconds of a core, with MLflow or vLLM ten. Tests of what processes do beside
each other fork instead, and so do runs whose subject is not how a process starts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grbench.execution import runner, worker
from grbench.signals import ENDING

USED = ("grbench.execution.cell", "grengines.hstu.engine", "pyarrow.parquet", "scipy.special")  # by every worker


class Fork:
    """A process that does `work` and ends. It has the parts of `subprocess.Popen` that the runner uses.

    output: file for what it prints. fds: open files that it keeps. env: its environment variables.
    """

    def __init__(
        self, work: Callable[[], object], output: Path, fds: Iterable[int] = (), env: Mapping[str, str] = os.environ
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, output, sorted(fds), dict(env))

    def wait(self, timeout: float = 240) -> int:
        """Return the exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _become(work: Callable[[], object], output: Path, fds: list[int], env: dict[str, str]) -> None:
    """Be a process of its own: its session, files, signals and log. Never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
            os.dup2(os.open(path, flags, 0o600), fd)
        os.dup2(1, 2)
        for first, last in zip([2, *fds], [*fds, os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(first + 1, last)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, 1) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
        faulthandler.enable(sys.stderr)
        for number in ENDING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", []):
                if type(handler) is logging.StreamHandler:
                    handler.setStream(sys.stderr)
        os.environ.clear()
        os.environ.update(env)
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """Let `run_cell` fork its workers, with the job file, log and report pipe that it gives to any worker."""

    def popen(command: list[str], *, stdout: Any, pass_fds: list[int], env: dict[str, str], **_: Any) -> Fork:
        def work() -> None:
            sys.argv = command[-2:]
            worker.main()

        return Fork(work, Path(stdout.name), pass_fds, env)

    for name in USED:
        importlib.import_module(name)
    patch.setattr(runner, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
