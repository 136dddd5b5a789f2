"""Table at the end of a run or a sweep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grbench.execution.energy import METRIC as JOULES
from grbench.execution.records import RunRecord, Status
from grbench.report.cells import MISSING, Cell, figure, labels, named, with_interval
from grbench.report.findings import comparable, findings, limit_verdict
from grbench.report.groups import best_first
from grbench.report.repeats import NUMBER, pooled, ranking_percentile, run_count
from grbench.report.screen import unwrapped
from grbench.report.work import LIKE, UNLIKE, model_of, scenario_of

MOST_COLUMNS = 10
P90 = "p90 ms"  # the heading of the column that is there where p99 does not rank
NARROWEST_CELL, LEGIBLE_CELL, GAP = 8, 14, 2  # characters; of the gap one is the divider
INTERVAL = "[low, high]: 95% interval of the figure before it"
STYLES = {Status.OK: "green", Status.UNAVAILABLE: "yellow", Status.INTERRUPTED: "yellow"}  # the others: red


class Column(NamedTuple):
    """Column of figures: heading, legend, and the function that formats a record."""

    heading: str
    legend: str
    text: Callable[[RunRecord], str]


def _metric(name: str, percent: bool = False) -> Callable[[RunRecord], str]:
    def text(record: RunRecord) -> str:
        value = record.metrics.get(name)
        return figure(100 * value if percent and value is not None else value)

    return text


def _of_latency(name: str, interval: bool = False) -> Callable[[RunRecord], str]:
    """Format a latency, except for `offline`: there it is the time in a queue of all requests."""

    def text(record: RunRecord) -> str:
        if scenario_of(record) == "offline":
            return MISSING
        return with_interval(record.metrics.get(name), record.intervals.get(name) if interval else None)

    return text


def _compared(record: RunRecord) -> str:
    sample = record.gate.get("measured")
    return f"{sample['checked']} of {sample['answers']}" if sample else MISSING


def _throughput(record: RunRecord) -> str:
    """Format a throughput, with the interval over repeats where it is a result, and not the offered load."""
    ends = record.intervals.get("throughput_rps") if scenario_of(record) in ("offline", "closed_loop") else None
    return with_interval(record.metrics.get("throughput_rps"), ends)


def _stages(record: RunRecord) -> str:
    values = [record.metrics.get(f"{stage}_ms/p50") for stage in ("retrieve", "rank")]
    return MISSING if None in values else " + ".join(figure(value) for value in values)


def _hit_rate(record: RunRecord) -> str:
    value = record.metrics.get("quality/hr10")
    return MISSING if value is None else f"{value:.4f}"


def _auc(record: RunRecord) -> str:
    tasks = (record.gate.get("quality") or {}).get("tasks") or {}
    return " ".join(f"{task['auc']:.4f}" for task in tasks.values()) or MISSING


def gate_share(record: RunRecord) -> float | None:
    """Return the error against the fp32 reference as a share of the tolerance, or None if no gate ran."""
    error, allowed = record.gate.get("error"), record.gate.get("tolerance")
    return None if error is None or not allowed else error / allowed


def _gate(record: RunRecord) -> str:
    return figure(gate_share(record))


COLUMNS = [  # in the order of the table
    Column("requests/s", "requests/s: answers per second over the whole run", _throughput),
    Column("p50 ms", "p50: median latency from arrival to answer", _of_latency("latency_ms/p50")),
    Column("p99 ms", "p99: 99% of answers are faster", _of_latency("latency_ms/p99", True)),
    Column(
        P90,
        "p90: 90% of answers are faster; it ranks where cells have too few requests for a p99 with an interval",
        _of_latency("latency_ms/p90", True),
    ),
    Column("in limit", "in limit: p99 keeps latency_limit_ms (unsure: its interval does not tell)", limit_verdict),
    Column("queue", "queue: median milliseconds of waiting", _of_latency("queue_ms/p50")),
    Column("compute", "compute: median milliseconds on the device", _metric("compute_ms/p50")),
    Column("J/request", "J/request: joules of the GPU, else of the processor, for each answer", _metric(JOULES)),
    Column("retrieve + rank", "retrieve + rank: median milliseconds of the pipeline's stages", _stages),
    Column("hits %", "hits: requests that found cached state", _metric("cache/hit_rate", percent=True)),
    Column(
        "HR@10", "HR@10: users whose last item is among the first ten of the answer, past items included", _hit_rate
    ),
    Column("AUC", "AUC: by the engine's scores, one a task", _auc),
    Column("compared", "compared: answers of the measurement that were compared with the reference", _compared),
    Column(
        "runs",
        "runs: repeats with other seeds; figures are their geometric means (arithmetic where a run has 0), "
        "and intervals have the spread between them",
        lambda record: str(run_count(record)) if run_count(record) > 1 else MISSING,
    ),
    Column("gate", "gate: error against the fp32 reference, as a share of the tolerance", _gate),
]
# Dropped first to last.
LEAST_NEEDED = [
    "compared",
    "queue",
    "compute",
    "p50 ms",
    "in limit",
    "J/request",
    "hits %",
    "retrieve + rank",
    P90,
]
UNSEEN = "latency_ms/p99.9 withheld"  # begins a note on a percentile that the table has no column for
ROW = "row "  # begins the name of a row of a page


def columns_for(records: list[RunRecord]) -> list[Column]:
    """Return the columns that these records fill. p90 is among them if the sentence goes by it (`findings`)."""
    ok = [record for record in records if record.ok]
    ranked = {ranking_percentile(group) for group in comparable(ok) if scenario_of(group[0]) != "offline"}
    return [
        column
        for column in COLUMNS
        if any(column.text(record) != MISSING for record in ok) and (column.heading != P90 or ranked - {"p99"})
    ]


def fitting(columns: list[Column], records: list[RunRecord], width: int) -> list[Column]:
    """Drop the least needed of `columns` until they fit MOST_COLUMNS and `width` characters."""
    status = max(len("status"), *(len(record.status) for record in records))
    widths = {c.heading: max(len(c.heading), *(len(c.text(record)) for record in records)) for c in columns}
    columns = without_least_needed(columns, MOST_COLUMNS - 2)
    longest = max(map(len, labels(records)))
    for heading in LEAST_NEEDED:
        name = min(NARROWEST_CELL if heading == P90 else LEGIBLE_CELL, longest)  # p90 is the figure that ranks
        if name + GAP + status + sum(GAP + widths[c.heading] for c in columns) <= width:
            break
        columns = [column for column in columns if column.heading != heading]
    return columns


def without_least_needed(columns: list[Column], most: int) -> list[Column]:
    """Drop the least needed of `columns` until at most `most` are left."""
    for heading in LEAST_NEEDED:
        if len(columns) <= most:
            break
        columns = [column for column in columns if column.heading != heading]
    return columns


def cells_table(records: list[RunRecord], columns: list[Column]) -> Table:
    """Return a table with one row per record: its label, its status and `columns`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("cell", overflow="fold", min_width=NARROWEST_CELL)
    table.add_column("status", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for record, label in zip(records, labels(records), strict=True):
        figures = [column.text(record) if record.ok else MISSING for column in columns]
        table.add_row(Text(label), Text(record.status, style=STYLES.get(record.status, "red")), *figures)
    return table


def legend(columns: Sequence[Column], records: Sequence[RunRecord]) -> list[str]:
    """Return the meanings of a name of the model and of the columns, and of intervals and "does not apply"."""
    texts = {column.text(record) if record.ok else MISSING for column in columns for record in records}
    beside = [INTERVAL] if any("[" in text for text in texts) else []
    if MISSING in texts:
        beside.append(f"{MISSING}: does not apply")
    like = [UNLIKE] if any(LIKE in model_of(record) for record in records) else []
    return [*like, *(column.legend for column in columns), *beside]


def print_cells(console: Console, cells: list[Cell]) -> None:
    """Print the table of `cells`, its legend, errors, notes and findings. Nothing is wrapped in a pipe.

    Repeats of a cell share a row. The best of the cells that can be compared comes first.
    """
    if not cells:
        return
    console = unwrapped(console)
    every = [record for _, record in cells]
    records = [record for group in comparable(every) for record in best_first(pooled(group))]
    columns = fitting(columns_for(records), records, console.width)
    console.print(cells_table(records, columns))
    if any(record.ok for record in records):
        console.print(Text("; ".join(legend(columns, records)), style="dim"), soft_wrap=True)
    for record, label in zip(records, labels(records), strict=True):
        if not record.ok:
            line = f"{record.status} {label}: {record.error or 'no reason was recorded'}"
            console.print(Text(line, style=STYLES.get(record.status, "red")), soft_wrap=True)
    for note in notes(records):
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
    for finding in findings(every):
        console.print(Text(finding.sentence, style="bold"), soft_wrap=True)


def notes(records: list[RunRecord], names: Sequence[str] = ()) -> list[str]:
    """Return each note once, without those of `UNSEEN`. Of several cells, those that have it follow.

    Notes that differ only in their numbers are one note, with the range of each number that differs.
    names: of the cells, their labels by default.
    """
    alike: dict[str, tuple[list[str], list[str]]] = {}  # by form: the notes and the cells that have one
    for record, label in zip(records, names or labels(records), strict=True):
        for note in dict.fromkeys(note for note in record.notes if not note.startswith(UNSEEN)):
            texts, cells = alike.setdefault(NUMBER.sub("#", note), ([], []))
            texts.append(note)
            cells.append(label)
    return [_ranges(texts) + _which(list(dict.fromkeys(cells)), len(records)) for texts, cells in alike.values()]


def _which(who: Sequence[str], every: int) -> str:
    """Return in brackets which of `every` cells a note is about, as many by name as MOST_NAMES allows."""
    if len(who) == every:
        return ("", " (both cells)")[every - 1] if every < 3 else f" (all {every} cells)"
    numbers = [name.removeprefix(ROW) for name in who if name.startswith(ROW)]
    if 1 < len(numbers) == len(who):  # a page's rows: a line with the word before each number is hard to read
        two = len(numbers) == 2
        return f" (rows {' and '.join(numbers) if two else spans(sorted(map(int, numbers)))})"
    return f" ({named(who)})"


def _ranges(alike: Sequence[str]) -> str:
    """Return notes that differ only in numbers as one, with "low to high" where they do."""
    found = zip(*(NUMBER.findall(note) for note in alike), strict=True)

    def ends(match: re.Match[str]) -> str:
        numbers = sorted(set(next(found)), key=float)
        return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"

    return NUMBER.sub(ends, alike[0])


def spans(numbers: Sequence[int]) -> str:
    """Return sorted numbers as "1-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
