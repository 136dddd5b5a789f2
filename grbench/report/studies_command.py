"""`grbench reports`: rebuild the pages under reports/ from their records."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from grbench.config.arguments import Arguments, CommandError
from grbench.report.frame import ReportError
from grkernels.nearest import nearest


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    about = "Rebuild the pages of kept reports from their records and notes, and draw their figures."
    examples = ["reports", "reports --check", "reports batching --keep outputs/studies/batching"]
    parser = Arguments("reports", about, examples)
    parser.add_argument("names", nargs="*", metavar="NAME", help="reports, by folder name (default: all)")
    parser.add_argument(
        "--root", type=Path, default=Path("reports"), help="folder of the reports (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="first replace the records by those under FOLDER")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 1 a page is out of date, 2 records or notes cannot be used."""
    args = parser().parse_args(words)
    if args.keep and len(args.names) != 1:
        raise CommandError("--keep: the records of one report; give its NAME")
    from grbench.report import studies

    kept = {folder.name: folder for folder in studies.folders(args.root)}
    unknown = [] if args.keep else [name for name in args.names if not (args.root / name).is_dir()]
    if not kept and (unknown or not args.names):
        raise CommandError(f"--root {args.root}: no report there; give the folder that holds them")
    if unknown:
        near = nearest(unknown[0], kept)
        raise CommandError(f"{unknown[0]}: no such report; {near}reports of {args.root}: {', '.join(kept)}")
    chosen = [args.root / name for name in args.names] or list(kept.values())
    try:
        if args.keep:
            studies.keep(args.keep, chosen[0])
        if args.check:
            problems = [problem for folder in chosen if (problem := studies.stale(folder))]
            print("\n".join(problems) or f"{len(chosen)} pages are what their records give")
            return 1 if problems else 0
        for folder in chosen:
            print(studies.rebuild(folder))
    except (ReportError, OSError) as e:
        raise CommandError(e) from e
    return 0
