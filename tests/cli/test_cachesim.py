"""The cache simulator against naive simulations, the real index of states, and brute force; the command end to end."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import Grbench
from helpers.forks import fork_command, printed_lines
from helpers.mlflow_store import new_database
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grbench import workloads
from grbench.cachesim import simulate
from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.replay import BELADY, LIMIT, Replay
from grbench.cachesim.simulate import Costs, Outcome, Simulation
from grbench.cachesim.trace import Columns, Workload, load
from grbench.cli import main
from grbench.execution.results import load as load_results
from grbench.report.results import results_sections
from grbench.tools.sizing import flops
from grbench.workloads.config import CsvConfig, Ml100kConfig, SyntheticConfig
from grengines.api import Request
from grengines.cache import policies
from grengines.cache.pool import PagePool
from grengines.cache.states import UserStates
from grengines.models.hstu.config import HSTUConfig

MODEL = HSTUConfig(layers=1, heads=1, qk_dim=16, v_dim=16)  # a token takes 64 bytes in bf16
SMALL = SyntheticConfig("synthetic", users=60, visits=600, history_median=40, max_history=100, delta_mean=6.0)
WORKLOADS: dict[str, Workload] = {
    "zipf": SMALL,
    "revisits": SyntheticConfig(
        "synthetic", users=400, visits=400, revisit_rate=0.7, history_median=20, burstiness=0.5
    ),
    "short": SyntheticConfig("synthetic", users=30, visits=300, history_median=8, delta_mean=0.5, max_requests=200),
    "ml_100k": Ml100kConfig("ml_100k", max_history=64, max_requests=3000),
}


def columns(
    visits: list[tuple[int, int]], starts: list[int] | None = None, times: list[float] | None = None
) -> Columns:
    """A trace of (user, length); a request a second."""
    users, lengths = np.array(visits).reshape(-1, 2).T
    return Columns(
        np.unique(users, return_inverse=True)[1].astype(np.int32),
        np.array(times if times is not None else range(len(visits)), dtype=np.float64),
        np.array(starts or [0] * len(visits), dtype=np.int32),
        lengths.astype(np.int32),
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", WORKLOADS)
def test_columns_are_those_of_the_requests(name: str, seed: int) -> None:
    config = WORKLOADS[name]
    requests = workloads.build(config, seed, 80.0).requests
    trace = load(config, seed)
    assert len(trace) == len(requests)
    assert trace.users.tolist() == np.unique([r.user_id for r in requests], return_inverse=True)[1].tolist()
    assert trace.lengths.tolist() == [len(r.history_items) for r in requests]
    assert trace.times.tolist() == [r.arrival_s for r in requests]
    # Where a history starts is not in a request: it has moved if the last history is no beginning of this one.
    last: dict[int, tuple[int, list[int]]] = {}
    for start, r in zip(trace.starts.tolist(), requests, strict=True):
        before, items = last.get(r.user_id, (start, []))
        assert (start == before) == (r.history_items[: len(items)].tolist() == items) or start == before
        last[r.user_id] = start, r.history_items.tolist()


def test_columns_of_a_file(tmp_path: Path) -> None:
    rows = [f"{user},{item},4.0,{100 * visit + item}" for visit in range(5) for user in (9, 4, 7) for item in range(3)]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    config = CsvConfig("csv", path=str(tmp_path / "ratings.csv"), visit_gap_s=50.0, num_candidates=2, max_history=4)
    requests = workloads.build(config, 0, 80.0).requests
    trace = load(config, 0)
    assert trace.lengths.tolist() == [len(r.history_items) for r in requests]
    assert trace.times.tolist() == [r.arrival_s for r in requests]
    assert trace.starts.max() == 8


traces = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40), st.sampled_from([0, 0, 0, 1, 2])), max_size=80)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", policies.names())
@examples(60)
@given(requests=traces.filter(bool), capacity=st.integers(1, 8))
def test_a_simulation_is_the_naive_one(
    name: str, context: int, requests: list[tuple[int, int, int]], capacity: int
) -> None:
    model = HSTUConfig(contextual_seq_len=context)
    trace = columns([(user, length) for user, length, _ in requests], [start for *_, start in requests])
    costs = Costs.of(model, 16, 8, 40)
    policy = policies.make(name)
    states: dict[int, tuple[int, int]] = {}  # user: start and events of the state
    naive = Outcome(requests=len(trace))

    def pages(events: int) -> int:
        return -(-(context + events) // 16)

    for user, now, start, length in zip(*(c.tolist() for c in (trace.users, trace.times, trace.starts, trace.lengths))):  # noqa: B905
        known = user in states
        before = states.pop(user, (-1, 0))
        valid = known and before[0] == start and (not context or before[1] == length)
        if valid:
            naive.hits += 1
            naive.tokens += before[1]
            naive.flops += flops(model, before[1], 8) - flops(model, before[1], 8, context + before[1])
        cost = flops(model, length, 0) - flops(model, length, 0, context + length)
        if pages(length) > capacity or not (valid or policy.admit(user, pages(length), cost, now)):
            naive.refused += 1
            policy.remove(user)
            continue
        while pages(length) + sum(pages(n) for _, n in states.values()) > capacity:
            victim = policy.victim(now, {user})
            policy.remove(victim)
            del states[victim]
            naive.evictions += 1
        states[user] = start, length
        policy.touch(user, pages(length), cost, now)
    done = Simulation(trace, costs, policies.make(name), capacity).run()
    counts = ("requests", "hits", "tokens", "evictions", "refused")
    assert [getattr(done, c) for c in counts] == [getattr(naive, c) for c in counts]
    assert done.flops == pytest.approx(naive.flops)


@cache
def traced(workload: str) -> tuple[Columns, list[Request]]:
    """A workload as the simulator and as the engine read it."""
    config = WORKLOADS[workload]
    return load(config, 3), workloads.build(config, 3, 80.0).requests


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("workload", ["zipf", "revisits", "short"])
@pytest.mark.parametrize("name", policies.names())
def test_the_engine_s_index_counts_the_same(name: str, workload: str, context: int, share: float) -> None:
    config = WORKLOADS[workload]
    model = HSTUConfig(layers=1, heads=1, qk_dim=16, v_dim=16, contextual_seq_len=context)
    (trace, requests), costs = traced(workload), Costs.of(model, 16, config.num_candidates, config.max_history)
    capacity = max(int(share * sum(costs.pages[n] for n in trace.last_lengths())), costs.pages[trace.lengths.max()])
    simulated = Simulation(trace, costs, policies.make(name), capacity).run()

    pool = PagePool(
        layers=1, pages=capacity, page=16, heads=1, qk_dim=16, v_dim=16, dtype=torch.bfloat16, device="meta"
    )
    index = UserStates(
        pool,
        policies.make(name),
        contextual_seq_len=context,
        cost=lambda tokens: costs.saved[tokens - context],
    )
    for request in requests:
        [plan] = index.lookup([request], request.arrival_s)
        index.extend(plan)
        index.commit(plan)
    counters = index.counters()
    assert counters.policy_errors == counters.bypassed == counters.unstored == counters.partial_hits == 0
    assert counters.hits == simulated.hits
    assert counters.cached_tokens == simulated.tokens + context * simulated.hits
    assert counters.evictions == simulated.evictions
    assert counters.refused == simulated.refused
    if name != "none" and not context:
        assert simulated.hits > 0 and simulated.evictions > 0


def most(trace: Columns, costs: Costs, capacity: int, value: list[float]) -> float:
    """The best that any choice of states can give, by trying all of them."""
    requests = list(zip(trace.users.tolist(), trace.starts.tolist(), trace.lengths.tolist(), strict=True))

    @cache
    def best(i: int, kept: frozenset[tuple[int, int, int]]) -> float:
        if i == len(requests):
            return 0.0
        user, start, _ = requests[i]
        mine = next((state for state in kept if state[0] == user), None)
        gain = value[mine[2]] if mine and mine[1] == start else 0.0
        states = [*(kept - {mine}), requests[i]]
        after = [
            frozenset(chosen)
            for n in range(len(states) + 1)
            for chosen in combinations(states, n)
            if sum(costs.pages[state[2]] for state in chosen) <= capacity
        ]
        return gain + max(best(i + 1, chosen) for chosen in after)

    return best(0, frozenset())


tiny = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.sampled_from([0, 0, 0, 1])), min_size=1, max_size=9)


@examples(80)
@given(requests=tiny, capacity=st.integers(1, 3))
def test_belady_is_the_best_of_all_where_sizes_are_equal(requests: list[tuple[int, int, int]], capacity: int) -> None:
    trace = columns([(user, 1 + length % 16) for user, length, _ in requests], [start for *_, start in requests])
    costs = Costs.of(MODEL, 16, 8, 16)
    found = simulate.belady(trace, costs, capacity)
    assert found.hits == most(trace, costs, capacity, [1.0] * 17)
    assert found.evictions + found.refused <= len(trace)


@examples(80)
@given(requests=tiny, capacity=st.integers(1, 5))
def test_nothing_is_above_the_limit(requests: list[tuple[int, int, int]], capacity: int) -> None:
    trace = columns([(user, length) for user, length, _ in requests], [start for *_, start in requests])
    costs = Costs.of(MODEL, 16, 8, 40)
    limit, belady = simulate.bound(trace, costs, capacity), simulate.belady(trace, costs, capacity)
    events = [float(n) for n in range(41)]
    for found, value, count in (
        (belady.hits, [1.0] * 41, limit.hits),
        (belady.tokens, events, limit.tokens),
        (belady.flops, costs.saved, limit.flops),
    ):
        best = most(trace, costs, capacity, value)
        assert found <= best * (1 + 1e-9)
        assert best <= count * (1 + 1e-9)
    for name in policies.names():
        done = Simulation(trace, costs, policies.make(name), capacity).run()
        assert done.hits <= most(trace, costs, capacity, [1.0] * 41)


def test_a_cache_for_everything_misses_first_visits_only() -> None:
    trace = load(SyntheticConfig("synthetic", users=60, visits=600, max_history=100_000), 0)
    costs = Costs.of(MODEL, 16, 8, int(trace.lengths.max()))
    everything = sum(costs.pages[n] for n in trace.last_lengths())
    returning = 600 - trace.num_users
    assert simulate.belady(trace, costs, everything).hits == returning
    assert simulate.bound(trace, costs, everything).hits == pytest.approx(returning)
    for name in ("lru", "lfu", "gdsf", "predictive"):
        assert Simulation(trace, costs, policies.make(name), everything).run().hits == returning


def test_progress_is_reported_after_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "CHUNK", 100)
    trace, costs = load(SMALL, 0), Costs.of(MODEL, 16, 8, 100)
    for run in (
        lambda report: Simulation(trace, costs, policies.make("lru"), 50).run(report),
        lambda report: simulate.belady(trace, costs, 50, report),
    ):
        report: list[int] = []
        run(report.append)
        assert report == [100, 200, 300, 400, 500, 600]


SYNTHETIC = [SyntheticConfig("synthetic", users=10_000, visits=10_000, revisit_rate=rate) for rate in (0.3, 0.6, 0.8)]
SYNTHETIC += [
    SyntheticConfig("synthetic", users=1_000, visits=10_000),
    SyntheticConfig("synthetic", users=10_000, visits=10_000, revisit_rate=0.6, burstiness=0.8),
]


@pytest.mark.parametrize("workload", [Ml100kConfig("ml_100k"), *SYNTHETIC])
def test_predictive_is_never_below_lru(workload: Workload) -> None:
    replay = Replay(CacheSimConfig(HSTUConfig(), workload, policies=["lru", "predictive"]))
    rows = [row for row in replay.run() if row.policy == "predictive"]
    assert len(rows) == 5
    assert min(row.metrics["over_lru"] for row in rows) >= 0
    assert max(row.metrics["over_lru"] for row in rows) > 0.01
    assert all(row.metrics["belady_share"] <= 1 for row in rows)


RUN = ["workload=synthetic", "workload.visits=3000", "shares=[0.05,0.5]"]


def test_a_run_leaves_table_results_plot_and_mlflow_runs(grbench_here: Grbench, tmp_path: Path) -> None:
    uri = new_database(tmp_path / "outputs")
    done = grbench_here("cachesim", *RUN)
    assert done.returncode == 0, done.stderr
    names = [LIMIT, BELADY, *policies.names()]
    for name in names:
        assert len(re.findall(rf" {name} +\d+\.\d\d ", done.stdout)) == 2, done.stdout
    [path] = tmp_path.glob("outputs/cachesim/*/results.json")
    results = json.loads(path.read_text())
    assert results["trace"]["requests"] == 3000
    assert results["config"]["workload"]["visits"] == 3000
    rows = {(row["policy"], round(row["share"], 2)): row for row in results["rows"]}
    assert rows.keys() == {(name, share) for name in names for share in (0.05, 0.5)}
    for share in (0.05, 0.5):
        rates = {name: rows[name, share]["metrics"]["hit_rate"] for name in names}
        assert rates["none"] == 0 < rates["lru"] <= rates["predictive"] <= rates[BELADY] <= rates[LIMIT]
        lru = rows["lru", share]
        assert lru["metrics"]["belady_share"] == pytest.approx(rates["lru"] / rates[BELADY])
        assert lru["metrics"]["hit_rate"] == lru["outcome"]["hits"] / 3000
        assert lru["gb"] == pytest.approx(share * results["trace"]["footprint_gb"], rel=0.01)
        assert rows["predictive", share]["metrics"]["over_lru"] == pytest.approx(rates["predictive"] - rates["lru"])
    assert (path.parent / "misses.png").read_bytes().startswith(b"\x89PNG")
    page = "\n\n".join(results_sections([("job", load_results(path))]))
    assert page.startswith("## Commands\n\n    python -m grbench cachesim workload=synthetic ")
    for (name, share), row in rows.items():
        cells = f"| {row['gb']:.3g} | {100 * row['share']:.3g} | {name} | {100 * row['metrics']['hit_rate']:.2f} |"
        assert cells in page, share

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("grbench-cachesim")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [r for r in runs if r.data.tags["role"] == "sweep"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2 * len(names)
    assert {r.data.params["policy"] for r in children} == set(names)
    [child] = [r for r in children if r.data.params["policy"] == "lru" and float(r.data.params["share"]) < 0.1]
    assert child.data.metrics["hit_rate"] == pytest.approx(rows["lru", 0.05]["metrics"]["hit_rate"], rel=1e-5)
    assert child.data.params["workload.visits"] == "3000"
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"results.json", "misses.png"}


@pytest.mark.parametrize(
    "override, expected",
    [
        ("policies=[nope]", "known: none, lru, lfu, gdsf, predictive"),
        ("shares=[1.5]", "> 0 and <= 1"),
        ("shares=[]", "at least one size"),
        ("sizes_gb=[-1]", "> 0"),
        ("page=8", ">= 16"),
        ("precision=fp4", "bf16"),
        ("workload.users=0", ">= 1"),
        ("+workload.nonsense=1", "known keys"),
        ("+nonsense=1", "shares"),
        ("workload=csv", "workload.path"),
        ("model=nope", "nope"),
        ("model=decoder_tiny", "model=hstu_tiny"),
    ],
)
def test_wrong_options_are_one_line(
    override: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = fails(["-m", "seed=0,1", "workload=synthetic", override], monkeypatch, capsys, tmp_path)
    assert expected in line
    assert not list(tmp_path.iterdir())  # a wrong job stops the command before the first one runs


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["sizes_gb=[1e-6]"], "sizes_gb=1e-06: a page takes"),
        (["workload.min_history=600"], "workload.min_history=600 is above max_history=512"),
        (["workload=csv", "workload.path=missing.csv"], "missing.csv: no such file"),
        (["workload.revisit_rate=0.1"], "set it to"),
    ],
)
def test_wrong_data_is_one_line(
    overrides: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    workload = [] if overrides[0] == "workload=csv" else ["workload=synthetic"]
    assert expected in fails([*workload, *overrides, "tracking=none"], monkeypatch, capsys, tmp_path)


def fails(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> str:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["grbench"])
    assert main(["cachesim", *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


SIZES = f"shares=[{','.join(f'{i / 100}' for i in range(1, 100))}]"  # of which it reaches few


def test_ctrl_c_keeps_the_rows_that_are_done(tmp_path: Path) -> None:
    process = fork_command(tmp_path, "cachesim", *RUN, "workload.visits=100000", SIZES, "tracking=none")
    try:
        assert any("lru:" in line for line in printed_lines(tmp_path / "err.txt", process))
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
    finally:
        process.kill()
    assert re.search(r" lru +\d+\.\d\d ", (tmp_path / "out.txt").read_text())
    [path] = tmp_path.glob("outputs/cachesim/*/results.json")
    assert "lru" in [row["policy"] for row in json.loads(path.read_text())["rows"]]
