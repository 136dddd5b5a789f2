"""The table that a run or a sweep ends with."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grbench.execution.records import RunRecord, Status
from grbench.report.cells import MISSING, Cell, figure, labels

COLUMNS = {  # heading: metric
    "rps": "throughput_rps",
    "good\nrps": "goodput_rps",
    "p50\nms": "latency_ms/p50",
    "p90\nms": "latency_ms/p90",
    "p99\nms": "latency_ms/p99",
    "p99.9\nms": "latency_ms/p99.9",
    "queue\np50": "queue_ms/p50",
    "comp.\np50": "compute_ms/p50",
}
STAGES = {"retr.\np50": "retrieve_ms/p50", "rank\np50": "rank_ms/p50"}  # of pipelines
STYLES = {Status.OK: "green", Status.UNAVAILABLE: "yellow", Status.INTERRUPTED: "yellow"}  # the others: red


def cells_table(cells: list[Cell]) -> Table:
    """One row a cell: what differs, status, rates, percentiles ("-" where withheld), pipelines' stages, gate error."""
    records = [record for _, record in cells]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("cell", overflow="fold", min_width=8)
    table.add_column("status", no_wrap=True)
    columns = COLUMNS | {h: name for h, name in STAGES.items() if any(name in r.metrics for r in records)}
    for heading in [*columns, "gate\nerror"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for record, label in zip(records, labels(records), strict=True):
        metrics = [figure(record.metrics.get(name)) if record.ok else MISSING for name in columns.values()]
        status = Text(record.status, style=STYLES.get(record.status, "red"))
        table.add_row(Text(label), status, *metrics, figure(record.gate.get("error")))
    return table


def print_cells(console: Console, cells: list[Cell]) -> None:
    """Print the table of `cells`, then errors and notes, one line each; piped, nothing is cut or wrapped."""
    if not cells:
        return
    if not console.is_terminal:
        console = Console(file=console.file, width=1000, color_system=None)
    console.print(cells_table(cells))
    records = [record for _, record in cells]
    for record, label in zip(records, labels(records), strict=True):
        if not record.ok:
            line = f"{record.status} {label}: {record.error or 'no reason was recorded'}"
            console.print(Text(line, style=STYLES.get(record.status, "red")), soft_wrap=True)
    for line in [*intervals(records), *(f"note: {note}" for note in notes(records))]:
        console.print(Text(line, style="dim"), soft_wrap=True)


def intervals(records: list[RunRecord]) -> list[str]:
    """The 95% interval of each percentile in the table, a line a cell."""
    lines = []
    for record, label in zip(records, labels(records), strict=True):
        ends = {name.rpartition("/")[2]: interval for name, interval in record.intervals.items()}
        if record.ok and ends:
            words = "  ".join(f"{name} {figure(low)} to {figure(high)}" for name, (low, high) in ends.items())
            lines.append(f"95% interval, ms: {words}{f' ({label})' if len(records) > 1 else ''}")
    return lines


def notes(records: list[RunRecord]) -> list[str]:
    """Each different note of the records once, followed by the cells that carry it unless all do."""

    def of(who: list[str]) -> str:
        if len(who) == len(records):
            return ""
        return f" ({'; '.join(who)})" if len(who) <= 3 else f" ({len(who)} of {len(records)} cells)"

    carriers: dict[str, list[str]] = {}
    for record, label in zip(records, labels(records), strict=True):
        for note in dict.fromkeys(record.notes):
            carriers.setdefault(note, []).append(label)
    return [note + of(who) for note, who in carriers.items()]
