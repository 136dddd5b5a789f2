"""Descriptions at the top of a run's page in MLflow: the result as a table, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from grbench.execution.records import LoggedRow, RunRecord
from grbench.report.cells import MISSING, figure, labels
from grbench.report.findings import findings
from grbench.report.markdown import escape, table
from grbench.report.repeats import pooled
from grbench.report.table import columns_for

GAP = "&nbsp;&nbsp;"


def describe_cell(record: RunRecord, run_id: str, pictures: Sequence[str]) -> str:
    """Return Markdown for one cell: findings, figures with their meaning, notes, or the reason of a failure.

    pictures: artifact paths of the run.
    """
    if not record.ok:
        return f"**{record.status}**: {escape(record.error or 'no reason was recorded')}"
    columns = columns_for([record])
    rows = [[column.heading, column.text(record), column.legend.partition(": ")[2]] for column in columns]
    parts = [
        *(escape(finding.sentence) for finding in findings([record])),
        _spaced(["figure", "value", "meaning"], [row for row in rows if row[1] != MISSING]),
        *_pictures(run_id, pictures),
        "\n".join(f"- {escape(note)}" for note in record.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def describe_row(row: LoggedRow) -> str:
    """Return Markdown for one row of kernelbench or cachesim: its figures, or why it failed."""
    if not row.ok:
        return f"**{row.status}**: {escape(row.error or 'no reason was recorded')}"
    return _spaced(["figure", "value"], [[name, figure(value)] for name, value in row.metrics.items()])


def describe_sweep(records: Sequence[RunRecord], run_id: str, pictures: Sequence[str]) -> str:
    """Return Markdown for a sweep: findings, a row for each cell, pictures of the comparison.

    pictures: artifact paths of the sweep's run.
    """
    together = pooled(records)
    columns = columns_for(together)
    rows = [
        [label, record.status, *(column.text(record) if record.ok else MISSING for column in columns)]
        for record, label in zip(together, labels(together), strict=True)
    ]
    parts = [
        "\n".join(f"- {escape(finding.sentence)}" for finding in findings(records)),
        _spaced(["cell", "status", *(column.heading for column in columns)], rows),
        *_pictures(run_id, pictures),
    ]
    return "\n\n".join(part for part in parts if part)


def _spaced(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a gap between its columns: MLflow draws them without one."""
    head, dashes, *others = table(heads, rows).split("\n")
    spaced = [line.replace(" |", f"{GAP} |") for line in (head, *others)]
    return "\n".join([spaced[0], dashes, *spaced[1:]])


def _pictures(run_id: str, paths: Sequence[str]) -> list[str]:
    """Return images with the address of a run's artifacts on MLflow's server."""
    return [f"![{path}](get-artifact?path={quote(path)}&run_uuid={run_id})" for path in paths]
