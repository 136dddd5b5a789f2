"""Figures as data: what is drawn, without how. `plots.py` draws a chart as PNG, `interactive.py` for a browser.

Every function takes the rows of one group and returns a chart, or None where the rows have nothing to show in it.
Numbers in a chart are those of the rows, so that a table beside it is its legend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grbench.execution.records import PARTS, RunRecord
from grbench.report.cells import figure
from grbench.report.frame import load_samples, samples_problem
from grbench.report.groups import Group, Row
from grbench.report.work import offered_load, scenario_of, strategy_of, unit_of

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

    def png(self, path: Path | None = None) -> bytes:
        """Return the chart as PNG and write it to `path`, if there is one."""
        from grbench.report.plots import png

        data = png(self)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return data

    def _repr_png_(self) -> bytes:
        return self.png()


def charts(group: Group) -> list[Chart]:
    """Return every chart that the group's rows fill, the one that answers its question first."""
    drawn = [draw(group) for draw in CHARTS] if group.ok else []
    return [chart for chart in drawn if chart is not None]


def load_latency(group: Group) -> Chart | None:
    """Offered load against p99, a line for each strategy: where it rises, the engine cannot follow."""
    if len(group.loads) < 2:
        return None
    metric, notes = _percentile(group.ok)
    lines: dict[str, list[Row]] = {}
    for row in group.ok:
        lines.setdefault(strategy_of(row.record), []).append(row)
    shown = list(lines.values())[:MOST_CURVES]
    notes += _left_out(len(lines), len(shown), "strategies", "those that lead the table")
    series = []
    for i, rows in enumerate(shown):
        rows = sorted(rows, key=lambda row: offered_load(row.record) or 0.0)
        low, high = _ends([row.record for row in rows], metric)
        series.append(
            Series(
                _strategy_name(rows, i),
                [offered_load(row.record) or 0.0 for row in rows],
                [row.record.metrics[metric] for row in rows],
                low,
                high,
                [str(row.number) for row in rows],
                [row.name for row in rows],
                i,
                "line+points",
            )
        )
    first = group.ok[0].record
    return Chart(
        "load_latency",
        f"Offered load and {_short(metric)}",
        f"offered load, {unit_of(first)}",
        f"{_short(metric)} latency with 95% interval, ms (log)",
        series,
        log_y=True,
        limits=_limits(group, "y"),
        notes=notes,
    )


def pareto(group: Group) -> Chart | None:
    """Throughput against p99, with the front: cells that no other one beats in both."""
    rows = group.ok
    if len(rows) < 2 or (len(group.loads) < 2 and scenario_of(rows[0].record) != "closed_loop"):
        return None  # at one offered load all have its throughput
    metric, notes = _percentile(rows)
    points = [(row.record.metrics[metric], row.record.metrics["throughput_rps"]) for row in rows]
    front = front_of(points)
    low, high = _ends([row.record for row in rows], metric)
    numbers = [str(row.number) if len(rows) <= MOST_NUMBERS or i in front else "" for i, row in enumerate(rows)]
    names = [row.name for row in rows]
    cells = Series("cells", [p[0] for p in points], [p[1] for p in points], low, high, numbers, names, 0)
    line = Series("Pareto front", [points[i][0] for i in front], [points[i][1] for i in front], colour=1, mode="line")
    return Chart(
        "pareto",
        f"Throughput and {_short(metric)}",
        f"{_short(metric)} latency with 95% interval, ms (log)",
        "throughput, requests/s",
        [cells, line],
        log_x=True,
        error_on="x",
        limits=_limits(group, "x"),
        notes=[*notes, "on the front: " + ", ".join(f"{rows[i].number} {rows[i].name}" for i in front)],
    )


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the points (latency, throughput) that no other one beats in both, by latency."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def ranking(group: Group) -> Chart | None:
    """The figure that ranks the group, with its interval, a row for each cell."""
    if len(group.ok) < 2 or len(group.loads) > 1:
        return None
    offline = scenario_of(group.ok[0].record) == "offline"
    metric, notes = ("throughput_rps", []) if offline else _percentile(group.ok)
    rows = group.ok[:MOST_BARS]
    low, high = _ends([row.record for row in rows], metric)
    values = [row.record.metrics[metric] for row in rows]
    title = "Throughput" if offline else f"{_short(metric)} latency"
    unit = "throughput, requests/s" if offline else f"{_short(metric)} latency with 95% interval, ms (log)"
    places = list(range(len(rows)))
    return Chart(
        "ranking",
        title,
        unit,
        "",
        [Series("cells", values, places, low, high, hover=[row.name for row in rows], colour=0)],
        log_x=not offline,
        error_on="x",
        limits=() if offline else _limits(group, "x"),
        rows=[_row_name(row) for row in rows],
        notes=notes + _left_out(len(group.ok), len(rows), "cells", "the best"),
    )


def latency_cdf(group: Group) -> Chart | None:
    """The share of requests that are answered within a time, a curve for each cell, from raw samples."""
    sampled = _sampled(group)
    if not sampled or scenario_of(sampled[0].record) == "offline":
        return None
    shown = sampled[:MOST_CURVES]
    series = []
    for i, row in enumerate(shown):
        latencies = np.sort(load_samples(row.folder)["latency_ms"].to_numpy())
        shares = 100 * np.arange(1, len(latencies) + 1) / len(latencies)
        keep = _thinned(len(latencies))
        series.append(
            Series(
                _row_name(row),
                latencies[keep].tolist(),
                shares[keep].tolist(),
                hover=[row.name],
                colour=i,
                mode="steps",
            )
        )
    return Chart(
        "latency_cdf",
        "Latency distribution",
        "latency, ms (log)",
        "requests answered, %",
        series,
        log_x=True,
        limits=_limits(group, "x"),
        notes=_left_out(len(sampled), len(shown), "cells", "the best"),
    )


def time_shares(group: Group) -> Chart | None:
    """The parts of the mean latency, a bar for each cell: means add up to the mean latency, medians do not."""
    sampled = _sampled(group)
    if not sampled:
        return None
    rows = sampled[:MOST_BARS]
    parts = [mean_parts(row.folder) for row in rows]
    series = [
        Series(
            part.removesuffix("_ms"),
            [100 * mean[part] / mean["latency_ms"] for mean in parts],
            list(range(len(rows))),
            hover=[row.name for row in rows],
            colour=i if i < len(PARTS) else None,
            mode="bars",
        )
        for i, part in enumerate([*PARTS, "other_ms"])
    ]
    return Chart(
        "time_shares",
        "Parts of the mean latency",
        "share of the mean latency, %",
        "",
        series,
        rows=[_row_name(row) for row in rows],
        ends=[f"{figure(mean['latency_ms'])} ms" for mean in parts],
        notes=_left_out(len(sampled), len(rows), "cells", "the best"),
    )


def mean_parts(folder: Path) -> dict[str, float]:
    """Return the mean milliseconds of each part of a cell's latency. `other_ms` is time between the timed steps."""
    means = load_samples(folder)[[*PARTS, "latency_ms"]].mean()
    parts = {str(name): float(value) for name, value in means.items()}
    return {**parts, "other_ms": max(parts["latency_ms"] - sum(parts[part] for part in PARTS), 0.0)}


def stages(group: Group) -> Chart | None:
    """The medians of a pipeline's stages, a bar for each cell."""
    return _bars(
        group,
        "stages",
        "Stages of the pipeline",
        "median time of the stage, ms",
        {
            "retrieve": lambda record: record.metrics.get("retrieve_ms/p50"),
            "rank": lambda record: record.metrics.get("rank_ms/p50"),
        },
    )


def cost(group: Group) -> Chart | None:
    """Time that the machine was held for a thousand requests, where the load did not limit the throughput."""
    if len(group.ok) < 2 or scenario_of(group.ok[0].record) not in ("offline", "closed_loop", "single_stream"):
        return None
    device = "GPU" if all(row.record.actual.get("device") == "cuda" for row in group.ok) else "machine"
    return _bars(
        group,
        "cost",
        f"Cost: {device} time",
        f"{device}-seconds per thousand requests",
        {f"{device}-seconds": lambda record: 1000 / record.metrics["throughput_rps"]},
    )


def hit_latency(group: Group) -> Chart | None:
    """Cache hit rate against p99."""
    rows = [row for row in group.ok if "cache/hit_rate" in row.record.metrics]
    if not rows or len(group.ok) < 2 or scenario_of(rows[0].record) == "offline":
        return None
    rows += [row for row in group.ok if row not in rows]  # without a cache nothing is hit
    metric, notes = _percentile(rows)
    low, high = _ends([row.record for row in rows], metric)
    return Chart(
        "hit_latency",
        f"Hit rate and {_short(metric)}",
        "requests that found cached state, %",
        f"{_short(metric)} latency with 95% interval, ms (log)",
        [
            Series(
                "cells",
                [100 * row.record.metrics.get("cache/hit_rate", 0.0) for row in rows],
                [row.record.metrics[metric] for row in rows],
                low,
                high,
                _numbers(rows),
                [row.name for row in rows],
                0,
            )
        ],
        log_y=True,
        limits=_limits(group, "y"),
        notes=notes,
    )


def quality(group: Group) -> Chart | None:
    """Speed against AUC, a colour for each precision: what a faster precision costs in answers."""
    rows = [row for row in group.ok if mean_auc(row.record) is not None]
    if len(rows) < 2:
        return None
    offline = scenario_of(rows[0].record) == "offline"
    metric, notes = ("throughput_rps", []) if offline else _percentile(rows)
    series = []
    for i, precision in enumerate(dict.fromkeys(precision_of(row.record) for row in rows)):
        those = [row for row in rows if precision_of(row.record) == precision]
        low, high = _ends([row.record for row in those], metric)
        series.append(
            Series(
                precision,
                [row.record.metrics[metric] for row in those],
                [mean_auc(row.record) or 0.0 for row in those],
                low,
                high,
                _numbers(those),
                [row.name for row in those],
                i,
            )
        )
    return Chart(
        "quality",
        "Speed and AUC by precision",
        "throughput, requests/s" if offline else f"{_short(metric)} latency with 95% interval, ms (log)",
        "AUC, mean of the tasks",
        series,
        log_x=not offline,
        error_on="x",
        notes=notes,
    )


def precision_of(record: RunRecord) -> str:
    """Return the precision that ran."""
    return str(record.actual.get("precision") or "unknown")


def mean_auc(record: RunRecord) -> float | None:
    """Return the mean AUC of the labelled tasks, or None if none was measured."""
    tasks = (record.gate.get("quality") or {}).get("tasks") or {}
    return sum(task["auc"] for task in tasks.values()) / len(tasks) if tasks else None


CHARTS: list[Callable[[Group], Chart | None]] = [
    load_latency,
    pareto,
    ranking,
    hit_latency,
    quality,
    stages,
    time_shares,
    latency_cdf,
    cost,
]


def _bars(
    group: Group, key: str, title: str, x: str, parts: dict[str, Callable[[RunRecord], float | None]]
) -> Chart | None:
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
    notes = _left_out(len(rows), len(shown), "cells", "the best")
    return Chart(key, title, x, "", series, rows=[_row_name(row) for row in shown], ends=totals, notes=notes)


def _sampled(group: Group) -> list[Row]:
    """Return the rows whose samples can be drawn."""
    return [row for row in group.ok if not samples_problem(row.folder)]


def _percentile(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return the highest percentile that all rows have, with a note if it is not p99."""
    without = sum("latency_ms/p99" not in row.record.metrics for row in rows)
    if not without:
        return "latency_ms/p99", []
    return "latency_ms/p90", [P90_NOTE.format(f"{without} of {len(rows)}")]


def _short(metric: str) -> str:
    return metric.rpartition("/")[2]


def _ends(records: Sequence[RunRecord], metric: str) -> tuple[list[float], list[float]]:
    ends = [record.intervals.get(metric, [record.metrics[metric]] * 2) for record in records]
    return [low for low, _ in ends], [high for _, high in ends]


def _limits(group: Group, axis: str) -> list[tuple[str, float, str]]:
    limit = group.rows[0].record.spec.get("latency_limit_ms")
    return [] if limit is None else [(axis, float(limit), f"limit {limit:g} ms")]


def _numbers(rows: Sequence[Row]) -> list[str]:
    return [str(row.number) if len(rows) <= MOST_NUMBERS else "" for row in rows]


def _row_name(row: Row) -> str:
    return f"{row.number} {_cut(row.name)}"


def _strategy_name(rows: Sequence[Row], index: int) -> str:
    words = [set(row.name.split()) for row in rows]
    return _cut(
        " ".join(w for w in rows[0].name.split() if all(w in some for some in words)) or f"strategy {index + 1}"
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _left_out(total: int, drawn: int, what: str, which: str) -> list[str]:
    return [f"{drawn} of {total} {what} are drawn: {which}"] if drawn < total else []


def _thinned(count: int, most: int = 4000) -> np.ndarray:
    """Return indices of `count` sorted samples to draw: evenly spaced, and all of the slowest 1000."""
    if count <= most:
        return np.arange(count)
    return np.unique(
        np.concatenate([np.linspace(0, count - 1, most - 1000).astype(int), np.arange(count - 1000, count)])
    )
