"""The report page, its figures, the terminal table and the frames they are made of."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.cells import SPEC, ink, log_to_mlflow, write_cell
from PIL import Image
from rich.console import Console

from grbench.cli import main
from grbench.config.compose import compose_spec
from grbench.config.jobs import Invocation
from grbench.execution import records
from grbench.execution.records import RunRecord, Status
from grbench.execution.session import CellSession
from grbench.report import (
    cells_frame,
    charts,
    group_cells,
    load_frame,
    load_samples,
    plots,
    time_parts,
    write_report,
)
from grbench.report.cells import Code, Planned, command, figure, flatten, knobs, label, labels
from grbench.report.chart import Chart
from grbench.report.findings import work_names
from grbench.report.frame import PARTS, ReportError, read_cells
from grbench.report.html import _inline
from grbench.report.interactive import plotly_figure
from grbench.report.latency_charts import front_of
from grbench.report.markdown import bullets, escape, sections, table
from grbench.report.page import Bullets, Heading, Table, Text, spans
from grbench.report.table import notes, print_cells
from grbench.tune.live import batches_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def drawn_once() -> Iterator[None]:
    """Draw equal charts once: most tests write the page of the same cells, and a chart takes half a second."""
    drawn: dict[bytes, bytes] = {}
    draw = plots.png

    def png(chart: Chart) -> bytes:
        key = pickle.dumps(chart)
        if key not in drawn:
            drawn[key] = draw(chart)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", png)
        yield


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two kernels, two batch sizes, one of them too short for a p99, and a cell that failed."""
    root = tmp_path / "outputs"
    write_cell(root / "0", "kernel=torch", "scenario.max_batch=8")
    write_cell(root / "1", "kernel=triton", "scenario.max_batch=8", scale=0.4, queries=2000)
    write_cell(root / "2", "kernel=triton", "scenario.max_batch=32", scale=0.5, queries=300)
    write_cell(
        root / "3",
        "kernel=cutlass",
        "scenario.max_batch=8",
        status=Status.UNAVAILABLE,
        error="no [GPU] | found; add <one>",
    )
    return root


def rows_of(page: str, heading: str) -> list[dict[str, str]]:
    """The table under a heading of a Markdown page, which begins with the given words."""
    text = page.split(f"## {heading}", 1)[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def written(root: Path, tmp_path: Path, name: str = "r.md") -> str:
    assert main(["report", str(root), "--out", str(tmp_path / name)]) == 0
    return (tmp_path / name).read_text()


def test_a_page_answers_one_question_a_section_best_cell_first(sweep: Path, tmp_path: Path, capsys: Capture) -> None:
    write_cell(sweep / "4", "scenario=offline", "kernel=torch")
    out = tmp_path / "reports" / "kernels of today.md"
    assert main(["report", str(sweep), "--out", str(out), "--title", "Kernels"]) == 0
    assert capsys.readouterr().out == f"{out}: 5 cells, 4 figures in {out.parent}/kernels of today_files\n"
    page = out.read_text()
    assert page.startswith(
        "# Kernels\n\n5 cells, 4 OK, measured 2026-01-02.\n\n- At 100 requests/s, hstu kernel=triton"
    )
    assert re.findall("^## (.*)", page, re.M) == [
        "Answer at 100 requests/s: which has the lowest latency?",
        "Answer offline",
        "How to read the tables",
        "Cells without a result",
        "Environment",
        "Requested and actual",
        "Run it again",
    ]
    section = page.split("## Answer at 100")[1]
    assert section.split("\n\n")[1].startswith("At 100 requests/s, hstu kernel=triton max_batch=8 ")
    rows = rows_of(page, "Answer at 100")
    assert [(r["#"], r["cell"], r["status"]) for r in rows] == [
        ("1", "hstu kernel=triton max_batch=8", "OK"),
        ("2", "hstu kernel=triton max_batch=32", "OK"),
        ("3", "hstu kernel=torch max_batch=8", "OK"),
        ("4", "hstu kernel=cutlass max_batch=8", "UNAVAILABLE"),
    ]
    assert len(rows[0]) <= 10
    record = records.load(sweep / "1")
    low, high = record.intervals["latency_ms/p99"]
    assert rows[0]["p99 ms"] == f"{record.metrics['latency_ms/p99']:.2f} [{low:.2f}, {high:.2f}]"
    assert [r["in limit"] for r in rows] == ["yes", "-", "yes", "-"]
    assert rows[1]["p99 ms"] == "-"
    assert rows[1]["p90 ms"].startswith(figure(records.load(sweep / "2").metrics["latency_ms/p90"]) + " [")
    assert {value for key, value in rows[3].items() if key not in ("#", "cell", "status")} == {"-"}
    assert "- latency_ms/p99 withheld: it needs 1000 samples, there are 300 (row 2)" in page
    [offline] = rows_of(page, "Answer offline")
    assert set(offline) == {"#", "cell", "requests/s", "compute", "gate"}  # no latency in a queue of all requests


def test_page_lists_a_failed_cell_with_its_reason(sweep: Path, tmp_path: Path) -> None:
    [failed] = rows_of(written(sweep, tmp_path), "Cells without a result")
    assert failed == {
        "#": "4",
        "cell": "hstu kernel=cutlass max_batch=8",
        "status": "UNAVAILABLE",
        "reason": r"no [GPU] \| found; add &lt;one>",
    }


def test_page_says_what_each_stage_ran(tmp_path: Path) -> None:
    stages = {"retrieve": {"precision": "bf16"}, "rank": {"precision": "fp32"}}
    requested = {f"engine.{stage}.precision": "auto" for stage in stages}
    actual = {"device": "cpu", "precision": "bf16/fp32", **stages}
    write_cell(tmp_path / "outputs" / "0", requested=requested, actual=actual)
    ran = rows_of(written(tmp_path / "outputs", tmp_path), "Requested and actual")
    assert [(row["option"], row["actual"]) for row in ran] == [
        ("engine.rank.precision", "fp32"),
        ("engine.retrieve.precision", "bf16"),
    ]


def test_page_says_what_ran_where_and_how_to_repeat_it(sweep: Path, tmp_path: Path) -> None:
    page = written(sweep, tmp_path)
    assert rows_of(page, "Requested and actual") == [
        {"option": "engine.device", "requested": "auto", "actual": "cpu", "rows": "all"},
        {"option": "kernel.layer_norm, kernel.norm_gate", "requested": "auto", "actual": "triton", "rows": "all"},
    ]
    environment = {row[""]: row["all rows"] for row in rows_of(page, "Environment")}
    assert environment == {
        "cpu": "Some CPU",
        "git_sha": "abc1234",
        "gpus": "none",
        "versions.torch": "2.13.0",
    }
    commands = {row["#"]: row["command"] for row in rows_of(page, "Run it again")}
    assert commands["2"] == "`python -m grbench kernel=triton scenario.max_batch=32`"


def test_cells_of_two_machines_are_two_sections(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", "seed=1")
    write_cell(tmp_path / "o" / "1", "seed=2", environment={"cpu": "Other", "gpus": [{"name": "H100"}]})
    page = written(tmp_path / "o", tmp_path)
    for machine in ("Some CPU, no GPU", "Other, H100"):
        assert f"## Answer at 100 requests/s ({machine})" in page
    assert {"": "gpus.0.name", "rows 1": "-", "rows 2": "H100"} in rows_of(page, "Environment")
    assert spans([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


@pytest.mark.parametrize(
    ("model", "name"), [("dlrm_v3", "DLRM-v3-like"), ("dlrm_v3_stu", "DLRM-v3-like (dlrm_v3_stu)")]
)
def test_a_model_with_mlperfs_layers_is_named_as_like_it(tmp_path: Path, model: str, name: str) -> None:
    meaning = "DLRM-v3-like: the model has the layers of MLPerf's DLRM-v3 and leaves out much else"
    write_cell(tmp_path / "o" / "0", f"model={model}")
    page = written(tmp_path / "o", tmp_path)
    assert f"## Answer at 100 requests/s ({name})\n" in page
    assert f"\n- {meaning}" in page
    assert any(line.startswith(meaning) for line in screen(read_cells([tmp_path / "o"]), None))
    write_cell(tmp_path / "o" / "1", "workload=synthetic_long", "model.name=my_dlrm_v3b")
    page = written(tmp_path / "o", tmp_path)
    assert f"## Answer at 100 requests/s ({name} on ml_100k)" in page
    assert "## Answer at 100 requests/s (my_dlrm_v3b on synthetic_long)" in page  # another model keeps its name
    assert "DLRM" not in written(tmp_path / "o" / "1", tmp_path)


def test_figures_are_real_and_linked(sweep: Path, tmp_path: Path) -> None:
    links = re.findall(r"!\[.*?\]\((.*?)\)", written(sweep, tmp_path, "a page.md"))
    assert [Path(link).name for link in links] == ["1_ranking.png", "1_time_shares.png", "1_latency_cdf.png"]
    for link in links:
        assert link.startswith("a%20page_files/")
        assert ink((tmp_path / link.replace("%20", " ")).read_bytes()) > 0.01


def chart(root: Path, key: str, group: int = 0) -> Chart:
    return next(one for one in charts(group_cells(read_cells([root]))[group]) if one.key == key)


def test_curves_are_the_samples_of_the_ok_cells(sweep: Path) -> None:
    drawn = chart(sweep, "latency_cdf")
    assert [series.name for series in drawn.series] == [
        "1 hstu kernel=triton max_batch=8",
        "2 hstu kernel=triton max_batch=32",
        "3 hstu kernel=torch max_batch=8",
    ]
    latencies = np.sort(load_samples(sweep / "1")["latency_ms"])
    np.testing.assert_array_equal(drawn.series[0].x, latencies)
    assert drawn.series[0].y[-1] == 100
    share_at_p50 = drawn.series[0].y[np.searchsorted(latencies, records.load(sweep / "1").metrics["latency_ms/p50"])]
    assert share_at_p50 == pytest.approx(50, abs=0.1)
    assert drawn.limits == [("x", 80.0, "limit 80 ms")] and drawn.notes == []


def test_long_distributions_keep_their_tail(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", queries=20_000)
    [curve] = chart(tmp_path / "o", "latency_cdf").series
    latencies = np.sort(load_samples(tmp_path / "o" / "0")["latency_ms"])
    assert len(curve.x) <= 4000
    np.testing.assert_array_equal(curve.x[-1000:], latencies[-1000:])
    np.testing.assert_allclose(np.interp(50, curve.y, curve.x), np.median(latencies), rtol=0.01)


def test_hundreds_of_cells_give_pictures_of_bounded_size_and_short_names(tmp_path: Path) -> None:
    for i in range(45):
        cell = write_cell(tmp_path / "o" / f"{i:02d}", f"scenario.max_batch={i + 1}", scale=1 + i, queries=50)
        cell.overrides += [f"workload={'x' * 300}"]
        cell.spec["workload"] = {"name": "x" * 300 + str(i % 2)}
        records.save(cell, tmp_path / "o" / f"{i:02d}")
    for one in charts(group_cells(read_cells([tmp_path / "o"]))[0]):
        picture = Image.open(io.BytesIO(one.png()))
        assert picture.height < 1800 and picture.width < 1800, one.key
        assert all(len(name) <= 45 for name in one.rows)
    ranking = chart(tmp_path / "o", "ranking")
    assert ranking.notes == [
        "p90 ranks these cells, because 23 of 23 have no p99 with an interval: it needs 1000 requests that are worth "
        "368 independent ones",
    ]
    curves = chart(tmp_path / "o", "latency_cdf")
    assert len(curves.series) == 10 and curves.notes == ["10 of 23 cells are drawn: the best"]


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Two engines at three loads; the second is slower at each."""
    for i, (engine, scale) in enumerate((("hstu", 1.0), ("aoti", 2.0))):
        for load in (50, 100, 200):
            folder = tmp_path / "loads" / f"{i}{load}"
            record = write_cell(folder, f"engine={engine}", f"scenario.target_qps={load}", scale=scale * load / 50)
            record.metrics["throughput_rps"] = load
            records.save(record, folder)
    return tmp_path / "loads"


def test_load_and_latency_are_a_line_for_each_strategy(loads: Path) -> None:
    drawn = chart(loads, "load_latency")
    assert [(series.name, list(series.x)) for series in drawn.series] == [
        ("hstu", [50, 100, 200]),
        ("aoti", [50, 100, 200]),
    ]
    assert drawn.series[0].y[2] == records.load(loads / "0200").metrics["latency_ms/p99"]
    low, high = records.load(loads / "0200").intervals["latency_ms/p99"]
    assert (drawn.series[0].low[2], drawn.series[0].high[2]) == (low, high)
    assert drawn.limits == [("y", 80.0, "limit 80 ms")]


def test_the_front_has_the_cells_that_none_beats_in_both(loads: Path) -> None:
    assert front_of([(10, 5), (20, 9), (15, 4), (30, 9), (5, 1)]) == [4, 0, 1]
    drawn = chart(loads, "pareto")
    front = drawn.series[1]
    assert front.name == "Pareto front" and list(front.y) == [50, 100, 200]
    assert drawn.notes[0].startswith("on the front: ") and "aoti" not in drawn.notes[0]


def test_time_shares_add_up(sweep: Path) -> None:
    frame = load_frame(sweep)
    parts = time_parts(frame)
    assert list(parts.index) == list(frame["cell"][:3])
    np.testing.assert_allclose(parts[[*PARTS, "other_ms"]].sum(axis=1), parts["latency_ms"])
    assert parts["latency_ms"].iloc[0] == pytest.approx(frame["latency_ms/mean"].iloc[0])
    assert parts["other_ms"].iloc[0] == pytest.approx(0.25)
    bars = chart(sweep, "time_shares").series
    assert [series.name for series in bars] == ["queue", "batch", "transfer", "compute", "other"]
    np.testing.assert_allclose(np.sum([series.x for series in bars], axis=0), 100)


def test_hits_stages_quality_and_cost_are_drawn_where_records_have_them(tmp_path: Path) -> None:
    for i, (cache, hits) in enumerate((("none", None), ("lru", 0.4))):
        record = write_cell(tmp_path / "o" / f"{i}", f"cache={cache}")
        if hits:
            record.gate["measured"] = {"checked": 131, "answers": 1500}
            record.metrics |= {"cache/hit_rate": hits, "retrieve_ms/p50": 20.0, "rank_ms/p50": 3.0}
            records.save(record, tmp_path / "o" / f"{i}")
    for i, (precision, auc) in enumerate((("fp32", 0.81), ("int8", 0.79))):
        record = write_cell(tmp_path / "o" / f"q{i}", "scenario=offline", f"engine.precision={precision}")
        record.actual["precision"], record.gate["quality"] = precision, {"tasks": {"rated": {"auc": auc}}}
        record.metrics |= {"throughput_rps": 100.0 * (i + 1), "energy_joules_per_request": 3.0 - i}
        records.save(record, tmp_path / "o" / f"q{i}")
    [hit] = chart(tmp_path / "o", "hit_latency").series
    rows = rows_of(written(tmp_path / "o", tmp_path), "Answer at 100")
    assert sorted((r["cell"], r["hits %"]) for r in rows) == [("hstu cache=lru", "40.0"), ("hstu cache=none", "-")]
    assert sorted(hit.x) == [0, 40]
    stages = chart(tmp_path / "o", "stages")
    assert [(series.name, list(series.x)) for series in stages.series] == [("retrieve", [20.0]), ("rank", [3.0])]
    quality = chart(tmp_path / "o", "quality", 1)
    assert [(s.name, list(s.x), list(s.y)) for s in quality.series] == [
        ("int8", [200.0], [0.79]),
        ("fp32", [100.0], [0.81]),
    ]
    cost = chart(tmp_path / "o", "cost", 1)
    assert list(cost.series[0].x) == [5.0, 10.0] and cost.x == "machine-seconds per thousand requests"
    energy = chart(tmp_path / "o", "energy", 1)
    assert list(energy.series[0].x) == [2000.0, 3000.0] and energy.x == "joules of the device per thousand requests"
    rows = rows_of(written(tmp_path / "o", tmp_path), "Answer offline")
    assert [r["J/request"] for r in rows] == ["2.00", "3.00"]
    keys = {one.key for one in charts(group_cells(read_cells([tmp_path / "o"]))[0])}
    assert {"quality", "cost", "energy", "pareto", "load_latency"}.isdisjoint(keys)  # nothing to show: one load, no AUC


def test_a_page_says_that_samples_are_missing(sweep: Path, tmp_path: Path) -> None:
    (sweep / "1" / records.SAMPLES_FILE).unlink()
    assert "- no samples beside the record (row 1): its distribution and parts of the latency are not drawn" in written(
        sweep, tmp_path
    )
    assert [series.name[0] for series in chart(sweep, "latency_cdf").series] == ["2", "3"]


def test_names_with_dollars_are_drawn_whole(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", "workload=$a$.inter", "seed=1")
    write_cell(tmp_path / "o" / "1", "workload=$a$.inter", "scenario.max_batch=4")
    for one in charts(group_cells(read_cells([tmp_path / "o"]))[0]):
        assert ink(one.png()) > 0.01


def test_html_is_one_file_with_the_same_tables_and_live_figures(sweep: Path, tmp_path: Path, capsys: Capture) -> None:
    page = written(sweep, tmp_path, "r.html")
    assert capsys.readouterr().out == f"{tmp_path}/r.html: 4 cells\n"
    assert [path.name for path in tmp_path.iterdir() if path.name != "outputs"] == ["r.html"]
    assert "<h2>Answer at 100 requests/s: which has the lowest latency?</h2>" in page
    assert "<td>hstu kernel=triton max_batch=8</td>" in page
    assert "no [GPU] | found; add &lt;one&gt;" in page
    assert re.findall(r'id="(figure_\w+)"', page) == [
        "figure_1_ranking",
        "figure_1_time_shares",
        "figure_1_latency_cdf",
    ]
    assert "src=" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)  # nothing is loaded from elsewhere
    assert re.search(r"<script[^>]*src=", page) is None


def test_a_figure_is_the_same_in_both_forms(loads: Path) -> None:
    for one in charts(group_cells(read_cells([loads]))[0]):
        live = plotly_figure(one)
        assert [list(trace.x) for trace in live.data] == [list(series.x) for series in one.series]
        assert ink(one.png()) > 0.01
    line = plotly_figure(chart(loads, "load_latency")).data[0]
    series = chart(loads, "load_latency").series[0]
    np.testing.assert_allclose(np.add(line.y, line.error_y.array), series.high)
    np.testing.assert_allclose(np.subtract(line.y, line.error_y.arrayminus), series.low)


def test_csv_has_a_line_for_each_cell(sweep: Path, tmp_path: Path) -> None:
    written(sweep, tmp_path, "r.csv")
    frame = pd.read_csv(tmp_path / "r.csv", keep_default_na=False, na_values=[""])
    assert frame["cell"].tolist()[0] == "hstu kernel=torch max_batch=8"
    assert frame["status"].tolist() == ["OK", "OK", "OK", "UNAVAILABLE"]
    record = records.load(sweep / "1")
    assert frame["latency_ms/p99"][1] == record.metrics["latency_ms/p99"]
    assert frame["latency_ms/p99/high"][1] == record.intervals["latency_ms/p99"][1]
    assert frame["command"][2] == "python -m grbench kernel=triton scenario.max_batch=32"
    assert frame["throughput_rps"].isna().tolist() == [False, False, False, True]


def test_json_has_everything(sweep: Path, tmp_path: Path) -> None:
    found = json.loads(written(sweep, tmp_path, "r.json"))
    assert found["findings"][0].startswith("At 100 requests/s, hstu kernel=triton")
    assert [cell["status"] for cell in found["cells"]] == ["OK", "OK", "OK", "UNAVAILABLE"]
    assert found["cells"][0]["metrics"] == records.load(sweep / "0").metrics
    assert found["cells"][3]["metrics"] == {} and found["cells"][3]["error"] == "no [GPU] | found; add <one>"


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_run_can_end_with_rows_for_other_programs(sweep: Path, capsys: Capture, form: str) -> None:
    _, run = compose_spec([f"runner.print={form}", f"runner.output_root={sweep}", "tracking=none"])
    session = CellSession(run, Invocation((), 4, None))
    session._cells = read_cells([sweep])
    assert session.close() == 1
    said = capsys.readouterr()
    if form == "json":
        names = [cell["cell"] for cell in json.loads(said.out)["cells"]]
    else:
        names = pd.read_csv(io.StringIO(said.out))["cell"].tolist()
    assert names[0] == "hstu kernel=torch max_batch=8" and len(names) == 4
    assert "report: python -m grbench report" in said.err.replace("\n", " ")


def test_nothing_is_plotted_when_no_cell_is_ok(tmp_path: Path) -> None:
    metrics = {"throughput_rps": 1e9}  # measured, and the samples did not fit on the disk
    write_cell(tmp_path / "o" / "0", status=Status.DISK_FULL, metrics=metrics, gate={"passed": True})
    page = written(tmp_path / "o", tmp_path)
    assert "1000000000" not in page and "![" not in page
    assert not (tmp_path / "r_files").exists()
    assert charts(group_cells(read_cells([tmp_path / "o"]))[0]) == []


def test_a_failure_without_a_reason_says_so(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", "seed=1")
    write_cell(tmp_path / "o" / "1", "seed=2", status=Status.KILLED, error=None)
    write_cell(tmp_path / "o" / "2", "seed=3", status=Status.ERROR, error="broken")
    assert load_frame(tmp_path / "o")["error"].tolist() == ["", "no reason was recorded", "broken"]
    failed = rows_of(written(tmp_path / "o", tmp_path), "Cells without a result")
    assert [row["reason"] for row in failed] == ["no reason was recorded", "broken"]


def test_frame_has_knobs_metrics_and_intervals(sweep: Path) -> None:
    frame = load_frame(sweep)
    assert frame.attrs["knobs"] == ["kernel", "scenario.max_batch"]
    assert list(frame.index) == [1, 2, 3, 4]
    assert frame["folder"].tolist() == [sweep / name for name in "0123"]
    record = records.load(sweep / "0")
    for name, value in record.metrics.items():
        assert frame[name].iloc[0] == value
    assert frame.loc[1, "latency_ms/p50/low"] == record.intervals["latency_ms/p50"][0]
    assert frame.loc[3, ["latency_ms/p99", "latency_ms/p99.9"]].isna().all()
    assert frame.loc[4, ["throughput_rps", "latency_ms/p50"]].isna().all()
    assert "engine_start_s" not in frame  # only the failed cell has it
    pivot = frame.pivot(index="kernel", columns="scenario.max_batch", values="throughput_rps")
    assert pivot.loc["triton", 32] == 30


def specs(*changes: dict[str, Any], overrides: list[str] | None = None) -> list[RunRecord]:
    return [RunRecord({**SPEC, **c}, "0", Status.OK, "2026", 1.0, overrides=overrides or []) for c in changes]


def test_what_comes_with_a_name_is_no_knob_of_its_own() -> None:
    tiny, large = {"name": "hstu_tiny", "layers": 2}, {"name": "dlrm_v3", "layers": 5}
    assert knobs(specs({"model": tiny}, {"model": large})) == ["model"]
    assert knobs(specs({"model": tiny}, {"model": {**tiny, "layers": 3}})) == ["model.layers"]
    assert knobs(specs({"model": tiny}, {"model": large}, overrides=["model.layers=5"])) == [
        "model",
        "model.layers",
    ]
    assert knobs(specs({"model": tiny}, {"model": {"name": "hstu_tiny"}})) == ["engine", "scenario"]
    assert knobs(specs({"gate": {"requests": 4}}, {"gate": {"requests": 8}})) == ["gate.requests"]
    assert knobs(specs({"latency_limit_ms": 80.0}, {"latency_limit_ms": 50.0}, {})) == ["latency_limit_ms"]


def named(*overrides: str, **changes: Any) -> RunRecord:
    """A record whose overrides were typed."""
    return specs(changes, overrides=list(overrides))[0]


def test_a_name_says_what_was_chosen() -> None:
    assert label(named()) == "hstu server"
    assert label(named("scenario=server", "engine.precision=bf16", engine={"name": "hstu", "precision": "bf16"})) == (
        "hstu server bf16"
    )
    assert label(named("cache=lru", "runner.timeout_s=9", "rerun=true", cache={"name": "lru"})) == (
        "hstu server cache=lru"  # what is no part of the spec is no part of the name
    )
    stages = {"name": "pipeline", "retrieve": {"name": "vllm", "precision": "auto"}}
    stages["rank"] = {"name": "hstu", "precision": "bf16"}
    typed = ["engine@engine.retrieve=vllm", "engine.rank.precision=bf16"]
    assert label(named(*typed, engine=stages)) == "vllm+hstu server rank.precision=bf16"
    assert label(Planned(named(seed=3).spec, ["seed=3"])) == "hstu server seed=3"
    long = "/data/" + 30 * "x" + "/week.inter"
    assert label(named("workload.path=x", workload={"name": "csv", "path": long})) == "hstu server path=week"


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/data/a/ratings.csv", "/data/b/events.csv.gz"], ["ratings", "events"]),
        (["/data/a/ratings.csv", "/data/b/ratings.csv"], ["a/ratings", "b/ratings"]),
        (["/data/a/ratings.csv", "/data/a/ratings.parquet"], ["ratings.csv", "ratings.parquet"]),
        (["weights.safetensors", "outputs/decoder/"], ["weights", "decoder"]),
        (["http://127.0.0.1:8000", "http://127.0.0.1:9000"], ["http://127.0.0.1:8000", "http://127.0.0.1:9000"]),
    ],
)
def test_a_path_is_its_stem_in_names_unless_two_have_it(paths: list[str], names: list[str]) -> None:
    cells = [named(f"workload.path={path}", workload={"name": "csv", "path": path}) for path in paths]
    assert labels(cells) == [f"hstu path={name}" for name in names]
    assert [name.partition("path=")[2] for name in work_names(cells)] == names


def test_a_study_names_its_cells() -> None:
    cells = [named("study=reference", f"study/reference@_global_={name}", seed=i) for i, name in enumerate("ab")]
    assert [label(cell) for cell in cells] == ["reference a", "reference b"]
    assert labels(cells) == ["a", "b"]
    swept = [named("study=reference", "study/reference@_global_=a", f"seed={i}", seed=i) for i in (1, 2)]
    assert labels(swept) == ["a seed=1", "a seed=2"]
    assert label(named("study=batching", "seed=1", seed=1)) == "hstu server batching seed=1"


def test_no_two_cells_look_alike() -> None:
    assert labels([named("seed=1", seed=1), named("seed=2", seed=2), named("seed=2", seed=2)]) == [
        "hstu seed=1",
        "hstu seed=2 (1 of 2)",
        "hstu seed=2 (2 of 2)",
    ]
    one, other = {"size": 1}, {"size": 2}
    assert labels(specs({"gate": one, "cache": one}, {"gate": other, "cache": other})) == [
        "hstu cache.size=1 gate.size=1",
        "hstu cache.size=2 gate.size=2",
    ]
    mixed = [named("seed=1", seed=1), named("seed=1", seed=1, latency_limit_ms=50.0), named("kernel=triton", seed=2)]
    assert labels(mixed) == [
        "hstu seed=1 latency_limit_ms=80",
        "hstu seed=1 latency_limit_ms=50",
        "hstu",  # all have its kernel
    ]


def test_flatten_and_command() -> None:
    assert flatten({"engine": {"name": "hstu", "lengths": [16, 32]}, "gpus": [{"name": "A"}], "seed": 0}) == {
        "engine": "hstu",
        "engine.lengths": [16, 32],
        "gpus.0.name": "A",
        "seed": 0,
    }
    assert command(specs({}, overrides=["engine.graph_lengths=[16, 32]"])[0]) == (
        "python -m grbench 'engine.graph_lengths=[16, 32]'"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (0.0, "0"),
        (123456.7, "123457"),
        (99.96, "100"),
        (12.0, "12.0"),
        (1e-5, "1e-05"),
    ],
)
def test_figure(value: float | None, text: str) -> None:
    assert figure(value) == text


def screen(cells: list[tuple[Path, RunRecord]], width: int | None) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    print_cells(console, cells)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_fits_and_cuts_no_number(sweep: Path, width: int) -> None:
    lines = screen(read_cells([sweep]), width)
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("requests/s: "))]
    assert max(map(len, table)) <= width
    assert "…" not in "".join(table)
    record = records.load(sweep / "1")
    row = next(line for line in table if figure(record.metrics["latency_ms/p99"]) in line.split())
    expected = ["OK", "200"] + [figure(record.metrics["latency_ms/p50"])] * (width > 100)
    for name in ("p99", "p90"):  # p90 ranks them, because one cell has too few requests for a p99
        low, high = (figure(end) for end in record.intervals[f"latency_ms/{name}"])
        expected += [figure(record.metrics[f"latency_ms/{name}"]), f"[{low},", f"{high}]"]
    expected += ["yes"] * ("in limit" in table[0])
    expected += [figure(record.metrics[f"{part}_ms/p50"]) for part in ("queue", "compute") if part in table[0]]
    assert row.split()[row.split().index("OK") :] == [*expected, "0.0062"]


@pytest.mark.parametrize("words", [[], ["runner.repeats"], ["scenario=offline"]])
def test_the_legend_says_what_brackets_are_where_there_are_some(tmp_path: Path, words: list[str]) -> None:
    """One run with an interval, runs with other seeds, and one whose figures have none."""
    folders = [tmp_path / "o" / str(i) for i in range(2 if words == ["runner.repeats"] else 1)]
    for seed, folder in enumerate(folders):
        record = write_cell(folder, f"seed={seed}", *(word for word in words if "=" in word))
        if words == ["scenario=offline"]:
            record.intervals = {}
            records.save(record, folder)
    lines = screen(read_cells([tmp_path / "o"]), None)
    legend = next(line for line in lines if line.startswith("requests/s: "))
    said = "; [low, high]: 95% interval of the figure before it" in legend
    assert said == ("[" in lines[2]) == (words != ["scenario=offline"])
    assert ("runs: repeats with other seeds; figures are their geometric means" in legend) == (len(folders) > 1)
    assert ("-: does not apply" in legend) == (" - " in f"{lines[2]} ")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_row_of_a_measured_server_fits_and_names_it(tmp_path: Path, width: int) -> None:
    """`grbench load` measured it: what that sets itself is in no name, and what the user sets is."""
    words = ["engine=remote", "scenario=server", "scenario.max_batch=1", "scenario.in_flight=64"]
    record = write_cell(tmp_path / "0", *words, "scenario.target_qps=40")
    record.spec["engine"]["url"] = "http://10.1.2.3:8000"
    record.overrides.insert(1, "engine.url=http://10.1.2.3:8000")
    assert labels([record]) == ["remote 10.1.2.3:8000 server target_qps=40"]
    lines = screen([(tmp_path / "0", record)], width)
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("requests/s: "))]
    assert max(map(len, table)) <= width and len(table) <= 2 + 4  # the name takes few lines
    name = " ".join(line[: table[0].index("status")] for line in table[2:])
    assert name.split() == ["remote", "10.1.2.3:8000", "server", "target_qps=40"]
    assert {"requests/s", "p99 ms", "gate"} <= set(re.split(r"  +", table[0].strip()))
    record.spec["scenario"]["in_flight"] = 8
    assert labels([record]) == ["remote 10.1.2.3:8000 server in_flight=8 target_qps=40"]


def test_piped_table_keeps_one_line_a_cell_and_ends_with_what_was_found(sweep: Path) -> None:
    lines = screen(read_cells([sweep]), None)
    assert [line.split()[1:4] for line in lines[2:6]] == [
        ["kernel=triton", "max_batch=8", "OK"],  # the best first
        ["kernel=triton", "max_batch=32", "OK"],
        ["kernel=torch", "max_batch=8", "OK"],
        ["kernel=cutlass", "max_batch=8", "UNAVAILABLE"],
    ]
    legend = next(i for i, line in enumerate(lines) if line.startswith("requests/s: "))
    assert lines[legend + 1] == "UNAVAILABLE hstu kernel=cutlass max_batch=8: no [GPU] | found; add <one>"
    assert all(line.startswith("note: ") for line in lines[legend + 2 : -1])
    assert lines[-1].startswith("At 100 requests/s, hstu kernel=triton max_batch=8 ")
    assert "\x1b" not in "".join(lines)
    assert screen([], None) == []


def test_offline_cells_show_no_latency(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", "scenario=offline")
    lines = screen(read_cells([tmp_path / "o"]), None)
    assert lines[0].split() == ["cell", "status", "requests/s", "compute", "gate"]
    row = lines[2].split()
    assert row[row.index("OK") :] == ["OK", "150", row[-2], "0.0062"]


def test_columns_appear_where_cells_have_their_figures(tmp_path: Path) -> None:
    """Hit rates with a cache, stages of a pipeline, AUC with labels; never more than ten columns."""
    record = write_cell(tmp_path / "o" / "0", "cache=lru")
    record.metrics |= {"cache/hit_rate": 0.4, "retrieve_ms/p50": 25.0, "rank_ms/p50": 2.0}
    record.gate["quality"] = {"tasks": {"rated": {"auc": 0.8123}}}
    records.save(record, tmp_path / "o" / "0")
    lines = screen(read_cells([tmp_path / "o"]), None)
    heads = re.split(r"  +", lines[0].strip())
    assert len(heads) <= 10
    assert {"hits %", "retrieve + rank", "AUC", "gate"} <= set(heads)
    assert "25.0 + 2.00" in lines[2] and "0.8123" in lines[2] and " 40.0 " in lines[2]


def test_a_table_in_a_pipe_has_no_blanks_at_the_ends_of_lines(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", status=Status.TIMEOUT, error="it took too long")
    cells = read_cells([tmp_path / "o"])
    assert not any(line.endswith(" ") for line in screen(cells, None))
    pipe = io.TextIOWrapper(io.BytesIO(), "ascii")
    print_cells(Console(file=pipe), cells)
    pipe.seek(0)
    assert set(pipe.readlines()[1]) <= set("-+ \n")


def test_notes_are_said_once(tmp_path: Path) -> None:
    for i in range(6):
        write_cell(
            tmp_path / "o" / str(i), f"scenario.max_batch={i + 1}", notes=["shared", *(["of most"] if i else [])]
        )
    lines = screen(read_cells([tmp_path / "o"]), None)
    assert lines[-3] == "note: shared (all 6 cells)" and lines[-2].startswith("note: of most (")
    assert sorted(re.findall(r"max_batch=(\d)", lines[-2])) == list("23456")  # in the order of the table


def test_notes_that_differ_in_numbers_are_one_with_ranges(tmp_path: Path) -> None:
    said = (
        ["others used 1.5 of 2 cores", "p99: these 1000 are worth 42; 8800 are enough", "at 12:31 in runs/7"],
        ["others used 1.4 of 2 cores", "p99: these 1000 are worth 7; 53000 are enough", "at 12:30 in runs/7"],
        ["p99: these 1000 are worth 7; 5200 are enough"],
    )
    cells = [write_cell(tmp_path / str(i), f"seed={i}", notes=list(those)) for i, those in enumerate(said)]
    assert notes(cells, "abc") == [
        "others used 1.4 to 1.5 of 2 cores (a; b)",
        "p99: these 1000 are worth 7 to 42; 5200 to 53000 are enough (all 3 cells)",
        "at 12:31 in runs/7 (a)",
        "at 12:30 in runs/7 (b)",
    ]
    assert notes(cells[:2], "ab")[0] == "others used 1.4 to 1.5 of 2 cores (both cells)"
    rows = notes(cells, ["row 3", "row 4", "row 12"])
    assert rows[0] == "others used 1.4 to 1.5 of 2 cores (rows 3 and 4)" and rows[2] == "at 12:31 in runs/7 (row 3)"
    [few] = notes(cells[:2] * 3, ["long" * 20 + str(i) for i in range(6)])[-1:]
    assert few == f"at 12:30 in runs/7 ({'long' * 20}1; {'long' * 20}3; and 1 more)"


def test_a_record_reached_twice_counts_once(sweep: Path, tmp_path: Path) -> None:
    copy = sweep / "mlruns" / "artifacts" / "copy"
    copy.mkdir(parents=True)
    (copy / records.RECORD_FILE).write_text((sweep / "0" / records.RECORD_FILE).read_text())
    assert [folder for folder, _ in read_cells([sweep, sweep / "0"])] == [sweep / name for name in "0123"]
    assert len(cells_frame(read_cells([sweep / "1"]))) == 1


def fails(capsys: Capture, *arguments: str) -> str:
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grbench report: ")
    assert error.count("\n") == 1
    return error


def test_a_folder_that_is_made_for_the_page_is_named(tmp_path: Path, capsys: Capture) -> None:
    write_cell(tmp_path / "cells" / "a", status=Status.OOM)
    out = tmp_path / "new" / "folder" / "page.md"
    assert main(["report", str(tmp_path / "cells"), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"grbench: made the folder {out.parent}\n"
    assert captured.out == f"{out}: 1 cell\n"
    assert main(["report", str(tmp_path / "cells"), "--out", str(out)]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "export", "build-plan"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: Capture, command: str
) -> None:
    (tmp_path / "taken").touch()
    out = tmp_path / "taken" / "new" / "page.md"
    assert main([command, "--out", str(out)]) == 2
    wrong = f"grbench {command}: --out {out}: Not a directory; give a folder that can be written\n"
    assert capsys.readouterr().err == wrong


@pytest.mark.parametrize(
    "name, before, space", [("r.md", None, 8192), ("r.html", b"old", 8192), ("r.md", "folder", -1)]
)
def test_a_disk_without_space_keeps_what_was_there(
    sweep: Path, tmp_path: Path, capsys: Capture, name: str, before: bytes | str | None, space: int | None
) -> None:
    """A limit of a file's size stands for a full disk. In the last case the page can't replace a folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / name
    if isinstance(before, bytes):
        out.write_bytes(before)
    elif before:
        out.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (space or limits[0], limits[1]))
    try:
        error = fails(capsys, str(sweep), "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    why = "Is a directory" if before == "folder" else "File too large"
    assert error == f"grbench report: {out}: {why}; free space there, or give a folder that can be written\n"
    assert [path.name for path in folder.iterdir()] == ([name] if before else [])
    assert not isinstance(before, bytes) or out.read_bytes() == before


def test_errors_are_one_line(sweep: Path, tmp_path: Path, capsys: Capture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ["--out", str(tmp_path / "r.md")]
    assert f"no record found under {empty}; `python -m grbench runner.output_root={empty}` makes one" in fails(
        capsys, str(empty), *out
    )
    assert "no where: no such folder; check the path, or make one: `python -m grbench 'runner.output_root=" in fails(
        capsys, str(tmp_path / "no where"), *out
    )
    (empty / records.RECORD_FILE).write_text("{")
    assert f"{empty}/record.json: not JSON" in fails(capsys, str(empty), *out)
    assert "cannot be read" in fails(capsys, "--mlflow", "nosuchscheme://x", *out)
    assert "no such file" in fails(capsys, "--mlflow", f"sqlite:///{tmp_path}/none.db", *out)
    assert "--mlflow: Invalid IPv6 URL; allowed" in fails(capsys, "--mlflow", "http://[", *out)
    assert "sqlite:x.db: no URI of a database; allowed is such as" in fails(capsys, "--mlflow", "sqlite:x.db", *out)
    assert not (tmp_path / "none.db").exists()
    assert "the suffix says the form; allowed: .md, .html, .csv, .json" in fails(
        capsys, str(sweep), "--out", str(tmp_path / "r.pdf")
    )
    assert not (tmp_path / "r.md").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(b"PAR1 no more"), "not readable as parquet"),
        (lambda path: path.write_bytes(b""), "not readable as parquet"),
        (lambda path: path.write_bytes(path.read_bytes()[:-99]), "not readable as parquet"),
        (lambda path: pd.DataFrame({"latency_ms": [1.0]}).to_parquet(path), "column 'request_id' is missing"),
        (lambda path: pd.read_parquet(path).assign(latency_ms="a").to_parquet(path), "column 'latency_ms' is "),
    ],
)
def test_damaged_samples_cost_no_more_than_their_curves(
    sweep: Path, tmp_path: Path, capsys: Capture, damage: Callable[[Path], None], message: str
) -> None:
    damage(sweep / "1" / records.SAMPLES_FILE)
    page = written(sweep, tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"grbench report: without its curves: {sweep}/1/samples.parquet: ") and message in line
    [note] = [note for note in page.split("\n- ") if note.startswith(f"{sweep}/1/samples.parquet: ")]
    assert message in note and "rerun=true" in note.split("\n\n")[0]
    assert [series.name[0] for series in chart(sweep, "latency_cdf").series] == ["2", "3"]
    with pytest.warns(UserWarning, match=r"1/samples\.parquet: "):
        parts = time_parts(load_frame(sweep))
    assert list(parts["latency_ms"].isna()) == [False, True, False] and message in parts.attrs["notes"][0]
    with pytest.raises(ReportError, match=r"1/samples\.parquet: "):
        batches_of(sweep / "1")


def test_damaged_samples_of_a_repeat_are_named(tmp_path: Path, capsys: Capture) -> None:
    for seed in range(2):
        write_cell(tmp_path / "runs" / f"{seed}", f"seed={seed}")
    (tmp_path / "runs" / "1" / records.SAMPLES_FILE).write_bytes(b"PAR1 cut")
    assert f"\n- {tmp_path}/runs/1/samples.parquet: not readable" in written(tmp_path / "runs", tmp_path)
    assert capsys.readouterr().err.count("/runs/1/samples.parquet: not readable as parquet") == 1


def test_texts_of_a_record_make_no_link_and_commands_are_as_typed() -> None:
    """Records may be of other people."""
    hostile = "![x](http://evil/t.png) [here](http://evil) [a]: http://evil <b> `a"
    assert escape(hostile) == r"![x\](http://evil/t.png) [here\](http://evil) [a\]: http://evil &lt;b> \`a"
    made = sections([Heading(hostile), Text(hostile), Bullets([hostile]), Table([hostile], [[hostile]])])
    assert not re.search(r"(?<!\\)\](?=[(:])|<b>", "\n".join(made))
    assert escape("p99 3.6 [3.5, 3.7] and `a command`") == "p99 3.6 [3.5, 3.7] and `a command`"
    assert table(["command"], [[Code('path="a<b|c`.csv"')]]).splitlines()[2] == r'| `` path="a<b\|c`.csv" `` |'
    assert _inline(Code('path="a<b|c`.csv"')) == '<code>path="a&lt;b|c`.csv"</code>'


def test_each_sentence_of_a_note_has_a_line() -> None:
    note = "It is INVALID: reduce the load. Run unsuccessful, e.g. CUDA was `lost. Try` again. (2 of 3 cells)"
    assert bullets([note, "One."]) == [
        "- It is INVALID: reduce the load.\n  Run unsuccessful, e.g. CUDA was `lost. Try` again.\n  (2 of 3 cells)\n"
        "- One."
    ]
    assert sections([Text("One. Two.")]) == ["One.\nTwo."]


def test_a_broken_record_beside_good_ones_is_named(sweep: Path, tmp_path: Path) -> None:
    (sweep / "3" / records.RECORD_FILE).write_text("[]")
    assert main(["report", str(sweep), "--out", str(tmp_path / "r.md")]) == 0
    page = (tmp_path / "r.md").read_text()
    assert f"- {sweep}/3/record.json: not a record (a JSON object is expected); remove it or run its cell again" in page
    assert page.startswith("# grbench report\n\n3 cells, 3 OK")


def test_runs_come_out_of_mlflow_as_they_went_in(sweep: Path, tmp_path: Path, capsys: Capture) -> None:
    uri = log_to_mlflow(sweep, tmp_path / "mlflow")
    for name, source in (
        ("files.md", [str(sweep)]),
        ("mlflow.md", ["--mlflow", uri, "--experiment", "grbench"]),
        ("both.md", [str(sweep), "--mlflow", uri]),
    ):
        assert main(["report", *source, "--out", str(tmp_path / name)]) == 0
    pages = {name: (tmp_path / f"{name}.md").read_text() for name in ("files", "mlflow", "both")}
    assert len({page.replace(f"{name}_files", "files_files") for name, page in pages.items()}) == 1
    assert ink((tmp_path / "mlflow_files" / "1_latency_cdf.png").read_bytes()) > 0.01
    capsys.readouterr()
    error = fails(capsys, "--mlflow", uri, "--experiment", "other", "--out", str(tmp_path / "r.md"))
    assert f"--experiment other: unknown at {uri}; known: " in error
    assert "grbench" in error.split("known: ")[1]
    damaged = min((tmp_path / "mlflow").rglob(records.RECORD_FILE))
    damaged.write_text("[]")
    assert main(["report", "--mlflow", uri, "--out", str(tmp_path / "rest.md")]) == 0
    assert f"left out: {uri}/{damaged.parents[1].name}/record.json: not a record" in capsys.readouterr().err


def test_module_runs_and_explains_itself(sweep: Path, tmp_path: Path) -> None:
    command_line = [sys.executable, "-m", "grbench", "report", str(sweep), "--out", "r.md"]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "r.md: 4 cells, 3 figures in r_files\n", "")


def test_the_table_needs_neither_pandas_nor_matplotlib() -> None:
    heavy = {"pandas", "matplotlib", "mlflow", "torch"}
    code = f"import sys, grbench.report.table; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr


def test_a_cell_of_a_study_is_repeated_alone() -> None:
    study, other = (RunRecord(SPEC, "0", Status.OK, "2026", 1.0, overrides=o) for o in (["study=batching"], ["seed=1"]))
    assert command(study) == "python -m grbench hydra.mode=RUN study=batching"
    assert command(other) == "python -m grbench seed=1"
    other.config_dir = "/my configs"
    assert command(other) == "python -m grbench --config-dir '/my configs' seed=1"


def test_repeats_share_a_row_with_their_number(tmp_path: Path) -> None:
    for seed, scale in enumerate((1.0, 1.1, 1.3)):
        write_cell(tmp_path / "runs" / f"{seed}", f"seed={seed}", scale=scale)
    write_cell(tmp_path / "runs" / "other", "scenario.max_batch=4", scale=9.0)
    write_report(read_cells([tmp_path / "runs"]), tmp_path / "page.md", "Repeats")
    row, other = rows_of((tmp_path / "page.md").read_text(), "Answer at 100")
    assert [row["runs"], other["runs"]] == ["3", "-"]
    low, high = map(float, re.findall(r"[\d.]+", row["p99 ms"])[1:])
    assert high > 1.3 * low  # the runs differ by 30%
