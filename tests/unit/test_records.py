"""Records: no speed without a passed gate, and one line for a file that is not a record."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.cells import write_cell
from helpers.checkout import ROOT, files

from grbench.execution import records
from grbench.execution.records import LoggedRow, RunRecord, Status, unreadable
from grbench.report.frame import ReportError, load_frame, read_cells
from grengines.cache.events import Counters
from grengines.cache.items import RowCounters

PASSED = {"passed": True, "error": 1e-6, "tolerance": 2e-5}
FAILED = {"passed": False, "error": 1.0, "tolerance": 2e-5}
EARLY = {"workload/requests": 64.0, "engine_start_s": 1.5}  # known before the gate
WHOLE: dict[str, Any] = {
    "spec": {group: {"name": group} for group in ("model", "engine", "workload", "scenario")},
    "spec_hash": "0123456789ab",
    "status": Status.OK,
    "started_at": "2026-01-02T03:04:05+00:00",
    "duration_s": 1.5,
    "gate": PASSED,
    "metrics": {**EARLY, "latency_ms/p50": 1.0, "throughput_rps": 5.0},
    "intervals": {"latency_ms/p50": [0.9, 1.1]},
}


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = RunRecord(**WHOLE, notes=["a note"], overrides=["seed=1"])
    records.save(record, tmp_path)
    assert records.load(tmp_path) == record
    assert [folder for folder, _ in records.find(tmp_path)] == [tmp_path]


def test_a_figure_without_finite_ends_has_no_interval_in_its_file(tmp_path: Path) -> None:
    """A task without positives among few labelled requests has a loss of NaN, with such an interval."""
    nan = {"quality/loss/liked/auc": math.nan}
    record = RunRecord(**WHOLE | {"metrics": WHOLE["metrics"] | nan})
    record.intervals = record.intervals | {name: [math.nan, math.nan] for name in nan}
    records.save(record, tmp_path)
    assert records.load(tmp_path).intervals == WHOLE["intervals"]


@pytest.mark.parametrize("gate", [{}, FAILED, {"passed": 1}, {"passed": "true"}])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("metrics", {"latency_ms/p50": 1.0}),
        ("metrics", {"throughput_rps": 5.0}),
        ("metrics", {**EARLY, "a_new_figure": 1.0}),
        ("intervals", {"latency_ms/p50": [0.9, 1.1]}),
    ],
)
def test_no_speed_without_a_passed_gate(gate: dict[str, Any], field: str, values: dict[str, Any]) -> None:
    incorrect = {**WHOLE, "status": Status.INCORRECT, "gate": gate, "metrics": EARLY, "intervals": {}}
    record = RunRecord(**incorrect)  # what is known before the gate is no speed
    name = list(values)[-1]
    with pytest.raises(ValueError, match=f"metrics: '{name}' needs a passed gate, gate.passed is "):
        RunRecord(**{**incorrect, field: values})
    setattr(record, field, values)
    with pytest.raises(ValueError, match=name):
        record.to_json()


@pytest.mark.parametrize("measured", [{}, {"measured": {}}, {"measured": {"passed": False}}])
def test_no_speed_without_measured_answers_that_are_right(measured: dict[str, Any]) -> None:
    asked = {**WHOLE, "spec": {**WHOLE["spec"], "gate": {"measured": 128}}}
    RunRecord(**{**asked, "gate": {**PASSED, "measured": {"passed": True}}})
    with pytest.raises(ValueError, match=r"needs measured answers that are right, gate\.measured is"):
        RunRecord(**{**asked, "gate": {**PASSED, **measured}})


def test_figures_that_were_not_checked_are_in_no_record_that_was_judged() -> None:
    early = {**WHOLE, "metrics": EARLY, "intervals": {}, "ungated": {"metrics": {"throughput_rps": 5.0}}}
    RunRecord(**{**early, "status": Status.TIMEOUT})
    for status in (Status.OK, Status.INCORRECT):
        with pytest.raises(ValueError, match=f"^ungated: a record that is {status} has no figures that were not check"):
            RunRecord(**{**early, "status": status})


def test_a_row_of_another_command_has_no_gate_block() -> None:
    row = LoggedRow(**{**WHOLE, "gate": {}})
    assert row.ok and row.metrics["latency_ms/p50"] == 1.0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ({"schema_version": 99}, "schema_version"),
        ({"duration_s": None}, "duration_s is a NoneType, expected is a float"),
        ({"duration_s": ...}, "missing or unknown key 'duration_s'"),
        ({"speed": 1}, "missing or unknown key 'speed'"),
        ({"status": "FINE"}, "status 'FINE' is not one of OK, "),
        ({"status": []}, "status"),
        ({"started_at": 5}, "started_at is a int"),
        ({"metrics": None}, "metrics is a NoneType, expected is a dict"),
        ({"gate": []}, "gate is a list"),
        ({"notes": {}}, "notes is a dict"),
        ({"notes": [5]}, r"notes\[0\] is a int, expected is a str"),
        ({"spec_hash": ["a"]}, "spec_hash is a list, expected is a str"),
        ({"started_at": "soon"}, "started_at is 'soon', expected is a time"),
        ({"started_at": "0001-01-01T00:00:00"}, "started_at is '0001-01-01T00:00:00', expected is a time"),
        ({"error": 5}, "error is a int, expected is a str or NoneType"),
        ({"metrics": {"latency_ms/p50": "1"}}, r"metrics\['latency_ms/p50'\] is a str, expected is a float"),
        ({"intervals": {"latency_ms/p50": [1.0]}}, r"intervals\['latency_ms/p50'\] has 1 ends"),
        ({"spec": {"engine": {"name": "hstu"}}}, "spec.model has no name"),
        ({"gate": {**PASSED, "error": "small"}}, "gate.error is a str"),
        ({"environment": {"gpus": [5]}}, r"environment.gpus\[0\] is a int"),
        ('{"a":' * 100_000, "nested too deeply"),
        ({"metrics": {"throughput_rps": math.nan}}, r"metrics\['throughput_rps'\] is nan, expected is a finite number"),
        ({"metrics": {"throughput_rps": None}}, r"metrics\['throughput_rps'\] is null, expected is a finite number"),
        ({"intervals": {"latency_ms/p50": [1.0, math.inf]}}, r"intervals\['latency_ms/p50'\]\[1\] is inf, expected"),
        ({"gate": FAILED}, "'latency_ms/p50' needs a passed gate, gate.passed is False"),
        ({"gate": ...}, "gate.passed is None"),
    ],
)
def test_a_file_that_is_not_a_record_gives_one_line(tmp_path: Path, change: Any, why: str) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
        records.save(RunRecord(**WHOLE), folder)
    path = bad / records.RECORD_FILE
    if isinstance(change, str):
        path.write_text(change)
    else:
        data = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    with pytest.raises(ValueError, match=why) as caught:
        records.load(bad)
    assert str(path) in str(caught.value)
    assert [folder for folder, _ in read_cells([tmp_path])] == [good]
    [line] = unreadable([tmp_path])
    assert line.startswith(str(path)) and "\n" not in line
    with pytest.warns(UserWarning, match="left out: "):
        assert load_frame(tmp_path).attrs["left_out"] == [line]
    with pytest.raises(ReportError, match=why):
        read_cells([bad])


def test_records_behind_links_are_found_once(tmp_path: Path) -> None:
    """The folder of sweeps may be on another disk. A link may also lead back to where it is."""
    root, disk = tmp_path / "outputs", tmp_path / "disk"
    for folder in (disk / "0", root / "mlartifacts" / "copy"):
        folder.mkdir(parents=True)
        records.save(RunRecord(**WHOLE), folder)
    (root / "sweeps").symlink_to(disk)
    (root / "again").symlink_to(disk)
    (disk / "back").symlink_to(root)
    [(folder, _)] = records.find(root)
    assert folder.samefile(disk / "0")


def test_a_sweeps_list_of_cells_is_followed(tmp_path: Path) -> None:
    first = write_cell(tmp_path / "out" / "sweeps" / "a" / "0", "seed=1", queries=50)
    write_cell(tmp_path / "out" / "studies" / "b" / "1", "seed=2", queries=50)
    study = tmp_path / "out" / "studies" / "b"
    records.list_cells(study, [tmp_path / "out" / "sweeps" / "a" / "0", study / "1"])
    (tmp_path / "out").rename(tmp_path / "moved")
    found = dict(records.find(tmp_path / "moved" / "studies" / "b"))
    assert found[tmp_path / "moved" / "sweeps" / "a" / "0"] == first and len(found) == 2
    assert len(list(records.find(tmp_path / "moved"))) == 2  # none is found twice
    (tmp_path / "moved" / "studies" / "b" / "cells.json").write_text("{")
    assert len(list(records.find(tmp_path / "moved" / "studies" / "b"))) == 1


def test_a_failure_that_was_measured_again_is_not_shown(tmp_path: Path) -> None:
    made = [
        (1, Status.KILLED, "Some CPU"), (1, Status.OK, "Some CPU"),  # superseded
        (2, Status.OK, "Some CPU"), (2, Status.KILLED, "Some CPU"),  # it failed later
        (3, Status.UNAVAILABLE, "Some CPU"), (3, Status.OK, "Another"),  # another machine
        (4, Status.INTERRUPTED, "Some CPU"), (4, Status.OOM, "Some CPU"),  # superseded
        (5, Status.OK, "Some CPU"), (5, Status.OK, "Some CPU"),  # two measurements
    ]  # fmt: skip
    cells = []
    for i, (seed, status, cpu) in enumerate(made):
        record = write_cell(
            tmp_path / str(i), f"seed={seed}", status=status, queries=50, environment={"cpu": cpu, "gpus": []},
            started_at=f"2026-01-01T00:00:{i:02d}+00:00",
        )  # fmt: skip
        cells.append((tmp_path / str(i), record))
    kept = [int(folder.name) for folder, _ in records.without_superseded(cells)]
    assert kept == [1, 2, 3, 4, 5, 7, 8, 9]
    assert [folder for folder, _ in read_cells([tmp_path])] == [tmp_path / str(i) for i in kept]


def test_the_page_about_records_has_every_field() -> None:
    page = (ROOT / "docs/design/running.md").read_text()
    section = page[page.index("## Fields of a record") : page.index("## Reports")]
    spans = re.findall(r"^\| `([^|]+)` \|", section, re.M)
    names = [name for span in spans for name in span.split("`, `")]
    patterns = [re.sub("[A-Z]+", "[^/]+", re.escape(name)).replace(r"\.\.\.", ".+") for name in names]
    known = re.compile("|".join(patterns))
    found = {field.name for field in dataclasses.fields(RunRecord)}
    found |= {f"engine/cache_{field.name}" for field in dataclasses.fields(Counters)}
    found |= {f"engine/items_{field.name}" for field in dataclasses.fields(RowCounters)}
    for path in files("reports/**/record.json"):
        record = records.load(ROOT / path)
        found |= {*record.metrics, *record.intervals, *record.gate, *record.environment}
    found -= {"throughput_rps/in_run", "engine/reread_tokens", "plain_error"}  # the last two: of earlier code
    assert len(found) > 150
    assert not {name for name in found if not known.fullmatch(name)}
    assert not known.fullmatch("engine/cache_thefts")


def test_the_page_about_records_has_every_status() -> None:
    page = (ROOT / "docs/design/running.md").read_text()
    section = page[page.index("## Statuses") : page.index("## Fields of a record")]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(Status)
