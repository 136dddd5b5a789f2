"""Choice of records a sweep keeps, and what a measurement is identified by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, RunSpec
from grbench.execution import environment, records
from grbench.execution.earlier import EarlierRecords
from grbench.execution.environment import code_digest, describe_environment
from grbench.execution.records import RunRecord, Status
from grengines.runtime.cache_dir import content


def cell(path: Path, *more: str) -> RunSpec:
    return compose_spec(["engine=hstu", "workload=csv", f"workload.path='{path}'", *more])[0]


def record_of(spec: RunSpec, status: Status = Status.OK, **environment: Any) -> RunRecord:
    """A record that this machine made, but for what `environment` says."""
    here = {**describe_environment(spec.packages), **environment}
    return RunRecord(spec.to_dict(), spec.hash, status, "2026-01-01T00:00:00+00:00", 1.0, environment=here)


def test_a_file_counts_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    first, other = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("u 1 2")
    other.write_text("u 1 2")
    before = cell(first).hash
    assert cell(other).hash == before
    assert cell(first).to_dict()["workload"]["path"] == str(first)  # the record shows the file's name
    first.write_text("u 2 1")
    assert cell(first).hash != before
    assert list(cell(first).file_contents()) == ["workload.path"]
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"1")
    random, trained = cell(other).hash, cell(other, f"model.weights={weights}")
    assert trained.hash != random and set(trained.file_contents()) == {"workload.path", "model.weights"}


def test_a_folder_and_an_onnx_models_weights_count(tmp_path: Path) -> None:
    (tmp_path / "plan" / "sub").mkdir(parents=True)
    inner = tmp_path / "plan" / "sub" / "part"
    inner.write_text("1")
    found = content(tmp_path / "plan")
    inner.write_text("2")
    changed = content(tmp_path / "plan")
    inner.rename(inner.with_name("renamed"))
    assert len({found, changed, content(tmp_path / "plan")}) == 3
    model, weights = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    model.write_text("graph")
    alone = content(model)
    weights.write_text("1")
    beside = content(model)
    weights.write_text("22")
    assert len({alone, beside, content(model)}) == 3


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("u 1 2")
    found = content(path)
    monkeypatch.setattr("grengines.runtime.cache_dir.sha256", lambda path: pytest.fail("read again"))
    assert content(path) == found


def test_a_missing_file_is_refused_and_a_home_folder_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"workload\.path=none\.csv: no such file; set workload\.path to one that"):
        cell(Path("none.csv"))
    (tmp_path / "a.csv").write_text("u 1 2")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cell(Path("~/a.csv")).to_dict()["workload"]["path"] == str(tmp_path / "a.csv")
    if os.geteuid():
        (tmp_path / "a.csv").chmod(0)
        with pytest.raises(ConfigError, match="it can't be read"):
            cell(tmp_path / "a.csv")


VERSIONS = describe_environment()["versions"]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"cpu": "Another CPU"}, "another machine (Another CPU, "),
        ({"cpu_cores": 4096}, "another machine ("),
        ({"gpus": [{"name": "Some GPU", "driver": "1"}]}, "Some GPU"),
        ({"code": "0" * 12, "git_sha": "f" * 40}, "other code (commit ffffffffffff)"),
        ({"versions": {**VERSIONS, "torch": "1.0"}}, "torch 1.0, here is "),
        ({"python": "3.1"}, "python 3.1, here is "),
    ],
)
def test_a_record_of_another_machine_or_code_is_not_kept(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    (tmp_path / "a.csv").write_text("u 1 2")
    spec, earlier = cell(tmp_path / "a.csv"), EarlierRecords()
    own = record_of(spec)
    earlier.add(tmp_path / "own", own)
    assert earlier.of(spec) == ((tmp_path / "own", own), "")
    earlier.add(tmp_path / "theirs", record_of(spec, **change))
    assert earlier.of(spec) == ((tmp_path / "own", own), "")  # a later one of theirs does not hide it
    earlier = EarlierRecords()
    earlier.add(tmp_path / "theirs", record_of(spec, **change))
    found, said = earlier.of(spec)
    assert found is None and said.startswith("the record of 2026-01-01T00:00:00+00:00 is from ") and why in said


def test_packages_that_no_measurement_depends_on_may_change(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u 1 2")
    spec, earlier = cell(tmp_path / "a.csv"), EarlierRecords()
    earlier.add(tmp_path, record_of(spec, versions={**VERSIONS, "mlflow": "0.1"}, git_sha="f" * 40))
    assert earlier.of(spec)[0] is not None
    assert earlier.of(cell(tmp_path / "a.csv", "seed=1")) == (None, "")


def test_a_timeout_after_less_time_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u 1 2")
    spec, earlier = cell(tmp_path / "a.csv"), EarlierRecords()
    record = record_of(spec, Status.TIMEOUT)
    record.duration_s = 60.3
    earlier.add(tmp_path, record)
    assert earlier.of(spec, 60.0) == ((tmp_path, record), "")
    found, why = earlier.of(spec, 108.0)
    assert found is None and why.endswith(" came after 60 s, and runner.timeout_s=108 is more")
    earlier.add(tmp_path / "oom", record_of(spec, Status.OOM))
    assert earlier.of(spec, 108.0)[0] is not None


def test_what_is_read_depends_on_the_status(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u 1 2")
    specs = {status: cell(tmp_path / "a.csv", f"seed={i}") for i, status in enumerate(Status)}
    for status, spec in specs.items():
        (tmp_path / status).mkdir()
        records.save(record_of(spec, status), tmp_path / status)
    for failed, expected in ((True, set(Status) - {Status.INTERRUPTED}), (False, {Status.OK})):
        earlier = EarlierRecords()
        earlier.read(tmp_path, failed=failed)
        assert {status for status, spec in specs.items() if earlier.of(spec)[0]} == expected


def test_an_edited_file_of_the_code_that_measures_changes_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_digest() == describe_environment()["code"]
    (tmp_path / "measuring").mkdir()
    (tmp_path / "measuring" / "__init__.py").touch()
    (tmp_path / "alone.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "MEASURING", ("measuring", "alone"))
    digests = [code_digest()]
    for path, text in (("measuring/table.json", "{}"), ("alone.py", "x = 1"), ("measuring/notes.md", "words")):
        (tmp_path / path).write_text(text)
        digests.append(code_digest())
    assert len(set(digests)) == 3 and digests[2] == digests[3]  # words do not measure
