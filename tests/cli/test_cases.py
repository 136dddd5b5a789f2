"""Small inputs with a right value, kept beside the checkout: each check.sh prints PASS or FAIL last.

A check starts whole runs, so `make test` has only the quickest, and `make test-all` (or `make cases`) has all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkout import ROOT
from helpers.properties import PROFILE

CASES = ROOT.parent / "shared" / "cases"
QUICK = ("01-sigterm-orphan", "04-replay-one-instant")  # 16 s of processor time


def _checks() -> list[Path]:
    found = sorted(CASES.glob("*/check.sh"))
    return [check for check in found if PROFILE == "long" or check.parent.name in QUICK]


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
@pytest.mark.parametrize("check", _checks(), ids=lambda check: check.parent.name)
@pytest.mark.timeout(600)
def test_the_case_has_its_right_value(check: Path) -> None:
    environ = {**os.environ, "PY": sys.executable}
    done = subprocess.run(["bash", check], env=environ, capture_output=True, text=True, check=False)
    *_, last = ["", *done.stdout.strip().splitlines()]
    assert last.startswith("PASS"), f"{last or 'it printed nothing'}\n{done.stderr}"
