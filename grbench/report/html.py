"""The report as one HTML file: the script that draws its figures is in it, so it opens without a network."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from grbench.report.cells import Code
from grbench.report.interactive import plotly_figure
from grbench.report.page import Block, Bullets, Figure, Heading, Table, Text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
code { font-size: 13px; background: #f4f4f4; padding: 1px 4px }
h2 { margin-top: 2em }
.note { color: #555 }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return a whole HTML document."""
    figures = any(isinstance(block, Figure) for block in blocks)
    body = "\n".join(_block(block) for block in blocks)
    script = ""
    if figures:
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{script}</head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(lines):
            return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"
        case Table(heads, rows):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in heads)
            lines = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
            return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        case Figure(name, chart):
            drawn = plotly_figure(chart).to_html(full_html=False, include_plotlyjs=False, div_id=f"figure_{name}")
            notes = "".join(f'<p class="note">{_inline(note)}</p>' for note in chart.notes)
            return f"{drawn}{notes}"


def _cell(text: str) -> str:
    number = re.match(r"[-+\d.]+( \[|$)", text)
    return ('<td class="number">' if number else "<td>") + f"{_inline(text)}</td>"


def _inline(text: str) -> str:
    """Escape a text, and keep its **bold** parts and `code`. Of a code span nothing else is changed."""
    if isinstance(text, Code):
        return f"<code>{html.escape(text, quote=False)}</code>"
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
