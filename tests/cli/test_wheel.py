"""The wheel, installed without the checkout: its files, its metadata and its command in an empty folder."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.checkout import ROOT

import grbench
from grbench.execution import records
from grbench.execution.records import Status

PIP = [sys.executable, "-m", "pip"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel of the checkout, built with the build backend that is installed here and without a network."""
    folder = tmp_path_factory.mktemp("dist")
    build = ["wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run([*PIP, *build], check=True, timeout=250)
    return next(folder.glob("grbench-*.whl"))


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Environment with the wheel installed. It borrows the dependencies of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=250)
    python = str(folder / "bin" / "python")
    install = ["install", "-q", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([*PIP, "--python", python, *install], check=True, timeout=250)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A .pth file in the borrowed folder is not read, so an editable grbench there stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    yield folder


def without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_wheel_has_configs_types_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        [metadata] = [email.message_from_bytes(file.read(name)) for name in names if name.endswith("/METADATA")]
    assert {
        "grbench/py.typed",
        "grkernels/py.typed",
        "grengines/py.typed",
        "grengines/runtime/native.c",
        "grbench/conf/config.yaml",
        "grbench/experiments/study/batching.yaml",
    } <= names
    assert {Path(name).name for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    assert metadata["Version"] == grbench.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_wheel_composes_outside_the_checkout(venv: Path, tmp_path: Path) -> None:
    code = "import grbench.config.compose as c; print(c.CONFIG_DIR); print(c.compose_spec([])[0].engine.name)"
    python = str(venv / "bin" / "python")
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=without_checkout(), timeout=250
    )
    config_dir, engine = done.stdout.splitlines()
    assert Path(config_dir).is_relative_to(venv), done.stderr
    assert config_dir.endswith("/site-packages/grbench/conf")
    assert engine == "pipeline"


def test_the_installed_command_measures_a_cell_in_an_empty_folder(venv: Path, tmp_path: Path) -> None:
    overrides = ["engine=hstu", "workload=synthetic", "workload.max_requests=64", "workload.max_history=64"]
    overrides += ["scenario=closed_loop", "scenario.queries=64", "gate.requests=2", "tracking=none"]
    cores = len(os.sched_getaffinity(0))
    places = min(2, cores)  # with two, the cell has a place, which is a process too
    overrides += [f"runner.parallel={places}"]
    done = subprocess.run(
        [str(venv / "bin" / "grbench"), *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=without_checkout(),
        timeout=250,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    [(_, record)] = list(records.find(tmp_path / "outputs"))
    assert record.status is Status.OK
    assert record.gate["passed"]
    assert record.environment["cpu_cores"] == cores // places
