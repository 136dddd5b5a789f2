"""Markdown pieces that pages are made of."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with one line a row; pipes and angle brackets in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines)


def bullets(lines: Sequence[str]) -> list[str]:
    """One section with a list, or no section where there are no lines."""
    return ["\n".join(f"- {escape(line)}" for line in lines)] if lines else []


def escape(text: str) -> str:
    """`text` on one line, without the characters that would end a table's cell or begin an HTML tag."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
