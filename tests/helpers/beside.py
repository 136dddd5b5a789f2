"""Cells that run beside each other in other processes, and their records."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from grbench.execution import records
from grbench.execution.records import RunRecord
from helpers.forks import Fork

QUICK = [
    "engine=hstu",
    "model=hstu_tiny",
    "workload=synthetic",
    "workload.max_requests=64",
    "workload.max_history=64",
    "scenario=closed_loop",
    "warmup_batches=1",
    "gate.requests=2",
    "tracking=none",
]
# 20 requests a second, which leave the core to other processes.
SLOW = [*(word.replace("closed_loop", "server") for word in QUICK), "scenario.target_qps=20"]


@contextlib.contextmanager
def two_cores() -> Iterator[None]:
    """Give the processes that start meanwhile two of this one's cores."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(own)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def until(true: Callable[[], bool], process: subprocess.Popen[str] | Fork, seconds: float = 150.0) -> None:
    """Wait until something is true while a command runs."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, "the command ended"
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def found(root: Path) -> dict[int, RunRecord]:
    """The records under a folder, by the cell's number of queries."""
    return {record.spec["scenario"]["queries"]: record for _, record in records.find(root)}


def measures(said: str, cell: int) -> bool:
    """Return whether the output of a sweep says that a cell, counted from 1, is measured."""
    return any(line.startswith(f"{cell}/") and ": measuring" in line for line in said.split("\n"))
