"""Figures of OK cells. Each `plot_*` takes a frame of `cells_frame`, or the cells themselves.

A notebook shows a figure that is the last line of a cell. With a path, it is also written as PNG.
Nothing here uses pyplot's global state or needs a display.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grbench.execution.records import Status
from grbench.report.cells import Cell
from grbench.report.cells import figure as in_words
from grbench.report.frame import HITS, PARTS, ReportError, cells_frame, load_samples, time_parts

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CURVES = 10  # more distribution curves are hard to distinguish
MAX_LEGEND = 20
MAX_BARS = 40  # a picture of more is taller than screens and pages
# Okabe and Ito's palette for colour-blind readers, without its yellow (too pale for lines).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX*"
LINES = ["-", "--", ":", "-."]
GREY = "#767676"


@dataclass
class Plot:
    """A figure and notes for its reader."""

    figure: Figure
    notes: list[str] = field(default_factory=list)

    def png(self) -> bytes:
        """Return the figure as PNG, including everything outside the axes."""
        data = io.BytesIO()
        self.figure.savefig(data, format="png", dpi=150, bbox_inches="tight", facecolor="white")
        return data.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def plot_latency_cdf(cells: pd.DataFrame | Sequence[Cell], path: Path | None = None) -> Plot:
    """Plot the share of requests answered within a time: one curve per cell, latency limits as lines.

    Curves are from raw samples. At most 10 cells are drawn, those with the lowest p90, and a note names the others.
    Raises ReportError if no cell is OK or samples cannot be read.
    """
    ok = _ok(cells)
    drawn, notes = _fastest(ok, MAX_CURVES)
    figure, axes = _figure(7.5, 4.5)
    for number, row in drawn.iterrows():
        latencies = np.sort(load_samples(row["folder"])["latency_ms"].to_numpy())
        shares = np.arange(1, len(latencies) + 1) / len(latencies)
        keep = _thinned(len(latencies))
        axes.step(
            latencies[keep],
            100 * shares[keep],
            where="post",
            label=_legend(number, row),
            **_style(number),
            lw=1.6,
        )
    for share in (50, 90, 99):
        axes.axhline(share, color=GREY, lw=0.5, alpha=0.5)
    _limits(axes, drawn)
    _log_x(axes)
    axes.set_ylim(0, 102)
    axes.set_yticks([0, 25, 50, 75, 90, 99])
    axes.set_xlabel("latency, ms (log)")
    axes.set_ylabel("requests answered, %")
    axes.set_title("Latency distribution")
    _legend_below(figure, axes)
    return _done(Plot(figure, notes), path)


def plot_throughput_latency(cells: pd.DataFrame | Sequence[Cell], path: Path | None = None) -> Plot:
    """Plot throughput against p99 latency with its 95% interval: one point per cell, best is top left.

    If any cell's p99 is withheld, all cells are drawn at p90, and a note says so.
    Raises ReportError if no cell is OK.
    """
    ok = _ok(cells)
    withheld = int(ok["latency_ms/p99"].isna().sum())
    percent = "p90" if withheld else "p99"
    name = f"latency_ms/{percent}"
    figure, axes = _figure(7.5, 4.5)
    for number, row in ok.iterrows():
        x, y = row[name], row["throughput_rps"]
        low, high = (x if end != end else end for end in (row[f"{name}/low"], row[f"{name}/high"]))
        colour = _style(number)["color"]
        axes.errorbar(x, y, xerr=[[x - low], [high - x]], fmt="o", color=colour, capsize=3, label=_legend(number, row))
        axes.annotate(f"{number}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)
    _limits(axes, ok)
    _log_x(axes)
    axes.set_ylim(0, 1.15 * ok["throughput_rps"].max())
    axes.margins(x=0.15)
    axes.set_xlabel(f"{percent} latency with 95% interval, ms (log)")
    axes.set_ylabel("throughput, requests/s")
    axes.set_title(f"Throughput against {percent} latency")
    notes = []
    if withheld:
        notes.append(
            f"p90 is drawn for all cells: p99 is withheld for {withheld} of them (fewer than 1000 independent samples)"
        )
    if len(ok) <= MAX_LEGEND:
        _legend_below(figure, axes)
    else:
        notes.append("the numbers are the rows of the comparison table")
    return _done(Plot(figure, notes), path)


def plot_time_shares(cells: pd.DataFrame | Sequence[Cell], path: Path | None = None) -> Plot:
    """Plot the parts of the mean latency, one bar per cell: queue, batch, transfer, compute, other.

    The parts are means of the raw samples, which add up to the mean latency (printed at each bar's end). At most 40
    cells are drawn, those with the lowest p90.
    Raises ReportError if no cell is OK or samples cannot be read.
    """
    ok, notes = _fastest(_ok(cells), MAX_BARS)
    parts = time_parts(ok)
    shares = 100 * parts.div(parts["latency_ms"], axis=0)
    figure, axes = _figure(7.5, 1.3 + 0.45 * len(ok))
    places = np.arange(len(ok))[::-1]
    left = np.zeros(len(ok))
    for part, colour in zip([*PARTS, "other_ms"], [*COLOURS[:4], "#BBBBBB"], strict=True):
        width = shares[part].to_numpy()
        axes.barh(places, width, left=left, color=colour, edgecolor="white", lw=0.5, label=part.removesuffix("_ms"))
        left += width
    for place, end, total in zip(places, left, parts["latency_ms"], strict=True):
        axes.text(end + 1, place, f"{in_words(total)} ms", va="center", fontsize=9)
    names = [_wrapped(f"{number} {row['cell']}", 40) for number, row in ok.iterrows()]
    axes.set_yticks(places, names)
    axes.set_xlim(0, 118)
    axes.set_ylim(-0.6, len(ok) - 0.4)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("share of the mean latency, %")
    axes.set_title("Where the time goes")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=5,
        frameon=False,
    )
    notes.insert(0, "means of the raw samples: unlike medians, they add up to the mean latency")
    return _done(Plot(figure, notes), path)


def plot_hit_mix(cells: pd.DataFrame | Sequence[Cell], path: Path | None = None) -> Plot:
    """Plot hits of the user-state cache, p99 and goodput: three panels over the cells, by hit rate.

    Hits are shares of requests whose state was on the device, on the host, or nowhere (all, without a cache). p99 has
    its 95% interval. If any cell's p99 is withheld, p90 is drawn, with a note. Raises ReportError if no cell is OK.
    """
    ok = _ok(cells)
    shares = ok.reindex(columns=HITS).fillna(0.0)
    order = shares.sum(axis=1).sort_values(kind="stable").index
    ok, shares = ok.loc[order], 100 * shares.loc[order]
    percent = "p90" if ok["latency_ms/p99"].isna().any() else "p99"
    name = f"latency_ms/{percent}"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7.5), layout="constrained")
    mix, latency, good = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": [2, 3, 3]})
    places, bottom = np.arange(len(ok)), np.zeros(len(ok))
    found = [("on the device", COLOURS[2]), ("on the host", COLOURS[5])]
    for (label, colour), column in zip(found, HITS, strict=True):
        mix.bar(places, shares[column], bottom=bottom, color=colour, label=label)
        bottom += shares[column].to_numpy()
    mix.bar(places, 100 - bottom, bottom=bottom, color="#DDDDDD", label="nowhere")
    mix.set_ylabel("requests, %")
    mix.set_title(f"Where users' state was found, {percent} latency and goodput")
    mix.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    middle = ok[name].to_numpy()
    ends = ok[[f"{name}/low", f"{name}/high"]].to_numpy()
    reach = np.nan_to_num(np.abs(ends - middle[:, None])).T
    latency.errorbar(places, middle, yerr=reach, fmt="o", color=COLOURS[0], capsize=3)
    for limit in sorted(ok["latency_limit_ms"].dropna().unique()):
        latency.axhline(limit, color=GREY, lw=1.2, ls=(0, (6, 3)))
    latency.set_yscale("log")
    latency.set_ylabel(f"{percent} latency, ms (log)")
    good.plot(places, ok["goodput_rps"], "o", color=COLOURS[1])
    good.set_ylim(0, 1.15 * max(ok["goodput_rps"].max(), 1e-9))
    good.set_ylabel("goodput, requests/s")
    good.set_xticks(places, [f"{number}" for number in ok.index])
    good.set_xlabel("cell (rows of the comparison table), by hit rate")
    for axes in (mix, latency, good):
        axes.spines[["top", "right"]].set_visible(False)
    notes = (
        []
        if percent == "p99"
        else ["p90 is drawn: p99 is withheld for some cells (fewer than 1000 independent samples)"]
    )
    return _done(Plot(figure, notes), path)


def _ok(cells: pd.DataFrame | Sequence[Cell]) -> pd.DataFrame:
    import pandas as pd

    frame = cells if isinstance(cells, pd.DataFrame) else cells_frame(cells)
    ok = frame[frame["status"] == Status.OK]
    if ok.empty:
        raise ReportError(f"nothing to plot: none of {len(frame)} cells is OK")
    return ok


def _fastest(ok: pd.DataFrame, most: int) -> tuple[pd.DataFrame, list[str]]:
    """Return the `most` cells with the lowest p90, in their order, and a note that names the others."""
    if len(ok) <= most:
        return ok, []
    drawn = ok.loc[ok["latency_ms/p90"].nsmallest(most).index.sort_values()]
    left_out = [f"#{number} {row['cell']}" for number, row in ok.iterrows() if number not in drawn.index]
    named = "; ".join(left_out[:MAX_LEGEND]) + (
        f"; and {len(left_out) - MAX_LEGEND} more" * (len(left_out) > MAX_LEGEND)
    )
    return drawn, [f"{len(drawn)} of {len(ok)} cells are drawn, those with the lowest p90; left out: {named}"]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # Agg: no display, no global state
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _done(plot: Plot, path: Path | None) -> Plot:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plot.png())
    return plot


def _style(number: object) -> dict[str, Any]:
    """Return the line style of a cell. It depends on the row, so a cell has one colour in every figure."""
    i = int(str(number)) - 1
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}


def _log_x(axes: Axes) -> None:
    """Give the x-axis a log scale with decimal numbers, as many as fit."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _limits(axes: Axes, frame: pd.DataFrame) -> None:
    for limit in sorted(frame["latency_limit_ms"].dropna().unique()):
        axes.axvline(limit, color=GREY, lw=1.2, ls=(0, (6, 3)), label=f"latency limit {limit:g} ms")


def _legend(number: object, row: pd.Series) -> str:
    return _wrapped(f"{number} {row['cell']}", 50)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, texts = axes.get_legend_handles_labels()
    columns = 2 if len(texts) > 3 else 1
    figure.legend(
        handles,
        texts,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=columns,
        frameon=False,
        fontsize=9,
    )


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False).replace("$", r"\$")  # a pair of $ would be maths


def _thinned(count: int, most: int = 4000) -> np.ndarray:
    """Return indices of `count` sorted samples to draw: evenly spaced, and all of the slowest 1000."""
    if count <= most:
        return np.arange(count)
    return np.unique(
        np.concatenate([np.linspace(0, count - 1, most - 1000).astype(int), np.arange(count - 1000, count)])
    )
