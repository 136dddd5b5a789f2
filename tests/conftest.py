"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
# Processes that tests start, in whatever folder, import this checkout, as the tests do.
_FOLDERS = [
    str(ROOT / name)
    for name in (".", "kernels", "engines", *(f"tests/{n}" for n in ("", "unit", "kernels", "engines", "cli")))
]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])
Grbench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def grbench(tmp_path: Path) -> Grbench:
    """Run `python -m grbench ARGS` in an empty directory, as a user would."""

    def run(*args: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "grbench", *args],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200", **env},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
