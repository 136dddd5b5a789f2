"""The folder of files that can be made again: compiled kernels, packages, plans, exports, data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $GRBENCH_CACHE, else $XDG_CACHE_HOME/grbench, else ~/.cache/grbench.

    Raises ValueError for a user without a home folder, as in some containers.
    """
    if own := os.environ.get("GRBENCH_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "grbench"
    try:
        return Path.home() / ".cache" / "grbench"
    except RuntimeError:
        raise ValueError("this user has no home folder; set GRBENCH_CACHE to a folder that can be written") from None
