"""Output of a job: a line per row, miss-ratio curves, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from grbench.cachesim.replay import BELADY, LIMIT, Row
from grbench.report.cells import figure
from grbench.report.plots import COLOURS, GREY, MARKERS, Plot

COLUMNS = {  # heading: (metric, factor, format)
    "hits\n%": ("hit_rate", 100, ".2f"),
    "bytes\n%": ("byte_hit_rate", 100, ".2f"),
    "FLOPs\nsaved %": ("saved_flops_share", 100, ".2f"),
    "hits, % of\nBelady's": ("belady_share", 100, ".1f"),
    "% of the\nlimit's": ("limit_share", 100, ".1f"),
    "over lru\npoints": ("over_lru", 100, "+.2f"),
    "thousand\nrequests/s": ("requests_per_s", 1e-3, ".0f"),
}


def line(row: Row) -> str:
    """Describe a finished row in one line."""
    return f"{row.size.gb:.3g} GB  {row.policy}: {100 * row.metrics['hit_rate']:.2f}% hits"


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print a row for each policy, size after size. Nothing is cut or wrapped in a pipe."""
    if not rows:
        return
    if not console.is_terminal:
        console = Console(file=console.file, width=1000, color_system=None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in ("size\nGB", "of all\nstates"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        first, last = row.size != last, row.size
        if first:
            table.add_section()
        cells = [_cell(row.metrics.get(metric), factor, form) for metric, factor, form in COLUMNS.values()]
        size = (f"{row.size.gb:.3g}", f"{100 * row.size.share:.3g}%") if first else ("", "")
        table.add_row(*size, row.policy, *cells)
    console.print(title, soft_wrap=True, highlight=False)
    console.print(table)


def plot(title: str, rows: Sequence[Row], path: Path) -> Path | None:
    """Plot the miss ratio against size, a curve per policy. A single size gives no file and None."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    names = list(dict.fromkeys(row.policy for row in rows))
    if len({row.size for row in rows}) < 2:
        return None
    picture = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = picture.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    styles: dict[str, dict[str, Any]] = {
        BELADY: {"color": "black", "ls": "--", "label": "Belady's rule"},
        LIMIT: {"color": GREY, "ls": ":", "label": "no policy is below"},
    }
    for i, name in enumerate(name for name in names if name not in styles):
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": name}
    for name in names:
        points = [row for row in rows if row.policy == name]
        misses = [100 * (1 - row.metrics["hit_rate"]) for row in points]
        axes.plot([row.size.gb for row in points], misses, **styles[name], lw=1.5, ms=5, alpha=0.85)
    axes.set_xscale("log")
    ticks = sorted({row.size.gb for row in rows})
    axes.set_xticks(ticks, [f"{gb:.3g}" for gb in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("cache size, GB (log)")
    axes.set_ylabel("requests without usable state, %")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Plot(picture).png())
    return path


def _cell(value: float | None, factor: float, form: str) -> str:
    return figure(None) if value is None or value != value else format(factor * value, form)
