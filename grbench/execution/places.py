"""Cells of a sweep side by side: one place a GPU, or a share of the cores, each a process that measures one at a time.

Places share neither cores nor GPUs, so cells meet only in the machine's memory, its caches and its disk. Each record
says so. The command itself only waits: it keeps lists, tracks and prints.

`Places` gives cells to the parts of a machine or of a cluster. A part starts its place, and another one when that is
lost. The places of this machine are here; those of clusters are in ray_places.py and slurm_places.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from grbench.config.arguments import CommandError
from grbench.config.schema import ConfigError, RunnerConfig, RunSpec, spec_to_json
from grbench.execution import records
from grbench.execution.gpu import visible_gpus
from grbench.execution.kept import engine_key
from grbench.execution.records import RECORD_FILE, Outcome, RunRecord, Status
from grbench.execution.runner import lost
from grbench.execution.workers import Event
from grbench.signals import deferred

END_S = 30.0  # for a place to stop its worker and keep the record
TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Cell:
    """A cell that a place measures. Fields as the arguments of run_cell.

    on_end: takes the record and its folder. lane: which of the engines that a place keeps with `runner.keep_engine` may
    be that of the cell; a place keeps one for each name.
    """

    spec: RunSpec
    runner: RunnerConfig
    folder: Path
    sweep_id: str | None
    overrides: list[str]
    config_dir: Path | None
    on_event: Callable[[Event], None]
    on_end: Callable[[Path, RunRecord], None]
    lane: str = ""


class Part(ABC):
    """A part of a machine or of a cluster, which has one place at a time.

    machine: the fields of a record's environment there that are not as in this process. beside: cells that may run
    beside its own on the same machine. facts: what its records say of it in their environment, besides what they find.
    """

    engine = ""  # key of the engine that its place was given last

    def __init__(self, machine: dict[str, Any], beside: int, facts: dict[str, Any]) -> None:
        self.machine, self.beside, self.facts = machine, beside, facts

    @abstractmethod
    def start(self) -> Place:
        """Start a place. Raises PartError."""

    def close(self) -> None:  # noqa: B027
        """Give the part back."""


class PartError(Exception):
    """A part has no place any more. The message says why."""


class Place(ABC):
    """A process that measures cells, as its parent sees it.

    output: what it says. lives: False once it has ended, or ends. cells: given and not ended; the first is measured.
    """

    lives = True
    waits = True  # for other cells after its own
    elsewhere = True  # on another machine, whose files may be others

    def __init__(self, part: Part, output: IO[bytes]) -> None:
        self.part, self.output = part, output
        self.cells: deque[Cell] = deque()
        self._pending = b""
        self._runs = False  # it has said something: its handlers are there
        self._began: float | None = None  # monotonic seconds of the first word on the cell that is measured

    def give(self, cells: deque[Cell]) -> None:
        """Give it cells, to measure one after another. Raises PartError."""
        self.cells = cells
        self._send(json.dumps([self._arguments(cell) for cell in cells]).encode() + b"\n")

    def _arguments(self, cell: Cell) -> dict[str, Any]:
        return {
            "spec": spec_to_json(cell.spec),
            "spec_hash": cell.spec.hash if self.elsewhere else None,
            "runner": asdict(cell.runner),
            "folder": str(self._folder(cell)),
            "sweep_id": cell.sweep_id,
            "overrides": cell.overrides,
            "config_dir": str(cell.config_dir) if cell.config_dir else None,
            "lane": cell.lane,
            "beside": self.part.beside,
            "facts": self.part.facts,
        }

    def read(self, stopping: bool) -> list[tuple[Cell, Path, RunRecord]]:
        """Pass on what has come. Returns the cells that have ended, however they did, with their folders and records.

        stopping: the command ends, and has sent the place a signal.
        """
        if not (chunk := os.read(self.output.fileno(), 65536)):
            self.lives = False
            if not self.cells:  # a signal came after its last one had ended
                return []
            before = "the cell ran" if self._began is None else "the record of the cell came"
            stopped = Outcome(Status.INTERRUPTED, f"a signal ended the command before {before}")
            return [self._lost(stopped if stopping else Outcome(Status.KILLED, f"{self._how()}; run it again"))]
        self._runs = True
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        return [ended for line in lines if (ended := self._take(json.loads(line), stopping)) is not None]

    def _take(self, event: Event, stopping: bool) -> tuple[Cell, Path, RunRecord] | None:
        """Pass a message on, or return the cell that it ends."""
        if "failed" in event:
            return self._lost(Outcome(Status.ERROR, event["failed"]))
        if "done" not in event:
            self._began = self._began or time.monotonic()
            self.cells[0].on_event(event)
            return None
        if event["signal"]:
            self.lives = False
        folder = self._bring(Path(event["done"]))
        record = records.load(folder / RECORD_FILE)
        if record.status is Status.INTERRUPTED and not stopping:  # the command goes on
            how = f"{signal.Signals(event['signal']).name} ended the process that measured it{self._where()}"
            record.status, record.error = Status.KILLED, f"{how}; run it again"
            records.save(record, folder)
        self._began = None
        return self.cells.popleft(), folder, record

    def _lost(self, outcome: Outcome) -> tuple[Cell, Path, RunRecord]:
        cell, ran_s = self.cells.popleft(), time.monotonic() - self._began if self._began is not None else 0.0
        self._began = None
        known = (cell.spec, cell.folder, cell.sweep_id, cell.overrides)
        return cell, *lost(*known, outcome, self.part.machine, ran_s)

    def signal(self, number: int) -> None:
        """Send it a signal: while it starts, one that ends it without a word."""
        self._signal(number if self._runs else signal.SIGKILL)

    def _folder(self, cell: Cell) -> Path:
        """Return the folder that the process writes into."""
        return cell.folder.absolute()

    def _bring(self, folder: Path) -> Path:
        """Return the folder here with what the process wrote for its cell into a folder.

        It waits for no other machine, because signals are put off meanwhile.
        """
        return folder

    @abstractmethod
    def _send(self, line: bytes) -> None:
        """Write a line to its standard input. Where it has ended, `read` says so."""

    @abstractmethod
    def _signal(self, number: int) -> None:
        """Send it a signal. SIGKILL ends its output, also where it cannot be reached."""

    @abstractmethod
    def _how(self) -> str:
        """Return in words how it ended, after the end of its output."""

    @abstractmethod
    def _where(self) -> str:
        """Return in words where it is, as " on cores 0 to 3"."""

    def close(self) -> None:
        """End it, if it lives."""
        self.output.close()


class Places:
    """The places of a command. The parent of all of them, on one thread. say: takes a line on a part that is lost."""

    def __init__(self, parts: Sequence[Part], say: Callable[[str], None]) -> None:
        self._parts, self._say = list(parts), say
        self._free = list(parts)
        self._busy: list[Place] = []
        self._idle: list[Place] = []
        self._waiting: deque[deque[Cell]] = deque()  # cells that one place measures one after another
        self._stopping = self._ending = False

    def give(self, cells: Sequence[Cell]) -> None:
        """Start cells, one after another, on a free place. Waits for one, and passes on what the others report.

        Raises CommandError where no place is left.
        """
        self._waiting.append(deque(cells))
        self._fill()
        while self._waiting:
            self._serve()

    def _fill(self) -> None:
        """Let free parts measure the cells that wait."""
        while self._waiting and self._free:
            part = self._part_for(self._waiting[0])
            self._free.remove(part)
            try:
                place = next((place for place in self._idle if place.part is part), None)
                if place is not None:
                    self._idle.remove(place)
                else:
                    place = part.start()
                with deferred():  # a job that is submitted is known, and a signal ends it
                    place.give(self._waiting[0])
                    self._waiting.popleft()
                    self._busy.append(place)
            except PartError as e:
                self._parts.remove(part)
                if not self._parts:
                    raise CommandError(f"{e}, and no other place is left", 1) from None
                self._say(f"{e}; places left: {len(self._parts)}")

    def _part_for(self, cells: Sequence[Cell]) -> Part:
        """Return the free part for cells: one whose place may have kept their engine, else any."""
        if not cells[0].runner.keep_engine:
            return self._free[0]
        key = engine_key(cells[0].spec)
        part = next((part for part in self._free if part.engine == key), self._free[0])
        part.engine = key
        return part

    def settle(self) -> None:
        """Wait until every cell has ended. The places wait for others."""
        while self._busy:
            self._serve()

    def wait(self) -> None:
        """Wait until every cell has ended. Places for which there is no cell are given back."""
        self._ending = True
        self._close_idle()
        self.settle()

    def interrupt(self, number: int) -> None:
        """Send a signal to every cell that runs, and take their records. Places that do not end in time are killed."""
        self._stopping = True
        self._waiting.clear()
        for place in self._busy:
            place.signal(number)
        end = time.monotonic() + END_S
        while self._busy and time.monotonic() < end:
            self._serve(end)
        for place in self._busy:
            place.signal(signal.SIGKILL)
        while self._busy:
            self._serve()

    @property
    def busy(self) -> bool:
        """True if a cell runs."""
        return bool(self._busy)

    def close(self) -> None:
        """End the idle places."""
        self._close_idle()
        for part in self._parts:
            part.close()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _serve(self, end: float | None = None) -> None:
        """Wait for messages, up to `end` (monotonic seconds), and pass them on."""
        with selectors.DefaultSelector() as ready:
            for place in self._busy:
                ready.register(place.output, selectors.EVENT_READ, place)
            for key, _ in ready.select(None if end is None else max(end - time.monotonic(), 0.0)):
                self._read(key.data)

    def _read(self, place: Place) -> None:
        """Take what a place has said, and give its part other cells once it has none."""
        with deferred():  # what has ended is in no other list, and its place does not say so again
            ended = place.read(self._stopping)
            for cell, folder, record in ended:
                cell.on_end(folder, record)
        if not (place.cells and place.lives):
            self._release(place)
            self._fill()

    def _release(self, place: Place) -> None:
        """Take a place whose cells have ended, or that has."""
        self._busy.remove(place)
        self._free.append(place.part)
        if place.cells and not self._stopping:
            self._waiting.appendleft(place.cells)
        if place.lives and place.waits and not self._ending:
            self._idle.append(place)
        else:
            place.close()


@dataclass(frozen=True)
class Share:
    """Cores and GPUs of a place of this machine. gpu: as in CUDA_VISIBLE_DEVICES; None: cells see none."""

    cores: tuple[int, ...]
    gpu: str | None = None


class LocalPart(Part):
    """A part of this machine. beside: other parts."""

    def __init__(self, share: Share, beside: int = 0) -> None:
        super().__init__({"cpu_cores": len(share.cores)}, beside, {})
        self.share = share

    def start(self) -> Place:
        return _LocalPlace(self)


def local_parts(parallel: str, each: int = 1) -> list[Part]:
    """Return the parts of this machine for `runner.parallel`. each: GPUs. Raises ConfigError if there are too few."""
    found = shares(parallel, each)
    return [LocalPart(share, len(found) - 1) for share in found]


def shares(parallel: str, each: int = 1) -> list[Share]:
    """Return what each place of this machine has. each: GPUs of a place. Raises ConfigError if there is too little."""
    cores, there = cores_here(), visible_gpus()
    gpus = [",".join(there[i : i + each]) for i in range(0, len(there) - each + 1, each)]
    count = places_asked(parallel, "this machine", len(gpus), len(cores), "CUDA_VISIBLE_DEVICES=", each)
    size = len(cores) // count
    return [Share(tuple(sorted(cores[i * size : (i + 1) * size])), gpus[i] if gpus else None) for i in range(count)]


def number_asked(parallel: str, allowed: str, gpus: int = 0) -> int:
    """Return the number in `runner.parallel`. gpus: what the word means; 0: it is refused. Raises ConfigError."""
    count = gpus if parallel == "gpus" else int(parallel) if parallel.isdecimal() else 0
    if not count:
        raise ConfigError(f"runner.parallel={parallel}: {allowed}")
    return count


def places_asked(parallel: str, where: str, gpus: int, cores: int | None, hides: str, each: int = 1) -> int:
    """Return the number of places that `runner.parallel` asks for. Raises ConfigError if there is too little.

    where: the machine or cluster, in words. gpus, cores: what it has; None: they do not limit. hides: what hides GPUs.
    each: GPUs that each of `gpus` stands for.
    """
    if parallel == "gpus" and not gpus:
        raise ConfigError(
            f"runner.parallel=gpus: {where} has no GPU; runner.parallel=2 measures two cells at a time on the processor"
        )
    count = number_asked(parallel, "allowed are gpus and a number of cells from 1", gpus)
    instead = f", or {hides} hides them from cells of the processor"
    units = "GPUs" if each == 1 else f"times the {each} GPUs of a cell"
    for has, what in ((gpus or None, units), (cores, "cores")):
        if has is not None and count > has:
            raise ConfigError(
                f"runner.parallel={parallel}: {where} has {has} {what}, and cells never share one; allowed is at most "
                f"{has}{instead if what == units else ''}"
            )
    return count


def cores_here() -> list[int]:
    """Return the cores that this process may use, those of one socket and of one physical core beside each other."""

    def place(core: int) -> tuple[int, int, int]:
        folder = TOPOLOGY / f"cpu{core}" / "topology"
        try:
            socket, physical = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):
            return 0, core, core
        return socket, physical, core

    return sorted(os.sched_getaffinity(0), key=place)


class _LocalPlace(Place):
    """A process of grbench.execution.place on some cores and a GPU."""

    elsewhere = False

    def __init__(self, part: LocalPart) -> None:
        self._share = part.share
        self._process = subprocess.Popen(
            place_command(part.share.cores),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the parent passes Ctrl-C on
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": part.share.gpu} if part.share.gpu is not None else {}),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin
        super().__init__(part, self._process.stdout)

    def _send(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._input.write(line)
            self._input.flush()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _how(self) -> str:
        return f"the process that measured it{self._where()} {ended(self._process.wait())}"

    def _where(self) -> str:
        return f" on cores {self._share.cores[0]} to {self._share.cores[-1]}"

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()
        super().close()


def place_command(cores: Sequence[int]) -> list[str]:
    """Return the command of a place on these cores."""
    return [sys.executable, "-m", "grbench.execution.place", ",".join(map(str, cores))]


def ended(code: int) -> str:
    """Return in words how a process ended, from its exit code."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def pipe(chunks: Iterable[bytes]) -> IO[bytes]:
    """Return a pipe that a thread fills with these chunks, and that ends with them."""
    read, write = os.pipe()

    def fill() -> None:
        with open(write, "wb", buffering=0) as full, contextlib.suppress(BrokenPipeError):  # noqa: PTH123
            for chunk in chunks:
                full.write(chunk)

    threading.Thread(target=fill, daemon=True).start()
    return open(read, "rb", buffering=0)  # noqa: PTH123
