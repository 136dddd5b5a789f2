"""Configurations that Hydra composed, kept for the next run: 0.2 s for each of hundreds of choices of groups."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
from pathlib import Path

from grbench.config import composition
from helpers import kept

SOURCES = ("conf/**/*.yaml", "experiments/study/**/*.yaml", "grbench/**/*.py", "engines/**/*.py", "kernels/**/*.py")


def load() -> None:
    """Take what earlier runs composed of the same files, code and packages."""
    composition.KEPT = 1000
    for file in _folder().glob("*.pickle"):
        for key, value in pickle.loads(file.read_bytes()):
            with contextlib.suppress(ImportError, AttributeError):  # it names a schema of a test's own
                composition._kept[pickle.loads(key)] = value


def save(worker: str) -> None:
    """Keep what this process has, in a file of its own."""
    folder = _folder()
    found = []
    for key, value in composition._kept.items():
        with contextlib.suppress(AttributeError, TypeError, pickle.PicklingError):  # it names this process's loader
            found.append((pickle.dumps(key), value))
    with contextlib.suppress(OSError):  # the checkout may be for reading only
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{worker}.{os.getpid()}"
        made.write_bytes(pickle.dumps(found))
        made.rename(folder / f"{worker}.pickle")
    for old in kept.KEPT.glob("compositions-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


@functools.cache  # of the files as they were imported: one may be edited while the tests run
def _folder() -> Path:
    return kept.KEPT / f"compositions-{kept.digest_of(SOURCES)}"
