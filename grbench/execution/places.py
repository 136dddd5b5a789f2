"""Cells of a sweep side by side: one place a GPU, or a share of the cores, each a process that measures one at a time.

Places share neither cores nor GPUs, so cells meet only in the machine's memory, its caches and its disk. Each record
says so. The command itself only waits: it keeps lists, tracks and prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grbench.config.schema import ConfigError, RunnerConfig, RunSpec, spec_to_json
from grbench.execution import records
from grbench.execution.gpu import visible_gpus
from grbench.execution.records import RECORD_FILE, Outcome, RunRecord, Status
from grbench.execution.runner import lost
from grbench.execution.workers import Event

END_S = 30.0  # for a place to stop its worker and keep the record
TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Share:
    """The part of a machine that a place has. gpu: as in CUDA_VISIBLE_DEVICES; None: cells see none."""

    cores: tuple[int, ...]
    gpu: str | None = None


@dataclass(frozen=True)
class Cell:
    """A cell that a place measures. Fields as the arguments of run_cell.

    on_end: takes the record and its folder.
    """

    spec: RunSpec
    runner: RunnerConfig
    folder: Path
    sweep_id: str | None
    overrides: list[str]
    config_dir: Path | None
    on_event: Callable[[Event], None]
    on_end: Callable[[Path, RunRecord], None]


def shares(parallel: str) -> list[Share]:
    """Return the parts of this machine for `runner.parallel`. Raises ConfigError if there are too few."""
    cores, gpus = _cores(), visible_gpus()
    if parallel == "gpus" and not gpus:
        raise ConfigError(
            "runner.parallel=gpus: no NVIDIA GPU here; runner.parallel=2 measures two cells at a time on the processor"
        )
    count = len(gpus) if parallel == "gpus" else int(parallel) if parallel.isdecimal() else 0
    if not count:
        raise ConfigError(f"runner.parallel={parallel}: allowed are gpus and a number of cells from 1")
    if gpus and count > len(gpus):
        raise ConfigError(
            f"runner.parallel={parallel}: this machine has {len(gpus)} GPUs, and cells never share one; allowed is at "
            f"most {len(gpus)}, or CUDA_VISIBLE_DEVICES= hides them from cells of the processor"
        )
    if count > len(cores):
        raise ConfigError(
            f"runner.parallel={parallel}: this machine has {len(cores)} cores, and cells never share one; allowed is "
            f"at most {len(cores)}"
        )
    size = len(cores) // count
    return [Share(tuple(sorted(cores[i * size : (i + 1) * size])), gpus[i] if gpus else None) for i in range(count)]


def _cores() -> list[int]:
    """Return the cores that this process may use, those of one socket and of one physical core beside each other."""

    def place(core: int) -> tuple[int, int, int]:
        folder = TOPOLOGY / f"cpu{core}" / "topology"
        try:
            socket, physical = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            return 0, core, core
        return socket, physical, core

    return sorted(os.sched_getaffinity(0), key=place)


class Places:
    """The places of a command. The parent of all of them, on one thread."""

    def __init__(self, parts: Sequence[Share]) -> None:
        self._parts = list(parts)
        self._free = list(parts)
        self._busy: list[_Place] = []
        self._idle: dict[Share, _Place] = {}
        self._stopping = False

    def give(self, cells: Sequence[Cell]) -> None:
        """Start cells, one after another, on a free place. Waits for one, and passes on what the others report."""
        while not self._free:
            self._serve()
        self._start(self._free.pop(0), deque(cells))

    def _start(self, part: Share, cells: deque[Cell]) -> None:
        """Let a place measure the first of these cells, and then the others."""
        place = self._idle.pop(part, None) or _Place(part)
        place.give(cells, len(self._parts))
        self._busy.append(place)

    def wait(self) -> None:
        """Wait until every cell has ended."""
        while self._busy:
            self._serve()

    def interrupt(self, number: int) -> None:
        """Send a signal to every cell that runs, and take their records. Places that do not end in time are killed."""
        self._stopping = True
        for place in self._busy:
            while len(place.cells) > 1:
                place.cells.pop()
            place.signal(number)
        end = time.monotonic() + END_S
        while self._busy and time.monotonic() < end:
            self._serve(end)
        for place in self._busy:
            place.signal(signal.SIGKILL)
        self.wait()

    @property
    def busy(self) -> bool:
        """True if a cell runs."""
        return bool(self._busy)

    def close(self) -> None:
        """End the idle places."""
        for place in self._idle.values():
            place.close()
        self._idle.clear()

    def _serve(self, end: float | None = None) -> None:
        """Wait for messages, up to `end` (monotonic seconds), and pass them on."""
        with selectors.DefaultSelector() as ready:
            for place in self._busy:
                ready.register(place.output, selectors.EVENT_READ, place)
            for key, _ in ready.select(None if end is None else max(end - time.monotonic(), 0.0)):
                place = key.data
                if (ended := place.read(self._stopping)) is None:
                    continue
                self._busy.remove(place)
                if place.lives:
                    self._idle[place.part] = place
                else:
                    place.close()
                cell = place.cells.popleft()
                if place.cells and not self._stopping:
                    self._start(place.part, place.cells)
                else:
                    self._free.append(place.part)
                cell.on_end(*ended)


class _Place:
    """A process of grbench.execution.place, as its parent sees it."""

    def __init__(self, part: Share) -> None:
        self.part, self.lives = part, True
        self.cells: deque[Cell] = deque()  # the first is measured
        self._pending = b""
        self._runs = False  # it has said something: its handlers are there
        self._process = subprocess.Popen(
            [sys.executable, "-m", "grbench.execution.place", ",".join(map(str, part.cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the parent passes Ctrl-C on
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": part.gpu} if part.gpu is not None else {}),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout

    def give(self, cells: deque[Cell], of: int) -> None:
        """Give it the first of some cells. of: places that there are."""
        self.cells, cell = cells, cells[0]
        beside = {"cells": of - 1, "cores": list(self.part.cores), "gpu": self.part.gpu}
        arguments = {
            "spec": spec_to_json(cell.spec),
            "runner": asdict(cell.runner),
            "folder": str(cell.folder.absolute()),
            "sweep_id": cell.sweep_id,
            "overrides": cell.overrides,
            "config_dir": str(cell.config_dir) if cell.config_dir else None,
            "beside": beside,
        }
        with contextlib.suppress(BrokenPipeError):  # it has ended: `read` says so
            self._input.write(json.dumps(arguments).encode() + b"\n")
            self._input.flush()

    def read(self, stopping: bool) -> tuple[Path, RunRecord] | None:
        """Pass on what has come. Returns the folder and the record of a cell that has ended, however it did.

        stopping: the command ends, and has sent the place a signal.
        """
        cell = self.cells[0]
        chunk = os.read(self.output.fileno(), 65536)
        if not chunk:
            self.lives = False
            self._process.wait()
            stopped = Outcome(Status.INTERRUPTED, "a signal ended the command before the cell ran")
            outcome = stopped if stopping else Outcome(Status.KILLED, f"{self._how()}; run it again")
            return lost(cell.spec, cell.folder, cell.sweep_id, cell.overrides, outcome)
        self._runs = True
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "done" in event:
                self.lives = not event["signal"]
                folder = Path(event["done"])
                return folder, records.load(folder / RECORD_FILE)
            cell.on_event(event)
        return None

    def _how(self) -> str:
        code, where = self._process.returncode, f"on cores {self.part.cores[0]} to {self.part.cores[-1]}"
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the process that measured it {where} ended {ended}"

    def signal(self, number: int) -> None:
        """Send it a signal: while it starts, one that ends it without a word."""
        number = number if self._runs else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def close(self) -> None:
        """End it, if it lives."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()
        self.output.close()
