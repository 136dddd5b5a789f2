"""Charts as PNG, with matplotlib. Nothing here uses pyplot's global state or needs a display."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from grbench.report.chart import Chart, Series

# Okabe and Ito's palette for colour-blind readers, without its yellow (too pale for lines).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX*"
LINES = ["-", "--", ":", "-."]
GREY = "#767676"
PALE = "#BBBBBB"


def png(chart: Chart) -> bytes:
    """Draw a chart."""
    from matplotlib.figure import Figure

    height = 1.4 + 0.3 * len(chart.rows) if chart.rows else 4.5
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    left = np.zeros(len(chart.rows))
    for series in chart.series:
        if series.mode == "bars":
            axes.barh(
                series.y, series.x, left=left, color=_colour(series), edgecolor="white", lw=0.5, label=series.name
            )
            left += np.asarray(series.x)
        else:
            _draw(axes, series, chart.error_on)
    for axis, value, text in chart.limits:
        draw = axes.axvline if axis == "x" else axes.axhline
        draw(value, color=GREY, lw=1.2, ls=(0, (6, 3)), label=text)
    for axis, log in (("x", chart.log_x), ("y", chart.log_y)):
        if log:
            _log(axes, axis)
    if chart.rows:
        axes.set_yticks(range(len(chart.rows)), [_no_maths(name) for name in chart.rows])
        axes.set_ylim(len(chart.rows) - 0.4, -0.6)
        for place, (end, text) in enumerate(zip(left, chart.ends, strict=False)):
            axes.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        axes.margins(x=0.15)
    elif not chart.log_y:
        axes.set_ylim(bottom=min(0, *axes.get_ylim()) if _from_zero(chart) else None)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    axes.set_title(chart.title)
    handles, texts = axes.get_legend_handles_labels()
    if len(texts) > 1:
        columns = 1 if max(map(len, texts)) > 30 else min(len(texts), 4)
        figure.legend(
            handles, texts, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns, frameon=False, fontsize=9
        )
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100, bbox_inches="tight", facecolor="white")  # all, also outside the axes
    return data.getvalue()


def _draw(axes: Axes, series: Series, error_on: str) -> None:
    style: dict[str, Any] = {"color": _colour(series), "label": _no_maths(series.name)}
    if series.mode == "steps":
        line = LINES[(series.colour or 0) // len(COLOURS) % len(LINES)]
        axes.step(series.x, series.y, where="post", lw=1.6, ls=line, **style)
        return
    if series.mode == "line":
        axes.plot(series.x, series.y, lw=1.2, **style)
        return
    error: dict[str, Any] = {}
    if series.low:
        measured = np.asarray(series.x if error_on == "x" else series.y, dtype=float)
        error = {f"{error_on}err": np.abs([measured - series.low, np.asarray(series.high) - measured])}
    if series.x_low:
        error["xerr"] = np.abs(np.asarray(series.x, dtype=float) - [series.x_low, series.x_high])
    marker = MARKERS[(series.colour or 0) % len(MARKERS)]
    axes.errorbar(
        series.x,
        series.y,
        fmt=f"{marker}-" if series.mode == "line+points" else marker,
        ms=5,
        capsize=3,
        lw=1.2,
        **error,
        **style,
    )
    for x, y, text in zip(series.x, series.y, series.texts, strict=False):
        axes.annotate(text, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)


def _colour(series: Series) -> str:
    return PALE if series.colour is None else COLOURS[series.colour % len(COLOURS)]


def _from_zero(chart: Chart) -> bool:
    return all(series.mode != "steps" for series in chart.series) and "AUC" not in chart.y


def _no_maths(text: str) -> str:
    return text.replace("$", r"\$")  # a pair of $ would be maths


def _log(axes: Axes, axis: str) -> None:
    """Give an axis a log scale with decimal numbers, as many as fit."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=subs))
    ticks.set_major_formatter(StrMethodFormatter("{x:g}"))
    ticks.set_minor_formatter(NullFormatter())
