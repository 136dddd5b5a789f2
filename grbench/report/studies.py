"""Reports that are kept: reports/<study>/ with a page that is rebuilt from its records.

A report's folder holds

    notes.md                     a title and what people wrote
    records/<cell>/record.json   as a run leaves it, but without its place in MLflow's store, which readers don't have;
                                 with quality.parquet, and samples.parquet if all are small
    records/<job>/results.json   as `grbench kernels`, `grbench cachesim` and the programs in experiments/ leave it
    README.md                    the page: rebuilt, never edited

All records of a report have one commit, which is clean, and one machine.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grbench.execution import results
from grbench.execution.records import ARTIFACTS, RECORD_FILE, RESAMPLES_FILE, SAMPLES_FILE, unreadable
from grbench.report.cells import Cell, labels
from grbench.report.frame import ReportError, has_samples, read_cells
from grbench.report.markdown import sections as written
from grbench.report.page import Figure, blocks, environment_blocks
from grbench.report.provenance import Origin, check_origin
from grbench.report.results import charts_of, results_sections
from grbench.report.write import draw
from grengines.runtime import atomic_io

NOTES, PAGE, RECORDS, FIGURES = "notes.md", "README.md", "records", "figures"
SMALL = 512 * 1024  # bytes: samples are kept where those of all cells take no more
HEADER = (
    "<!-- Rebuilt by `make reports` from records/ and notes.md: edit those. -->\n\n"
    "*Notes* was written by people. All other sections are generated from [records/](records)."
)


def study_page(folder: Path) -> str:
    """The page of a report, from its notes and records alone.

    Raises ReportError if notes or records are missing or unreadable, if a record has a dirty or unknown commit,
    and if two differ in commit or machine.
    """
    title, prose = _notes(folder)
    cells, tables, origin = _read(folder / RECORDS)
    days = sorted({record.started_at[:10] for _, record in cells} | {data["started_at"][:10] for _, data in tables})
    sections = [title, HEADER, f"Measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}: {origin}."]
    sections += [f"The study: [{path}](../../{path})." for path in _definitions(folder, cells, tables)]
    sections += ["## Notes", prose.strip()] if prose.strip() else []
    sections += ["## Summary", *written(blocks(cells, figures=False))] if cells else []
    if tables:
        sections += results_sections([(path.parent.name, data) for path, data in tables])
        drawn = [f"`{FIGURES}/{figure.name}.png`" for figure in _charts(tables)]
        sections += ["## Figures", f"`make reports` draws {' and '.join(drawn)}."] if drawn else []
        environments = [(number, data["environment"]) for number, (_, data) in enumerate(tables, 1)]
        sections += [] if cells else written(environment_blocks(environments))
    return "\n\n".join(sections) + "\n"


def rebuild(folder: Path) -> Path:
    """Write a report's page and draw its figures into figures/, which git ignores. Raises ReportError."""
    page = folder / PAGE
    atomic_io.write(page, study_page(folder).encode())
    shutil.rmtree(folder / FIGURES, ignore_errors=True)
    cells, tables, _ = _read(folder / RECORDS)
    figures = [block for block in blocks(cells) if isinstance(block, Figure)] if cells else []
    if figures := [*figures, *_charts(tables)]:
        draw(figures, folder / FIGURES)
    return page


def _charts(tables: Sequence[tuple[Path, dict[str, Any]]]) -> list[Figure]:
    """The charts of results files, named after the folder of each."""
    return [Figure(f"{path.parent.name}_{chart.key}", chart) for path, data in tables for chart in charts_of(data)]


def stale(folder: Path) -> str | None:
    """Return why a report's page differs from what its records give, or None. Raises ReportError."""
    page = folder / PAGE
    if not page.is_file():
        return f"{page}: missing; `make reports` writes it"
    if page.read_text(encoding="utf-8") != study_page(folder):
        return f"{page}: not what its records and notes give; `make reports` rebuilds it"
    return None


def keep(source: Path, folder: Path) -> None:
    """Replace a report's records by those under `source`. Raises ReportError or OSError before anything is removed."""
    _notes(folder)
    cells, tables, _ = _read(source)
    samples = [path / SAMPLES_FILE for path, _ in cells if has_samples(path)]
    small = sum(file.stat().st_size for file in samples) <= SMALL
    wanted = {RESAMPLES_FILE, *([SAMPLES_FILE] if small else [])}
    with atomic_io.scratch(folder / RECORDS) as made:
        for (path, _), label in zip(cells, labels([record for _, record in cells]), strict=True):
            target = made / re.sub(r"[^\w=.,-]+", "_", label)
            target.mkdir()
            record = json.loads((path / RECORD_FILE).read_text()) | {"tracking": {}}
            atomic_io.write(target / RECORD_FILE, json.dumps(record, indent=1, sort_keys=True).encode())
            for name in wanted:
                if (path / name).is_file():
                    shutil.copy(path / name, target)
        for path, _ in tables:
            target = made / ("_".join(path.parent.relative_to(source).parts) or folder.name)
            target.mkdir()
            shutil.copy(path, target)
        atomic_io.discard(folder / RECORDS)
        atomic_io.publish(made, folder / RECORDS)


def folders(root: Path) -> Iterator[Path]:
    """The folders of reports under `root`, by name."""
    yield from sorted(path.parent for path in root.glob(f"*/{NOTES}"))


def _notes(folder: Path) -> tuple[str, str]:
    """The title and the prose that people wrote. Raises ReportError, with the command that makes the file."""
    notes = folder / NOTES
    title, _, prose = notes.read_text(encoding="utf-8").partition("\n") if notes.is_file() else ("", "", "")
    if not title.startswith("# "):
        fix = f"mkdir -p {shlex.quote(str(folder))} && echo '# TITLE' > {shlex.quote(str(notes))}"
        raise ReportError(f"{notes}: needed, with a title as its first line: {fix}")
    return title, prose


def _read(root: Path) -> tuple[list[Cell], list[tuple[Path, dict[str, Any]]], Origin]:
    """The cells and the results files (with their paths) under `root`, and the one origin of all of them."""
    if problems := unreadable([root]):
        raise ReportError(problems[0])
    cells = read_cells([root]) if _below(root, RECORD_FILE) else []
    try:
        tables = [(path, results.load(path)) for path in _below(root, results.RESULTS_FILE)]
    except ValueError as e:
        raise ReportError(str(e)) from None
    for path, data in tables:
        try:
            charts_of(data)
        except ValueError as e:
            raise ReportError(f"{path}: {e}") from None
    environments = {str(path / RECORD_FILE): record.environment for path, record in cells}
    environments |= {str(path): data["environment"] for path, data in tables}
    if not environments:
        raise ReportError(f"{root}: no {RECORD_FILE} and no {results.RESULTS_FILE} below it")
    return cells, tables, check_origin(environments)


def _below(root: Path, name: str) -> list[Path]:
    """Return the files of a name under `root`, without MLflow's copies."""
    return sorted(path for path in root.rglob(name) if ARTIFACTS not in path.relative_to(root).parts)


def _definitions(folder: Path, cells: Sequence[Cell], tables: Sequence[tuple[Path, dict[str, Any]]]) -> list[str]:
    """Files of the studies and programs that the commands name, else of the report's name, relative to the checkout."""
    words = " ".join([*(word for _, record in cells for word in record.overrides), *(d["command"] for _, d in tables)])
    found = [f"experiments/study/{name}.yaml" for name in re.findall(r"\bstudy=(\w+)", words)]
    found += re.findall(r"\bexperiments/\w+\.py\b", words)
    named = [f"experiments/study/{folder.name}.yaml", f"experiments/{folder.name}.py"]
    return [path for path in dict.fromkeys(found or named) if (folder.parent.parent / path).is_file()]
