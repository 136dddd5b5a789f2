"""Output of a job: a line per row, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from grbench.cachesim.replay import Row
from grbench.report.cells import figure

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


def _cell(value: float | None, factor: float, form: str) -> str:
    return figure(None) if value is None or value != value else format(factor * value, form)
