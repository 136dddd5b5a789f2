"""Pauses of the garbage collector: they fall outside of what is measured, and a server leaves its start out of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Grbench
from helpers.serving import TINY, serving

from grbench import scenarios
from grbench.execution import records
from grbench.execution.heap import leave_out, settle


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


def test_a_server_settles_before_it_is_ready() -> None:
    gc.unfreeze()
    with serving("engine=hstu", *TINY):
        assert gc.get_freeze_count() > 100_000
