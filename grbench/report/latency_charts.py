"""Charts of load, throughput and latency.

Every function takes the rows of one group and returns a chart, or None where the rows have nothing to show in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grbench.report.chart import (
    MOST_BARS,
    MOST_CURVES,
    MOST_NUMBERS,
    Chart,
    Series,
    ends,
    left_out,
    limits,
    percentile,
    row_name,
    short,
    strategy_name,
    with_samples,
)
from grbench.report.frame import load_samples
from grbench.report.groups import Group, Row
from grbench.report.repeats import P99_NEEDS, ranking_percentile
from grbench.report.work import offered_load, scenario_of, strategy_of, unit_of

RANKS_NOTE = "{} ranks these cells, because {} of {} have no p99 with an interval: it needs {}"


def load_latency(group: Group) -> Chart | None:
    """Offered load against p99, a line for each strategy: where it rises, the engine cannot follow."""
    if len(group.loads) < 2:
        return None
    metric, notes = percentile(group.ok)
    lines: dict[str, list[Row]] = {}
    for row in group.ok:
        lines.setdefault(strategy_of(row.record), []).append(row)
    shown = list(lines.values())[:MOST_CURVES]
    notes += left_out(len(lines), len(shown), "strategies", "those that lead the table")
    series = []
    names = [strategy_name(rows, i) for i, rows in enumerate(shown)]
    for i, rows in enumerate(shown):
        rows = sorted(rows, key=lambda row: offered_load(row.record) or 0.0)
        numbers = ", ".join(str(number) for number in sorted(row.number for row in rows))
        low, high = ends([row.record for row in rows], metric)
        series.append(
            Series(
                names[i] if names.count(names[i]) == 1 else f"{names[i]} (row {numbers})",
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
        f"Offered load and {short(metric)}",
        f"offered load, {unit_of(first)}",
        f"{short(metric)} latency with 95% interval, ms (log)",
        series,
        log_y=True,
        limits=limits(group, "y"),
        notes=notes,
    )


def pareto(group: Group) -> Chart | None:
    """Throughput against p99, with the front: cells that no other one beats in both."""
    rows = group.ok
    if len(rows) < 2 or (len(group.loads) < 2 and scenario_of(rows[0].record) != "closed_loop"):
        return None  # at one offered load all have its throughput
    metric, notes = percentile(rows)
    points = [(row.record.metrics[metric], row.record.metrics["throughput_rps"]) for row in rows]
    front = front_of(points)
    low, high = ends([row.record for row in rows], metric)
    numbers = [str(row.number) if len(rows) <= MOST_NUMBERS or i in front else "" for i, row in enumerate(rows)]
    names = [row.name for row in rows]
    cells = Series("cells", [p[0] for p in points], [p[1] for p in points], low, high, numbers, names, 0)
    line = Series("Pareto front", [points[i][0] for i in front], [points[i][1] for i in front], colour=1, mode="line")
    return Chart(
        "pareto",
        f"Throughput and {short(metric)}",
        f"{short(metric)} latency with 95% interval, ms (log)",
        "throughput, requests/s",
        [cells, line],
        log_x=True,
        error_on="x",
        limits=limits(group, "x"),
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
    metric, notes = ("throughput_rps", []) if offline else _ranking_latency(group.ok)
    rows = group.ok[:MOST_BARS]
    low, high = ends([row.record for row in rows], metric)
    values = [row.record.metrics[metric] for row in rows]
    title = "Throughput" if offline else f"{short(metric)} latency"
    unit = "throughput, requests/s" if offline else f"{short(metric)} latency with 95% interval, ms (log)"
    places = list(range(len(rows)))
    return Chart(
        "ranking",
        title,
        unit,
        "",
        [Series("cells", values, places, low, high, hover=[row.name for row in rows], colour=0)],
        log_x=not offline,
        error_on="x",
        limits=() if offline else limits(group, "x"),
        rows=[row_name(row) for row in rows],
        notes=notes + left_out(len(group.ok), len(rows), "cells", "the best"),
    )


def _ranking_latency(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return the latency that ranks the rows, with a note if it is not p99."""
    chosen = ranking_percentile([row.record for row in rows])
    if chosen == "p99":
        return "latency_ms/p99", []
    without = sum("latency_ms/p99" not in row.record.intervals for row in rows)
    return f"latency_ms/{chosen}", [RANKS_NOTE.format(chosen, without, len(rows), P99_NEEDS)]


def latency_cdf(group: Group) -> Chart | None:
    """The share of requests that are answered within a time, a curve for each cell, from raw samples."""
    sampled = with_samples(group)
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
                row_name(row),
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
        limits=limits(group, "x"),
        notes=left_out(len(sampled), len(shown), "cells", "the best"),
    )


def _thinned(count: int) -> np.ndarray:
    """Return indices of `count` sorted samples to draw: 3000 evenly spaced ones, and all of the slowest 1000."""
    if count <= 4000:
        return np.arange(count)
    return np.unique(np.concatenate([np.linspace(0, count - 1, 3000).astype(int), np.arange(count - 1000, count)]))
