"""The sentences that say what was found: only cells that can be compared are, and noise decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grbench.execution.records import RunRecord, Status
from grbench.report.findings import Finding, findings, limit_verdict
from grbench.report.groups import best_first, group_cells
from grbench.report.latency_charts import ranking
from grbench.report.repeats import P99_NEEDS, pooled, run_count
from grbench.report.table import columns_for
from grkernels import fp8

P99 = "latency_ms/p99"


def cell(
    p99: float | None = None,
    *,
    rps: float = 40.0,
    spread: float = 0.1,
    load: float = 40.0,
    scenario: str = "server",
    engine: str = "hstu",
    seed: int = 0,
    cpu: str = "A",
    status: Status = Status.OK,
    **spec: Any,
) -> RunRecord:
    """A record with one p99 and an interval of +- `spread` of it."""
    options = {"server": {"target_qps": load}, "closed_loop": {"clients": load}}.get(scenario, {})
    content = {
        "task": "rank",
        "model": {"name": "hstu_tiny"},
        "workload": {"name": "ml_100k"},
        "scenario": {"name": scenario, "max_batch": 8, **options},
        "engine": {"name": engine, "precision": "fp32"},
        "latency_limit_ms": 80.0,
        "seed": seed,
        **spec,
    }
    record = RunRecord(content, f"{hash(str(content))}", status, "2026-01-01T00:00:00+00:00", 1.0)
    record.environment = {"cpu": cpu, "cpu_cores": 2, "gpus": []}
    record.gate = {"passed": True, "error": 0.0, "tolerance": 1.0}
    if status is Status.OK:
        record.metrics = {"throughput_rps": rps}
        if p99 is not None:
            record.metrics |= {P99: p99, "latency_ms/p90": p99 / 2, "latency_ms/p50": p99 / 4}
            record.intervals = {P99: [p99 * (1 - spread), p99 * (1 + spread)]}
    return record


def sentences(*records: RunRecord) -> list[str]:
    return [finding.sentence for finding in findings(records)]


def test_runs_in_loadgens_accuracy_mode_are_not_ranked() -> None:
    for mode, ranked in (("performance", 1), ("accuracy", 0)):
        engines = [cell(scenario="offline", rps=rps, engine=name) for name, rps in (("onnxruntime", 900), ("hstu", 50))]
        for record in engines:
            record.spec["scenario"]["mode"] = mode
        assert len(sentences(*engines)) == ranked
        [group] = group_cells([(Path(), record) for record in engines])
        assert (ranking(group) is not None) == ranked


def test_a_trace_at_its_own_clock_is_not_at_a_load_of_0() -> None:
    replays = [cell(p99, scenario="trace_replay") for p99 in (50, 120, 120)]
    for record, rate in zip(replays, (None, 20.0, 40.0), strict=True):
        record.spec["scenario"]["mean_qps"] = rate
    own_clock, scaled = sentences(*replays)
    assert own_clock.startswith("In trace_replay, hstu has a p99 of 50.0 [45.0, 55.0] ms, within the limit")
    assert scaled.startswith("In trace_replay, no cell has p99 within 80 ms for certain")


def test_at_one_load_the_lowest_p99_leads_whatever_the_throughput() -> None:
    """In `server` the rate is what was offered: its last digits say nothing."""
    fast, slow = cell(6.25, rps=40.0252), cell(9.28, rps=40.0254, engine="onnxruntime")
    (found,) = findings([slow, fast])
    assert found.best == (fast,)
    assert found.sentence == (
        "At 40 requests/s, hstu has the lowest p99: 6.25 [5.62, 6.88] ms, within the limit of 80 ms; "
        "next is onnxruntime with 9.28 [8.35, 10.2] ms."
    )


def test_the_sentence_the_table_and_the_figure_rank_by_one_percentile() -> None:
    """Rank by p90 where one cell's p99 has no interval."""
    first, *others = (cell(p99, engine=engine) for p99, engine in ((9.0, "hstu"), (8.0, "aoti"), (7.0, "onnxruntime")))
    for one, p90 in zip((first, *others), (1.0, 2.0, 3.0), strict=True):
        one.metrics["latency_ms/p90"], one.intervals["latency_ms/p90"] = p90, [p90 * 0.9, p90 * 1.1]
    del first.intervals[P99]
    (found,) = findings([*others, first])
    assert found.sentence.startswith("At 40 requests/s, hstu has the lowest p90: 1.00")
    assert found.sentence.endswith(f"; a p99 with an interval needs {P99_NEEDS}, which 1 of 3 cells lack.")
    shown = {column.heading: column.text for column in columns_for([first, *others])}
    assert [shown["p90 ms"](one).split()[0] for one in (first, *others)] == ["1.00", "2.00", "3.00"]
    assert "p90 ms" not in [column.heading for column in columns_for(others)]  # there p99 ranks
    [alone] = findings([first])
    assert alone.sentence == (
        "At 40 requests/s, hstu has a p90 of 1.00 [0.900, 1.10] ms; a p99 with an interval needs 1000 requests that "
        "are worth 368 independent ones, which this cell lacks."
    )
    assert best_first([*others, first])[0] is found.best[0] is first
    [group] = group_cells([(Path("a"), first), (Path("b"), others[0]), (Path("c"), others[1])])
    figure = ranking(group)
    assert figure is not None and figure.title == "p90 latency" and figure.rows[0] == "1 hstu"
    assert figure.notes[0].startswith("p90 ranks these cells, because 1 of 3 have no p99 with an interval")


def test_overlapping_intervals_decide_nothing() -> None:
    (said,) = sentences(cell(6.25), cell(6.5, engine="onnxruntime"), cell(20, engine="aoti"))
    assert "hstu leads, but not beyond the 95% intervals of onnxruntime: 6.25" in said
    assert said.endswith("; next is aoti with 20.0 [18.0, 22.0] ms.")


def test_a_limit_is_kept_only_by_the_whole_interval() -> None:
    assert limit_verdict(cell(60)) == "yes"
    assert limit_verdict(cell(79)) == "unsure"
    assert limit_verdict(cell(100)) == "no"
    assert limit_verdict(cell(scenario="offline")) == limit_verdict(cell(60, status=Status.OOM)) == "-"
    assert sentences(cell(79))[0].endswith("; the limit of 80 ms is in its interval.")


def test_a_growing_queue_or_a_smaller_percentile_breaks_a_limit_without_an_interval_of_p99() -> None:
    behind = cell(2171)
    del behind.intervals[P99]
    behind.metrics |= {"offered_rps": 1500.0, "throughput_rps": 827.0, "latency_ms/p50": 60.0}
    assert limit_verdict(behind) == "unsure"  # so few requests may be a burst
    behind.metrics["latency_ms/p50"] = 1316.0
    assert limit_verdict(behind) == "no"
    assert ", over the limit of 80 ms." in sentences(behind)[0]
    behind.metrics["throughput_rps"] = 1490.0
    assert limit_verdict(behind) == "unsure"
    behind.intervals["latency_ms/p90"] = [81.0, 3000.0]
    assert limit_verdict(behind) == "no"
    assert sentences(cell(100))[0].endswith(", over the limit of 80 ms.")


def test_over_several_loads_the_highest_that_keeps_the_limit_leads() -> None:
    cells = [cell(p99, load=load, engine=e) for e, rows in
             {"hstu": [(20, 50), (60, 100), (300, 200)], "aoti": [(30, 50), (35, 100), (70, 200)]}.items()
             for p99, load in rows]  # fmt: skip
    (found,) = findings(cells)
    assert [r.spec["scenario"]["target_qps"] for r in found.best] == [200]
    assert found.sentence == (
        "In server, aoti: the highest load with p99 within 80 ms is 200 requests/s (p99 70.0 [63.0, 77.0] ms); "
        "next is hstu with 100. At 50 requests/s, hstu has the lowest p99: 20.0 [18.0, 22.0] ms, within the limit of "
        "80 ms; next is aoti with 30.0 [27.0, 33.0] ms. At 100 requests/s, aoti has the lowest p99: 35.0 [31.5, 38.5] "
        "ms, within the limit of 80 ms; next is hstu with 60.0 [54.0, 66.0] ms. At 200 requests/s, aoti has the lowest "
        "p99: 70.0 [63.0, 77.0] ms, within the limit of 80 ms; next is hstu with 300 [270, 330] ms."
    )
    late = [cell(p99, load=load) for p99, load in ((100, 50), (90, 20))]
    assert findings(late)[0].best == ()
    assert sentences(*late) == ["In server, no cell has p99 within 80 ms for certain."]
    unknown = cell(60, load=10, engine="aoti")
    unknown.intervals = {}
    assert sentences(*late, cell(79, load=40), unknown) == [
        "In server, no cell has p99 within 80 ms for certain; nearest is hstu at 40 requests/s (p99 79.0 [71.1, 86.9] "
        "ms): raise scenario.queries or set runner.repeats=5; 1 of 4 cells has too few requests for an interval: "
        "scenario.queries=1000 is about enough."
    ]


def test_too_few_requests_are_said_to_be_too_few_and_rank_within_each_load() -> None:
    """300 requests give no p99, whatever the limit; those of one cell are worth 15 independent ones."""
    latencies = {(20, "hstu"): 30, (20, "aoti"): 8, (40, "hstu"): 10, (40, "aoti"): 20}
    cells = {(load, engine): cell(p99, load=load, engine=engine) for (load, engine), p99 in latencies.items()}
    for (load, engine), one in cells.items():
        del one.metrics[P99], one.intervals[P99]
        few = (load, engine) == (40, "aoti")
        one.metrics |= {"samples": 300.0, "latency_ms/p50_worth": 300.0, "latency_ms/p90_worth": 15.0 if few else 54.0}
        one.intervals["latency_ms/p90"] = [one.metrics["latency_ms/p90"] * (1 + end) for end in (-0.1, 0.1)]
    (found,) = findings(list(cells.values()))
    assert found.best == ()
    assert found.sentence == (
        "In server, the requests of every cell are too few for a p99 with an interval: scenario.queries=7400 is about "
        "enough. "
        "At 20 requests/s, aoti has the lowest p90: 4.00 [3.60, 4.40] ms; next is hstu with 15.0 [13.5, 16.5] ms. "
        "At 40 requests/s, hstu has the lowest p90: 5.00 [4.50, 5.50] ms; next is aoti with 10.0 [9.00, 11.0] ms."
    )
    order = [(40, "hstu"), (40, "aoti"), (20, "aoti"), (20, "hstu")]
    assert best_first(list(cells.values())) == [cells[which] for which in order]


def test_offline_cells_are_ranked_by_throughput() -> None:
    assert sentences(cell(scenario="offline", rps=111)) == ["Offline, hstu answers 111 requests/s."]
    (said,) = sentences(cell(scenario="offline", rps=111), cell(scenario="offline", rps=294, engine="aoti"))
    assert said == (
        "Offline, aoti is fastest: 294 requests/s; next is hstu with 111 "
        "(one run each; runner.repeats=5 gives intervals)."
    )
    wide = [cell(scenario="offline", rps=rps, seed=i) for i, rps in enumerate((100, 400))]
    (said,) = sentences(*wide, cell(scenario="offline", rps=180, engine="aoti"))
    assert said.startswith("Offline, hstu leads, but not beyond the 95% intervals of aoti: 200 [")


def test_seeds_are_repeats_whose_spread_counts() -> None:
    """Three seeds of one cell had intervals that did not overlap: one run's interval understates the spread."""
    mine = [cell(p99, seed=i, spread=0.01) for i, p99 in enumerate((4.6, 5.0, 7.3))]
    (found,) = findings([*mine, cell(6.0, engine="aoti", spread=0.01)])
    assert found.best == tuple(mine)
    said = "hstu leads, but not beyond the 95% intervals of aoti: 5.52 [2.99, 10.2] ms (3 runs), within"
    assert said in found.sentence
    offline = [cell(scenario="offline", rps=rps, seed=i) for i, rps in enumerate((100, 101, 99))]
    assert sentences(*offline) == ["Offline, hstu answers 100 [97.5, 103] requests/s (3 runs)."]


def test_repeats_are_one_row() -> None:
    """Their mean, the spread between them, and their number; what failed or differs in more stays apart."""
    runs = [cell(p99, seed=i, rps=40 + i) for i, p99 in enumerate((4.6, 5.0, 7.3))]
    failed, other = cell(seed=3, status=Status.ERROR), cell(9.0, engine="aoti")
    runs[1].metrics["cache/hit_rate"] = 0.5  # not of all runs
    one, *rest = pooled([*runs, failed, other])
    assert rest == [failed, other]
    assert [run_count(record) for record in (one, other)] == [3, 1]
    assert one.metrics[P99] == pytest.approx((4.6 * 5.0 * 7.3) ** (1 / 3))
    assert one.intervals.keys() == {P99, "latency_ms/p90", "latency_ms/p50", "throughput_rps"}
    assert "cache/hit_rate" not in one.metrics
    assert [record.metrics.get("runs") for record in runs] == [None] * 3
    moved = [cell(p99, seed=i, cpu=f"{i}") for i, p99 in enumerate((4.6, 5.0))]
    assert pooled(moved) == moved


def test_a_run_with_the_same_seed_replaces_the_one_before() -> None:
    """Reruns of one seed share weights, trace and arrivals: they are no repeats."""
    first, again, other = cell(4.0, seed=0), cell(6.0, seed=0), cell(5.0, seed=1)
    again.started_at = "2026-01-01T00:01:00+00:00"
    (one,) = pooled([again, first])
    assert one.metrics[P99] == 6.0 and run_count(one) == 1
    assert one.notes == ["1 earlier run is left out: a run with the same seed replaces the one before it"]
    (both,) = pooled([first, again, other])
    assert run_count(both) == 2 and both.metrics[P99] == pytest.approx((6.0 * 5.0) ** 0.5)
    (found,) = findings([first, again])
    assert found.best == (again,) and "runs" not in found.sentence


def test_a_note_of_some_runs_says_of_how_many() -> None:
    """Notes that differ in a number alone count as one, which is every run's here."""
    one, other = cell(4.0, seed=0), cell(5.0, seed=1)
    one.notes, other.notes = ["the run took 0.35 s", "a kernel was compiled"], ["the run took 0.37 s"]
    (both,) = pooled([one, other])
    expected = ["the run took 0.35 s", "a kernel was compiled (1 of 2 runs)", "the run took 0.37 s"]
    assert [note for note in both.notes if note in expected] == expected


@pytest.mark.parametrize("changed", ["git_sha", "code"])
def test_runs_of_other_code_are_no_repeats(changed: str) -> None:
    one, other = cell(4.0, seed=0), cell(6.0, seed=1)
    other.environment[changed] = "other"
    assert len(pooled([one, other])) == 2


def test_two_files_of_one_path_are_different_work() -> None:
    one, same, other = (cell(p99, seed=seed) for seed, p99 in enumerate((4.0, 4.1, 6.0)))
    for record, digest in ((one, "aa" * 32), (same, "aa" * 32), (other, "bb" * 32)):
        record.spec["workload"] = {"name": "csv", "path": "ratings.csv"}
        record.files = {"workload.path": digest}
    same.spec["workload"]["path"] = "elsewhere/ratings.csv"
    assert len(pooled([one, same, other])) == 2
    assert [said.partition(":")[0] + ":" + said.split(":")[1][:9] for said in sentences(one, other)] == [
        "hstu_tiny on csv sha256:aaaaaaaa",
        "hstu_tiny on csv sha256:bbbbbbbb",
    ]


@pytest.mark.parametrize(
    ("seeds", "words"), [((0, 1), ["runner.repeats=2"]), ((4, 3), ["seed=3", "runner.repeats=2"]), ((0, 7), ["seed=0"])]
)
def test_a_row_of_repeats_has_the_command_of_all(seeds: tuple[int, ...], words: list[str]) -> None:
    runs = [cell(seed=seed) for seed in seeds]
    for run, seed in zip(runs, seeds, strict=True):
        run.overrides = ["engine=hstu", f"seed={seed}"]
    [row] = pooled(runs)
    assert row.overrides == ["engine=hstu", *words]


def test_a_cell_of_two_commits_is_two_strategies_with_their_commits() -> None:
    old, new = cell(p99=10), cell(p99=20)
    old.environment["git_sha"], new.environment["git_sha"] = "a" * 40, "b" * 40 + "+dirty"
    (said,) = sentences(old, new)
    assert said.startswith("At 40 requests/s, hstu commit=aaaaaaa has the lowest p99: 10.0 ")
    assert "; next is hstu commit=bbbbbbb+dirty with 20.0 " in said


def test_short_offline_runs_are_not_ranked() -> None:
    """A rate over 0.3 s is mostly chance; repeats have an interval that says so."""
    quick, slow = cell(scenario="offline", rps=300), cell(scenario="offline", rps=100, engine="aoti")
    quick.metrics["duration_s"], slow.metrics["duration_s"] = 0.3, 3.0
    (found,) = findings([quick, slow])
    assert found.best == ()
    assert found.sentence == (
        "Offline, nothing is ranked, because hstu ran for less than 1 s: "
        "raise scenario.queries or set runner.repeats=5."
    )
    assert sentences(quick) == ["Offline, hstu answers 300 requests/s."]
    repeats = [cell(scenario="offline", rps=300 + i, seed=i) for i in range(3)]
    for run in repeats:
        run.metrics["duration_s"] = 0.3
    assert sentences(*repeats, slow)[0].startswith("Offline, hstu is fastest: 301")


@pytest.mark.parametrize("scenario", ["offline", "server"])
@pytest.mark.parametrize("stage", ["", "rank", "server"])  # of a pipeline, or of another process
def test_emulated_products_are_not_ranked_by_speed(scenario: str, stage: str) -> None:
    """The fastest of three cells is one whose products a CPU emulates."""

    def ran_on(device: str) -> dict[str, Any]:
        products = {"fp8_products": fp8.runs_as(device)}
        return {"": products, "rank": {"rank": products}, "server": {"server": {"strategies": [products]}}}[stage]

    precisions = {"fp32": 9.0, "bf16": 7.0, "fp8": 5.0}
    every = [cell(p99, scenario=scenario, rps=1000 / p99, engine=name) for name, p99 in precisions.items()]
    every[2].actual = ran_on("cpu")
    why = " fp8 is not ranked by speed, because products in fp8 are emulated there, and their speed is not that of fp8."
    (found,) = findings(every)
    assert found.best == (every[1],) and found.sentence.endswith(why) and "fp8" not in found.sentence.removesuffix(why)
    assert [record.spec["engine"]["name"] for record in best_first(every)] == ["bf16", "fp32", "fp8"]
    assert findings(every[2:]) == [Finding((), why.strip())]
    every[2].actual = ran_on("cuda")
    (found,) = findings(every)
    assert found.best == (every[2],) and best_first(every)[0] is every[2]


def test_neither_an_emulated_nor_a_failed_cell_orders_the_others() -> None:
    """The only cell that keeps the limit at 100 requests/s is emulated, and one at 200 failed."""
    high, low = cell(120, load=100), cell(60, load=50)
    slow, failed = cell(20, load=100, engine="aoti"), cell(load=200, status=Status.OOM)
    slow.actual = {"fp8_products": fp8.runs_as("cpu")}
    assert best_first([failed, slow, high, low]) == [low, high, slow, failed]
    del slow.metrics[P99], slow.intervals[P99]  # it would rank those of its load by p90
    faster, other = cell(70, load=100, engine="onnxruntime"), cell(120, load=100)
    faster.metrics["latency_ms/p90"] = 65.0
    assert best_first([other, faster, slow, failed]) == [faster, other, slow, failed]


def test_without_an_interval_nothing_is_certain() -> None:
    short = cell(6.0)
    del short.intervals[P99]
    assert limit_verdict(short) == "unsure"
    assert sentences(short)[0].endswith("6.00 ms; without an interval, the limit of 80 ms is not decided.")
    short.intervals["latency_ms/p90"] = [2.9, 3.1]
    sure = cell(9.0, engine="aoti")
    sure.intervals["latency_ms/p90"] = [4.4, 4.6]
    assert sentences(short, sure)[0].startswith("At 40 requests/s, hstu has the lowest p90: 3.00 [2.90, 3.10]")
    slow = [cell(p99, load=load) for p99, load in ((60, 50), (70, 100))]
    del slow[1].intervals[P99]
    assert "the highest load with p99 within 80 ms is 50 requests/s" in sentences(*slow)[0]


def test_higher_loads_with_too_few_requests_are_named_beside_the_winner() -> None:
    """They may keep the limit too. A lower load with too few requests changes nothing."""
    cells = [cell(30, load=load, engine=e) for e in ("hstu", "aoti") for load in (50, 100, 300)]
    by_load = {(one.spec["scenario"]["target_qps"], one.spec["engine"]["name"]): one for one in cells}
    too_few = {(50, "hstu"): 400.0, (300, "hstu"): 300.0, (300, "aoti"): 300.0}
    for which, samples in too_few.items():
        by_load[which].intervals.clear()
        by_load[which].metrics |= {"samples": samples, "latency_ms/p50_worth": 15.0 if samples == 400.0 else 300.0}
    clause = (
        "; 2 of 2 cells at higher loads have too few requests for an interval: scenario.queries=1000 is about enough."
    )
    assert clause in sentences(*cells)[0], sentences(*cells)[0]
    by_load[300, "aoti"].intervals[P99] = [100.0, 120.0]
    assert "; 1 of 2 cells at higher loads has too few requests" in sentences(*cells)[0]
    by_load[300, "hstu"].intervals[P99] = [100.0, 120.0]
    assert "too few" not in sentences(*cells)[0]


@pytest.mark.parametrize(
    "other",
    [
        {"workload": {"name": "synthetic"}},
        {"task": "generate"},
        {"scenario": "closed_loop"},
        {"latency_limit_ms": 50.0},
        {"cpu": "B"},
    ],
)
def test_different_work_is_not_compared(other: dict[str, Any]) -> None:
    found = findings([cell(6.0), cell(9.0, **other)])
    assert [len(f.best) for f in found] == [1, 1]
    assert not any("next" in f.sentence for f in found)
    if "workload" in other:
        assert [f.sentence.partition(":")[0] for f in found] == ["hstu_tiny on ml_100k", "hstu_tiny on synthetic"]


def test_cells_without_a_result_are_left_out() -> None:
    assert findings([cell(status=Status.OOM)]) == []
    assert len(findings([cell(6.0), cell(status=Status.ERROR, engine="aoti")])) == 1


def test_a_withheld_p99_moves_the_ranking_to_p90() -> None:
    short = cell(6.0, engine="aoti")
    del short.metrics[P99], short.intervals[P99]
    (said,) = sentences(short, cell(20.0))
    assert said.startswith("At 40 requests/s, aoti has the lowest p90: 3.00 ms")


def test_several_servers_are_compared_with_one() -> None:
    def measured(rps: float, more: int, clients: int, scenario: str = "closed_loop", label: str = "hstu") -> RunRecord:
        record = cell(9.0, rps=rps, scenario=scenario, load=clients)
        urls = [f"http://h{n}:8000" for n in range(more)]
        record.spec["engine"] = {"name": "remote", "url": "http://h:8000", "more_urls": urls}
        record.actual = {"server": {"strategies": [{"name": label, "engine": label, "precision": "bf16"}]}}
        return record

    one, two = measured(100.0, 0, 16), measured(190.0, 1, 32)
    [said] = sentences(one, two, measured(240.0, 2, 48), measured(900.0, 1, 32, label="aoti"))
    assert "2 servers answer 1.90 times as many requests/s as one: a scaling efficiency of 95%." in said
    assert said.endswith("3 servers answer 2.40 times as many requests/s as one: a scaling efficiency of 80%.")
    for others in (
        [two],
        [one],
        [measured(100.0, 0, 16, "server"), measured(190.0, 1, 32, "server")],
        [one, measured(190.0, 1, 64)],
    ):  # nothing to compare with, offered rates, other clients each
        assert "efficiency" not in " ".join(sentences(*others))
