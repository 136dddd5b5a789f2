"""`grbench report`: a page, or a table for other programs, from records or MLflow runs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grbench.config.arguments import Arguments, CommandError
from grbench.execution.folders import left_out, require_parent
from grbench.report.cells import number_of
from grbench.report.frame import ReportError, damaged_samples, read_cells


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    about = "Write a report of measured cells: what was found, tables and figures."
    examples = [
        "report outputs --out report.html",
        "report outputs --out cells.csv",
        "report --mlflow http://127.0.0.1:5000 --experiment grbench",
    ]
    form = "file to write, by its suffix .md, .html, .csv or .json (default: %(default)s)"
    parser = Arguments("report", about, examples)
    parser.add_argument("roots", nargs="*", type=Path, metavar="ROOT", help="folders with records (default: outputs)")
    parser.add_argument("--mlflow", metavar="URI", help="read runs from this tracking URI, e.g. sqlite:///mlruns.db")
    parser.add_argument(
        "--experiment", default="grbench", metavar="NAME", help="experiment that --mlflow reads (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("report.md"), help=form)
    parser.add_argument("--title", default="grbench report", help="heading of the page (default: %(default)s)")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 the page is written, 2 a record or the page cannot be read or written."""
    args = parser().parse_args(words)
    roots = args.roots or ([] if args.mlflow else [Path("outputs")])
    require_parent(args.out)
    try:
        with tempfile.TemporaryDirectory(prefix="grbench-report-") as downloads:
            if args.mlflow:
                from grbench.report.mlflow_runs import download

                download(args.mlflow, args.experiment, Path(downloads))
                roots = [*roots, Path(downloads)]  # read together, so that a record that is in both counts once
            cells = read_cells(roots)
            from grbench.report.write import write_report

            damaged = [line.replace(downloads, args.mlflow or "") for line in left_out(roots)]
            written = write_report(cells, args.out, args.title, damaged)
            undrawn = damaged_samples(cells)
    except (ReportError, OSError) as e:
        raise CommandError(e) from e
    for line in damaged:
        print(f"grbench report: left out: {line}", file=sys.stderr)
    for line in undrawn:
        print(f"grbench report: without its curves: {line}", file=sys.stderr)
    figures = f", {number_of(len(written) - 1, 'figure')} in {written[1].parent}" if len(written) > 1 else ""
    print(f"{written[0]}: {number_of(len(cells), 'cell')}{figures}")
    return 0
