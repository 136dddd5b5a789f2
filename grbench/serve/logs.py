"""Structured logs: a JSON object a line, on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO


class Log:
    """Writes lines. `file` is standard error by default. A line that can't be written is lost: requests go on."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file

    def info(self, event: str, **facts: Any) -> None:
        """Write what happened as expected."""
        self._write("info", event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """Write that a call was refused: its client can change or repeat it."""
        self._write("warning", event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """Write what went wrong."""
        self._write("error", event, facts)

    def _write(self, level: str, event: str, facts: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "level": level, "event": event, **facts}, default=str)
        with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that has left, a closed file
            print(line, file=self._file or sys.stderr, flush=True)
