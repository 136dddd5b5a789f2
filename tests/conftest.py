"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkout import ROOT
from helpers.command import Grbench, run_forked, run_here, run_in
from helpers.forks import fork_workers

if not torch.cuda.is_available():  # before anything imports Triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the tensors are small
gc.set_threshold(100_000, 50, 100)  # composing makes many objects: a fifth of its time went into looking for cycles
if "PYTEST_XDIST_WORKER" in os.environ:  # processes that tests start share the cores with the other worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that tests start, in whatever folder, import this checkout and tests/helpers, as the tests do.
_FOLDERS = [str(ROOT / name) for name in (".", "kernels", "engines", "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without a serial test when only those are asked for: their imports take longer than the tests."""
    if config.option.markexpr.startswith("serial") and collection_path.match("test_*.py"):
        return "mark.serial" not in collection_path.read_text() or None
    return None


# The files that take most processor time when nothing is kept of an earlier run.
LONGEST = (
    "vllm",
    "vllm_decoder",
    "aoti",
    "tensorrt",
    "hstu_kernels",
    "studies",
    "planted_faults",
    "export",
    "report",
    "runner",
    "tracking",
    "config",
    "structure",
    "cached_engine",
    "kernelbench",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker has one of them left when the other is done."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Leave what is imported out of later collections of garbage, also in forks, which would copy the memory."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let go of what was left out: libraries complain about objects that live on at the end."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker, and both files of vLLM to the same: it imports vLLM, which takes ten seconds."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "vllm" if "/test_vllm" in nodeid else super()._split_scope(nodeid)

    return Files(config, log)


@pytest.fixture
def grbench(tmp_path: Path) -> Grbench:
    """Run `python -m grbench ARGS` in an empty directory."""
    return partial(run_in, tmp_path)


@pytest.fixture
def grbench_forked(tmp_path: Path) -> Grbench:
    """Run `grbench ARGS` in an empty directory and in a fork: a process of its own that need not import anything."""
    return partial(run_forked, tmp_path)


@pytest.fixture
def grbench_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grbench:
    """Run `grbench ARGS` in an empty directory and in this process: for refusals, help and short tables."""
    return partial(run_here, tmp_path, monkeypatch, capsys)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork workers from this process: for runs with `grbench_here` whose subject is not how a worker starts."""
    fork_workers(monkeypatch)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a variant allocates is NaN until it writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
