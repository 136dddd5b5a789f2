"""A report as a file: Markdown with PNG figures beside it, one HTML file, CSV or JSON, by the suffix."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from grbench.execution.records import RECORD_FILE
from grbench.report import rows
from grbench.report.cells import Cell
from grbench.report.frame import ReportError
from grbench.report.markdown import sections
from grbench.report.page import Figure, blocks, origin
from grengines.runtime import atomic_io

SUFFIXES = (".md", ".html", ".csv", ".json")


def write_report(cells: Sequence[Cell], out: Path, title: str, remarks: Sequence[str] = ()) -> list[Path]:
    """Write `out` and, for Markdown, figures under `<out's stem>_files/`. Returns all written paths, the report first.

    `remarks` are lines for the reader, such as records that could not be read. Raises ReportError for another suffix,
    and where nothing can be written.
    """
    if out.suffix not in SUFFIXES:
        raise ReportError(f"{out}: the suffix says the form; allowed: {', '.join(SUFFIXES)}")
    if (out.parent / RECORD_FILE).exists():
        raise ReportError(f"{out}: its folder holds the files of a cell; write the report to another one")
    figures: list[Figure] = []
    folder = out.parent / f"{out.stem}_files"
    if out.suffix == ".csv":
        text = rows.as_csv(cells)
    elif out.suffix == ".json":
        text = rows.as_json(cells)
    else:
        content = blocks(cells, [origin(cells), *remarks])
        if out.suffix == ".html":
            from grbench.report import html

            text = html.page(title, content)
        else:
            figures = [block for block in content if isinstance(block, Figure)]
            text = "\n\n".join([f"# {title}", *sections(content, folder, out)]) + "\n"
    try:
        with atomic_io.scratch(folder) as made:  # on a full disk, a page and figures of before stay as they are
            drawn, page = draw(figures, made), made / out.name
            atomic_io.write(page, text.encode())
            if drawn:
                folder.mkdir(exist_ok=True)
            page.replace(out)
            return [out, *(path.replace(folder / path.name) for path in drawn)]
    except OSError as e:
        with contextlib.suppress(OSError):  # it is not empty, or not there
            folder.rmdir()
        why = e.strerror or e
        raise ReportError(f"{out}: {why}; free space there, or give a folder that can be written") from None


def draw(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG into `folder`. Returns the paths."""
    paths = [folder / f"{figure.name}.png" for figure in figures]
    for path, figure in zip(paths, figures, strict=True):
        figure.chart.png(path)
    return paths
