"""results.json: the record of a command that measures rows instead of cells.

The benchmark of kernels, the cache simulator and the programs in experiments/ write one. It holds the command line, the
time at which it began, the environment, facts of the command's own, and `rows`. A row is a dict of scalars, with
measurements under `metrics` if the command has many.
"""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grbench.execution.environment import describe_environment
from grbench.execution.records import finite
from grengines.runtime import atomic_io

RESULTS_FILE = "results.json"
SCHEMA_VERSION = 1


def origin(command: Sequence[str]) -> dict[str, Any]:
    """The facts that every results file begins with: command line, time (ISO 8601, UTC) and environment."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"command": shlex.join(command), "started_at": now, "environment": describe_environment()}


def save(folder: Path, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """Write results.json whole or not at all; an earlier one, with fewer rows, is replaced."""
    path = folder / RESULTS_FILE
    content = {"schema_version": SCHEMA_VERSION, **facts, "rows": list(rows)}
    atomic_io.write(path, (json.dumps(finite(content), indent=1) + "\n").encode())
    return path


def load(path: Path) -> dict[str, Any]:
    """Read one results file. Raises ValueError, naming the file and the key, for anything else, and OSError."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON (line {e.lineno}: {e.msg})") from None
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path}: not results (a JSON object with schema_version {SCHEMA_VERSION} is expected)")
    if missing := [key for key in ("command", "started_at", "environment", "rows") if key not in data]:
        raise ValueError(f"{path}: missing key {missing[0]!r}")
    return data
