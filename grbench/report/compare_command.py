"""`grbench compare`: two measurements of the same cells, and which of them is faster."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grbench.config.arguments import Arguments, CommandError
from grbench.execution import records
from grbench.execution.clock import SILENCE_S, at_most_every, pace
from grbench.execution.folders import left_out
from grbench.report.cells import Cell
from grbench.report.compare import MARGIN, Comparison, Verdict, change_text, compare, side_text
from grbench.report.frame import ReportError, read_cells
from grbench.report.screen import unwrapped
from grengines.overrides import override

HEADINGS = ("cell", "metric", "base", "new", "change", "verdict", "runs")
STYLES = {"faster": "green", "slower": "red"}


def parser() -> Arguments:
    """Return the parser of the command's flags."""
    about = (
        "Compare two measurements cell by cell: faster, slower, no difference or undecided, with the interval of the "
        "change. No difference: the interval lies inside --margin. Undecided: none of these is certain. A side is a "
        "record, a folder with records, or REVISION:FOLDER of a git repository. Of several BASEs, those of the machine "
        "of NEW count.\n"
        "Exit codes: 0 no cell is slower, 1 a cell is slower, 2 nothing to compare, 3 no cell is slower, but one is "
        "undecided, 4 a change has no interval: more runs (runner.repeats) make or narrow one."
    )
    examples = [
        "compare outputs/before outputs/after",
        "compare v1.0:reports/reference reports/reference",
        "compare reports/regress_* outputs/studies/regress/TIME --tolerance 0.05",
    ]
    parser = Arguments("compare", about, examples)
    parser.add_argument("base", nargs="+", metavar="BASE", help="the measurement to compare with")
    parser.add_argument("new", metavar="NEW", help="the measurement to judge")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="a cell is slower only beyond this share, e.g. 0.05 (default: %(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        metavar="SHARE",
        help="no difference: the interval lies within this share, at least --tolerance (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Returns 1 if a cell is slower, 4 if a change has no interval, 3 if one is undecided, else 0.

    Raises CommandError if there is nothing to compare.
    """
    args = parser().parse_args(words)
    for flag, share in (("tolerance", args.tolerance), ("margin", args.margin)):
        if not (math.isfinite(share) and share >= 0):
            raise CommandError(f"--{flag} {share}: allowed is a finite number >= 0, such as 0.05 for 5%")
    allowed = (args.tolerance, args.margin)

    def lines(comparison: Comparison) -> Iterator[list[str]]:
        for change in comparison.changes:
            runs = " + ".join(map(str, change.runs))
            verdict = change.verdict(*allowed)
            metric = change.metric.removeprefix("latency_ms/").replace("throughput_rps", "throughput")
            yield [change.cell, metric, *side_text(change), change_text(change), verdict, runs]

    try:
        sides = dict.fromkeys([*args.base, args.new])
        if len(absent := [side for side in sides if ":" not in side and not Path(side).exists()]) > 1:
            makers = ", ".join(shlex.quote(override("runner.output_root", side)) for side in absent)
            raise ReportError(
                f"{', '.join(absent)}: no such folders; check the paths, or make them: `python -m grbench` with "
                f"{makers}"
            )
        with contextlib.ExitStack() as stack:
            lacking: list[str] = []
            new = stack.enter_context(_cells(args.new, lacking))
            base = [cell for side in args.base for cell in stack.enter_context(_cells(side, lacking))]
            for line in lacking:
                _say(f"left out: {line}")
            begun, say = time.monotonic(), at_most_every(SILENCE_S, _say)
            comparison = compare(
                base,
                new,
                lambda done, total: say(
                    f"{done} of {total} cells are compared, {pace(time.monotonic() - begun, done, total)}"
                ),
            )
    except (ReportError, OSError) as e:
        raise CommandError(e) from e
    counts = comparison.counts(*allowed)
    if args.json:
        rows = [asdict(c) | {"verdict": c.verdict(*allowed)} for c in comparison.changes]
        shares = {"tolerance": args.tolerance, "margin": args.margin}
        found = {**asdict(comparison), **shares, "changes": rows, "counts": counts, "left_out": lacking}
        print(json.dumps(records.finite(found), indent=1))
    else:
        _print(list(lines(comparison)), comparison.chosen, comparison.notes)
        print("; ".join(f"{n} {verdict}" for verdict, n in counts.items() if n) or "no metric in common")
    codes = {Verdict.SLOWER: 1, Verdict.UNKNOWN: 4, Verdict.UNDECIDED: 3}
    return next((code for verdict, code in codes.items() if counts[verdict]), 0)


def _say(line: str) -> None:
    print(f"grbench compare: {line}", file=sys.stderr)


def _print(rows: Sequence[Sequence[str]], differing: dict[str, tuple[str, str]], notes: Sequence[str]) -> None:
    console = unwrapped(Console(highlight=False))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in HEADINGS[2:5] else "left")
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    if differing:
        options = ", ".join(f"{key}: {base or '-'} -> {new or '-'}" for key, (base, new) in differing.items())
        console.print(Text(f"base -> new differ in {options}"), soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


@contextlib.contextmanager
def _cells(side: str, lacking: list[str]) -> Iterator[list[Cell]]:
    """Read the cells of a side: a record file, a folder, or REVISION:FOLDER. Raises ReportError.

    lacking: takes a line for each cell whose record can't be read or is not there.
    """
    path = Path(side)
    if path.is_file():
        try:
            cell = path.parent, records.load(path)
        except ValueError as e:
            raise ReportError(str(e)) from None
        yield [cell]
    elif path.is_dir() or ":" not in side:
        yield _readable(path, lacking)
    else:
        with tempfile.TemporaryDirectory(prefix="grbench-compare-") as folder:
            inside = _checkout(side, Path(folder))
            found: list[str] = []
            cells = _readable(inside, found)
            lacking += [line.replace(str(inside), side) for line in found]
            yield cells


def _readable(folder: Path, lacking: list[str]) -> list[Cell]:
    cells = read_cells([folder])
    lacking += left_out([folder])
    return cells


def _checkout(side: str, folder: Path) -> Path:
    """Extract the folder of REVISION:FOLDER into `folder`. Raises ReportError."""
    revision, _, inside = side.partition(":")
    done = subprocess.run(["git", "archive", "--format=tar", revision, inside], capture_output=True, check=False)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()
        raise ReportError(f"{side}: no such folder and no such revision ({why[-1] if why else 'git failed'})")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / inside
