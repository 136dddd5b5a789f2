"""Work of a cell, its offered load and its strategy: which cells compare, and which are repeats."""

from __future__ import annotations

import json

from grbench.execution.environment import machine_of
from grbench.execution.records import RunRecord
from grbench.report.cells import flatten, shown

LOADS = {  # scenario: the option of its offered load, and the unit
    "server": ("target_qps", "requests/s"),
    "trace_replay": ("mean_qps", "requests/s"),
    "closed_loop": ("clients", "clients"),
    "multi_stream": ("samples_per_query", "requests per query"),
    "single_stream": ("", ""),
}


def scenario_of(record: RunRecord) -> str:
    """Return the name of the record's scenario."""
    return str(record.spec["scenario"]["name"])


def unit_of(record: RunRecord) -> str:
    """Return the unit of the offered load."""
    return LOADS[scenario_of(record)][1]


def offered_load(record: RunRecord) -> float | None:
    """Return the load that the scenario asks for, in `unit_of`, or None if it asks for none."""
    option, _ = LOADS.get(scenario_of(record), ("", ""))
    value = record.spec["scenario"].get(option) if option else None
    return float(value) if value is not None else None


def work_of(record: RunRecord) -> str:
    """Return a key that is equal for comparable cells."""
    spec = record.spec
    retrieval = spec.get("retrieval") or {}
    work = [
        spec.get("task"),
        spec.get("workload"),
        retrieval.get("k"),
        scenario_of(record),
        spec.get("latency_limit_ms"),
    ]
    return json.dumps([work, machine_of(record.environment)], sort_keys=True)


def strategy_of(record: RunRecord) -> str:
    """Return a key that is equal for repeats of one strategy at any load: all options, the commit and the device."""
    option = LOADS.get(scenario_of(record), ("", ""))[0]
    leaves = {k: shown(v) for k, v in flatten(record.spec).items() if k not in ("seed", f"scenario.{option}")}
    return json.dumps([leaves, record.environment.get("git_sha"), record.actual.get("device")], sort_keys=True)
