"""The charts of a group of rows, in the order of a page."""

from __future__ import annotations

from collections.abc import Callable

from grbench.report.chart import Chart
from grbench.report.cost_charts import cost, energy, hit_latency, quality, stages, time_shares
from grbench.report.groups import Group
from grbench.report.latency_charts import latency_cdf, load_latency, pareto, ranking

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
    energy,
]


def charts(group: Group) -> list[Chart]:
    """Return every chart that the group's rows fill, the one that answers its question first."""
    drawn = [draw(group) for draw in CHARTS] if group.ok else []
    return [chart for chart in drawn if chart is not None]
