"""Repeats: cells that differ only in their seed, as one record for the tables.

`runner.repeats` makes them, and so does a sweep over `seed`. A cell that was run again with the same seed is no repeat:
its weights, trace and arrivals are the same, so its runs differ by less than repeats do. The latest such run counts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence

from grbench.execution import stats
from grbench.execution.energy import METRIC as JOULES
from grbench.execution.environment import machine_of
from grbench.execution.records import RunRecord
from grbench.report.cells import counted
from grbench.report.work import offered_load, strategy_of

NUMBER = re.compile(r"(?<![\w.:/-])\d+(?:\.\d+)?(?![\w:/-]|\.\d)")  # not those in names, times and paths

# Names of the metrics whose spread becomes an interval.
SPREADS = ("latency_ms/p", "throughput_rps", "goodput_rps", JOULES)
PERCENTILES = ("p99", "p90", "p50")
P99_NEEDS = f"{stats.SAMPLES_NEEDED[99.0]} requests that are worth {stats.samples_for_interval(99.0)} independent ones"


RERUNS = "{} left out: a run with the same seed replaces the one before it"


def pooled(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the records with the OK repeats of a cell as one, at the place of the first.

    Its metrics are those that all runs have, by `stats.across_runs`, and `runs` is their number. Its gate is the one of
    the largest error. All other facts are the first run's.
    """
    groups: dict[str, list[RunRecord]] = {}
    for i, record in enumerate(records):
        groups.setdefault(_cell(record) if record.ok else str(i), []).append(record)
    return [_one(runs) if len(runs) > 1 else runs[0] for runs in groups.values()]


def latest_by_seed(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the latest run of each seed, in the order in which the seeds first came."""
    latest: dict[object, RunRecord] = {}
    for run in runs:
        seed = run.spec.get("seed")
        if seed not in latest or run.started_at >= latest[seed].started_at:
            latest[seed] = run
    return list(latest.values())


def ranking_percentile(records: Sequence[RunRecord]) -> str:
    """Return the percentile (p99, p90 or p50) that ranks comparable cells, single runs or `pooled` ones.

    It is the highest for which all OK cells have an interval, else the highest that all have.
    """
    cells = [record for record in pooled(records) if record.ok]
    in_all = [p for p in PERCENTILES if all(f"latency_ms/{p}" in cell.metrics for cell in cells)] or ["p50"]
    return next((p for p in in_all if all(f"latency_ms/{p}" in cell.intervals for cell in cells)), in_all[0])


def run_count(record: RunRecord) -> int:
    """Return the number of runs behind a record's figures."""
    return round(record.metrics.get("runs", 1))


def estimate(runs: Sequence[RunRecord], metric: str) -> tuple[float, tuple[float, float] | None]:
    """Return the value of a metric that all runs have, and its 95% interval or None."""
    return stats.across_runs([run.metrics[metric] for run in runs], [run.intervals.get(metric) for run in runs])


def _one(every: Sequence[RunRecord]) -> RunRecord:
    runs = latest_by_seed(every)
    replaced = [RERUNS.format(counted(len(every) - len(runs), "earlier run"))] if len(runs) < len(every) else []
    if len(runs) == 1:
        return dataclasses.replace(runs[0], notes=[*runs[0].notes, *replaced])
    metrics, intervals = {"runs": float(len(runs))}, {}
    for name in runs[0].metrics:
        if any(run.metrics.get(name) is None for run in runs):
            continue
        metrics[name], interval = estimate(runs, name)
        if interval is not None and name.startswith(SPREADS):
            intervals[name] = list(interval)
    return dataclasses.replace(
        runs[0],
        overrides=_for_all(runs),
        metrics=metrics,
        intervals=intervals,
        gate=max((run.gate for run in runs), key=lambda gate: gate.get("error") or 0.0),
        notes=[*_notes(runs, intervals), *replaced],
    )


def _for_all(runs: Sequence[RunRecord]) -> list[str]:
    """Return the options that repeat all runs: `runner.repeats` for seeds that follow each other, else the first's."""
    seeds = [run.spec.get("seed") for run in runs]
    first = min((seed for seed in seeds if isinstance(seed, int)), default=0)
    if sorted(seeds, key=str) != sorted(range(first, first + len(runs)), key=str):
        return runs[0].overrides
    typed = [word for word in runs[0].overrides if word.partition("=")[0] not in ("seed", "runner.repeats")]
    return [*typed, *([f"seed={first}"] if first else []), f"runner.repeats={len(runs)}"]


def _notes(runs: Sequence[RunRecord], intervals: dict[str, list[float]]) -> list[str]:
    """Return each note once, but not that an interval is absent which is here.

    A note that some runs lack has the number of those that have it, whatever numbers are in it.
    """
    carriers = Counter(form for run in runs for form in {NUMBER.sub("#", note) for note in run.notes})
    notes = []
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        count = carriers[NUMBER.sub("#", note)]
        if note.partition(" ")[0] not in intervals:
            notes.append(note if count == len(runs) else f"{note} ({count} of {len(runs)} runs)")
    return notes


def _cell(record: RunRecord) -> str:
    """Return a key that is equal for repeats: those of one strategy, at one load, on one machine."""
    return json.dumps([strategy_of(record), offered_load(record), machine_of(record.environment)])
