"""The further ranks of an engine whose model is split over devices: processes that follow this one, rank 0.

Rank 0 packs batches, keeps the cache and answers. Before it launches a batch, it sends the others the name of the call
by a pipe, and the packed inputs by one broadcast from its device. They launch the same, and answer nothing.

A rank that ends or fails ends the engine: what waits for it is aborted, and `check` raises the reason.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grengines.api import UnavailableError
from grengines.runtime.group import Group

# By name: each takes the inputs on its device, and further arguments. "close" takes none, and ends the rank's part.
Calls = Mapping[str, Callable[..., object]]
START_S = 300.0  # for the ranks to load the model
END_S = 10.0  # for a rank to end
PEER_S = 2.0  # for the end of a rank to be noticed after a collective has failed


class Alone:
    """The team of an engine in one process."""

    size = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def call(self, name: str, inputs: Sequence[Any], **arguments: Any) -> Iterator[list[Any]]:
        """Yield the inputs (grengines.runtime.graphs.Input) on the device, to launch a call within."""
        yield [one.to(self._device) for one in inputs]

    def ready(self) -> None:
        """Wait for other ranks."""

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Wait for other ranks within it."""
        return contextlib.nullcontext()

    def actual(self) -> dict[str, Any]:
        """Return the entries of a record."""
        return {"tensor_parallel": 1}

    def close(self, beside: Callable[[], None] = lambda: None) -> None:
        """End the other ranks, and meanwhile what `beside` ends."""
        beside()


@dataclass(frozen=True)
class Recipe:
    """Origin of a rank: what its process is sent by a pipe.

    make: a function of a module, called with the group, the device and `arguments`, which returns the calls.
    """

    rank: int
    size: int
    device: torch.device
    threads: int  # PyTorch's
    store: str  # of the group
    make: Callable[..., Calls]
    arguments: dict[str, Any]

    def group(self) -> Group:
        return Group(self.rank, self.size, self.device, self.store)


class Team:
    """Rank 0's view of `size` ranks. Arguments: of Recipe.

    collectives: whether `group` has them, or a library its own. Raises UnavailableError for fewer GPUs than ranks.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        make: Callable[..., Calls],
        arguments: dict[str, Any],
        collectives: bool = True,
    ) -> None:
        if lacking := fewer_gpus(size, device):
            raise UnavailableError(lacking)
        self.size, self._device = size, device
        self._lock, self._counting = threading.Lock(), threading.Lock()  # of what is sent, and of `_waits`
        self._lost: tuple[type[RuntimeError], str] | None = None
        self._gone, self._closing = threading.Event(), False
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._folder = tempfile.TemporaryDirectory(prefix="grbench-ranks-")
        self._ranks: dict[Connection, tuple[int, Any]] = {}  # rank and process
        self._waits = 0  # how often rank 0 waits for others at this moment
        store = str(Path(self._folder.name) / "store") if collectives else ""
        first = Recipe(0, size, device, torch.get_num_threads(), store, make, arguments)
        self._group: Group | None = None
        try:
            for rank in range(1, size):
                self._start(replace(first, rank=rank, device=device_of(device, rank)))
            threading.Thread(target=self._watch, daemon=True).start()
            with self.waiting():
                self._group = first.group()
        except BaseException:
            self.close()
            raise

    @property
    def group(self) -> Group:
        """Rank 0's group."""
        assert self._group is not None, "the team has started"
        return self._group

    @property
    def pids(self) -> list[int]:
        """The processes of the other ranks."""
        return [process.pid for _, process in self._ranks.values()]

    def _start(self, recipe: Recipe) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "grengines.runtime.follower", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        connection = Connection(ours.detach())
        self._ranks[connection] = recipe.rank, process
        connection.send(recipe)

    def ready(self) -> None:
        """Wait until every rank has its part of the model. Raises as `check`."""
        with self.waiting():
            if self._collect(START_S) is None:
                self._lose(f"a rank of engine.tensor_parallel={self.size} said nothing for {START_S:g} s")

    @contextmanager
    def call(self, name: str, inputs: Sequence[Any], **arguments: Any) -> Iterator[list[Any]]:
        """Let every rank do a call, and yield its inputs on this device, for this rank to do the same within.

        An error within leaves the others waiting in a collective, so it ends them. Raises as `check`.
        """
        try:
            with self.waiting():
                self._send((name, [replace(one, buffer=len(one.buffer)) for one in inputs], arguments))
                yield [replace(one, buffer=self._shared(one.buffer)).to(self._device) for one in inputs]
        except BaseException as e:
            if self._gone.wait(PEER_S if _of_peer(e) else 0.0):
                raise self._reason() from e
            self._lose(f"rank 0 failed: {type(e).__name__}: {e}")
            raise

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for other ranks within it. Raises as `check`, before and after."""
        with self._counting:
            self._waits += 1
        try:
            self.check()  # counted before, so that no end of a rank comes in between and goes unseen
            yield
        finally:
            with self._counting:
                self._waits -= 1
        self.check()

    def _shared(self, buffer: Tensor) -> Tensor:
        """Copy a buffer to this device and from there to those of the other ranks."""
        return self.group.first_(buffer.to(self._device, non_blocking=True))

    def check(self) -> None:
        """Raise RuntimeError, or PyTorch's OutOfMemoryError, with the reason if a rank has gone."""
        if self._gone.is_set():
            raise self._reason()

    def actual(self) -> dict[str, Any]:
        """Return the entries of a record. rank_memory_mib: the most memory of each rank but the first so far.

        It is left out if a rank has gone, or computes for END_S.
        """
        facts: dict[str, Any] = {"tensor_parallel": self.size, "parallel_backend": self.group.backend}
        with contextlib.suppress(RuntimeError, OSError):
            self.check()
            while not self._answers.empty():  # too late for an earlier call
                self._answers.get()
            self._send(("memory", [], {}))
            if (memory := self._collect(END_S)) is not None:
                facts["rank_memory_mib"] = memory
        return facts

    def close(self, beside: Callable[[], None] = lambda: None) -> None:
        """End the other ranks. A second call does nothing.

        beside: ends this rank's part meanwhile, since libraries that have collectives end them together. If a rank is
        lost, it may wait for ever, and then this process ends as in a call.
        """
        alone, healthy = threading.Timer(END_S, self.end_process), not self._gone.is_set()
        if not healthy and not self._closing:
            alone.start()
        self._closing = True
        with contextlib.suppress(OSError):
            self._send(None)
        try:
            beside()
        finally:
            alone.cancel()
        end = time.monotonic() + END_S
        for _, process in self._ranks.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.0))
        self._kill()
        self._gone.wait(END_S if self._ranks else 0.0)
        for connection in self._ranks:
            connection.close()
        self._ranks.clear()
        if self._group is not None and healthy:
            abort = threading.Thread(target=self._group.abort, daemon=True)
            abort.start()
            abort.join(END_S)  # as in `_lose`, something may keep it from ending
        self._folder.cleanup()

    def _send(self, message: object) -> None:
        with self._lock:
            for connection in self._ranks:
                connection.send(message)

    def _collect(self, seconds: float) -> list[Any] | None:
        """Return what each rank says next, or None if one says nothing for so long. Raises as `check`."""
        end = time.monotonic() + seconds
        said: list[Any] = []
        while len(said) < self.size - 1:
            self.check()
            try:
                said.append(self._answers.get(timeout=0.1))
            except queue.Empty:
                if time.monotonic() > end:
                    return None
        return said

    def _watch(self) -> None:
        """Take what the ranks say, until one has gone."""
        while True:
            for ready in wait(list(self._ranks)):
                assert isinstance(ready, Connection)
                rank, process = self._ranks[ready]
                try:
                    kind, value = ready.recv()
                except (EOFError, OSError):
                    kind, value = "ended", None
                if kind == "answer":
                    self._answers.put(value)
                    continue
                if kind == "ended":
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(END_S)
                    value = _how(process.returncode), False
                words, memory = value
                self._lose(f"rank {rank} of engine.tensor_parallel={self.size} {words}", memory)
                self._end_waiting()
                return

    def _lose(self, reason: str, memory: bool = False) -> None:
        """Take the team as lost, and free whoever waits for a rank. memory: the rank's device had no memory left."""
        self._lost = self._lost or (torch.OutOfMemoryError if memory else RuntimeError, reason)
        self._gone.set()
        if not self._closing:
            self._kill()
            if self._group is not None:  # graphs that hold collectives may keep it from ending
                threading.Thread(target=self._group.abort, daemon=True).start()

    def _end_waiting(self) -> None:
        """End this process, with the reason as the last line of its log, if nothing frees it from a collective."""
        end = time.monotonic() + END_S
        while self._waits and not self._closing:
            if time.monotonic() > end:
                self.end_process()
            time.sleep(0.05)

    def end_process(self) -> None:
        """End this process with the reason."""
        print(f"grbench: {self._reason()}", file=sys.stderr, flush=True)
        os._exit(1)

    def _reason(self) -> RuntimeError:
        assert self._lost is not None
        kind, reason = self._lost
        return kind(reason)

    def _kill(self) -> None:
        for _, process in list(self._ranks.values()):  # another thread may close the team
            process.kill()


def device_of(first: torch.device, rank: int) -> torch.device:
    """Return the device of a rank: the GPU that many after the first."""
    return torch.device("cuda", (first.index or 0) + rank) if first.type == "cuda" else first


def fewer_gpus(size: int, device: torch.device, asked: str = "engine.tensor_parallel") -> str | None:
    """Return None, or that there are fewer GPUs from the engine's on than an option asks for."""
    there = torch.cuda.device_count() - (device.index or 0) if device.type == "cuda" else size
    if there >= size:
        return None
    return f"{asked}={size}: PyTorch sees {there} of these GPUs; set it to at most {there}"


def _of_peer(error: BaseException) -> bool:
    """Return whether an error may come from the end of another rank."""
    return isinstance(error, OSError | RuntimeError) and not isinstance(error, torch.OutOfMemoryError)


def _how(code: int | None) -> str:
    """Return in words how a process ended."""
    if code is None:
        return "closed its pipe"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
