"""Configurations that Hydra composed, kept for the next run: 0.1 s for each of hundreds of choices of groups."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list as lists
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

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


def quicken() -> None:
    """Let Hydra leave out a fifth of its work in this process, which changes no result.

    It copies the schemas of all groups for each composition, and for each file with defaults it lists what is chosen so
    far, also where no default refers to that.
    """
    store, listed = ConfigStore.instance(), lists._create_interpolation_map

    def where_needed(overrides: Any, defaults_list: list[Any], self_added: bool) -> DictConfig:
        refers = any(not default.is_override() and default.is_interpolation() for default in defaults_list)
        return listed(overrides, defaults_list, self_added) if refers else DictConfig({})

    vars(store)["__deepcopy__"] = lambda memo: store
    lists._create_interpolation_map = where_needed


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
