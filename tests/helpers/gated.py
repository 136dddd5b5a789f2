"""Cells and their parts in this process: an engine with the gate that a run would put before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import RunSpec
from grbench.execution.cell import Cell
from grbench.execution.records import Outcome
from grbench.gate import gate_for
from grengines import registry


def run_cell(folder: Path, overrides: list[str]) -> Outcome:
    """Run a cell with its gate and return what it found."""
    outcome = Outcome()
    Cell(compose_spec(overrides)[0], folder, outcome, lambda message: None).run()
    return outcome


def built(overrides: list[str]) -> tuple[RunSpec, Any, Any]:
    """A cell's specification, its prepared engine and its gate."""
    spec = compose_spec(overrides)[0]
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    engine = registry.build(spec.engine, spec.model, spec.kernel, trace.catalogue, spec.seed, spec.cache)
    engine.prepare(trace.requests, spec.scenario.max_batch)
    return spec, engine, gate_for(spec, trace, None, engine.actual())
