"""Forks of the test's process: real processes that need not import anything.

A start of Python with torch takes three seconds of a core, with MLflow or vLLM ten. Tests of what processes do beside
each other fork instead, and so do runs whose subject is not how a process starts.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grbench.cli import main
from grbench.execution import environment, place, places, worker, workers
from grbench.signals import ENDING
from grbench.tune import legal
from grengines.runtime import follower, team

USED = ("grbench.execution.cell", "grengines.hstu.engine", "pyarrow.parquet", "scipy.special")  # by every worker
USED_BY_COMMANDS = (  # the last of them draw the picture of a cell
    *("grbench.execution.session", "grbench.tracking.store", "hydra._internal.config_loader_impl", "pandas"),
    *("grbench.report.latency_charts", "grbench.report.plots", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)


class Fork:
    """A process that does `work` and ends. It has the parts of `subprocess.Popen` that the runner uses.

    output: file for what it prints. fds: open files that it keeps. env: its environment variables. errors: file for
    standard error, if not the same.
    """

    def __init__(
        self,
        work: Callable[[], object],
        output: Path,
        fds: Iterable[int] = (),
        env: Mapping[str, str] = os.environ,
        errors: Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._polling = threading.Lock()  # only one call finds how a process ended
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, output, errors, sorted(fds), dict(env))
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # a signal to its group would miss it
            time.sleep(0.001)

    def wait(self, timeout: float = 240) -> int:
        """Return the exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it by SIGKILL, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with self._polling:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
            return self.returncode


def _become(work: Callable[[], object], output: Path, errors: Path | None, fds: list[int], env: dict[str, str]) -> None:
    """Be a process of its own: its session, files, signals and log. Never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        # Collecting what the tests left would copy all their memory, and end objects of threads that are not here.
        gc.freeze()
        gc.unfreeze = lambda: None  # a server's reload would collect it, too
        adding = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, adding), (2, errors or output, adding)):
            os.dup2(os.open(path, flags, 0o600), fd)
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in {int(path.name) for path in Path("/dev/fd").iterdir()} - {0, 1, 2, nothing, *fds}:
            with contextlib.suppress(OSError):  # the folder itself was open
                os.fstat(fd)
                os.dup2(nothing, fd)  # pyarrow aborts in the next fork if a file of its own is closed
        # A fork of a fork drops these files: that must not close what they stand for.
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, "w" if fd else "r", 1, closefd=False) for fd in range(3))
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, sys.stderr)  # the stacks of all threads
        for number in ENDING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", []):
                if type(handler) is logging.StreamHandler:
                    handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
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


def in_fork(work: Callable[[], object], folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Do `work` in a fork, and wait for it. It prints to out.txt and err.txt in a folder."""
    out, err = folder / "out.txt", folder / "err.txt"
    out.unlink(missing_ok=True)
    err.unlink(missing_ok=True)
    process = Fork(work, out, errors=err)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired as e:
        os.kill(process.pid, signal.SIGUSR1)  # it prints where its threads are
        time.sleep(1.0)
        e.add_note(err.read_text()[-8000:])
        raise
    finally:
        process.kill()
    return subprocess.CompletedProcess(["fork"], code, out.read_text(), err.read_text())


def run_program(program: str, folder: Path, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    """Run the text of a Python program in a fork; see `in_fork`."""
    return in_fork(lambda: exec(program, {"__name__": "__main__"}), folder, timeout)


def printed_lines(file: Path, process: Fork) -> Iterator[str]:
    """Yield each line that a fork prints to a file, until it ends."""
    rest, ended = "", False
    with file.open() as lines:
        while not ended or rest:
            ended = process.poll() is not None
            rest += lines.read()
            *whole, rest = rest.split("\n")
            yield from whole
            if not whole:
                rest = "" if ended else rest
                time.sleep(0.02)


def fork_command(folder: Path, *words: str, env: Mapping[str, str] = os.environ, forked_places: bool = False) -> Fork:
    """Start `grbench WORDS` in a folder, with forked workers. It prints to out.txt and err.txt there.

    forked_places: the places of cells side by side are forks too, and so are their workers.
    """
    for name in (*USED, *USED_BY_COMMANDS):
        importlib.import_module(name)

    def work() -> None:
        os.chdir(folder)
        sys.argv = ["grbench"]
        fork_workers(pytest.MonkeyPatch())
        if forked_places:
            fork_places(pytest.MonkeyPatch())
        sys.exit(main(words))

    for name in ("out.txt", "err.txt"):
        (folder / name).write_text("")
    return Fork(work, folder / "out.txt", env=env, errors=folder / "err.txt")


class _Place(Fork):
    """A fork that is a place, with the parts of `subprocess.Popen` that `Places` uses."""

    def __init__(self, command: list[str], **_: Any) -> None:
        reads, writes = os.pipe(), os.pipe()

        def work() -> None:
            os.dup2(reads[0], 0)
            os.dup2(writes[1], 1)
            sys.argv = command[-2:]
            environment._machine_and_code.cache_clear()  # it has the cores of the command
            place.main()

        super().__init__(work, Path("places.txt"), (reads[0], writes[1]))
        os.close(reads[0])
        os.close(writes[1])
        self.stdin, self.stdout = os.fdopen(reads[1], "wb"), os.fdopen(writes[0], "rb")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def fork_places(patch: pytest.MonkeyPatch) -> None:
    """Let the places of cells side by side be forks, which print to places.txt in the current folder."""
    patch.setattr(places, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": _Place}))


def fork_ranks(patch: pytest.MonkeyPatch) -> None:
    """Let the further ranks of an engine be forks, which print to ranks.txt in the current folder."""

    def popen(command: list[str], *, pass_fds: list[int], env: dict[str, str], **_: Any) -> Fork:
        def work() -> None:
            sys.argv = command[-2:]
            follower.main()

        return Fork(work, Path("ranks.txt"), pass_fds, env)

    patch.setattr(team, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """Let `run_cell` fork its workers, with the job file, log and report pipe that it gives to any worker.

    A search forks the process that it asks which engines can run.
    """

    def popen(command: list[str], *, stdout: Any, pass_fds: list[int], env: dict[str, str], **_: Any) -> Fork:
        def work() -> None:
            sys.argv = command[-2:]
            worker.main()

        return Fork(work, Path(stdout.name), pass_fds, env)

    def ask(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        def work() -> None:
            sys.stdin = io.StringIO(input)
            legal.main()

        with tempfile.TemporaryDirectory() as folder:
            return in_fork(work, Path(folder))

    for name in USED:
        importlib.import_module(name)
    patch.setattr(workers, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
    patch.setattr(legal, "subprocess", SimpleNamespace(run=ask))
