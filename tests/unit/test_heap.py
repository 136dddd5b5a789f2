"""Pauses of the garbage collector fall outside of what is measured, and threads of a server share an arena of glibc."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Grbench
from helpers.serving import TINY, serving

from grbench import scenarios
from grbench.execution import records
from grbench.execution.heap import in_use, leave_out, settle
from grbench.serve import server, service


@pytest.fixture(autouse=True)
def frozen_as_before() -> Iterator[None]:
    """Leave the heap as the test session left it."""
    yield
    gc.freeze()


def test_what_is_alive_is_left_out() -> None:
    class Kept:
        pass

    here = Kept()
    gc.unfreeze()
    assert any(found is here for found in gc.get_objects())
    leave_out()
    assert gc.get_freeze_count() > 10_000
    assert not any(isinstance(found, Kept) for found in gc.get_objects())


def test_garbage_of_what_was_left_out_is_collected_once_it_is_settled() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    cycle: Cycle | None = Cycle()
    known = weakref.ref(cycle)
    leave_out()
    cycle = None
    gc.collect()
    assert known() is not None, "it was left out"
    settle()
    assert known() is None


@pytest.mark.usefixtures("forked_workers")
def test_a_measurement_has_no_pause_for_what_was_alive_before(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scenarios.run_scenario

    def watched(*args: Any, **options: Any) -> Any:
        measurement = run(*args, **options)
        measurement.metrics["frozen"] = float(gc.get_freeze_count())
        return measurement

    monkeypatch.setattr(scenarios, "run_scenario", watched)
    small = ["workload=synthetic", "workload.max_requests=24", "workload.max_history=32", "scenario=closed_loop"]
    small += ["scenario.queries=16", "warmup_batches=1", "gate.requests=2", "tracking=none", "model=hstu_tiny"]
    done = grbench_here("engine=hstu", *small)
    assert done.returncode == 0, done.stderr
    [(_, record)] = records.find(tmp_path)
    assert record.metrics["frozen"] > 100_000, "PyTorch's objects alone are more"


def test_a_server_settles_before_it_is_ready_shares_its_arena_and_gives_free_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared: list[int] = []
    given_back = threading.Event()
    monkeypatch.setattr(server, "share_arena", lambda: shared.append(1))
    monkeypatch.setattr(service, "give_back", given_back.set)
    monkeypatch.setattr(service, "GIVE_BACK_S", 0.01)
    gc.unfreeze()
    with serving("engine=hstu", *TINY):
        assert gc.get_freeze_count() > 100_000 and len(shared) == 1
        assert given_back.wait(20)


ARENAS = """
import ctypes, sys, threading
from grbench.execution.heap import share_arena
if sys.argv[1] == "share":
    share_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(4)
def allocate():
    libc.malloc(ctypes.c_size_t(5000))
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_share_an_arena() -> None:
    def arenas(word: str) -> int:
        done = subprocess.run([sys.executable, "-c", ARENAS, word], capture_output=True, text=True, check=True)
        return done.stdout.count("<heap nr=")

    assert arenas("share") == 1 < arenas("as it is")


FREED = """
import ctypes, psutil
from grbench.execution.heap import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(ctypes.c_size_t(50_000)) for _ in range(2000)]  # 100 MB, each below the size of a mapping
for block in blocks:
    ctypes.memset(block, 1, 50_000)
for number, block in enumerate(blocks):
    if number % 10:
        libc.free(ctypes.c_void_p(block))
before = psutil.Process().memory_info().rss
give_back()
print((before - psutil.Process().memory_info().rss) / 1e6)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps them")
def test_free_pages_between_used_ones_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 60, "of 90 MB"


@pytest.mark.skipif(in_use() is None, reason="it is glibc that counts them")
def test_what_is_allocated_is_counted_and_what_is_freed_is_not() -> None:
    before = in_use() or 0
    block = bytearray(50_000_000)
    assert 45e6 < (in_use() or 0) - before < 55e6
    del block
    assert abs((in_use() or 0) - before) < 5e6
