"""The report page, its figures, the terminal table and the frames they are made of."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.cells import SPEC, ink, log_to_mlflow, write_cell
from rich.console import Console

from grbench.cli import main
from grbench.execution import records
from grbench.execution.records import RunRecord, Status
from grbench.report import (
    ReportError,
    cells_frame,
    load_frame,
    load_samples,
    plot_hit_mix,
    plot_latency_cdf,
    plot_throughput_latency,
    plot_time_shares,
    plots,
    time_parts,
    within_limit,
)
from grbench.report.cells import Planned, command, figure, flatten, knobs, label, labels
from grbench.report.frame import PARTS, read_cells
from grbench.report.markdown import code, escape, table
from grbench.report.page import write_page
from grbench.report.table import print_cells

Capture = pytest.CaptureFixture[str]


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
    """The table under a heading of a Markdown page."""
    lines = page.split(f"## {heading}\n\n", 1)[1].split("\n\n")[0].strip().splitlines()
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def test_page_compares_the_knobs_that_differ(sweep: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "reports" / "kernels of today.md"
    assert main(["report", str(sweep), "--out", str(out), "--title", "Kernels"]) == 0
    assert capsys.readouterr().out == f"{out}: 4 cells, 3 figures\n"
    page = out.read_text()
    assert page.startswith(
        "# Kernels\n\n4 cells, 3 OK, measured 2026-01-02.\n\n- At 100 requests/s, hstu kernel=triton max_batch=8"
    )
    rows = rows_of(page, "Comparison")
    assert list(rows[0])[:3] == ["#", "cell", "status"]
    assert [(r["cell"], r["status"]) for r in rows] == [
        ("hstu kernel=torch max_batch=8", "OK"),
        ("hstu kernel=triton max_batch=8", "OK"),
        ("hstu kernel=triton max_batch=32", "OK"),
        ("hstu kernel=cutlass max_batch=8", "UNAVAILABLE"),
    ]
    record = records.load(sweep / "1")
    low, high = record.intervals["latency_ms/p99"]
    assert rows[1]["p99"] == f"{record.metrics['latency_ms/p99']:.2f} [{low:.2f}, {high:.2f}]"
    assert rows[1]["throughput rps"] == "200"
    assert rows[1]["compute p50"] == f"{record.metrics['compute_ms/p50']:#.3g}"
    assert rows[1]["gate error / allowed"] == "1.2e-07 / 2e-05"
    assert [r["p99 within limit"] for r in rows] == ["yes", "yes", "p99 withheld", "-"]


def test_page_shows_the_hits_of_cells_with_a_cache(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    write_cell(root / "0", "cache=none")
    cached = write_cell(root / "1", "cache=lru")
    cached.metrics |= {"cache/device_hit_rate": 0.316, "cache/host_hit_rate": 0.0}
    cached.gate["measured"] = {"checked": 131, "answers": 1500}
    records.save(cached, root / "1")
    main(["report", str(root), "--out", str(tmp_path / "r.md")])
    rows = rows_of((tmp_path / "r.md").read_text(), "Comparison")
    assert [(r["cell"], r["hits on device / host, %"]) for r in rows] == [
        ("hstu cache=none", "-"),
        ("hstu cache=lru", "31.6 / 0"),
    ]
    assert [r["answers compared"] for r in rows] == ["-", "131 of 1500"]  # records from before have none


def test_page_withholds_p99_and_says_so(sweep: Path, tmp_path: Path) -> None:
    main(["report", str(sweep), "--out", str(tmp_path / "r.md")])
    page = (tmp_path / "r.md").read_text()
    rows = rows_of(page, "Comparison")
    assert rows[2]["p99"] == rows[2]["p99.9"] == "withheld"
    assert rows[2]["p90"].startswith(figure(records.load(sweep / "2").metrics["latency_ms/p90"]) + " [")
    assert "- latency_ms/p99 withheld: it needs 1000 samples, there are 300 (row 3)" in page
    assert "p90 is drawn for all cells: p99 is withheld for 1 of them" in page
    assert "![Throughput against p90 latency]" in page


def test_page_lists_a_failed_cell_and_gives_it_no_speed(sweep: Path, tmp_path: Path) -> None:
    main(["report", str(sweep), "--out", str(tmp_path / "r.md")])
    page = (tmp_path / "r.md").read_text()
    failed = rows_of(page, "Cells without a result")
    assert failed == [
        {
            "#": "4",
            "cell": "hstu kernel=cutlass max_batch=8",
            "status": "UNAVAILABLE",
            "reason": r"no [GPU] \| found; add &lt;one>",
        }
    ]
    row = rows_of(page, "Comparison")[3]
    assert {row[name] for name in ("throughput rps", "goodput rps", "p50", "p99", "queue p50")} == {"-"}


def test_page_says_what_ran_where_and_how_to_repeat_it(sweep: Path, tmp_path: Path) -> None:
    main(["report", str(sweep), "--out", str(tmp_path / "r.md")])
    page = (tmp_path / "r.md").read_text()
    assert rows_of(page, "Requested and actual") == [
        {"option": "engine.device", "requested": "auto", "actual": "cpu", "cells": "all"},
        {"option": "kernel.layer_norm, kernel.norm_gate", "requested": "auto", "actual": "triton", "cells": "all"},
    ]
    environment = {row[""]: row["all rows"] for row in rows_of(page, "Environment")}
    assert environment == {
        "cpu": "Some CPU",
        "git_sha": "abc1234",
        "gpus": "none",
        "versions.torch": "2.13.0",
    }
    commands = [row["command"] for row in rows_of(page, "Run it again")]
    assert commands[2] == "`python -m grbench kernel=triton scenario.max_batch=32`"


def test_a_page_distinguishes_environments(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", "seed=1")
    write_cell(tmp_path / "o" / "1", "seed=2", environment={"cpu": "Other", "gpus": [{"name": "H100"}]})
    main(["report", str(tmp_path / "o"), "--out", str(tmp_path / "r.md")])
    page = (tmp_path / "r.md").read_text()
    assert [row["environment"] for row in rows_of(page, "Comparison")] == ["A", "B"]
    assert {"": "gpus.0.name", "A": "-", "B": "H100"} in rows_of(page, "Environment")


def test_figures_are_real_and_linked(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "a page.md"
    main(["report", str(sweep), "--out", str(out)])
    links = re.findall(r"!\[.*?\]\((.*?)\)", out.read_text())
    assert [Path(link).name for link in links] == [
        "latency_cdf.png",
        "throughput_latency.png",
        "time_shares.png",
    ]
    for link in links:
        assert link.startswith("a%20page_files/")
        assert ink((tmp_path / link.replace("%20", " ")).read_bytes()) > 0.01


def drawn(plot: Any) -> list[str]:
    """Return the texts of a figure's legend."""
    return [text.get_text().replace("\n", " ") for text in plot.figure.legends[0].get_texts()]


def test_curves_are_the_samples_of_the_ok_cells(sweep: Path) -> None:
    plot = plot_latency_cdf(load_frame(sweep))
    assert drawn(plot) == [
        "1 hstu kernel=torch max_batch=8",
        "2 hstu kernel=triton max_batch=8",
        "3 hstu kernel=triton max_batch=32",
        "latency limit 80 ms",
    ]
    curve = next(line for line in plot.figure.axes[0].lines if line.get_label() == "2 hstu kernel=triton max_batch=8")
    latencies = np.sort(load_samples(sweep / "1")["latency_ms"])
    np.testing.assert_array_equal(curve.get_xdata(), latencies)
    assert list(curve.get_ydata())[-1] == 100
    share_at_p50 = curve.get_ydata()[np.searchsorted(latencies, records.load(sweep / "1").metrics["latency_ms/p50"])]
    assert share_at_p50 == pytest.approx(50, abs=0.1)
    limit = next(line for line in plot.figure.axes[0].lines if line.get_label() == "latency limit 80 ms")
    assert list(limit.get_xdata()) == [80, 80]
    assert plot.notes == []


def test_long_distributions_keep_their_tail(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", queries=20_000)
    curve = plot_latency_cdf(load_frame(tmp_path / "o")).figure.axes[0].lines[0]
    latencies = np.sort(load_samples(tmp_path / "o" / "0")["latency_ms"])
    assert len(curve.get_xdata()) <= 4000
    np.testing.assert_array_equal(curve.get_xdata()[-1000:], latencies[-1000:])
    np.testing.assert_allclose(np.interp(50, curve.get_ydata(), curve.get_xdata()), np.median(latencies), rtol=0.01)


def test_too_many_curves_are_left_out_and_named(tmp_path: Path) -> None:
    for i in range(12):
        write_cell(tmp_path / "o" / f"{i:02d}", f"seed={i}", scale=12.0 - i, queries=50)
    plot = plot_latency_cdf(load_frame(tmp_path / "o"))
    assert len(drawn(plot)) == 10 + 1
    assert plot.notes == [
        "10 of 12 cells are drawn, those with the lowest p90; left out: #1 hstu seed=0; #2 hstu seed=1"
    ]


def test_plots_take_cells_too_and_write_png(sweep: Path, tmp_path: Path) -> None:
    path = tmp_path / "plots" / "cdf.png"
    plot_latency_cdf([(sweep / "0", records.load(sweep / "0"))], path)
    assert ink(path.read_bytes()) > 0.01


def test_throughput_plot_has_one_axis_for_all(sweep: Path) -> None:
    frame = load_frame(sweep)
    plot = plot_throughput_latency(frame)
    points = {round(float(line.get_ydata()[0])) for line in plot.figure.axes[0].lines if line.get_marker() == "o"}
    assert points == {150, 200, 30}
    assert "p90" in plot.figure.axes[0].get_xlabel()
    long_enough = plot_throughput_latency(frame[frame["scenario.max_batch"] == 8])
    assert "p99" in long_enough.figure.axes[0].get_xlabel()
    assert long_enough.notes == []


def test_time_shares_add_up(sweep: Path) -> None:
    frame = load_frame(sweep)
    parts = time_parts(frame)
    assert list(parts.index) == list(frame["cell"][:3])
    np.testing.assert_allclose(parts[[*PARTS, "other_ms"]].sum(axis=1), parts["latency_ms"])
    assert parts["latency_ms"].iloc[0] == pytest.approx(frame["latency_ms/mean"].iloc[0])
    assert parts["other_ms"].iloc[0] == pytest.approx(0.25)
    bars = plot_time_shares(frame).figure.axes[0].patches
    assert len(bars) == 5 * 3
    assert sum(bar.get_width() for bar in bars) == pytest.approx(300)


def test_the_hit_mix_is_drawn_by_hit_rate_beside_what_became_of_the_latency(sweep: Path) -> None:
    frame = load_frame(sweep)
    frame["cache/device_hit_rate"] = [0.5, float("nan"), 0.25, *[0.0] * (len(frame) - 3)]
    frame["cache/host_hit_rate"] = [0.1, float("nan"), 0.0, *[0.0] * (len(frame) - 3)]
    mix, latency, good = plot_hit_mix(frame).figure.axes
    heights = np.array([bar.get_height() for bar in mix.patches]).reshape(3, -1)  # device, host, nowhere
    assert heights.T.tolist() == [[0, 0, 100], [25, 0, 75], [50, 10, 40]]
    cells = [int(text.get_text()) for text in good.get_xticklabels()]
    assert cells == [2, 3, 1]
    assert good.lines[0].get_ydata().tolist() == frame.loc[cells, "goodput_rps"].tolist()
    assert latency.lines[0].get_ydata().tolist() == frame.loc[cells, "latency_ms/p90"].tolist()  # one p99 is withheld


def test_labels_with_dollars_and_great_length_are_drawn_whole(tmp_path: Path) -> None:
    long = "/data/$week/" + "-".join(["interactions"] * 9) + "$.inter"
    write_cell(tmp_path / "o" / "0", f"workload={long}")
    write_cell(tmp_path / "o" / "1", "workload=ml_100k")
    for plot in (plot_latency_cdf, plot_throughput_latency, plot_time_shares):
        assert ink(plot(load_frame(tmp_path / "o")).png()) > 0.01


def test_nothing_is_plotted_when_no_cell_is_ok(tmp_path: Path) -> None:
    metrics = {"throughput_rps": 1e9}  # measured, and the samples did not fit on the disk
    write_cell(tmp_path / "o" / "0", status=Status.DISK_FULL, metrics=metrics, gate={"passed": True})
    out = tmp_path / "r.md"
    assert main(["report", str(tmp_path / "o"), "--out", str(out)]) == 0
    assert "No cell is OK: there is nothing to plot." in out.read_text()
    assert "1000000000" not in out.read_text()
    assert not (tmp_path / "r_files").exists()
    with pytest.raises(ReportError, match="nothing to plot: none of 1 cells is OK"):
        plot_latency_cdf(load_frame(tmp_path / "o"))


def test_a_failure_without_a_reason_says_so(tmp_path: Path) -> None:
    write_cell(tmp_path / "o" / "0", "seed=1")
    write_cell(tmp_path / "o" / "1", "seed=2", status=Status.KILLED, error=None)
    write_cell(tmp_path / "o" / "2", "seed=3", status=Status.ERROR, error="broken")
    assert load_frame(tmp_path / "o")["error"].tolist() == ["", "no reason was recorded", "broken"]
    main(["report", str(tmp_path / "o"), "--out", str(tmp_path / "r.md")])
    failed = rows_of((tmp_path / "r.md").read_text(), "Cells without a result")
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


def test_within_limit_needs_the_whole_interval_within() -> None:
    def row(p99: float, low: float, high: float, rps: float, status: str = "OK") -> dict[str, Any]:
        names = ("latency_ms/p99", "latency_ms/p99/low", "latency_ms/p99/high", "throughput_rps", "status")
        return dict(zip(names, (p99, low, high, rps, status), strict=True)) | {"latency_limit_ms": 80.0}

    nan = float("nan")
    frame = pd.DataFrame(
        [
            row(70, 60, 79, 100),
            row(50, 40, 60, 90),
            row(79, 70, 81, 200),
            row(90, 81, 99, 300),
            row(nan, nan, nan, 400),
            row(80, nan, nan, 95),
            row(nan, nan, nan, nan, "OOM"),
        ]
    )
    assert within_limit(frame).tolist() == ["yes", "yes", "unsure", "no", "p99 withheld", "unsure", "-"]


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
    assert label(named("workload.path=x", workload={"name": "csv", "path": long})) == "hstu server path=week.inter"


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
        "hstu seed=2 #1",
        "hstu seed=2 #2",
    ]
    one, other = {"size": 1}, {"size": 2}
    assert labels(specs({"gate": one, "cache": one}, {"gate": other, "cache": other})) == [
        "hstu cache.size=1 gate.size=1",
        "hstu cache.size=2 gate.size=2",
    ]
    mixed = [named("seed=1", seed=1), named("seed=1", seed=1, latency_limit_ms=50.0), named("kernel=triton", seed=2)]
    assert labels(mixed) == [
        "hstu seed=1 latency_limit_ms=80.0",
        "hstu seed=1 latency_limit_ms=50.0",
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
    low, high = (figure(end) for end in record.intervals["latency_ms/p99"])
    expected = ["OK", "200", figure(record.metrics["latency_ms/p50"]), figure(record.metrics["latency_ms/p99"])]
    expected += [f"[{low},", f"{high}]", "yes"]
    if width > 100:
        expected += [figure(record.metrics[f"{part}_ms/p50"]) for part in ("queue", "compute")]
    assert row.split()[row.split().index("OK") :] == [*expected, "0.0062"]


def test_piped_table_keeps_one_line_a_cell_and_ends_with_what_was_found(sweep: Path) -> None:
    lines = screen(read_cells([sweep]), None)
    assert [line.split()[1:4] for line in lines[2:6]] == [
        ["kernel=torch", "max_batch=8", "OK"],
        ["kernel=triton", "max_batch=8", "OK"],
        ["kernel=triton", "max_batch=32", "OK"],
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
    row = screen(read_cells([tmp_path / "o"]), None)[2].split()
    assert row[row.index("OK") :] == ["OK", "150", "-", "-", "-", "-", row[-2], "0.0062"]


def test_columns_appear_where_cells_have_their_figures(tmp_path: Path) -> None:
    """Hit rates with a cache, stages of a pipeline, AUC with labels; never more than ten columns."""
    record = write_cell(tmp_path / "o" / "0", "cache=lru")
    record.metrics |= {"cache/hit_rate": 0.4, "retrieve_ms/p50": 25.0, "rank_ms/p50": 2.0}
    record.gate["quality"] = {"tasks": {"rated": {"auc": 0.8123}}}
    records.save(record, tmp_path / "o" / "0")
    lines = screen(read_cells([tmp_path / "o"]), None)
    heads = re.split(r"  +", lines[0].strip())
    assert len(heads) == 10
    assert {"hits %", "retrieve + rank", "AUC", "gate"} <= set(heads)
    assert "queue" not in heads
    assert "25.0 + 2.00" in lines[2] and "0.8123" in lines[2] and " 40.0 " in lines[2]


def test_notes_are_said_once(tmp_path: Path) -> None:
    for i in range(6):
        write_cell(
            tmp_path / "o" / str(i), f"scenario.max_batch={i + 1}", notes=["shared", *(["of most"] if i else [])]
        )
    lines = screen(read_cells([tmp_path / "o"]), None)
    assert lines[-3:-1] == ["note: shared", "note: of most (5 of 6 cells)"]


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


def test_errors_are_one_line(sweep: Path, tmp_path: Path, capsys: Capture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ["--out", str(tmp_path / "r.md")]
    assert f"no record found under {empty}; `python -m grbench runner.output_root={empty}` makes one" in fails(
        capsys, str(empty), *out
    )
    assert "nowhere: no such folder" in fails(capsys, str(tmp_path / "nowhere"), *out)
    (empty / records.RECORD_FILE).write_text("{")
    assert f"{empty}/record.json: not JSON" in fails(capsys, str(empty), *out)
    assert "cannot be read" in fails(capsys, "--mlflow", "nosuchscheme://x", *out)
    assert "no such file" in fails(capsys, "--mlflow", f"sqlite:///{tmp_path}/none.db", *out)
    assert not (tmp_path / "none.db").exists()
    assert not (tmp_path / "r.md").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(b"PAR1 no more"), "not readable as parquet"),
        (lambda path: pd.DataFrame({"latency_ms": [1.0]}).to_parquet(path), "column 'request_id' is missing"),
        (lambda path: path.unlink(), "no such file"),
    ],
)
def test_damaged_samples_cost_no_more_than_their_curves(
    sweep: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(sweep / "1" / records.SAMPLES_FILE)
    assert main(["report", str(sweep), "--out", str(tmp_path / "r.md")]) == 0
    page = (tmp_path / "r.md").read_text()
    [line] = [line for line in page.splitlines() if line.startswith(f"- {sweep}/1/samples.parquet: ")]
    assert message in line and "rerun=true" in line
    assert "latency_cdf.png" in page and "time_shares.png" in page


def test_texts_of_a_record_make_no_link_and_commands_are_as_typed() -> None:
    """Records may be of other people."""
    hostile = "![x](http://evil/t.png) [here](http://evil) [a]: http://evil <b> `a"
    assert escape(hostile) == r"![x\](http://evil/t.png) [here\](http://evil) [a\]: http://evil &lt;b> \`a"
    assert escape("p99 3.6 [3.5, 3.7] and `a command`") == "p99 3.6 [3.5, 3.7] and `a command`"
    assert table(["command"], [[code('path="a<b|c`.csv"')]]).splitlines()[2] == r'| `` path="a<b\|c`.csv" `` |'


def test_a_picture_has_no_more_bars_than_a_screen_shows(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAX_BARS", 2)
    plot = plots.plot_time_shares(read_cells([sweep]))
    assert len(plot.figure.axes[0].get_yticks()) == 2
    assert plot.notes[1].startswith("2 of 3 cells are drawn, those with the lowest p90; left out: #")


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
    ):
        assert main(["report", *source, "--out", str(tmp_path / name)]) == 0
    from_files, from_mlflow = ((tmp_path / name).read_text() for name in ("files.md", "mlflow.md"))
    assert from_mlflow.replace("mlflow_files", "files_files") == from_files
    assert ink((tmp_path / "mlflow_files" / "latency_cdf.png").read_bytes()) > 0.01
    capsys.readouterr()
    error = fails(capsys, "--mlflow", uri, "--experiment", "other", "--out", str(tmp_path / "r.md"))
    assert f"--experiment other: unknown at {uri}; known: " in error
    assert "grbench" in error.split("known: ")[1]


def test_module_runs_and_explains_itself(sweep: Path, tmp_path: Path) -> None:
    command_line = [sys.executable, "-m", "grbench", "report", str(sweep), "--out", "r.md"]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "r.md: 4 cells, 3 figures\n", "")


def test_the_table_needs_neither_pandas_nor_matplotlib() -> None:
    heavy = {"pandas", "matplotlib", "mlflow", "torch"}
    code = f"import sys, grbench.report.table; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr


def test_a_cell_of_a_study_is_repeated_alone() -> None:
    study, other = (RunRecord(SPEC, "0", Status.OK, "2026", 1.0, overrides=o) for o in (["study=batching"], ["seed=1"]))
    assert command(study) == "python -m grbench hydra.mode=RUN study=batching"
    assert command(other) == "python -m grbench seed=1"


def test_repeated_cells_have_a_section_with_their_number(tmp_path: Path) -> None:
    for seed, scale in enumerate((1.0, 1.1, 1.3)):
        write_cell(tmp_path / "runs" / f"{seed}", f"seed={seed}", scale=scale)
    write_cell(tmp_path / "runs" / "other", "scenario.max_batch=4")
    write_page(read_cells([tmp_path / "runs"]), tmp_path / "page.md", "Repeats")
    [row] = rows_of((tmp_path / "page.md").read_text(), "Repeated cells")
    assert row["runs"] == "3"
    low, high = map(float, re.findall(r"[\d.]+", row["p99 ms"])[1:])
    assert high > 1.3 * low  # the runs differ by 30%
    write_page(read_cells([tmp_path / "runs" / "other"]), tmp_path / "page.md", "Repeats")
    assert "Repeated" not in (tmp_path / "page.md").read_text()
