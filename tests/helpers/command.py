"""The `grbench` command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Grbench = Callable[..., subprocess.CompletedProcess[str]]


def run_in(folder: Path, *args: str, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m grbench ARGS` in a folder; `env` adds environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "grbench", *args],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
