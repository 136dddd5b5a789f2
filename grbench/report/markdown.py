"""Markdown: parts of pages, and the report's blocks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from grbench.report.cells import Code

if TYPE_CHECKING:
    from grbench.report.page import Block

LONGEST = 240  # characters of a line of prose
_PART = re.compile("(?<=;) ")  # between the parts of a long sentence
# The end of a sentence: a stop, a space, and a capital, a code span or a bracket; not of "e.g. CUDA".
_END = re.compile(r"""(?<=[\w)`\]*"”][.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.) +(?=[A-Z`*(\[])""")


def sections(blocks: Sequence[Block], figures: Path | None = None, page: Path | None = None) -> list[str]:
    """Return blocks as sections of a page. figures: folder of the charts' PNG files, which `page` links to."""
    from grbench.report.page import Bullets, Figure, Heading, Table, Text

    parts: list[str] = []
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {escape(text)}")
            case Text(text):
                parts.append("\n".join(sentences(text)))
            case Bullets(lines):
                parts += bullets(lines)
            case Table(heads, rows):
                parts.append(table(heads, rows))
            case Figure(name, chart) if figures and page:
                link = quote(Path(os.path.relpath(figures / f"{name}.png", page.parent)).as_posix())
                parts += [f"![{chart.title}]({link})", *bullets(chart.notes)]
    return parts


def code(text: str) -> str:
    """Return `text` on one line as a code span, also if it has backticks. Pipes are escaped for a table."""
    line = " ".join(text.split()).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Its cells are escaped, or code spans."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(code(cell) if isinstance(cell, Code) else escape(cell) for cell in line) + " |"
        for line in lines
    )


def bullets(lines: Sequence[str]) -> list[str]:
    """Return one section with a list, or no section if there are no lines. Each sentence has a line of its own."""
    return ["\n".join("- " + "\n  ".join(sentences(line)) for line in lines)] if lines else []


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, escaped, a long one in its parts. A stop within a code span ends none."""
    line = escape(text)
    spans = [match.span() for match in re.finditer("`[^`]*`", line)]
    ends = [match.end() for match in _END.finditer(line) if not any(a < match.end() < b for a, b in spans)]
    whole = [line[a:b].rstrip() for a, b in zip([0, *ends], [*ends, len(line)], strict=True)]
    return [part for one in whole for part in ([one] if len(one) <= LONGEST or "`" in one else _PART.split(one))]


def escape(text: str) -> str:
    """Return `text` on one line, with what is escaped that ends a table's cell or begins a tag, a link or a picture.

    Texts come from records, which may be those of other people.
    """
    line = " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
    line = re.sub(r"\](?=[(:\[])", r"\]", line)
    return line if line.count("`") % 2 == 0 else line.replace("`", r"\`")
