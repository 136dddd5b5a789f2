"""The load that others put on the machine: exact from files of a made-up /proc, and one real process tree."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grbench.execution import gpu, load
from grbench.execution.load import MEASURING, LoadWatch, with_load
from grbench.execution.stats import latency_summary

CORES = {1, 3}
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write /proc as it is at a time: seconds of the worker (process 7), its child (8) and both cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: CORES)
    monkeypatch.setattr(os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))

    def process(number: int, seconds: float, children: str) -> None:
        task = tmp_path / f"{number}" / "task" / f"{number}"
        task.mkdir(parents=True, exist_ok=True)
        (task / "children").write_text(children)
        ticks = round(seconds * TICKS)
        (tmp_path / f"{number}" / "stat").write_text(f"{number} (a) name) S {'0 ' * 10}{ticks} 0 0 0 20 0 1 0")

    def write(now: float, *, worker: float, child: float, cores: tuple[float, float]) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: now)
        process(7, worker, "8 ")
        process(8, child, "")
        lines = ["cpu  999999 0 0 0 0 0 0 0 0 0", "cpu0 999999 0 0 0 0 0 0 0 0 0"]  # core 0 is not ours
        for core, seconds in zip(sorted(CORES), cores, strict=True):
            third = round(seconds * TICKS / 2)
            lines.append(f"cpu{core} {third} 0 0 5000 70 0 0 {third} 0 0")  # steal counts, idle and iowait do not
        (tmp_path / "stat").write_text("\n".join([*lines, "intr 1 2 3"]))

    return write


def test_what_others_take_is_what_the_own_tree_does_not(tmp_path: Path, at: Callable[..., None]) -> None:
    watch = LoadWatch(7, proc=tmp_path)
    at(0.0, worker=5, child=1, cores=(50, 50))
    watch.see("loading the workload")
    watch.see(MEASURING)
    at(1.0, worker=5.5, child=1.5, cores=(51, 50))  # all of it our own
    watch.see(None)
    at(2.0, worker=6.0, child=1.5, cores=(52, 50.5))  # one core for a second
    watch.see(None)
    at(4.0, worker=8.0, child=1.5, cores=(54, 50.5))
    watch.see("writing")
    at(5.0, worker=8.0, child=1.5, cores=(55, 51.5))  # after the measurement
    watch.see(None)
    assert watch.metrics("cpu") == pytest.approx({"others/cores": 0.25, "others/cores_peak": 1.0})
    assert watch.notes("cpu") == [
        "other processes used 0.25 of 2 cores while this was measured, up to 1 at a time "
        "(noted above 5%, at a time 25%): measure again on an idle machine"
    ]


def test_a_note_of_a_lacking_interval_names_the_load_beside_it() -> None:
    latencies = np.repeat(np.arange(1.0, 21.0), 100)  # they wait alike
    notes = latency_summary(latencies, arrivals_s=np.arange(len(latencies))).notes
    lacks = [i for i, note in enumerate(notes) if "p99 has no 95% interval" in note]
    assert lacks and with_load(notes, []) == notes
    *beside, last = with_load(notes, ["other processes used the cores"])
    assert last == "other processes used the cores" and len(beside) == len(notes)
    assert all(", the more beside other work on the machine; about " in beside[i] for i in lacks)


def test_an_idle_machine_has_no_note(tmp_path: Path, at: Callable[..., None]) -> None:
    watch = LoadWatch(7, proc=tmp_path)
    at(0.0, worker=0, child=0, cores=(0, 0))
    watch.see(MEASURING)
    at(10.0, worker=12, child=6, cores=(10, 8.5))
    watch.see("writing")
    assert watch.metrics("cpu") == pytest.approx({"others/cores": 0.05, "others/cores_peak": 0.05})
    assert watch.notes("cpu") == []


@pytest.mark.parametrize("damage", ["stat", "7/stat"])
def test_where_the_system_has_no_such_files_nothing_is_claimed(
    tmp_path: Path, at: Callable[..., None], damage: str
) -> None:
    watch = LoadWatch(7, proc=tmp_path)
    at(0.0, worker=0, child=0, cores=(0, 0))
    (tmp_path / damage).unlink()
    watch.see(MEASURING)
    watch.see("writing")
    assert watch.metrics("cpu") == {}
    assert watch.notes("cpu") == []


def test_a_real_tree_counts_its_children() -> None:
    burn = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); input()"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE) as process:
        watch, deadline = LoadWatch(process.pid), time.monotonic() + 60
        while watch._trees_s() < 0.4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 0.4 <= watch._trees_s() < 5
        process.communicate(b"\n")


SERVER = """
import socket, sys, time
with socket.create_server(("127.0.0.1", 0)) as one:
    while time.process_time() < 0.4: pass
    print(one.getsockname()[1], flush=True)
    input()
"""


def test_a_server_of_this_machine_that_is_measured_is_no_other_process() -> None:
    def seconds(worker: int, url: str) -> float:
        return LoadWatch(worker, urls=[url])._trees_s()

    idle = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server,
        subprocess.Popen(idle, stdin=subprocess.PIPE) as worker,
    ):
        assert server.stdout is not None
        port = int(server.stdout.readline())
        elsewhere, here = "http://192.0.2.1:8000", f"http://localhost:{port}"
        assert seconds(worker.pid, here) > seconds(worker.pid, elsewhere) + 0.3
        assert seconds(server.pid, here) < seconds(server.pid, elsewhere) + 0.1  # a process counts once
        server.communicate(b"\n")
        worker.communicate(b"\n")


@pytest.mark.parametrize(
    ("url", "port"), [("http://127.0.0.1:8000", "1F40"), ("http://localhost", "0050"), ("https://localhost/", "01BB")]
)
def test_a_server_that_began_a_container_is_found(tmp_path: Path, at: Callable[..., None], url: str, port: str) -> None:
    """Its parent has number 0, which is no process. A URL without a port has the one of its scheme."""
    at(0.0, worker=0, child=0, cores=(0, 0))
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(f"head\n 0: 0100007F:{port} 00000000:0000 0A 0:0 0:0 0 0 0 4242 1\n")
    (tmp_path / "1" / "fd").mkdir(parents=True)
    (tmp_path / "1" / "fd" / "3").symlink_to("socket:[4242]")
    (tmp_path / "1" / "stat").write_text("1 (grbench) S 0 " + "0 " * 40)
    assert LoadWatch(7, urls=[url], proc=tmp_path)._own == [7, 1]


def test_a_server_whose_process_is_not_seen_is_named_in_the_note(tmp_path: Path, at: Callable[..., None]) -> None:
    watch = LoadWatch(7, urls=["http://127.0.0.1:8000"], proc=tmp_path)
    at(0.0, worker=0, child=0, cores=(0, 0))
    watch.see(MEASURING)
    at(1.0, worker=0, child=0, cores=(1, 0))
    watch.see("writing")
    [note] = watch.notes("cpu")
    assert note.startswith("other processes, among them perhaps the server at http://127.0.0.1:8000, used 1 of 2 cores")


def test_nvml_is_not_asked_for_the_use_of_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library ends the process by a segmentation fault then."""
    asked: list[Any] = []
    card = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: asked.append(handle) or [],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=3),
    )

    @contextmanager
    def nvml() -> Iterator[Any]:
        yield card

    monkeypatch.setattr(gpu, "_nvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.gpu_use() is None and asked == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpu.gpu_use() == gpu.GpuUse(0, 3.0) and asked == [0]


def test_use_of_the_gpu_by_others_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: ["a process"],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=next(busy)),
    )

    @contextmanager
    def nvml(found: Any) -> Iterator[Any]:
        yield found

    monkeypatch.setattr(gpu, "_nvml", lambda: nvml(None))
    assert load.gpu_in_use() is None
    monkeypatch.setattr(gpu, "_nvml", lambda: nvml(card))
    busy = iter([90, 40])
    monkeypatch.setattr(load, "GPU_PERIOD_S", 0.0)
    watch = LoadWatch(os.getpid(), load.gpu_in_use())
    assert watch.metrics("cuda") == {"others/gpu_processes": 1.0, "others/gpu_percent": 40.0}
    [note] = watch.notes("cuda")
    assert note.startswith(
        "before this cell used the GPU, it was busy for 40% of the time, with 1 processes of others on it"
    )
    assert watch.metrics("cpu") == {}


@pytest.mark.parametrize(
    ("visible", "card"),
    [(None, 0), ("2,0", 2), ("1", 1), ("GPU-b", 1), ("GPU-c2,GPU-a", 2), ("MIG-7", "MIG-7"), ("", None), ("-1", None)],
)
def test_the_gpu_is_the_first_visible_one(monkeypatch: pytest.MonkeyPatch, visible: str | None, card: object) -> None:
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUUID=lambda index: ["GPU-a0", "GPU-b1", "GPU-c2"][index],
    )
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu._used_by_engines(nvml) == card
