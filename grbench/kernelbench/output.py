"""Output of a job: a line per row, and the tables at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grbench.execution.records import Status
from grbench.kernelbench.bench import ALL_SHAPES, Row
from grbench.report.cells import MISSING, figure
from grbench.report.screen import unwrapped
from grbench.report.table import STYLES

COLUMNS = {  # heading: (metric, factor)
    "ms": ("latency_ms/p50", 1),
    "p10": ("latency_ms/p10", 1),
    "p90": ("latency_ms/p90", 1),
    "TFLOP/s": ("tflops", 1),
    "TB/s": ("tbps", 1),
    "matmul\n%": ("matmul_share", 100),
    "copy\n%": ("copy_share", 100),
    "roof\n%": ("roofline_share", 100),
    "x torch": ("speedup_torch", 1),
    "x peer": ("speedup_peer", 1),
    "error": ("error", 1),
    "allowed": ("error_allowed", 1),
    "cold\ns": ("cold_start_s", 1),
}


def line(row: Row) -> str:
    """Return a finished row in one line."""
    if not row.ok:
        where = "" if row.shape == ALL_SHAPES else f" at {row.shape}"
        return f"{row.family} {row.variant}{where}: {row.status}: {row.reason}"
    m = row.metrics
    return (
        f"  {row.variant}: {figure(m['latency_ms/p50'])} ms  {figure(m['tflops'])} TFLOP/s  {figure(m['tbps'])} TB/s  "
        f"{100 * m['roofline_share']:.0f}% of the roofline  error {m['error']:.1e} of {m['error_allowed']:.1e}"
    )


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """Print one table per family, then the reasons of other rows. Piped output is neither cut nor wrapped."""
    console = unwrapped(console)
    dtypes = {row.dtype for row in rows}
    for family in dict.fromkeys(row.family for row in rows):
        table = Table(
            box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, title=family, title_justify="left"
        )
        for heading in ("shape", *(["dtype"] if len(dtypes) > 1 else []), "variant", "status"):
            table.add_column(heading, no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        place = None
        for row in [r for r in rows if r.family == family and r.status is not Status.UNAVAILABLE]:
            if place not in (None, (row.shape, row.dtype)):
                table.add_section()
            first, place = place != (row.shape, row.dtype), (row.shape, row.dtype)
            cells = [figure(None if (x := row.metrics.get(m)) is None else f * x) for m, f in COLUMNS.values()]
            table.add_row(
                row.shape if first else "",
                *([row.dtype] if len(dtypes) > 1 else []),
                row.variant,
                Text(row.status, style=STYLES.get(row.status, "red")),
                *(cells if any(c != MISSING for c in cells) else [""] * len(cells)),
            )
        if table.row_count:
            console.print(table)
    for words, style in _reasons(rows):
        console.print(Text(words, style=style), soft_wrap=True)


def _reasons(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield each reason why rows are not OK once, with all its rows, and the colour of its line."""
    found: dict[tuple[Status, str, str], list[Row]] = {}
    for row in rows:
        if not row.ok:
            found.setdefault((row.status, row.family, row.reason or ""), []).append(row)
    for (status, family, reason), those in found.items():
        variants, shapes = (
            ", ".join(dict.fromkeys(names)) for names in zip(*((r.variant, r.shape) for r in those), strict=True)
        )
        where = "" if shapes == ALL_SHAPES else f" at {shapes}"
        yield f"{status} {family} {variants}{where}: {reason}", STYLES.get(status, "red")
