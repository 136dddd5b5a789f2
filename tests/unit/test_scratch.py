"""Temporary folders: those of killed processes are removed, those of living ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from grengines.runtime.scratch import Scratch

HOLD = """
import sys
from grengines.runtime.scratch import Scratch
folder = Scratch("grbench-test-")
(folder.path / "model").write_text("large")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_goes_once_its_process_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holds = [sys.executable, "-c", HOLD]
    with subprocess.Popen(
        holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as process:
        try:
            assert process.stdout is not None
            theirs = Path(process.stdout.readline().strip())
            assert theirs.parent == tmp_path
            os.utime(theirs, (0, 0))
            Scratch("grbench-test-").close()
            assert (theirs / "model").exists()  # it lives
            process.kill()
            process.wait()
            young = tmp_path / "grbench-test-young"
            young.mkdir()
            own = Scratch("grbench-test-")
            assert set(tmp_path.iterdir()) == {own.path, young}
            own.close()
            own.close()
            assert list(tmp_path.iterdir()) == [young]
        finally:
            process.kill()
