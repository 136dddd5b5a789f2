"""Places on a cluster of Ray: each is an actor with a process of grbench.execution.place.

A place has a GPU of its node, or in a cluster without GPUs a share of the processors, and cores that no other place of
the command has. All places have equally many, whatever their nodes have, because their cells are compared. Nodes have
this code and the same packages. Their file systems may be others: then the folder of a cell that has ended is sent
here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grbench.config.schema import ConfigError
from grbench.execution import folders, records
from grbench.execution.environment import describe_environment
from grbench.execution.places import (
    Cell,
    Part,
    PartError,
    Place,
    cores_here,
    ended,
    pipe,
    place_command,
    places_asked,
)
from grbench.execution.records import RECORD_FILE, one_line
from grbench.signals import ENDING

CONNECT_S = 10.0  # for the cluster to take a connection
START_S = 300.0  # for Ray to place an actor and start its process
PASSED_ON = ("GRBENCH_", "OMP_", "TRITON_")  # variables of the command that its places have too
MACHINE = ("cpu", "cpu_cores", "memory_gib", "system", "gpus")  # what nodes may differ in
FIX = (
    "start one with `RAY_AUTH_MODE=token ray start --head`, add machines with `RAY_AUTH_MODE=token ray start "
    "--address=HOST:6379`, or set RAY_ADDRESS"
)


class Remote:
    """A process of grbench.execution.place on a node. Ray runs its methods there, several at a time.

    number, size: which of the node's cores it has, and how many. marker: a file of the command; where it is not seen,
    cells are written into a temporary folder of the name `spare`.
    """

    def __init__(self, number: int, size: int, marker: str, spare: str, folder: str, variables: dict[str, str]) -> None:
        self._cores = sorted(cores_here()[number * size : (number + 1) * size])
        self._spare = None if Path(marker).exists() else str(Path(tempfile.gettempdir(), spare))
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # Ray has set it
        paths = os.pathsep.join(filter(None, sys.path))  # Ray adds those of the command
        self._process = subprocess.Popen(
            place_command(self._cores),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd=folder if Path(folder).is_dir() else None,
            env={**own, **variables, "PYTHONPATH": paths},
        )

    def facts(self) -> dict[str, Any]:
        """Return where it is: host, environment, cores, its own folder where the command's files are not."""
        environment = describe_environment() | {"cpu_cores": len(self._cores)}
        return {"host": platform.node(), "environment": environment, "cores": self._cores, "spare": self._spare}

    def send(self, line: bytes) -> None:
        """Write to its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `read` says so
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def read(self) -> bytes:
        """Wait for what it says; nothing: it has ended."""
        assert self._process.stdout is not None
        return os.read(self._process.stdout.fileno(), 65536)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def how(self) -> str:
        """Return in words how it ended."""
        return ended(self._process.wait())

    def pack(self, folder: str) -> bytes:
        """Return a folder as a tar file."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(folder, ".")
        return packed.getvalue()

    def remove(self, folder: str) -> None:
        """Remove a folder."""
        shutil.rmtree(folder)

    def end(self, kill: bool) -> None:
        """Wait until it has ended, since no cell comes any more. kill: end it at once."""
        assert self._process.stdin is not None
        if kill:
            self._process.kill()
        self._process.stdin.close()
        self._process.wait()
        if self._spare:
            shutil.rmtree(self._spare, ignore_errors=True)


class RayPart(Part):
    """A GPU of a node, or a share of its processors. Its first place starts at once.

    beside: other parts of the node. number, size, marker: see Remote.
    """

    def __init__(self, ray: Any, node: dict[str, Any], beside: int, number: int, size: int, marker: Path) -> None:
        super().__init__({}, beside, {})
        self.ray, self.host, self._marker = ray, node["NodeManagerHostname"], marker
        resources = node["Resources"]
        pin = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        self._actor = ray.remote(Remote).options(
            num_cpus=min(size, int(resources.get("CPU", 0))),
            num_gpus=1 if resources.get("GPU") else 0,
            scheduling_strategy=pin,
            max_concurrency=4,  # a call waits for what the process says
        )
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        self._arguments = (f"grbench-{uuid.uuid4().hex}", str(Path.cwd()), variables)
        self._number, self._size = number, size
        self._first: Any = self._new()

    def _new(self) -> Any:
        return self._actor.remote(self._number, self._size, str(self._marker), *self._arguments)

    @cached_property
    def known(self) -> dict[str, Any]:
        """Answer of its first place: see Remote.facts. Raises PartError."""
        return self._ask(self._first)

    def check(self) -> None:
        """Learn what machine it is. Raises ConfigError for a node that cannot measure what is asked for here."""
        try:
            there, here = self.known["environment"], describe_environment()
        except PartError as e:
            raise ConfigError(f"runner.cluster=ray: {e}") from None
        for name in ("code", "python", "versions"):
            if there[name] != here[name]:
                raise ConfigError(
                    f"runner.cluster=ray: {self.host} has {name} {there[name]}, and here it is {here[name]}; install "
                    "the same code and packages there"
                )
        if (found := len(self.known["cores"])) < self._size:
            raise ConfigError(
                f"runner.cluster=ray: {self.host}: a cell needs {self._size} cores, and {found} are available, "
                "because Ray counts more processors or GPUs there; use a smaller runner.parallel, or start Ray there "
                "with --num-cpus=CORES"
            )
        self.machine = {name: there[name] for name in MACHINE} | {"host": self.known["host"]}
        self.facts = {"host": self.known["host"]}
        if self.known["spare"] is None:
            self._marker = Path("/")  # the marker is removed, and later places find this one

    def _ask(self, actor: Any) -> dict[str, Any]:
        errors = self.ray.exceptions
        try:
            found: dict[str, Any] = self.ray.get(actor.facts.remote(), timeout=START_S)
        except errors.GetTimeoutError:
            raise PartError(
                f"no place has started on {self.host} within {START_S:g} s, which other work fills"
            ) from None
        except errors.RayError as e:
            raise PartError(f"no place starts on {self.host}: {one_line(e, keep_end=True)}") from None
        return found

    def start(self) -> Place:
        actor, self._first = self._first or self._new(), None
        return _RayPlace(self, actor, self._ask(actor))

    def close(self) -> None:
        self.ray.shutdown()


def ray_parts(parallel: str, root: Path) -> list[Part]:
    """Return the parts of a cluster for `runner.parallel`. root: output root. Raises ConfigError."""
    if find_spec("ray") is None:
        raise ConfigError("runner.cluster=ray: package ray is not installed; pip install 'grbench[ray]'")
    ray = _joined()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=root, prefix=".grbench-") as marker:
        counts, size = _counts(parallel, [n["Resources"] for n in nodes])
        parts = [
            RayPart(ray, node, count - 1, number, size, Path(marker.name))
            for node, count in zip(nodes, counts, strict=True)
            for number in range(count)
        ]
        for part in parts:
            part.check()
    return list(parts)


def _joined() -> Any:
    """Return Ray, connected to a cluster that runs. Raises ConfigError."""
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local":
        raise ConfigError(f"RAY_ADDRESS=local: Ray would start here and listen on every network; {FIX}")
    if answers := re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d+)", address):  # Ray would try for minutes
        try:
            socket.create_connection((answers[1], int(answers[2])), CONNECT_S).close()
        except OSError as e:
            raise _nobody_at(address, e) from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = importlib.import_module("ray")
    importlib.import_module("ray.util.scheduling_strategies")
    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        raise _nobody_at(address, e) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():  # Ray has handlers of its own
                signal.signal(number, handler)
    return ray


def _nobody_at(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"runner.cluster=ray: no cluster answers at RAY_ADDRESS={address} ({one_line(error, keep_end=True)}); {FIX}"
    )


def _counts(parallel: str, nodes: Sequence[dict[str, float]]) -> tuple[list[int], int]:
    """Return how many places each node has, given its resources, and how many cores each has. Raises ConfigError."""
    gpus, cpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
    room = gpus if any(gpus) else cpus
    cores = None if any(gpus) else sum(room)
    wanted = places_asked(parallel, "the Ray cluster", sum(gpus), cores, "`ray start --num-gpus=0`")
    return spread(wanted, room, cpus)


def spread(wanted: int, room: Sequence[int], cpus: Sequence[int]) -> tuple[list[int], int]:
    """Return how many of `wanted` processes each node has, and how many cores each of them has.

    room: the most that each node can have. One goes where it has the most cores, so the fewest are as many as can be,
    and all have that many.
    """
    counts = [0] * len(room)
    for _ in range(wanted):
        counts[max(range(len(room)), key=lambda i: (room[i] > counts[i], cpus[i] // (counts[i] + 1)))] += 1
    return counts, max(min(cpu // count for cpu, count in zip(cpus, counts, strict=True) if count), 1)


class _RayPlace(Place):
    def __init__(self, part: RayPart, actor: Any, known: dict[str, Any]) -> None:
        self._ray, self._actor, self._host, self._cores = part.ray, actor, known["host"], known["cores"]
        self._spare = Path(known["spare"]) if known["spare"] else None
        self._why = ""
        self._packed: deque[bytes] = deque()  # folders of cells that have ended
        super().__init__(part, pipe(self._said()))

    def _said(self) -> Iterator[bytes]:
        """Yield its messages. The folder of a cell comes before the message that the cell has ended.

        A thread calls this, so that a node that does not answer keeps no signal from the command.
        """
        begun = b""
        try:
            while chunk := self._ray.get(self._actor.read.remote()):
                *lines, begun = (begun + chunk).split(b"\n")
                for line in lines:
                    if self._spare is not None and (folder := json.loads(line).get("done")):
                        self._packed.append(self._ray.get(self._actor.pack.remote(folder)))
                    yield line + b"\n"
            self._why = self._ray.get(self._actor.how.remote())
        except self._ray.exceptions.RayError as e:
            self._why = f"was lost ({one_line(e, keep_end=True)})"

    def _send(self, line: bytes) -> None:
        self._actor.send.remote(line)

    def _signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            with contextlib.suppress(self._ray.exceptions.RayError):  # the node may be lost
                self._ray.get(self._actor.end.remote(True), timeout=CONNECT_S)
            self._ray.kill(self._actor)
        else:
            self._actor.signal.remote(number)

    def _how(self) -> str:
        return f"the process that measured it{self._where()} {self._why}"

    def _where(self) -> str:
        return f" on {self._host}, cores {self._cores[0]} to {self._cores[-1]},"

    def _folder(self, cell: Cell) -> Path:
        return self._spare / cell.folder.name if self._spare else super()._folder(cell)

    def _bring(self, folder: Path) -> Path:
        if self._spare is None:
            return folder
        with folders.unused(self.cells[0].folder) as here:
            here = unpacked(self._packed.popleft(), here)
        self._actor.remove.remote(str(folder))
        return here

    def close(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.end.remote(False))
        self._ray.kill(self._actor)
        super().close()


def unpacked(packed: bytes, folder: Path) -> Path:
    """Unpack the folder of a cell, into a temporary folder if the disk refuses. Returns the folder that has it."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        try:
            tar.extractall(folder, filter="data")
            return folder
        except OSError as e:
            with contextlib.suppress(OSError):
                (folder / RECORD_FILE).unlink()  # the other files may lack
            spare, why = Path(tempfile.mkdtemp(prefix="grbench-")), e.strerror or e
            tar.extractall(spare, filter="data")
    record = records.load(spare / RECORD_FILE)
    record.notes.append(f"{folder} could not be written ({why}): this record is kept in {spare}")
    records.save(record, spare)
    return spare
