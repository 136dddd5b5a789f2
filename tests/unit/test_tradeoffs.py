"""Quality against speed, from made-up records with known differences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.cells import ink, write_cell

from grbench.execution.energy import METRIC as JOULES
from grbench.execution.load import DISTURBED
from grbench.execution.records import RESAMPLES_FILE
from grbench.quality import metrics
from grbench.report import group_cells
from grbench.report.frame import read_cells
from grbench.report.html import page as html_page
from grbench.report.interactive import plotly_figure
from grbench.report.markdown import sections
from grbench.report.page import blocks
from grbench.report.tradeoffs import NOT_ALONE, Tradeoff, tradeoffs
from grkernels import fp8

USERS = 943


def study(root: Path) -> None:
    """The base finds 300 of 943 users. 4 beams lose 60 of them, 1.5 times as fast; 256 find 2 more, half as fast."""
    hits = np.r_[np.ones(300), np.zeros(USERS - 300)]
    cell(root, hits, 100.0)
    cell(root, np.r_[np.zeros(60), hits[60:]], 150.0, width=4, k=4)
    cell(root, np.r_[hits[:300], 1, 1, hits[302:]], 50.0, width=256)
    cell(root, hits, 101.0, stale=4)
    cell(root, np.zeros(USERS), 300.0, width=4, k=4, stale=4)  # two choices differ: it is on no axis
    for width, rate in ((64, 60.0), (256, 40.0)):
        offered = {"offered_rps": 60.0, "latency_ms/p99": 30.0, "throughput_rps": rate}
        cell(
            root, None, 0.0, width=width, scenario="server", metrics=offered, intervals={"latency_ms/p99": [28.0, 33.0]}
        )


def cell(root: Path, hits: Any, rate: float, width: int = 64, k: int = 10, stale: int = 0, **changes: Any) -> None:
    folder = root / str(len(list(root.glob("*"))))
    estimate = metrics.means({"hr10": hits})["hr10"] if hits is not None else None
    ends = {"throughput_rps/in_run": [0.99 * rate, 1.01 * rate]}
    load = [f"scenario={changes.pop('scenario', 'offline')}", f"scenario.target_qps={changes.pop('load', 100)}"]
    record = write_cell(folder, *load, f"workload.stale_events={stale}")
    record.spec |= {"task": "generate", "retrieval": {"beam_width": width, "k": k}}
    record.spec["engine"] = changes.get("engine", record.spec["engine"])
    record.spec["gate"]["quality_requests"] = 1000 if estimate else 0
    if estimate:
        record.metrics |= {"throughput_rps": rate, "quality/hr10": estimate.value}
        record.intervals |= {"quality/hr10": estimate.interval, **ends}
        pd.DataFrame({"hr10": estimate.drawn}).to_parquet(folder / RESAMPLES_FILE)
    record.metrics |= changes.get("metrics", {})
    record.intervals |= changes.get("intervals", {})
    record.spec_hash = f"{int(folder.name):012x}"
    (folder / "record.json").write_text(record.to_json())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study(folder)
    return folder


def found(root: Path) -> list[Tradeoff]:
    return tradeoffs([row for group in group_cells(read_cells([root])) for row in group.rows])


def test_each_axis_has_its_points_and_its_base(root: Path) -> None:
    beams, age = found(root)
    assert (beams.title, age.title) == (
        "Retrieve: beam width against speed",
        "Retrieve: age of the state against speed",
    )
    assert [beams.text(point) for point in beams.points] == ["4", "64", "256"]
    assert [age.text(point) for point in age.points] == ["0", "4"]
    assert beams.base is not None and beams.text(beams.base) == "64" and age.base.row is beams.base.row


def test_changes_are_those_of_pairs(root: Path) -> None:
    beams, age = found(root)
    few, many = beams.others
    lost = beams.change(few, "hr10")
    assert lost.value == pytest.approx(-60 / USERS)
    # Of pairs: the deviation of a mean of 60 ones among 943, not that of two shares of 300 and 240.
    share = 60 / USERS
    assert lost.high - lost.low == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / USERS), rel=0.15)
    assert lost.high - lost.low < 0.6 * (few.quality("hr10").high - few.quality("hr10").low)
    assert beams.change(many, "hr10").value == pytest.approx(2 / USERS)
    assert age.change(age.others[0], "hr10").interval == [0, 0]
    gain = beams.gain(few)
    assert gain.value == pytest.approx(0.5)
    assert (gain.low, gain.high) == pytest.approx((0.479, 0.521), abs=0.001)


def test_a_sentence_says_what_is_lost_and_gained(root: Path) -> None:
    beams, age = found(root)
    assert re.fullmatch(
        r"Against 64 beams: 4 loses 0\.0636 \[0\.0[45]\d\d, 0\.0[78]\d\d\] of HR@10 and gains 50% \[48%, 52%\] "
        r"of requests/s; "
        r"256 loses at most 0\.0000 of HR@10, perhaps none; it costs 50% \[49%, 51%\] of requests/s\.",
        beams.sentence,
    )
    assert age.sentence == (
        "Against a state 0 events old: 4 loses at most 0.0000 of HR@10, perhaps none; it is about as fast [-0%, +2%]."
    )


@pytest.mark.parametrize(
    "change",
    [
        {"notes": [f"others were there: {DISTURBED} machine"]},
        {"duration_s": 0.5},
        {"actual": {"fp8_products": fp8.runs_as("cpu")}},
    ],
)
def test_a_speed_that_says_nothing_is_not_compared(change: dict[str, Any], tmp_path: Path) -> None:
    study(tmp_path)
    path = tmp_path / "1" / "record.json"  # 4 beams
    record = json.loads(path.read_text())
    record["notes"] += change.get("notes", [])
    record["actual"] |= change.get("actual", {})
    record["metrics"] |= {k: v for k, v in change.items() if k not in ("notes", "actual")}
    path.write_text(json.dumps(record))
    beams = found(tmp_path)[0]
    assert "4 loses 0.0636" in beams.sentence and " gains " not in beams.sentence and "it costs 50%" in beams.sentence
    assert beams.sentence.endswith(f"; {NOT_ALONE}.")
    assert [line[5] for line in beams.table()[1]] == ["-", "-", "-50% [-51%, -49%]"]


def test_the_page_has_the_sections_once_and_the_other_cells_as_before(root: Path) -> None:
    content = blocks(read_cells([root]))
    page = "\n\n".join(sections(content))
    assert page.count("## Retrieve: beam width against speed") == 1
    assert "| 4 | 0.2545 [" in page and "| 64 (base) | 0.3181 [" in page
    assert "-0.0636 [-0.0" in page and "+50% [+48%, +52%]" in page
    assert "p99 at 100 requests/s, ms" in page  # the base kept up, 256 beams did not
    assert "30.0 [28.0, 33.0]" in page and "overloaded: 40.0/s" in page
    assert page.count("## Retrieve offline") == 1  # of the cell that is on no axis
    drawn = html_page("t", content)
    assert drawn.count('id="figure_quality_') == 2


def test_p99_is_that_at_the_load_that_most_cells_have(tmp_path: Path) -> None:
    study(tmp_path)
    idle = {"offered_rps": 50.0, "latency_ms/p99": 5.0, "throughput_rps": 50.0}
    cell(tmp_path, None, 0.0, scenario="server", load=50, metrics=idle)
    beams = found(tmp_path)[0]
    heads, lines = beams.table()
    assert heads[-1] == "p99 at 100 requests/s, ms"
    assert [line[-1] for line in lines] == ["-", "30.0 [28.0, 33.0]", "overloaded: 40.0/s"]
    assert {row.record.spec["scenario"]["target_qps"] for row in beams.rows} == {100}


def test_joules_stand_beside_the_throughput_that_they_are_of(tmp_path: Path) -> None:
    study(tmp_path)
    for number, joules in ((0, 0.25), (5, 1.5)):  # the base, offline and as a server
        path = tmp_path / str(number) / "record.json"
        record = json.loads(path.read_text())
        record["metrics"][JOULES] = joules
        path.write_text(json.dumps(record))
    beams = found(tmp_path)[0]
    heads, [four, base, many] = beams.table()
    assert heads[-3:] == ["J/request offline", "p99 at 100 requests/s, ms", "J/request at 100 requests/s"]
    assert [line[-3::2] for line in (four, base, many)] == [["-", "-"], ["0.250", "1.50"], ["-", "-"]]


def test_a_chart_has_intervals_on_both_axes(root: Path) -> None:
    chart = found(root)[0].chart(1)
    assert ink(chart.png()) > 0
    for trace in plotly_figure(chart).data:
        assert (
            trace.error_x.array
            and trace.error_y.array
            and min(*trace.error_x.arrayminus, *trace.error_y.arrayminus) >= 0
        )


def test_a_ranker_with_fewer_candidates_is_compared_by_its_hit_rate(tmp_path: Path) -> None:
    """AUC is of the candidates: of fewer ones it is another figure. A cell without the hit rate is on no axis."""
    for number, (candidates, hits) in enumerate({32: 90, 16: 80, 8: 60, 4: 0}.items()):
        cell(tmp_path, np.r_[np.ones(hits), np.zeros(USERS - hits)], 100.0)
        path = tmp_path / str(number) / "record.json"
        record = json.loads(path.read_text())
        record["spec"] |= {"task": "rank", "retrieval": None}
        record["spec"]["workload"]["num_candidates"] = candidates
        record["metrics"] |= {"quality/auc": 0.5, "quality/hr10_popular": record["metrics"].pop("quality/hr10")}
        path.write_text(json.dumps(record))
        drawn = pd.read_parquet(path.with_name(RESAMPLES_FILE)).rename(columns={"hr10": "hr10_popular"})
        drawn.assign(auc=0.5).drop(columns=[] if hits else ["hr10_popular"]).to_parquet(path.with_name(RESAMPLES_FILE))
    [candidates] = found(tmp_path)
    assert candidates.title == "Rank: candidates scored against speed" and list(candidates.figures) == ["hr10_popular"]
    assert candidates.sentence.startswith("Against 32 candidates: ") and "of HR@10" in candidates.sentence
    few, half = candidates.others
    assert [candidates.change(point, "hr10_popular").value * USERS for point in (half, few)] == pytest.approx(
        [-10, -30]
    )


def test_damaged_resamples_cost_their_point_and_are_named(root: Path, tmp_path: Path) -> None:
    study(tmp_path / "copy")
    (tmp_path / "copy" / "0" / RESAMPLES_FILE).write_bytes(b"none")
    drawn, every = ({row.folder.name for one in found(at) for row in one.rows} for at in (tmp_path / "copy", root))
    assert "0" in every - drawn
    lines = [line for one in blocks(read_cells([tmp_path / "copy"])) for line in getattr(one, "lines", [])]
    assert any(re.search(r"0/quality\.parquet: not readable as parquet .*rerun=true", line) for line in lines)


def test_cells_of_other_users_or_code_are_no_pairs(tmp_path: Path) -> None:
    study(tmp_path)
    for path in tmp_path.glob("[1-4]/record.json"):
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert all(one.base.row.record.spec["seed"] == 1 for one in found(tmp_path))


def test_of_two_cells_the_first_is_the_base(tmp_path: Path) -> None:
    cell(tmp_path, np.ones(USERS), 100.0)
    cell(tmp_path, np.ones(USERS), 200.0, width=4, k=4)  # the faster one has the first row of its table
    [beams] = found(tmp_path)
    assert beams.text(beams.base) == "64"


@pytest.mark.parametrize("widths", [[64], [64, 4]])
def test_several_servers_are_no_other_engine_and_keep_their_efficiency(widths: list[int], tmp_path: Path) -> None:
    for width in widths:  # with two, each cell is also on the axis of beams
        for more in ([], ["http://b:8000"]):
            server = {"name": "remote", "url": "http://a:8000", "more_urls": more}
            cell(tmp_path, np.ones(USERS), 190.0 if more else 100.0, width=width, engine=server)
    assert [one.title for one in found(tmp_path)] == ["Retrieve: beam width against speed"] * 2 * (len(widths) - 1)
    page = "\n\n".join(sections(blocks(read_cells([tmp_path]))))
    assert page.count("## Retrieve offline") == 1
    assert page.count("2 servers answer 1.90 times as many requests/s as one: a scaling efficiency of 95%.") >= 1
