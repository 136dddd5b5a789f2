"""The Python API: real cells in worker processes, their records and their frame."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import grbench
from grbench.execution import records

CELL = [
    "engine=hstu", "scenario=offline", "workload=synthetic", "workload.visits=60", "scenario.queries=8",
    "warmup_batches=1", "tracking=none",
]  # fmt: skip


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_returns_records_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "it's here"
    both = grbench.run([*CELL, "scenario.max_batch=2,4"], sweep=True, output_root=root)
    assert [record.status for record in both] == [grbench.Status.OK] * 2
    assert [record.spec["scenario"]["max_batch"] for record in both] == [2, 4]
    assert all(record.metrics["throughput_rps"] > 0 and record.gate["passed"] for record in both)
    assert capfd.readouterr() == ("", "")
    on_disk = {record.spec_hash: folder for folder, record in records.find(root)}
    assert set(on_disk) == {record.spec_hash for record in both}
    assert {folder.relative_to(root).parts[::2] for folder in on_disk.values()} == {("sweeps", "0"), ("sweeps", "1")}

    again = grbench.run([*CELL, "scenario.max_batch=4,2"], sweep=True, output_root=root, progress=True)
    assert [record.started_at for record in again] == [record.started_at for record in reversed(both)]
    assert capfd.readouterr().err.count("kept (rerun=true measures it again)") == 2

    frame = grbench.frame(root)
    assert list(frame.status) == ["OK", "OK"] and set(frame.folder) == set(on_disk.values())
    assert list(frame["scenario.max_batch"]) == [2, 4]


@pytest.mark.usefixtures("forked_workers")
def test_a_failed_cell_is_a_record_and_a_wrong_override_raises(tmp_path: Path) -> None:
    of_others = {"token_table": np.zeros((7, 64), np.float32), "head_hidden.weight": np.zeros((2, 2), np.float32)}
    save_file(of_others, tmp_path / "few.safetensors")
    [record] = grbench.run([*CELL, f"model.weights={tmp_path}/few.safetensors"], output_root=tmp_path)
    assert record.status is grbench.Status.ERROR and record.error and "few.safetensors: tensor " in record.error
    with pytest.raises(grbench.ConfigError, match=r"scenario\.max_batch=0: allowed is"):
        grbench.run([*CELL, "scenario.max_batch=2,0"], sweep=True, output_root=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_sweep_that_is_refused_is_not_one_that_runs(tmp_path: Path) -> None:
    """A notebook keeps the last error, and with it all that the call had."""
    kept = []
    for _ in range(2):
        with pytest.raises(grbench.ConfigError, match=r"^runner\.parallel=4096: this machine has ") as error:
            grbench.run([*CELL, "scenario.max_batch=2,4", "runner.parallel=4096"], sweep=True, output_root=tmp_path)
        kept.append(error)


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import grbench; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert packages - set(sys.stdlib_module_names) == {"grbench"}
    assert set(grbench.__all__) <= set(dir(grbench))
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        grbench.rum  # noqa: B018
