"""Charts of what an answer costs and where the time goes: parts, stages, machine time, joules, hits, quality.

Every function takes the rows of one group and returns a chart, or None where the rows have nothing to show in it.
"""

from __future__ import annotations

from grbench.execution.energy import METRIC as JOULES
from grbench.execution.records import PARTS, RunRecord
from grbench.report.cells import figure
from grbench.report.chart import (
    MOST_BARS,
    Chart,
    Series,
    bars,
    ends,
    left_out,
    limits,
    numbers,
    percentile,
    row_name,
    short,
    with_samples,
)
from grbench.report.frame import mean_parts
from grbench.report.groups import Group
from grbench.report.work import scenario_of


def time_shares(group: Group) -> Chart | None:
    """The parts of the mean latency, a bar for each cell: means add up to the mean latency, medians do not."""
    sampled = with_samples(group)
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
        rows=[row_name(row) for row in rows],
        ends=[f"{figure(mean['latency_ms'])} ms" for mean in parts],
        notes=left_out(len(sampled), len(rows), "cells", "the best"),
    )


def stages(group: Group) -> Chart | None:
    """The medians of a pipeline's stages, a bar for each cell."""
    return bars(
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
    return bars(
        group,
        "cost",
        f"Cost: {device} time",
        f"{device}-seconds per thousand requests",
        {f"{device}-seconds": lambda record: 1000 / record.metrics["throughput_rps"]},
    )


def energy(group: Group) -> Chart | None:
    """Energy of a thousand requests, at any load: an idle device takes energy too."""
    if len(group.ok) < 2:
        return None
    return bars(
        group,
        "energy",
        "Cost: energy",
        "joules of the device per thousand requests",
        {"joules": lambda record: 1000 * record.metrics[JOULES] if JOULES in record.metrics else None},
    )


def hit_latency(group: Group) -> Chart | None:
    """Cache hit rate against p99."""
    rows = [row for row in group.ok if "cache/hit_rate" in row.record.metrics]
    if not rows or len(group.ok) < 2 or scenario_of(rows[0].record) == "offline":
        return None
    rows += [row for row in group.ok if row not in rows]  # without a cache nothing is hit
    metric, notes = percentile(rows)
    low, high = ends([row.record for row in rows], metric)
    return Chart(
        "hit_latency",
        f"Hit rate and {short(metric)}",
        "requests that found cached state, %",
        f"{short(metric)} latency with 95% interval, ms (log)",
        [
            Series(
                "cells",
                [100 * row.record.metrics.get("cache/hit_rate", 0.0) for row in rows],
                [row.record.metrics[metric] for row in rows],
                low,
                high,
                numbers(rows),
                [row.name for row in rows],
                0,
            )
        ],
        log_y=True,
        limits=limits(group, "y"),
        notes=notes,
    )


def quality(group: Group) -> Chart | None:
    """Speed against AUC, a colour for each precision: what a faster precision costs in answers."""
    rows = [row for row in group.ok if mean_auc(row.record) is not None]
    if len(rows) < 2:
        return None
    offline = scenario_of(rows[0].record) == "offline"
    metric, notes = ("throughput_rps", []) if offline else percentile(rows)
    series = []
    for i, precision in enumerate(dict.fromkeys(precision_of(row.record) for row in rows)):
        those = [row for row in rows if precision_of(row.record) == precision]
        low, high = ends([row.record for row in those], metric)
        series.append(
            Series(
                precision,
                [row.record.metrics[metric] for row in those],
                [mean_auc(row.record) or 0.0 for row in those],
                low,
                high,
                numbers(those),
                [row.name for row in those],
                i,
            )
        )
    return Chart(
        "quality",
        "Speed and AUC by precision",
        "throughput, requests/s" if offline else f"{short(metric)} latency with 95% interval, ms (log)",
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
