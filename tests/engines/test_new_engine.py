"""A new engine is one folder and one row: these tests add one from another package and measure it like any other."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command import run_fresh

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, schemas, spec_from_json, spec_to_json
from grbench.execution import records
from grbench.execution.records import Status
from grbench.tools.doctor import findings
from grengines import registry

# The folder: options and the row, which import nothing heavy, and the engine.
FOLDER = {
    "__init__.py": """
from dataclasses import dataclass

from grengines.options import DeviceOptions, option
from grengines.refusals import whole_histories
from grengines.spec import EngineSpec, Package


@dataclass
class ToyOptions(DeviceOptions):
    name: str = "toy"
    delay_ms: float = option(0.0, ge=0)  # of every batch


SPEC = EngineSpec(
    "toy",
    ToyOptions,
    {"rank": "toy_engine.engine:ToyEngine"},
    packages=(Package("numpy", ("numpy",), "pip install numpy"),),
    contradiction=lambda options, asked: whole_histories(asked, "toy"),
)
""",
    "engine.py": """
import time

import torch

from grengines.base import RankingEngine, placement_of
from grengines.models.hstu.model import build_model
from grengines.runtime.batch import pack
from grengines.runtime.results import collect
from grengines.runtime.timing import Marks
from grkernels.operators import Operators


class ToyEngine(RankingEngine):
    name = "toy"

    def __init__(self, options, setup):
        super().__init__(setup, placement_of(options))
        self._options, self._ranker = options, None

    def _load(self, sample, max_batch):
        setup = self._setup
        self._ranker = build_model(
            self._model_config, setup.catalogue, setup.seed, self._device, self._dtype, Operators.eager()
        )

    def _warm_up(self, sample, max_batch):
        self.rank(self._largest(sample, max_batch))

    @torch.inference_mode()
    def rank(self, requests):
        ranker = self._ready(self._ranker)
        self._check_size(requests)
        begun = time.perf_counter()
        time.sleep(self._options.delay_ms / 1e3)
        host = pack(requests, self._encoding)
        batch_ms = (time.perf_counter() - begun) * 1e3
        with self._lock:
            marks = Marks(self._device)
            batch = host.to(self._device)
            marks.add()
            return collect(ranker(batch), [host], marks, batch_ms, {})()

    def _describe(self):
        return {"delay_ms": self._options.delay_ms}

    def _unload(self):
        self._ranker = None
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder that holds the package of the new engine."""
    package = tmp_path / "site" / "toy_engine"
    package.mkdir(parents=True)
    for name, text in FOLDER.items():
        (package / name).write_text(text)
    return package.parent


@pytest.fixture
def registered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the new engine in this process."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(registry.ENGINES, "toy", importlib.import_module("toy_engine").SPEC)
    yield
    sys.modules.pop("toy_engine")


def install(folder: Path, entry: str) -> dict[str, str]:
    """Write the metadata that pip leaves beside a package, and return an environment that finds it."""
    information = folder / "toy_engine-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engine\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[grbench.engines]\n{entry}\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}


def test_an_installed_engine_is_measured(folder: Path, tmp_path: Path) -> None:
    path = install(folder, "toy = toy_engine:SPEC")
    small = ["workload=synthetic", "workload.max_requests=24", "workload.max_history=32", "scenario=closed_loop"]
    small += ["scenario.queries=16", "warmup_batches=1", "gate.requests=2", "tracking=none"]
    [done] = run_fresh(tmp_path, [["engine=toy", "engine.delay_ms=1", "engine.device=cpu", *small]], **path)
    assert done.returncode == 0, done.stderr + done.stdout
    [(_, record)] = records.find(tmp_path / "outputs")
    assert record.status is Status.OK and record.gate["passed"]
    assert (record.actual["engine"], record.actual["delay_ms"], record.actual["device"]) == ("toy", 1.0, "cpu")
    assert record.spec["engine"]["cpu_threads"] == 0


def test_it_is_composed_checked_and_listed_like_any_other(registered: None) -> None:
    spec, _ = compose_spec(["engine=toy", "engine.delay_ms=2"])
    assert (spec.task, spec.engine.delay_ms) == ("rank", 2.0)
    assert spec_from_json(spec_to_json(spec)) == spec
    staged = compose_spec(["engine=pipeline", "engine@engine.retrieve=hstu", "engine@engine.rank=toy"])[0]
    assert staged.engine.rank.name == "toy" and spec_from_json(spec_to_json(staged)) == staged
    for overrides, message in (
        (["engine.delay_ms=-1"], r"engine.delay_ms=-1.0: allowed is float >= 0"),
        (["task=generate"], "task=generate: engine toy can't; allowed: auto, rank"),
        (["scenario.in_flight=2"], "engine toy ends a batch before it takes the next"),
        (["cache=lru"], "cache=lru: engine=toy computes whole histories; set cache=none"),
        (["model=decoder_tiny"], "engine toy runs hstu models only; hf, vllm, remote run decoder models"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_spec(["engine=toy", *overrides])
    assert schemas()["engine"]["toy"] is registry.get("toy").options
    listed = {(finding.kind, finding.name): finding for finding in findings(run=False)}
    assert listed["engine", "toy"].ok
    assert "engine toy" in listed["optional", "numpy"].detail


def test_a_missing_package_and_a_taken_name_are_refused(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="engine 'hstu' is registered already"):
        registry.register(registry.get("hstu"))
    monkeypatch.setattr("grengines.spec.find_spec", lambda name: None)
    assert registry.availability("toy") == "package numpy is not installed; pip install numpy"
    monkeypatch.setitem(registry.ENGINES, "toy", replace(registry.get("toy"), requires=lambda: "no toys here; buy"))
    assert registry.availability("toy") == "no toys here; buy"


@pytest.mark.parametrize(
    "target, message", [("toy_engine:NOTHING", "has no attribute 'NOTHING'"), ("toys:SPEC", "toys")]
)
def test_an_entry_point_that_cannot_be_loaded_is_named(folder: Path, target: str, message: str) -> None:
    env = os.environ | install(folder, f"toy = {target}")
    code = "from grengines import registry; registry.specs()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert f"ValueError: entry point toy of group grbench.engines ({target}): " in line
    assert message in line and line.endswith("; fix or uninstall its package")
