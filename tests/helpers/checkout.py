"""Files of the checkout that tests read."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def files(*patterns: str) -> tuple[str, ...]:
    """Paths of all files, tracked or about to be, relative to ROOT. `patterns` are Git's, for example "*.md"."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    paths = sorted(set(listed.stdout.split("\0")) - {""})
    return tuple(path for path in paths if (ROOT / path).is_file())
