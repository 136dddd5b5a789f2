"""Temporary folders that outlive no process for long: a killed one can't remove its own, so the next one does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

YOUNG_S = 60.0  # a folder that is younger may not have its lock yet


class Scratch:
    """A temporary folder until `close`. Making one removes those of killed processes with the same prefix.

    A process holds a lock on its folder, which the system releases with the process.
    """

    def __init__(self, prefix: str) -> None:
        for other in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            with contextlib.suppress(OSError):  # a living process has it, another user, or it has just gone
                if time.time() - other.stat().st_mtime < YOUNG_S:
                    continue
                lock = _locked(other)
                try:
                    shutil.rmtree(other)
                finally:
                    os.close(lock)
        self._folder = tempfile.TemporaryDirectory(prefix=prefix)
        self.path = Path(self._folder.name)
        self._lock: int | None = _locked(self.path)

    def close(self) -> None:
        """Remove the folder. A second call does nothing."""
        self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(folder: Path) -> int:
    """Return an open file that has the lock of a folder. Raises OSError if another process has it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(opened)
        raise
    return opened
