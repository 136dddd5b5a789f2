"""The folder of files that can be made again, and digests of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $GRBENCH_CACHE, else $XDG_CACHE_HOME/grbench, else ~/.cache/grbench."""
    if own := os.environ.get("GRBENCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grbench"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits. Raises OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
