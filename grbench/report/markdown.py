"""Markdown parts of pages."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Pipes and angle brackets in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(escape(cell) for cell in line) + " |" for line in lines)


def bullets(lines: Sequence[str]) -> list[str]:
    """Return one section with a list, or no section if there are no lines."""
    return ["\n".join(f"- {escape(line)}" for line in lines)] if lines else []


def escape(text: str) -> str:
    """Return `text` on one line, with the characters escaped that end a table's cell or begin an HTML tag."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
