"""`grbench compare`: what it claims, how often it is wrong, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.cells import write_cell
from helpers.command import Grbench

from grbench.execution.records import Status
from grbench.report import compare_command
from grbench.report.compare import Change, Verdict, bootstrap_interval, compare, t_interval
from grbench.report.frame import ReportError, read_cells
from grkernels import fp8

MACHINE = {"git_sha": "abc1234", "cpu": "Some CPU", "cpu_cores": 2, "gpus": []}


def runs(folder: Path, *overrides: str, throughput: float = 100.0, seeds: int = 5, spread: float = 0.01) -> None:
    """Offline cells, one a seed, whose throughput is drawn from a lognormal distribution."""
    rng = np.random.default_rng(list(folder.name.encode()))
    for seed in range(seeds):
        rate = throughput * float(np.exp(rng.normal(0, spread)))
        name = "-".join([*overrides, str(seed)]).replace(".", "_")
        write_cell(folder / name, *overrides, "scenario=offline", f"seed={seed}", metrics={"throughput_rps": rate})


def sides(folder: Path) -> tuple[Any, Any]:
    return tuple(read_cells([folder / side]) for side in ("base", "new"))


@pytest.mark.parametrize(("factor", "expected"), [(0.9, Verdict.SLOWER), (1.0, Verdict.SAME), (1.1, Verdict.FASTER)])
def test_repeats_tell_a_tenth_and_do_not_tell_nothing(tmp_path: Path, factor: float, expected: Verdict) -> None:
    runs(tmp_path / "base")
    runs(tmp_path / "new", "kernel=triton", throughput=100 * factor)
    comparison = compare(*sides(tmp_path))
    assert comparison.differing["kernel"] == ("torch", "triton")
    [change] = comparison.changes
    assert (change.runs, change.metric, change.verdict()) == ((5, 5), "throughput_rps", expected)
    assert change.low < factor < change.high and change.low < change.ratio < change.high
    assert change.ratio == pytest.approx(change.new / change.base)
    assert comparison.notes == []


@pytest.mark.parametrize("shared", [True, False])  # each pair of runs has something in common, such as its trace
def test_equal_runs_are_called_different_one_time_in_twenty(shared: bool) -> None:
    rng = np.random.default_rng(0)
    wrong = found = 0
    for _ in range(2000):
        traces = rng.normal(0, 0.1, 5) if shared else np.zeros(5)
        base, new = (traces + rng.normal(0, 0.015, 5) for _ in range(2))
        middle, half = t_interval(base, new, paired=shared, confidence=0.95)
        wrong += abs(middle) > half
        found += t_interval(base, new + np.log(1.05), shared, 0.95)[0] > half
    assert 0.035 < wrong / 2000 < 0.065
    assert found / 2000 > 0.9  # 5% in 1.5% of spread


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("order", ["alternating", "same", "apart"])
def test_a_drift_of_the_machine_is_no_change_if_each_side_comes_first_in_turn(order: str, linear: bool) -> None:
    """Runs have a noise of 1%, and the machine drifts by 5% in the time of all ten."""
    rng, count = np.random.default_rng(0), 4000
    drift = np.full((count, 10), 0.05 / 10) if linear else rng.normal(0, 0.05 / np.sqrt(10), (count, 10))
    slots = drift.cumsum(axis=1) + rng.normal(0, 0.01, (count, 10))
    sides = {"alternating": [0, 1, 1, 0, 0, 1, 1, 0, 0, 1], "same": [0, 1] * 5, "apart": [0] * 5 + [1] * 5}[order]
    first, second = (np.flatnonzero(np.array(sides) == side) for side in (0, 1))
    intervals = [t_interval(slot[first], slot[second], paired=True, confidence=0.95) for slot in slots]
    wrong = sum(abs(middle) > half for middle, half in intervals) / count
    found = sum(middle + np.log(1.05) > half for middle, half in intervals) / count
    if order == "alternating":
        assert 0.03 < wrong < 0.06 and found > 0.95
    elif order == "same":  # what was measured second is later in each pair
        assert wrong > 0.08 if linear else wrong < 0.06
    else:
        assert wrong > 0.3, "the note is needed"


def test_sides_that_were_not_measured_in_turn_are_noted(tmp_path: Path) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side)
    base, new = sides(tmp_path)
    assert compare(base, new).notes == []
    for _, record in new:
        record.started_at = record.started_at.replace("2026", "2027")
    [note] = compare(base, new).notes
    assert note.startswith("all runs of BASE were measured before those of NEW: a drift of the machine in between")
    [note] = compare(new, base).notes
    assert note.startswith("all runs of NEW were measured before those of BASE") and note.endswith("with seed=1")


def test_each_configuration_that_was_not_measured_in_turn_is_noted(tmp_path: Path) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side, "engine=hstu")
        runs(tmp_path / side, "engine=aoti")
        runs(tmp_path / side, "engine=onnxruntime", seeds=1)
    base, new = sides(tmp_path)
    for _, record in new:
        if record.spec["engine"]["name"] != "hstu":
            record.started_at = record.started_at.replace("2026", "2027")
    one_run, apart = compare(base, new).notes
    assert one_run.startswith("one run on each side")
    assert apart.startswith("all runs of BASE were measured before those of NEW") and apart.endswith("seed=1: aoti")


def test_notes_of_the_cells_are_carried_and_named_once(tmp_path: Path) -> None:
    short, busy = (
        "the run took {:.1f} s: too short to rank by one run",
        "others took {} cores: measure again on an idle machine",
    )
    for side in ("base", "new"):
        runs(tmp_path / side)
    base, new = sides(tmp_path)
    for i, (_, record) in enumerate([*base, *new]):
        record.notes = [short.format(0.4 + i / 10), "latency_ms/p99 has no 95% interval: it needs 368 samples"]
    for _, record in new:
        record.notes.append(busy.format(1))
    notes = compare(base, new).notes
    assert [note.count(short[-12:]) for note in notes] == [1, 0]  # and none on an interval of a record
    assert notes[1] == f"{busy.format(1)} (NEW hstu)"


def test_a_side_that_is_compared_with_itself_is_noted(tmp_path: Path, grbench_here: Grbench) -> None:
    runs(tmp_path / "base", seeds=3)
    base = read_cells([tmp_path / "base"])
    [note] = compare(base, base).notes
    assert note.startswith("3 records are on both sides: ") and note.endswith("check the paths of BASE and NEW")
    assert f"note: {note}" in grbench_here("compare", "base", "base").stdout


def test_the_json_of_a_report_is_named_as_such(tmp_path: Path, grbench_here: Grbench) -> None:
    runs(tmp_path / "base", seeds=1)
    assert grbench_here("report", "base", "--out", "page.json").returncode == 0
    done = grbench_here("compare", "base", "page.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "page.json: the JSON of a report and not a record; give the folder of the cells" in done.stderr


def test_one_run_is_compared_with_the_spread_of_the_others() -> None:
    middle, half = t_interval(np.zeros(1), np.array([1.0, 1.5]), paired=False, confidence=0.95)
    assert middle == 1.25 and half == pytest.approx(12.706 * np.sqrt(0.125 * 1.5), rel=1e-4)  # t of one degree


@pytest.mark.parametrize("paired", [True, False])
def test_blocks_of_requests_hold_the_truth(paired: bool) -> None:
    """Latencies with waits that last for some 20 requests; the true ratio is 1."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(20):
        waits = [np.repeat(rng.lognormal(0, 0.5, 100), 20) for _ in range(2)]
        base, new = (5 + waits[0 if paired else i] + rng.exponential(0.3, 2000) for i in range(2))
        low, high = bootstrap_interval(base, new, 90.0, block=40, paired=paired, confidence=0.95)
        held += low <= 1 <= high
    assert held >= 17


def test_one_run_a_side_goes_by_its_requests_and_says_so(tmp_path: Path) -> None:
    write_cell(tmp_path / "base" / "a")
    write_cell(tmp_path / "new" / "a", "engine=aoti", scale=1.3)
    comparison = compare(*sides(tmp_path))
    assert {change.metric: change.verdict() for change in comparison.changes} == {
        "latency_ms/p50": Verdict.SLOWER,
        "latency_ms/p99": Verdict.SLOWER,
    }
    assert comparison.notes == [
        "one run on each side: the interval leaves out differences between runs; runner.repeats=5 measures them"
    ]
    assert all(change.verdict(tolerance=0.6) is Verdict.SAME for change in comparison.changes)


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.012, 36.78, Verdict.UNDECIDED),  # -98.8% to +3578%
        (0.96, 1.04, Verdict.SAME),
        (0.96, 1.06, Verdict.UNDECIDED),
        (0.94, 1.04, Verdict.UNDECIDED),
        (1.01, 1.02, Verdict.SLOWER),
        (0.98, 0.99, Verdict.FASTER),
        (math.nan, math.nan, Verdict.UNKNOWN),
    ],
)
def test_no_difference_needs_an_interval_within_the_margin(low: float, high: float, verdict: Verdict) -> None:
    for metric, ends in (("latency_ms/p99", (low, high)), ("throughput_rps", (1 / high, 1 / low))):
        change = Change("hstu", metric, 10.0, 10.0, 1.0, *ends, (5, 5))
        assert change.verdict() is verdict
    assert Change("hstu", "latency_ms/p99", 10.0, 10.0, 1.0, 0.96, 1.06, (5, 5)).verdict(margin=0.1) is Verdict.SAME
    assert Change("hstu", "latency_ms/p99", 10.0, 10.0, 1.0, 1.01, 1.06, (5, 5)).verdict(0.1) is Verdict.SAME


def test_an_undecided_cell_has_its_own_word_and_exit_code(tmp_path: Path, grbench_here: Grbench) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side, spread=1.5, seeds=3)
    done = grbench_here("compare", "base", "new")
    assert done.returncode == 3 and done.stdout.endswith("1 undecided\n")
    found = json.loads(grbench_here("compare", "base", "new", "--json").stdout)
    assert (found["changes"][0]["verdict"], found["margin"], found["counts"]["undecided"]) == ("undecided", 0.05, 1)
    assert grbench_here("compare", "base", "new", "--margin", "1e9").returncode == 0
    assert (
        "--margin -1.0: allowed is a finite number >= 0"
        in grbench_here("compare", "base", "new", "--margin", "-1").stderr
    )


def test_the_table_and_the_exit_code_say_what_is_slower(tmp_path: Path, grbench_here: Grbench) -> None:
    for engine, factor in (("hstu", 1.0), ("aoti", 0.8)):
        runs(tmp_path / "base", f"engine={engine}")
        runs(tmp_path / "new", f"engine={engine}", throughput=100 * factor)
    done = grbench_here("compare", "base", "new")
    assert done.returncode == 1
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith(("hstu ", "aoti "))}
    assert "slower" in rows["aoti"] and "5 + 5" in rows["aoti"] and "requests/s" in rows["aoti"]
    assert "no difference" in rows["hstu"]
    assert done.stdout.splitlines()[-1] == "1 slower; 1 no difference"
    assert grbench_here("compare", "base", "new", "--tolerance", "0.5").returncode == 0
    assert grbench_here("compare", "new", "base").returncode == 0
    found = json.loads(grbench_here("compare", "base", "new", "--json").stdout)
    assert {row["cell"]: row["verdict"] for row in found["changes"]} == {
        "hstu": "no difference",
        "aoti": "slower",
    }
    assert found["counts"]["slower"] == 1


def test_one_offline_run_a_side_decides_nothing(tmp_path: Path, grbench_here: Grbench) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side, seeds=1)
    done = grbench_here("compare", "base", "new")
    assert done.returncode == 4 and done.stdout.endswith("1 not known\n")


@pytest.mark.parametrize("batches", [(8,), (8, 16)])
def test_a_row_names_the_engines_of_both_sides(tmp_path: Path, grbench_here: Grbench, batches: tuple[int, ...]) -> None:
    """Options that one engine has and the other lacks follow from the engine, and are not listed."""
    for batch in batches:
        name = f"{batch}"
        write_cell(tmp_path / "base" / name, "engine=hstu", f"scenario.max_batch={batch}", "scenario.in_flight=2")
        write_cell(tmp_path / "new" / name, "engine=onnxruntime", f"scenario.max_batch={batch}", "scenario.in_flight=1")
        path = tmp_path / "new" / name / "record.json"
        content = json.loads(path.read_text())
        del content["spec"]["engine"]["graph_lengths"]
        path.write_text(json.dumps(content))
    done = grbench_here("compare", "base", "new")
    lines = done.stdout.splitlines()
    assert lines[0] == "base -> new differ in engine: hstu -> onnxruntime, scenario.in_flight: 2 -> 1"
    rows = [line.split("   ")[0] for line in lines if line.startswith("hstu -> onnxruntime")]
    own = [f" max_batch={batch}" if len(batches) > 1 else "" for batch in batches]
    assert rows == [f"hstu -> onnxruntime{name}" for name in own for _ in ("p50", "p99")]


def test_samples_that_are_worth_too_few_give_no_interval(tmp_path: Path, grbench_here: Grbench) -> None:
    """Latencies that drift are worth one independent sample: resampling its one block never changes a percentile."""
    for side, scale in (("base", 1.0), ("new", 1.1)):
        write_cell(tmp_path / side / "a", queries=300)
        samples = tmp_path / side / "a" / "samples.parquet"
        table = pd.read_parquet(samples)
        table.assign(latency_ms=np.linspace(1, 2, 300) * scale).to_parquet(samples)
    done = grbench_here("compare", "base", "new")
    assert done.returncode == 4 and "[" not in done.stdout, done.stdout
    assert "hstu lacks an interval: p50 needs 6 independent samples, and 300 requests of BASE are worth " in done.stdout
    assert "not known" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"PAR1 cut"])
def test_samples_that_cannot_be_read_cost_the_interval_and_are_named(
    tmp_path: Path, grbench_here: Grbench, content: bytes | None
) -> None:
    for side in ("base", "new"):
        write_cell(tmp_path / side / "a", "scenario.max_batch=8", queries=1200)
        write_cell(tmp_path / side / "b", "scenario.max_batch=16", queries=1200)
    samples = tmp_path / "new" / "a" / "samples.parquet"
    samples.write_bytes(content) if content is not None else samples.unlink()
    done = grbench_here("compare", "base", "new")
    [line] = [line for line in done.stdout.splitlines() if "samples.parquet" in line]
    assert line.startswith("note: hstu max_batch=8 lacks an interval: new/a/samples.parquet: ")
    rows = [line for line in done.stdout.splitlines() if line.startswith("hstu max_batch=")]
    assert ["not known" in row for row in rows] == [True, True, False, False]  # two metrics of each cell


def test_a_revision_of_a_repository_is_a_side(tmp_path: Path, grbench_here: Grbench) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    runs(tmp_path / "kept")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "Keep")
    for path in (tmp_path / "kept").rglob("record.json"):
        path.unlink()
    runs(tmp_path / "new", throughput=80)
    done = grbench_here("compare", "HEAD:kept", "new")
    assert done.returncode == 1 and done.stdout.endswith("1 slower\n")
    refused = grbench_here("compare", "HEAD:nothing", "new")
    assert refused.returncode == 2 and "HEAD:nothing: no such folder and no such revision" in refused.stderr


def test_what_does_not_compare_is_refused_with_the_reason(tmp_path: Path) -> None:
    runs(tmp_path / "base")
    base = read_cells([tmp_path / "base"])
    write_cell(tmp_path / "server" / "a")
    with pytest.raises(ReportError, match="scenario is offline in BASE and server in NEW: not the same work"):
        compare(base, read_cells([tmp_path / "server"]))
    write_cell(tmp_path / "other" / "a", "scenario=offline", environment=MACHINE | {"cpu": "Another CPU"})
    other = read_cells([tmp_path / "other"])
    with pytest.raises(ReportError, match="BASE was measured on Some CPU, no GPU and NEW on Another CPU, 2 cores"):
        compare(base, other)
    with pytest.raises(ReportError, match="NEW was measured on different machines: Some CPU, no GPU; Another CPU"):
        compare(base, [*base, *other])
    assert [change.runs for change in compare([*other, *base], base).changes] == [(5, 5)]  # the other one is left out
    write_cell(tmp_path / "failed" / "a", status=Status.ERROR)
    with pytest.raises(ReportError, match="NEW has no OK cell to compare by speed, 1 cell in all"):
        compare(base, read_cells([tmp_path / "failed"]))


def test_configurations_of_one_side_are_left_out_and_counted(tmp_path: Path) -> None:
    for batch in (16, 8):
        runs(tmp_path / "base", f"scenario.max_batch={batch}")
    for batch in (16, 32):
        runs(tmp_path / "new", f"scenario.max_batch={batch}")
    comparison = compare(*sides(tmp_path))
    assert [change.runs for change in comparison.changes] == [(5, 5)]
    assert comparison.notes == [
        f"1 configuration is in {side} alone and left out: hstu offline max_batch={batch}"
        for side, batch in (("BASE", 8), ("NEW", 32))
    ]
    for path in (tmp_path / "new").glob("*=16*"):
        (path / "record.json").unlink()
    allowed = (
        "all options but the seed and those that have one value in all cells of BASE and another one in all of NEW"
    )
    with pytest.raises(ReportError, match=f"no configuration in common; what must be equal: {allowed}"):
        compare(read_cells([tmp_path / "base"]), read_cells([tmp_path / "new"]))


def test_cells_with_emulated_products_are_left_out_with_the_reason(tmp_path: Path) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side)
        emulated = {"device": "cpu", "fp8_products": fp8.runs_as("cpu")}
        write_cell(tmp_path / side / "fp8", "engine.precision=fp8", "scenario=offline", actual=emulated)
    base, new = sides(tmp_path)
    comparison = compare(base, new)
    assert [change.runs for change in comparison.changes] == [(5, 5)]
    why = "products in fp8 are emulated there, and their speed is not that of fp8"
    for side, note in zip(("BASE", "NEW"), comparison.notes, strict=True):
        assert note.startswith(f"1 {side} cell is left out, because {why}: hstu offline fp8")
    with pytest.raises(ReportError, match=why):
        compare(base[-1:], new[-1:])


def test_cells_of_the_accuracy_mode_have_nothing_to_compare(tmp_path: Path, grbench_here: Grbench) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side)
        none = {"latency_ms/p50": None, "latency_ms/p99": None, "throughput_rps": 9.0, "quality/loadgen/auc": 0.7}
        write_cell(tmp_path / side / "accuracy", "scenario.mode=accuracy", metrics=none)
    comparison = compare(*sides(tmp_path))
    assert [change.runs for change in comparison.changes] == [(5, 5)]
    why = "they have no rate and no latency to compare: scenario.mode=accuracy measures quality/loadgen/... alone"
    for side, note in zip(("BASE", "NEW"), comparison.notes, strict=True):
        assert note.startswith(f"1 {side} cell is left out, because {why}: hstu server")
    done = grbench_here("compare", "base/accuracy", "new/accuracy")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"grbench compare: BASE has no OK cell to compare by speed, 1 cell in all; {why}\n"


def test_options_of_how_much_is_measured_are_noted(tmp_path: Path) -> None:
    for side, queries in (("base", 1500), ("new", 1200)):
        write_cell(tmp_path / side / "a", f"scenario.queries={queries}", f"gate.requests={queries}", queries=queries)
    note = "the sides differ in how much is measured or checked: gate.requests, scenario.queries"
    assert note in compare(*sides(tmp_path)).notes


def test_a_refusal_of_machines_names_fewer_cores(tmp_path: Path) -> None:
    for cores in (1, 2):
        write_cell(tmp_path / "new" / f"{cores}", environment=MACHINE | {"cpu_cores": cores})
    new = read_cells([tmp_path / "new"])
    with pytest.raises(ReportError, match=r"1 core, no GPU; Some CPU, 2 cores, no GPU; cells of runner\.parallel have"):
        compare(new, new)


def test_all_absent_sides_are_named_with_what_makes_them(grbench_here: Grbench) -> None:
    done = grbench_here("compare", "a/before", "a/after")
    assert done.returncode == 2 and done.stderr == (
        "grbench compare: a/before, a/after: no such folders; check the paths, or make them: `python -m grbench` with "
        "runner.output_root=a/before, runner.output_root=a/after\n"
    )


def test_damaged_records_are_named_and_left_out(tmp_path: Path, grbench_here: Grbench) -> None:
    for side in ("base", "new"):
        runs(tmp_path / side)
    damaged = sorted((tmp_path / "new").rglob("record.json"))[:2]
    for path in damaged:
        path.write_text("{")
    done = grbench_here("compare", "base", "new")
    assert done.returncode in (0, 3) and "5 + 3" in done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.endswith("remove it or run its cell again") for line in lines)
    for line, path in zip(lines, damaged, strict=True):
        assert line.startswith(f"grbench compare: left out: {path.relative_to(tmp_path)}: not JSON")
    as_json = json.loads(grbench_here("compare", "base", "new", "--json").stdout)
    assert [f"grbench compare: left out: {line}" for line in as_json["left_out"]] == lines
    done = grbench_here("report", "new", "--out", "page.csv")
    assert done.returncode == 0 and "left out: new/" in done.stderr
    record = next((tmp_path / "base").rglob("record.json"))
    before = record.read_text()
    refused = grbench_here("report", "base", "--out", str(record))
    assert refused.returncode == 2 and "its folder holds the files of a cell" in refused.stderr
    assert record.read_text() == before
    for path in (tmp_path / "new").rglob("record.json"):
        path.write_text("{")
    done = grbench_here("compare", "base", "new")
    assert done.returncode == 2 and done.stderr.count("record.json: not JSON") == 5


def test_a_rerun_replaces_the_run_with_its_seed(tmp_path: Path) -> None:
    """Three runs of one seed are one run: as repeats their spread would be too small."""
    for side, rates in (("base", (100.0, 50.0, 100.0)), ("new", (100.0,))):
        for i, rate in enumerate(rates):
            write_cell(tmp_path / side / f"{i}", "scenario=offline", metrics={"throughput_rps": rate})
    comparison = compare(*sides(tmp_path))
    [change] = comparison.changes
    assert change.runs == (1, 1) and change.base == pytest.approx(100)
    assert "2 earlier BASE runs are left out: a run with the same seed replaces the one before it" in comparison.notes


def test_other_content_of_one_path_is_other_work(tmp_path: Path) -> None:
    for side, digest in (("base", "aa"), ("new", "bb")):
        write_cell(tmp_path / side / "0", "workload.path=1", files={"workload.path": digest * 32})
    with pytest.raises(ReportError, match="path is sha256:aaaaaaaaaaaa in BASE and sha256:bbbbbbbbbbbb in NEW"):
        compare(*sides(tmp_path))


def test_a_defect_is_not_taken_for_a_damaged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ValueError("a defect")

    write_cell(tmp_path / "one")
    monkeypatch.setattr(compare_command, "compare", defect)
    file = str(tmp_path / "one" / "record.json")
    with pytest.raises(ValueError, match="a defect") as raised:
        compare_command.main([file, file])
    assert raised.type is ValueError
