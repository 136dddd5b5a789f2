"""Output of a job: a line per row, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from grbench.cachesim.replay import Row
from grbench.report.cells import figure
from grbench.report.screen import unwrapped

Columns = dict[str, tuple[str, float, str]]  # heading: (metric, factor, format)
COLUMNS: Columns = {
    "hits\n%": ("hit_rate", 100, ".2f"),
    "bytes\n%": ("byte_hit_rate", 100, ".2f"),
    "FLOPs\nsaved %": ("saved_flops_share", 100, ".2f"),
    "hits, % of\nBelady's": ("belady_share", 100, ".1f"),
    "% of the\nlimit's": ("limit_share", 100, ".1f"),
    "over lru\npoints": ("over_lru", 100, "+.2f"),
    "thousand\nrequests/s": ("requests_per_s", 1e-3, ".0f"),
}
TIERS: Columns = {
    "hits on the\ndevice %": ("device_hit_rate", 100, ".2f"),
    "host\n%": ("host_hit_rate", 100, ".2f"),
    "storage\n%": ("storage_hit_rate", 100, ".2f"),
    "tokens\ncomputed": ("computed_tokens", 1, ".0f"),
    "MB a request\nfrom host": ("host_read_mb", 1, ".3g"),
    "to\nhost": ("host_written_mb", 1, ".3g"),
    "from\nstorage": ("storage_read_mb", 1, ".3g"),
    "to\nstorage": ("storage_written_mb", 1, ".3g"),
    "busiest replica\nover mean": ("imbalance", 1, ".3f"),
}
FLEET: Columns = {
    "GPU ms\na request": ("fleet_gpu_ms", 1, ".3f"),
    "requests/s\na GPU": ("fleet_rps_a_gpu", 1, ".0f"),
    "GPUs": ("fleet_gpus", 1, ".0f"),
    "GB a GPU\non the device": ("fleet_device_gb", 1, ".3g"),
    "host": ("fleet_host_gb", 1, ".3g"),
    "storage": ("fleet_storage_gb", 1, ".3g"),
    "loaded\n%": ("fleet_loaded_share", 100, ".0f"),
    "GB/s a GPU\nfrom host": ("fleet_from_host_gb_s", 1, ".3g"),
    "to\nhost": ("fleet_to_host_gb_s", 1, ".3g"),
    "from\nstorage": ("fleet_from_storage_gb_s", 1, ".3g"),
    "to\nstorage": ("fleet_to_storage_gb_s", 1, ".3g"),
}


def tables(metrics: Sequence[dict[str, float]]) -> list[Columns]:
    """Return the columns of each table that has figures in these rows, without columns that have none."""
    found = [
        {heading: column for heading, column in columns.items() if any(column[0] in row for row in metrics)}
        for columns in (TIERS, FLEET)
    ]
    return [COLUMNS, *filter(None, found)]


def line(row: Row) -> str:
    """Describe a finished row in one line."""
    return f"{row.size.gb:.3g} GB  {row.policy}: {100 * row.metrics['hit_rate']:.2f}% hits"


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print a row for each policy, size after size. Nothing is cut or wrapped in a pipe."""
    if not rows:
        return
    console = unwrapped(console)
    console.print(title, soft_wrap=True, highlight=False)
    for columns in tables([row.metrics for row in rows]):
        shown = [row for row in rows if any(metric in row.metrics for metric, *_ in columns.values())]
        console.print(_table(shown, columns))


def _table(rows: Sequence[Row], columns: Columns) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in ("size\nGB", "of all\nstates"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        first, last = row.size != last, row.size
        if first:
            table.add_section()
        cells = [_cell(row.metrics.get(metric), factor, form) for metric, factor, form in columns.values()]
        size = (f"{row.size.gb:.3g}", f"{100 * row.size.share:.3g}%") if first else ("", "")
        table.add_row(*size, row.policy, *cells)
    return table


def _cell(value: float | None, factor: float, form: str) -> str:
    return figure(None) if value is None or value != value else format(factor * value, form)
