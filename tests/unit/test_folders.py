"""Two commands at once in one folder: neither overwrites what the other writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command import Grbench

from grbench.config.compose import compose_spec
from grbench.execution import records, runner
from grbench.execution.folders import only_writer, unused
from grbench.execution.records import Outcome, Status


def test_a_folder_in_use_is_left_to_its_user(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "0"
    with unused(wanted) as first, unused(wanted) as second:
        assert (first, second) == (wanted, wanted.with_name("0.1"))
        (second / records.RECORD_FILE).touch()
    with unused(wanted) as again:
        assert again == wanted  # it was held, and got no record
        (again / records.RECORD_FILE).touch()
    with unused(wanted) as third:
        assert third == wanted.with_name("0.2")


def test_two_cells_at_once_keep_two_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, run = compose_spec(["engine=hstu", "tracking=none"])
    found: list[Path] = []

    def work(*args: Any) -> Outcome:
        if not found:  # while the first measures, another process is asked for the same folder
            found.append(Path())
            found[0] = runner.run_cell(spec, run.runner, tmp_path / "0")[1]
        return Outcome(Status.ERROR, "nothing ran")

    monkeypatch.setattr(runner, "_work", work)
    found.append(runner.run_cell(spec, run.runner, tmp_path / "0")[1])
    assert found == [tmp_path / "0.1", tmp_path / "0"]
    assert len(list(records.find(tmp_path))) == 2


def test_results_have_one_writer(tmp_path: Path, grbench_here: Grbench) -> None:
    words = ["cachesim", "tracking=none", "hydra.run.dir=sim", "workload=synthetic", "workload.max_requests=20"]
    with only_writer(tmp_path / "sim", "out"):
        refused = grbench_here(*words)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "grbench cachesim: sim: another command is writing there; wait for it, or set hydra.run.dir=FOLDER"
    )
    assert grbench_here(*words).returncode == 0
    assert grbench_here(*words).returncode == 0  # the folder is free again


def test_two_trainings_do_not_share_a_checkpoint(tmp_path: Path, grbench_here: Grbench) -> None:
    with only_writer(tmp_path / "weights", "out"):
        refused = grbench_here("train", "task=rank", "tracking=none", "out=weights")
    assert refused.returncode == 2 and refused.stderr.strip().endswith("or set out=FOLDER"), refused.stderr
