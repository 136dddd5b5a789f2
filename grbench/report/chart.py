"""Figures as data: what is drawn, without how. `plots.py` draws a chart as PNG, `interactive.py` for a browser.

Numbers in a chart are those of the rows, so that a table beside it is its legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grbench.execution.records import RunRecord
from grbench.report.cells import figure
from grbench.report.frame import samples_problem
from grbench.report.groups import Group, Row
from grengines.runtime import atomic_io

MOST_CURVES = 10  # more curves are hard to tell apart
MOST_BARS = 30  # a page must stay readable with hundreds of cells
MOST_NUMBERS = 40  # numbers beside points
LONGEST_NAME = 40
P90_NOTE = "p90 is drawn: p99 needs 1000 independent samples, which {} of the cells lack"


@dataclass(frozen=True)
class Series:
    """Points, a line through points, or one part of every bar."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()  # ends of the interval of the measured coordinate
    high: Sequence[float] = ()
    texts: Sequence[str] = ()  # beside the points
    hover: Sequence[str] = ()  # full names
    colour: int | None = None  # index of a colour; None: grey
    mode: str = "points"  # points, line, line+points, steps, bars
    x_low: Sequence[float] = ()  # ends of the interval of x, where both coordinates are measured
    x_high: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """One figure."""

    key: str  # part of a file name
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    error_on: str = "y"  # the axis of the intervals
    limits: Sequence[tuple[str, float, str]] = ()  # (axis, value, text) of dashed lines
    rows: Sequence[str] = ()  # names of horizontal bars or points, from the top
    ends: Sequence[str] = ()  # texts at the ends of the bars
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Chart:
        """Return the chart that `to_dict` gave. Raises KeyError or TypeError for anything else."""
        return cls(**{**data, "series": [Series(**series) for series in data["series"]]})

    def to_dict(self) -> dict[str, Any]:
        """Return the chart as plain data, for a file."""
        return asdict(self)

    def png(self, path: Path | None = None) -> bytes:
        """Return the chart as PNG and write it to `path`, if there is one."""
        from grbench.report.plots import png

        data = png(self)
        if path is not None:
            atomic_io.write(path, data)
        return data

    def _repr_png_(self) -> bytes:
        return self.png()


def bars(
    group: Group, key: str, title: str, x: str, parts: dict[str, Callable[[RunRecord], float | None]]
) -> Chart | None:
    """Return horizontal bars, one for each row that has all `parts`, or None if there is none."""
    rows = [row for row in group.ok if all(value(row.record) is not None for value in parts.values())]
    shown = rows[:MOST_BARS]
    if not shown:
        return None
    series = [
        Series(
            name,
            [value(row.record) or 0.0 for row in shown],
            list(range(len(shown))),
            hover=[row.name for row in shown],
            colour=i,
            mode="bars",
        )
        for i, (name, value) in enumerate(parts.items())
    ]
    totals = [figure(sum(one.x[i] for one in series)) for i in range(len(shown))]
    notes = left_out(len(rows), len(shown), "cells", "the best")
    return Chart(key, title, x, "", series, rows=[row_name(row) for row in shown], ends=totals, notes=notes)


def with_samples(group: Group) -> list[Row]:
    """Return the rows whose samples can be drawn."""
    return [row for row in group.ok if not samples_problem(row.folder)]


def percentile(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return the highest percentile that all rows have, with a note if it is not p99."""
    without = sum("latency_ms/p99" not in row.record.metrics for row in rows)
    if not without:
        return "latency_ms/p99", []
    return "latency_ms/p90", [P90_NOTE.format(f"{without} of {len(rows)}")]


def short(metric: str) -> str:
    """Return a metric without its group, such as p99."""
    return metric.rpartition("/")[2]


def ends(records: Sequence[RunRecord], metric: str) -> tuple[list[float], list[float]]:
    """Return the ends of the intervals of a metric; without one both are its value."""
    ends = [record.intervals.get(metric, [record.metrics[metric]] * 2) for record in records]
    return [low for low, _ in ends], [high for _, high in ends]


def limits(group: Group, axis: str) -> list[tuple[str, float, str]]:
    """Return the dashed line of the latency limit."""
    limit = group.rows[0].record.spec.get("latency_limit_ms")
    return [] if limit is None else [(axis, float(limit), f"limit {limit:g} ms")]


def numbers(rows: Sequence[Row]) -> list[str]:
    """Return the numbers beside points, or nothing where they would cover each other."""
    return [str(row.number) if len(rows) <= MOST_NUMBERS else "" for row in rows]


def row_name(row: Row) -> str:
    """Return the number and the name of a row."""
    return f"{row.number} {_cut(row.name)}"


def strategy_name(rows: Sequence[Row], index: int) -> str:
    """Return the words that the names of all rows share."""
    words = [set(row.name.split()) for row in rows]
    return _cut(
        " ".join(w for w in rows[0].name.split() if all(w in some for some in words)) or f"strategy {index + 1}"
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def left_out(total: int, drawn: int, what: str, which: str) -> list[str]:
    """Return a note if something is not drawn."""
    return [f"{drawn} of {total} {what} are drawn: {which}"] if drawn < total else []
