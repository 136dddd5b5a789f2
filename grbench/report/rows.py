"""Cells as rows for other programs: JSON with everything, CSV with a column for each figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from grbench.execution.records import finite
from grbench.report.cells import Cell, command, flatten, labels, shown
from grbench.report.findings import findings, limit_verdict


def as_json(cells: Sequence[Cell]) -> str:
    """Return the cells and what was found as one JSON object."""
    records = [record for _, record in cells]
    found = {
        "findings": [finding.sentence for finding in findings(records)],
        "cells": [
            {
                "cell": name,
                "status": record.status,
                "error": record.error,
                "metrics": record.metrics if record.ok else {},
                "intervals": record.intervals if record.ok else {},
                "in_limit": limit_verdict(record),
                "gate": record.gate,
                "notes": record.notes,
                "spec": record.spec,
                "actual": record.actual,
                "environment": record.environment,
                "spec_hash": record.spec_hash,
                "started_at": record.started_at,
                "command": command(record),
                "folder": str(folder),
            }
            for name, (folder, record) in zip(labels(records), cells, strict=True)
        ],
    }
    return json.dumps(finite(found), indent=1) + "\n"


def as_csv(cells: Sequence[Cell]) -> str:
    """Return a line for each cell: its name, options, status, figures with their intervals, and its command."""
    records = [record for _, record in cells]
    lines: list[dict[str, Any]] = []
    for name, (folder, record) in zip(labels(records), cells, strict=True):
        line: dict[str, Any] = {"cell": name, "status": record.status, "error": record.error or ""}
        if record.ok:
            line |= record.metrics
            line |= {f"{metric}/low": low for metric, (low, _) in record.intervals.items()}
            line |= {f"{metric}/high": high for metric, (_, high) in record.intervals.items()}
            line["in_limit"] = limit_verdict(record)
        line |= {f"gate/{key}": record.gate.get(key) for key in ("error", "tolerance")}
        line |= {key: shown(value) for key, value in flatten(record.spec).items()}
        line |= {"started_at": record.started_at, "folder": str(folder), "command": command(record)}
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for line in lines for key in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
