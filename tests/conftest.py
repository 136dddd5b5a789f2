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

torch.set_num_threads(1)  # the tensors are small
if "PYTEST_XDIST_WORKER" in os.environ:  # processes that tests start share the cores with the other worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# Processes that tests start, in whatever folder, import this checkout, as the tests do.
_FOLDERS = [
    str(ROOT / name)
    for name in (".", "kernels", "engines", *(f"tests/{n}" for n in ("", "unit", "kernels", "engines", "cli")))
]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without a serial test when only those are asked for: their imports take longer than the tests."""
    if config.option.markexpr.startswith("serial") and collection_path.match("test_*.py"):
        return "mark.serial" not in collection_path.read_text() or None
    return None


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
