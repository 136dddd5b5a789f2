"""Fixtures that several test files share.

PyTorch and grbench are imported by processes that run tests, not by the one that hands them to workers: they would
start seconds later.
"""

from __future__ import annotations

import gc
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.checkout import ROOT

if TYPE_CHECKING:
    from helpers.command import Grbench

gc.set_threshold(100_000, 50, 100)  # composing makes many objects: a fifth of its time went into looking for cycles
# Processes that tests start share the cores with the other worker. Those that fork must have no threads of OpenMP.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # it prints a line at each fork; no fork calls gRPC
# Inductor tries each kind of vector instructions in a program of its own, for seven seconds; /proc/cpuinfo has them.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")  # of the code that calls kernels
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a fork waits for ever for the pool of its parent

# As in a shell's background and under nohup, and processes would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Processes that tests start, in whatever folder, import this checkout and tests/helpers, as the tests do.
_FOLDERS = [str(ROOT / name) for name in (".", "kernels", "engines", "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_configure(config: pytest.Config) -> None:
    """Set up PyTorch where tests run, before a test file imports it."""
    if not _worker(config):
        return
    import torch

    if not torch.cuda.is_available():  # before anything imports Triton, which reads it then
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("CUTE_DSL_ARCH", "sm_90a")  # what CuTe compiles for, read when it is imported
    torch.set_num_threads(1)  # the tensors are small


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without a serial test when only those are asked for: their imports take longer than the tests."""
    if config.option.markexpr.startswith("serial") and collection_path.match("test_*.py"):
        return "mark.serial" not in collection_path.read_text() or None
    return None


SECONDS = "grbench/seconds"  # in pytest's cache folder: how long each test took when it last ran
# The files that take longest when nothing is kept of an earlier run.
LONGEST = (
    "aoti",
    "tensorrt",
    "studies",
    "hstu_kernels",
    "operators",
    "vllm",
    "vllm_decoder",
    "cluster",
    "tune",
    "cachesim",
    "config",
    "fp8_projection",
    "fp8_engine",
    "report",
    "runner",
    "structure",
    "tracking",
    "kv8",
    "onnxruntime",
    "cached_engine",
    "export",
    "kernelbench",
    "fp8_attention",
    "planted_faults",
    "wheel",
    "compare",
    "quality_commands",
    "kv8_engine",
    "pages_and_beams",
    "tensor_parallel",
    "serve",
    "hf",
    "notebook",
    "cases",
    "families",
    "search",
    "parallel",
    "serve_load",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that took longest, so that no worker has one of them left when the other is done."""
    cache = getattr(config, "cache", None)
    seconds = cache.get(SECONDS, {}) if cache else {}
    took = {f"test_{name}": 1e-3 * (len(LONGEST) - place) for place, name in enumerate(LONGEST)}
    for item in items:
        took[item.path.stem] = took.get(item.path.stem, 0.0) + seconds.get(item.nodeid, 0.0)
    items.sort(key=lambda item: -took[item.path.stem])


_took: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the phases of each test."""
    _took[report.nodeid] += report.duration


def _worker(config: pytest.Config) -> str:
    """Return the name of this process among those that run tests; "" for the one that hands them to workers."""
    if hasattr(config, "workerinput"):
        return str(config.workerinput["workerid"])
    return "" if getattr(config.option, "numprocesses", None) else "alone"


def pytest_sessionstart(session: pytest.Session) -> None:
    if _worker(session.config):
        from helpers import compositions

        compositions.load()
        compositions.quicken()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what Hydra composed, and how long tests took. The process that starts workers knows how long theirs took."""
    if worker := _worker(session.config):
        from helpers import compositions

        compositions.save(worker)
    cache = getattr(session.config, "cache", None)
    if cache and worker in ("", "alone"):
        cache.set(SECONDS, {**cache.get(SECONDS, {}), **_took})


def pytest_collection_finish() -> None:
    """Leave what is imported out of later collections of garbage, also in forks, which would copy the memory."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from helpers import interpreter

        interpreter.hasten()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let go of what was left out: libraries complain about objects that live on at the end."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker, and all tests of vLLM to the same: it imports vLLM, which takes ten seconds."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "vllm" if "_vllm" in nodeid else super()._split_scope(nodeid)

    return Files(config, log)


@pytest.fixture(scope="session", autouse=True)
def measured_once() -> Iterator[None]:
    """Let engines with a cache measure the cost of computing with one batch, not with five: no test needs its mean."""
    from grengines.hstu import cached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached, "RUNS", 1)
        yield


@pytest.fixture
def grbench(tmp_path: Path) -> Grbench:
    """Run `python -m grbench ARGS` in an empty directory."""
    from helpers.command import run_in

    return partial(run_in, tmp_path)


@pytest.fixture
def grbench_forked(tmp_path: Path) -> Grbench:
    """Run `grbench ARGS` in an empty directory and in a fork: a process of its own that need not import anything."""
    from helpers.command import run_forked

    return partial(run_forked, tmp_path)


@pytest.fixture
def grbench_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Grbench:
    """Run `grbench ARGS` in an empty directory and in this process: for refusals, help and short tables."""
    from helpers.command import run_here

    return partial(run_here, tmp_path, monkeypatch, capsys)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork workers from this process: for runs with `grbench_here` whose subject is not how a worker starts."""
    from helpers.forks import fork_workers

    fork_workers(monkeypatch)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that a variant allocates is NaN until it writes it."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
