"""`python -m grbench.report`: records or MLflow runs in, one Markdown page and its figures out."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from grbench.report.frame import ReportError, read_cells, unreadable


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 the page was written, 2 what was asked for can't be read or written."""
    parser = argparse.ArgumentParser(
        prog="python -m grbench.report",
        description="Write one Markdown page with tables and figures of cells.",
    )
    parser.add_argument("roots", nargs="*", type=Path, metavar="ROOT", help="folders with records (default: outputs)")
    parser.add_argument("--mlflow", metavar="URI", help="read runs from this tracking URI, e.g. sqlite:///mlruns.db")
    parser.add_argument("--experiment", default="grbench", metavar="NAME", help="of --mlflow (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("report.md"), help="the page (default: %(default)s)")
    parser.add_argument("--title", default="grbench report", help="its heading (default: %(default)s)")
    options = parser.parse_args(arguments)
    roots = options.roots or ([] if options.mlflow else [Path("outputs")])
    try:
        with tempfile.TemporaryDirectory(prefix="grbench-report-") as downloads:
            cells = read_cells(roots)
            if options.mlflow:
                from grbench.report.mlflow_runs import download_cells

                cells += download_cells(options.mlflow, options.experiment, Path(downloads))
            from grbench.report.page import write_page

            written = write_page(cells, options.out, options.title, unreadable(roots))
    except (ReportError, OSError) as e:
        print(f"grbench.report: {e}", file=sys.stderr)
        return 2
    print(f"{written[0]}: {len(cells)} cells, {len(written) - 1} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
