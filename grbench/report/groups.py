"""Cells in groups that can be compared, each with its finding, best cell first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grbench.execution.environment import machine_of
from grbench.execution.records import RunRecord
from grbench.report.cells import Cell, labels
from grbench.report.findings import comparable, findings, limit_verdict, work_names
from grbench.report.repeats import pooled, ranking_percentile
from grbench.report.work import LIKE, emulated, has_speed, model_of, offered_load, scenario_of, unit_of

VERBS = {"rank": "Rank", "generate": "Retrieve", "recommend": "Retrieve and rank"}


@dataclass(frozen=True)
class Row:
    """A row of a table and a number in the figures: one cell, or the repeats of one."""

    number: int  # from 1, over all groups of a page
    name: str  # unique in its group
    record: RunRecord
    folder: Path  # of the first run, for its samples


@dataclass(frozen=True)
class Group:
    """Rows that did the same work: what was asked of them, what was found, and the rows, best first."""

    title: str
    sentence: str  # "" if no row has a result
    rows: list[Row]

    @property
    def ok(self) -> list[Row]:
        """The rows with figures of speed."""
        return [row for row in self.rows if has_speed(row.record)]

    @property
    def loads(self) -> list[float]:
        """The different offered loads, sorted; empty if the scenario has none."""
        return sorted({load for row in self.ok if (load := offered_load(row.record)) is not None})


def best_first(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return comparable records as `findings` ranks them.

    Those with emulated products follow, ranked by themselves, and those without a result come last.

    At several loads the cells of each load are ranked by themselves, those first that keep the latency limit. The loads
    at which a cell keeps it come first, and go down from the highest.
    """
    ok = [record for record in records if record.ok]
    failed = [record for record in records if not record.ok]
    real, slow = ([record for record in ok if emulated(record) == which] for which in (False, True))
    return [*_best_first(real), *_best_first(slow), *failed]


def _best_first(records: Sequence[RunRecord]) -> list[RunRecord]:
    loads: dict[float | None, list[RunRecord]] = {}
    for record in records:
        loads.setdefault(offered_load(record), []).append(record)
    metrics = {load: f"latency_ms/{ranking_percentile(those)}" for load, those in loads.items()}
    kept = {load: any(limit_verdict(record) == "yes" for record in those) for load, those in loads.items()}

    def place(record: RunRecord) -> tuple[float, ...]:
        if scenario_of(record) == "offline":
            return (-record.metrics.get("throughput_rps", 0.0),)
        load = offered_load(record)
        latency = record.metrics.get(metrics[load], float("inf"))
        if len(loads) == 1:
            return (latency,)
        return not kept[load], -(load or 0.0), limit_verdict(record) != "yes", latency

    return sorted(records, key=place)


def group_cells(cells: Sequence[Cell]) -> list[Group]:
    """Return the groups of comparable cells in the order of their first cell. Repeats share a row."""
    folders = {(r.spec_hash, r.started_at, r.duration_s): folder for folder, r in cells}
    runs = comparable([record for _, record in cells])
    split = [best_first(pooled(records)) for records in runs]
    firsts = [records[0] for records in split]
    works = list(zip(work_names(firsts), (machine_of(first.environment) for first in firsts), strict=True))
    differing = [i for i in (0, 1) if len({work[i] for work in works}) > 1]
    groups: list[Group] = []
    number = 0
    for records, behind, work in zip(split, runs, works, strict=True):
        rows = []
        for record, name in zip(records, labels(records), strict=True):
            number += 1
            folder = folders[record.spec_hash, record.started_at, record.duration_s]
            rows.append(Row(number, name, record, folder))
        names = [work[i] for i in differing]
        if 0 not in differing and all(LIKE in model_of(record) for record in records):
            names.insert(0, model_of(records[0]))
        sentence = " ".join(finding.sentence for finding in findings(behind))
        groups.append(Group(_title(records) + (f" ({', '.join(names)})" if names else ""), sentence, rows))
    return groups


def _title(records: Sequence[RunRecord]) -> str:
    """Return what the rows were asked: the task and the load, and the question if there is a choice."""
    first = records[0]
    verb, scenario = VERBS.get(str(first.spec.get("task")), "Answer"), scenario_of(first)
    loads = {load for record in records if (load := offered_load(record)) is not None}
    choice = len(records) > 1
    if scenario == "offline":
        return f"{verb} offline" + (": which has the highest throughput?" if choice else "")
    if len(loads) > 1:
        return f"{verb} in {scenario}: what load keeps the latency limit?"
    where = f"at {loads.pop():g} {unit_of(first)}" if loads else f"in {scenario}"
    return f"{verb} {where}" + (": which has the lowest latency?" if choice else "")
