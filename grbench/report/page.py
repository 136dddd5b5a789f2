"""The report: its content as blocks, which `markdown.py` and `html.py` write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grbench.execution.records import RunRecord, Status
from grbench.report.cells import MISSING, Cell, command, flatten, labels, number_of, shown
from grbench.report.chart import Chart
from grbench.report.charts import charts
from grbench.report.findings import findings
from grbench.report.frame import damaged_samples, has_samples
from grbench.report.groups import Group, Row, group_cells
from grbench.report.provenance import origin_line
from grbench.report.table import MOST_COLUMNS, ROW, columns_for, legend, notes, spans, without_least_needed
from grbench.report.tradeoffs import READING, Tradeoff, tradeoffs
from grbench.report.work import servers_of

NO_SAMPLES = "no samples beside the record (row {}): its distribution and parts of the latency are not drawn"


@dataclass(frozen=True)
class Heading:
    """A heading of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A chart; `name` is unique on the page."""

    name: str
    chart: Chart = field(repr=False)


Block = Heading | Text | Bullets | Table | Figure


def blocks(cells: Sequence[Cell], remarks: Sequence[str] = (), figures: bool = True) -> list[Block]:
    """Return the content of a report: findings, a section for each group of comparable cells, how it was measured.

    remarks: lines for the reader, such as records that could not be read. Samples that can't be read cost only their
    cell's curves, with a line for each file that says why.
    """
    records = [record for _, record in cells]
    groups = group_cells(cells)
    rows = [row for group in groups for row in group.rows]
    traded = tradeoffs(rows)
    shown_there = {row.number for one in traded for row in one.rows}
    others = [
        group
        for group in groups
        if not shown_there.issuperset(row.number for row in group.rows)
        or len({max(1, servers_of(row.record)) for row in group.rows}) > 1  # its finding is how they scale
    ]
    rest = [row.record for group in others for row in group.rows]
    content: list[Block] = [Text(_summary(records))]
    if len(others) > 1:
        content += _bullets([finding.sentence for finding in findings(rest)])
    content += _bullets([*remarks, *(damaged_samples(cells) if figures else [])])
    content += _tradeoff_blocks(traded, [row for row in rows if row.number in shown_there], figures)
    for number, group in enumerate(others, 1):
        content += _group_blocks(number, group, figures)
    if any(record.ok for record in rest):
        content += [Heading("How to read the tables"), *_bullets(_legend(rest))]
    content += _failures(rows)
    content += environment_blocks([(row.number, row.record.environment) for row in rows])
    content += _requested_and_actual(rows)
    names = labels([row.record for row in rows])
    commands = [[str(row.number), name, command(row.record)] for row, name in zip(rows, names, strict=True)]
    return [*content, Heading("Run it again"), Table(["#", "cell", "command"], commands)]


def origin(cells: Sequence[Cell]) -> str:
    """Return the line about commit and machine, by the numbers of the rows."""
    rows = [row for group in group_cells(cells) for row in group.rows]
    return origin_line([row.record.environment for row in rows])


def _summary(records: Sequence[RunRecord]) -> str:
    days = sorted({record.started_at[:10] for record in records})
    count, ok = len(records), sum(record.ok for record in records)
    return f"{number_of(count, 'cell')}, {ok} OK, measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}."


def _group_blocks(number: int, group: Group, figures: bool) -> list[Block]:
    records = [row.record for row in group.rows]
    all_ok = all(record.ok for record in records)
    lead = ["#", "cell", *([] if all_ok else ["status"])]
    columns = without_least_needed(columns_for(records), MOST_COLUMNS - len(lead))
    lines = []
    for row in group.rows:
        figures_of = [column.text(row.record) if row.record.ok else MISSING for column in columns]
        lines.append([str(row.number), row.name, *([] if all_ok else [row.record.status]), *figures_of])
    content: list[Block] = [Heading(group.title)]
    content += [Text(group.sentence)] if group.sentence else []
    content += [Table([*lead, *(column.heading for column in columns)], lines)]
    content += _bullets(notes(records, [f"{ROW}{row.number}" for row in group.rows]))
    if figures:
        content += _bullets(_without_samples(group))
        content += [Figure(f"{number}_{chart.key}", chart) for chart in charts(group)]
    return content


def _said(one: Tradeoff) -> list[Block]:
    """Return what was found along an axis: one sentence, or a list of several."""
    if len(parts := one.parts) == 1:
        return [Text(one.sentence)]
    return [Text(f"{one.against}:"), Bullets(parts)]


def _tradeoff_blocks(traded: Sequence[Tradeoff], rows: Sequence[Row], figures: bool) -> list[Block]:
    """Return a section for each axis of quality against speed, then how to read them and the notes of their rows."""
    content: list[Block] = []
    for number, one in enumerate(traded, 1):
        content += [Heading(one.title), *_said(one), Table(*one.table())]
        content += [Figure(f"quality_{number}", one.chart(number))] if figures else []
    if traded:
        content += [Heading("How to read quality against speed"), *_bullets(READING)]
        content += _bullets(notes([row.record for row in rows], [f"{ROW}{row.number}" for row in rows]))
    return content


def _without_samples(group: Group) -> list[str]:
    """Return a line about the rows without samples."""
    bare = [row.number for row in group.ok if not has_samples(row.folder)]
    return [NO_SAMPLES.format(spans(bare))] if bare else []


def _legend(records: Sequence[RunRecord]) -> list[str]:
    """Return the meaning of every column that some table has."""
    return [*legend(columns_for(list(records)), records), "percentiles are samples, not interpolated"]


def _bullets(lines: Sequence[str]) -> list[Block]:
    return [Bullets(lines)] if lines else []


def _failures(rows: Sequence[Row]) -> list[Block]:
    failed = [
        [str(row.number), row.name, str(row.record.status), row.record.error or "no reason was recorded"]
        for row in rows
        if row.record.status is not Status.OK
    ]
    return [Heading("Cells without a result"), Table(["#", "cell", "status", "reason"], failed)] if failed else []


def environment_blocks(recorded: Sequence[tuple[int, dict[str, Any]]]) -> list[Block]:
    """Return the section about machines and versions, with a column for each different environment and its rows."""
    different: list[tuple[dict[str, str], list[int]]] = []
    for number, environment in recorded:
        flat = {key: "none" if value in ([], {}) else shown(value) for key, value in flatten(environment).items()}
        for known, numbers in different:
            if known == flat:
                numbers.append(number)
                break
        else:
            different.append((flat, [number]))
    keys = dict.fromkeys(key for environment, _ in different for key in environment)
    heads = [f"rows {spans(numbers)}" for _, numbers in different] if len(different) > 1 else ["all rows"]
    return [
        Heading("Environment"),
        Table(["", *heads], [[key, *(e.get(key, MISSING) for e, _ in different)] for key in keys]),
    ]


def _requested_and_actual(rows: Sequence[Row]) -> list[Block]:
    """List options whose actual value differs from the requested one, such as engine.device=auto on cuda.

    Options with equal values share a line.
    """
    cells: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        ran = flatten(row.record.actual)
        for key, asked in flatten(row.record.requested).items():
            found = _ran(key, ran)
            if found is not None and found != shown(asked):
                cells.setdefault((key, shown(asked), found), []).append(row.number)
    lines: dict[tuple[str, str, str], list[str]] = {}
    for (key, asked, found), who in cells.items():
        where = "all" if len(who) == len(rows) else spans(who)
        lines.setdefault((asked, found, where), []).append(key)
    if not lines:
        return []
    table = [[", ".join(keys), *rest] for rest, keys in lines.items()]
    return [Heading("Requested and actual"), Table(["option", "requested", "actual", "rows"], table)]


def _ran(key: str, ran: dict[str, Any]) -> str | None:
    """Return the actual value of a requested option; for a kernel in several stages each variant once."""
    group, _, name = key.rpartition(".")
    if group == "kernel":
        return ", ".join(sorted({str(v) for k, v in ran.items() if k.endswith(f"kernels.{name}")})) or None
    found = ran.get(key.removeprefix("engine."))  # of a stage it has the stage's name
    return None if found is None else shown(found)
