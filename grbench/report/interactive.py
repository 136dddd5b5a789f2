"""Charts for a browser, with plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grbench.report.plots import COLOURS, GREY, PALE

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from grbench.report.chart import Chart, Series

MODES = {"points": "markers", "line": "lines", "line+points": "lines+markers", "steps": "lines"}

# Whole numbers at 1, 2 and 5 of each decade: plotly's own labels between decades are single digits.
_TICKS = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
_LOG = {"type": "log", "tickvals": _TICKS, "ticktext": [f"{tick:g}" for tick in _TICKS]}


def plotly_figure(chart: Chart) -> go.Figure:
    """Return a chart as a plotly figure. Names that are cut elsewhere are whole under the pointer."""
    import plotly.graph_objects as go

    figure = go.Figure([_trace(go, series, chart.error_on) for series in chart.series])
    for axis, value, text in chart.limits:
        line = {"line_dash": "dash", "line_color": GREY, "line_width": 1.5}
        (figure.add_vline if axis == "x" else figure.add_hline)(value, **line)
        place = math.log10(value) if (chart.log_x if axis == "x" else chart.log_y) else value  # plotly's own rule
        across = {"x": place, "y": 1, "yref": "paper"} if axis == "x" else {"y": place, "x": 1, "xref": "paper"}
        figure.add_annotation(text=text, showarrow=False, xanchor="right", yanchor="bottom", **across)
    figure.update_layout(
        title=chart.title,
        template="plotly_white",
        barmode="stack",
        height=190 + 26 * len(chart.rows) if chart.rows else 450,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "traceorder": "normal"},
        showlegend=len(chart.series) > 1,
        margin={"l": 60, "r": 30, "t": 50, "b": 90},
    )
    figure.update_xaxes(title=chart.x, rangemode="tozero", **(_LOG if chart.log_x else {}))
    figure.update_yaxes(title=chart.y, **(_LOG if chart.log_y else {}))
    if chart.rows:
        figure.update_yaxes(
            tickvals=list(range(len(chart.rows))), ticktext=list(chart.rows), autorange="reversed", automargin=True
        )
    return figure


def _ends(measured: Sequence[float], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    """Return intervals as plotly takes them."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [end - value for end, value in zip(high, measured, strict=True)],
        "arrayminus": [value - end for end, value in zip(low, measured, strict=True)],
    }


def _trace(go: Any, series: Series, error_on: str) -> Any:
    colour = PALE if series.colour is None else COLOURS[series.colour % len(COLOURS)]
    x, y = list(series.x), list(series.y)
    hover = list(series.hover) if len(series.hover) == len(x) else list(series.hover) * len(x)
    common = {"name": series.name, "x": x, "y": y, "hovertext": hover or None}
    if series.mode == "bars":
        return go.Bar(orientation="h", marker_color=colour, **common)
    error = {}
    if series.low:
        error = {f"error_{error_on}": _ends(x if error_on == "x" else y, series.low, series.high)}
    if series.x_low:
        error["error_x"] = _ends(x, series.x_low, series.x_high)
    mode = MODES[series.mode] + ("+text" if any(series.texts) else "")
    shape = {"line_shape": "hv"} if series.mode == "steps" else {}
    return go.Scatter(
        mode=mode,
        text=list(series.texts) or None,
        textposition="top right",
        marker_color=colour,
        line_color=colour,
        **shape,
        **error,
        **common,
    )
