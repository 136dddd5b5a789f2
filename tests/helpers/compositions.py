"""Configurations that Hydra composed, kept for the next run: 0.1 s for each of hundreds of choices of groups."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from hydra._internal import defaults_list as lists
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
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
    """Let Hydra leave out a third of its work in this process, which changes no result.

    It parses every file and copies the schemas of all groups for each composition, and for each file with defaults it
    lists what is chosen so far, also where no default refers to that.
    """
    store, listed = ConfigStore.instance(), lists._create_interpolation_map
    Plugins.instance()  # registers the sources
    files: Any = SourcesRegistry.instance().resolve("file")
    read = files.load_config
    parsed: dict[Hashable, bytes] = {}

    def where_needed(overrides: Any, defaults_list: list[Any], self_added: bool) -> DictConfig:
        refers = any(not default.is_override() and default.is_interpolation() for default in defaults_list)
        return listed(overrides, defaults_list, self_added) if refers else DictConfig({})

    def parsed_once(source: ConfigSource, config_path: str) -> ConfigResult:
        file = Path(source.path, source._normalize_file_name(config_path))
        try:
            facts = file.stat()
        except OSError:  # Hydra says what is wrong
            return read(source, config_path)
        key = (source.provider, source.path, file, facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if key not in parsed:
            parsed[key] = pickle.dumps(read(source, config_path))
        return pickle.loads(parsed[key])

    vars(store)["__deepcopy__"] = lambda memo: store
    files.load_config = parsed_once
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
