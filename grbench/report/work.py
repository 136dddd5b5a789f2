"""Work of a cell, its offered load and its strategy: which cells compare, and which are repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grbench.execution.environment import machine_of
from grbench.execution.records import RunRecord
from grbench.report.cells import flatten, shown
from grengines.pipeline.config import STAGES

LOADS = {  # scenario: the option of its offered load, and the unit
    "server": ("target_qps", "requests/s"),
    "trace_replay": ("mean_qps", "requests/s"),
    "closed_loop": ("clients", "clients"),
    "multi_stream": ("samples_per_query", "requests per query"),
    "single_stream": ("", ""),
}


LIKE = "DLRM-v3-like"
LIKES = {"dlrm_v3": LIKE, "dlrm_v3_stu": f"{LIKE} (dlrm_v3_stu)"}  # names of models with layers of MLPerf's DLRM-v3
UNLIKE = (
    f"{LIKE}: the model has the layers of MLPerf's DLRM-v3 and leaves out much else (docs/PERFORMANCE.md), so its "
    "figures are not those of MLPerf's"
)
EMULATED = "products in fp8 are emulated there, and their speed is not that of fp8"


def scenario_of(record: RunRecord) -> str:
    """Return the name of the record's scenario."""
    return str(record.spec["scenario"]["name"])


def model_of(record: RunRecord) -> str:
    """Return the model's name as pages have it: one with layers of MLPerf's DLRM-v3 is only like it."""
    name = str(record.spec["model"]["name"])
    return LIKES.get(name, name)


def unit_of(record: RunRecord) -> str:
    """Return the unit of the offered load."""
    return LOADS[scenario_of(record)][1]


def offered_load(record: RunRecord) -> float | None:
    """Return the load that the scenario asks for, in `unit_of`, or None if it asks for none."""
    option, _ = LOADS.get(scenario_of(record), ("", ""))
    value = record.spec["scenario"].get(option) if option else None
    return float(value) if value is not None else None


def has_speed(record: RunRecord) -> bool:
    """Return whether a cell has figures of speed that may be compared. LoadGen's accuracy mode has none."""
    is_accuracy = record.spec["scenario"].get("mode") == "accuracy"
    return record.ok and bool(record.metrics.get("throughput_rps")) and not is_accuracy


def emulated(record: RunRecord) -> bool:
    """Return whether products of a cell, a stage of it or its server are emulated: its speed is not that of fp8."""
    stages = [record.actual.get(stage) or {} for stage in STAGES]
    parts = [record.actual, *stages, *_strategies_of(record)]
    return any(str(part.get("fp8_products", "")).startswith("emulated") for part in parts)


def _strategies_of(record: RunRecord) -> list[dict[str, Any]]:
    """Return the strategies of the server that a cell measured; none of an engine of its own."""
    return (record.actual.get("server") or {}).get("strategies") or []


def options_of(record: RunRecord) -> dict[str, Any]:
    """Return a record's options by dotted key, a file by its content: one path may have held several files."""
    return by_content(record.spec, record.files)


def by_content(spec: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a spec by dotted key. files: SHA-256 of each file that an option names, by its key."""
    return {
        key: f"sha256:{digest[:12]}" if (digest := files.get(key)) else value for key, value in flatten(spec).items()
    }


def work_of(record: RunRecord) -> str:
    """Return a key that is equal for comparable cells."""
    spec = record.spec
    work = [
        spec.get("task"),
        {key: value for key, value in options_of(record).items() if key.split(".")[0] == "workload"},
        (spec.get("retrieval") or {}).get("k"),
        scenario_of(record),
        offered_load(record) is None,  # a trace at its own clock is at no load that others could be compared with
        spec.get("latency_limit_ms"),
    ]
    return json.dumps([work, machine_of(record.environment)], sort_keys=True)


def strategy_of(record: RunRecord) -> str:
    """Return a key that is equal for repeats of one strategy at any load: all options, the code and the device."""
    option = LOADS.get(scenario_of(record), ("", ""))[0]
    leaves = {k: shown(v) for k, v in options_of(record).items() if k not in ("seed", f"scenario.{option}")}
    code = [record.environment.get(name) for name in ("git_sha", "code")]
    return json.dumps([leaves, code, record.actual.get("device")], sort_keys=True)


def servers_of(record: RunRecord) -> int:
    """Return the number of servers that a cell measured; 0 for an engine of its own."""
    engine = record.spec.get("engine") or {}
    return 1 + len(engine.get("more_urls", ())) if engine.get("name") == "remote" else 0


def served_by(record: RunRecord) -> str:
    """Return a key that is equal for cells that differ only in which servers they measured, and how many.

    Several servers have as many more connections or clients as there are more of them.
    """
    servers = servers_of(record)
    per_server = {"scenario.in_flight", "scenario.clients"}
    options = {
        key: value / servers if key in per_server and value else value
        for key, value in flatten(record.spec).items()
        if key not in ("seed", "engine.url", "scenario.queries") and not key.startswith("engine.more_urls")
    }
    names = [(one.get("name"), one.get("engine"), one.get("precision")) for one in _strategies_of(record)]
    return json.dumps([options, names], sort_keys=True, default=str)
