"""Load of the machine by other processes while a cell is measured.

A server on this machine that is measured is none of them: its work is what the cell measures.
The launcher reads the GPU before the worker starts, and the cores only when the worker reports: the worker's timing
does not notice. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from grbench.execution.gpu import GpuUse, gpu_use
from grbench.execution.stats import WAIT_ALIKE

MEASURING = "measuring"  # a stage of the worker
MOST_MEAN, MOST_PEAK = 0.05, 0.25  # shares of the cores that others may take before a note says so
MOST_GPU_PERCENT = 5.0
DISTURBED = "measure again on an idle"  # in each note of a load
BESIDE = "other processes"  # begins a note of the cores that they used
GPU_PERIOD_S = 1.0  # NVML's utilisation is that of at most so long
SHORTEST_S = 0.4  # of a reading: the kernel counts in ticks of 10 ms
PORTS = {"http": 80, "https": 443}  # of a URL without one
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reading:
    """Processor seconds up to a moment: of the cores that the worker may use, and of what is measured."""

    at_s: float
    busy_s: float
    own_s: float


def gpu_in_use() -> GpuUse | None:
    """Return the use of the GPU while no worker runs, or None where it is not known."""
    use = gpu_use()
    if use is not None and use.utilisation_percent > MOST_GPU_PERCENT:
        time.sleep(GPU_PERIOD_S)  # the worker of the cell before may be in the figure
        use = gpu_use()
    return use


class LoadWatch:
    """Watch over one worker, by its process id.

    gpu: use of the GPU before the worker started; None: not known. urls: the servers that are measured. proc: the
    process file system.
    """

    def __init__(
        self, worker: int, gpu: GpuUse | None = None, urls: Sequence[str] = (), proc: Path = Path("/proc")
    ) -> None:
        self._proc, self._urls = proc, [url for url in urls if _is_here(url)]
        found = {url: list(self._servers(url)) for url in self._urls}
        self._own = [worker, *dict.fromkeys(process for those in found.values() for process in those)]
        self._hidden = [url for url, those in found.items() if not those]
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._first: Reading | None = None
        self._last: Reading | None = None
        self._peak = 0.0
        self._ended = False
        self._gpu = gpu

    def see(self, stage: str | None) -> None:
        """Take a reading on a message of the worker. stage: the one that begins; None for mere progress."""
        if stage == MEASURING:
            self._first = self._last = self._read()
        elif self._last is not None and not self._ended:
            now = self._read()
            if now is not None and now.at_s - self._last.at_s >= SHORTEST_S:
                self._peak, self._last = max(self._peak, _others(self._last, now)), now
            self._ended = stage is not None

    def metrics(self, device: str) -> dict[str, float]:
        """Return what others used: cores during the measurement, and the GPU before the worker's engine."""
        found = {}
        if self._first is not None and self._last is not None and self._last is not self._first:
            found = {"others/cores": _others(self._first, self._last), "others/cores_peak": self._peak}
        if self._gpu is not None and device == "cuda":
            found |= {
                "others/gpu_processes": float(self._gpu.processes),
                "others/gpu_percent": self._gpu.utilisation_percent,
            }
        return found

    def notes(self, device: str) -> list[str]:
        """Return a note for each part of the machine that others used."""
        found, notes = self.metrics(device), []
        mean, peak, cores = found.get("others/cores", 0.0), found.get("others/cores_peak", 0.0), len(self._cores)
        if mean > MOST_MEAN * cores or peak > MOST_PEAK * cores:
            hidden = f", among them perhaps the server at {self._hidden[0]}," if self._hidden else ""
            notes.append(
                f"{BESIDE}{hidden} used {mean:.2g} of {cores} cores while this was measured, up to {peak:.2g} "
                f"at a time (noted above {MOST_MEAN:.0%}, at a time {MOST_PEAK:.0%}): {DISTURBED} machine"
            )
        processes, percent = found.get("others/gpu_processes", 0.0), found.get("others/gpu_percent", 0.0)
        if processes or percent > MOST_GPU_PERCENT:
            notes.append(
                f"before this cell used the GPU, it was busy for {percent:.0f}% of the time, with {processes:.0f} "
                f"processes of others on it (noted above {MOST_GPU_PERCENT:.0f}%): {DISTURBED} GPU"
            )
        return notes

    def _read(self) -> Reading | None:
        """Return a reading; None where the system has no such files or the worker has ended."""
        try:
            return Reading(time.monotonic(), self._busy_s(), self._trees_s() + sum(os.times()[:2]))
        except (OSError, ValueError, IndexError):
            return None

    def _busy_s(self) -> float:
        """Return the seconds in which the cores were busy: with processes, interrupts and the host's other guests."""
        total = 0
        for line in (self._proc / "stat").read_text().splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name != "cpu" and int(name[3:]) in self._cores:
                user, nice, system, _, _, irq, soft_irq, steal = map(int, ticks[:8])
                total += user + nice + system + irq + soft_irq + steal
        return total / _TICKS_PER_S

    def _trees_s(self) -> float:
        """Return the seconds of what is measured, of its living descendants and of those that it has waited for."""
        ticks, seen, left = 0, set(), list(self._own)
        while left:
            if (process := left.pop()) in seen:  # a server may have begun this command
                continue
            seen.add(process)
            ticks += sum(map(int, self._stat(process)[11:15]))  # utime, stime, cutime, cstime
            for task in (self._proc / str(process) / "task").iterdir():
                left += map(int, (task / "children").read_text().split())
        return ticks / _TICKS_PER_S

    def _stat(self, process: int) -> list[str]:
        """Return the fields of a process after its name, which may contain blanks."""
        return (self._proc / str(process) / "stat").read_text().rpartition(")")[2].split()

    def _servers(self, url: str) -> Iterator[int]:
        """Yield the processes that listen at a URL, as far as this user may see them.

        Of a proxy that `grbench serve` has started, that command is meant: the replicas are its children too.
        """
        parts, sockets = urlsplit(url), set()
        port = f":{parts.port or PORTS[parts.scheme]:04X}"
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in (self._proc / "net" / table).read_text().splitlines()[1:]:
                    fields = line.split()  # the fourth: 0A is a socket that listens
                    if fields[1].endswith(port) and fields[3] == "0A":
                        sockets.add(f"socket:[{fields[9]}]")
        for folder in self._proc.iterdir() if sockets else ():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and any(str(file.readlink()) in sockets for file in (folder / "fd").iterdir()):
                    parent = int(self._stat(int(folder.name))[1])
                    yield parent if self._serves(parent) else int(folder.name)

    def _serves(self, process: int) -> bool:
        """Return whether a process is a `grbench serve`."""
        try:
            words = (self._proc / str(process) / "cmdline").read_text().split("\0")
        except OSError:  # 0 is the parent of a container's first process
            return False
        return "serve" in words and any(Path(word).name == "grbench" for word in words)


def with_load(notes: Sequence[str], disturbed: Sequence[str]) -> list[str]:
    """Return the notes of a cell and those of others' load, which is also a reason why an interval lacks."""
    more = f"{WAIT_ALIKE}, the more beside other work on the machine" if disturbed else WAIT_ALIKE
    return [*(note.replace(WAIT_ALIKE, more) for note in notes), *disturbed]


def _is_here(url: str) -> bool:
    """Return whether a URL is of this machine: then a socket can have its address."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(urlsplit(url).hostname, 0, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as one:
                one.bind(address)
                return True
    return False


def _others(begin: Reading, end: Reading) -> float:
    """Return the mean number of cores that other processes kept busy between two readings."""
    return max((end.busy_s - begin.busy_s) - (end.own_s - begin.own_s), 0.0) / (end.at_s - begin.at_s)
