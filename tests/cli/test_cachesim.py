"""The cache simulator against naive ones, the engine, kept records and brute force; the command end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkout import ROOT
from helpers.command import Grbench
from helpers.forks import fork_command, printed_lines
from helpers.mlflow_store import new_database
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grbench import workloads
from grbench.cachesim import simulate
from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.costs import Costs
from grbench.cachesim.fleet import Demand, FleetConfig, plan
from grbench.cachesim.replay import BELADY, LIMIT, Replay
from grbench.cachesim.routing import FACTOR, ROUTINGS, route
from grbench.cachesim.simulate import Outcome, Simulation
from grbench.cachesim.tiers import Tier
from grbench.cachesim.trace import Columns, Workload, load
from grbench.cli import main
from grbench.execution.results import load as load_results
from grbench.report.results import results_sections
from grbench.tools.sizing import flops
from grbench.workloads.config import CsvConfig, Ml100kConfig, StepsConfig, SyntheticConfig
from grengines.api import Request, Setup
from grengines.cache import policies
from grengines.cache.config import PagedCacheConfig
from grengines.cache.pool import PagePool
from grengines.cache.states import UserStates
from grengines.hstu import cached
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig
from grkernels.choice import requested

MODEL = HSTUConfig(layers=1, heads=1, qk_dim=16, v_dim=16)  # a token takes 64 bytes in bf16
SMALL = SyntheticConfig("synthetic", users=60, visits=600, history_median=40, max_history=100, delta_mean=6.0)
WORKLOADS: dict[str, Workload] = {
    "zipf": SMALL,
    "revisits": SyntheticConfig(
        "synthetic", users=400, visits=400, revisit_rate=0.7, history_median=20, burstiness=0.5
    ),
    "short": SyntheticConfig("synthetic", users=30, visits=300, history_median=8, delta_mean=0.5, max_requests=200),
    "ml_100k": Ml100kConfig("ml_100k", max_history=64, max_requests=3000),
    "steps": StepsConfig("steps", users=40, steps_before=1, steps=6, step_events=20, min_history=50, max_requests=70),
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
    work = partial(flops, model, rows=LastLayer.READ)
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
            naive.flops += work(before[1], 8) - work(before[1], 8, context + before[1])
        cost = work(length, 0) - work(length, 0, context + length)
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


@pytest.mark.parametrize("storage", [0, 60], ids=["", "storage"])
@pytest.mark.parametrize("host_admit_visit", [1, 2])
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", ["lru", "lfu", "predictive"])
def test_the_tiers_are_those_of_the_engine_request_by_request(
    name: str, context: int, host_admit_visit: int, storage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine loads all of a state that only a lower tier has, as the simulator does. storage: pages on disk."""
    model = HSTUConfig(embedding_dim=16, layers=1, heads=1, qk_dim=8, v_dim=8, contextual_seq_len=context)
    config = SyntheticConfig("synthetic", users=90, visits=260, history_median=30, max_history=90, num_candidates=2)
    requests, trace = workloads.build(config, 3, 80.0).requests, load(config, 3)
    costs = Costs.of(model, 16, 2, 90)
    device, host = 40, 90 if not storage else 45  # pages
    monkeypatch.setattr(cached, "RESERVE_SHARE", 1.0)  # room for all that one request sends to the disk
    cache = PagedCacheConfig(
        name, name, page=16, memory_gb=device * 1024 / 1e9, host_gb=host * 1024 / 1e9, onload_share=1.0,
        host_admit_visit=host_admit_visit, storage_gb=storage * 4097 / 1e9,
    )  # fmt: skip
    engine = HSTUEngine(
        HSTUEngineConfig(device="cpu", precision="fp32"),
        Setup(model, requested("torch"), workloads.catalogue(config), config.num_candidates, cache),
    )
    engine.prepare(requests, 1)
    actual = engine.actual()
    assert (actual["cache_pages"], actual["cache_host_pages"]) == (device, host)
    assert actual.get("cache_storage_pages", 0) == storage

    measured = []
    for request in requests:
        details = engine.rank([request]).details
        names = ["hits", "host_hits", "evictions", "refused", "offloads", "host_refused", "host_bytes"]
        names += ["offloaded_bytes", "storage_hits", "storage_taken", "storage_refused", "storage_read_bytes"]
        found = [int(details.get(f"cache_{key}", 0)) for key in [*names, "storage_written_bytes"]]
        for place in (6, 7, 11, 12):
            found[place] //= 1024
        found[6] -= found[11]  # what came from either
        measured.append(found)
        if (disk_tier := engine.user_cache.states.storage) is not None:  # type: ignore[union-attr]
            disk_tier.finish_writes()  # the simulator's disk is never too slow
        assert not details["cache_faults"] and not details["cache_offloads_refused"]
        assert not details.get("cache_storage_busy")
    engine.close()

    monkeypatch.setattr(simulate, "CHUNK", 1)
    disk = Tier(costs, policies.make(name, host_admit_visit), storage)
    lower = Tier(costs, policies.make(name, host_admit_visit), host, disk if storage else None)
    simulation = Simulation(trace, costs, policies.make(name, 0), device, lower)
    totals = [[0] * 13]

    def note(_: int) -> None:
        out, tier, last = simulation.outcome, lower.outcome, disk.outcome
        hits = [int(out.hits) - tier.hits - last.hits, tier.hits, out.evictions, out.refused]
        moved = [tier.stored, tier.refused, tier.read, tier.written]
        totals.append([*hits, *moved, last.hits, last.stored, last.refused, last.read, last.written])

    simulation.run(note)
    assert np.diff(totals, axis=0).tolist() == measured
    if not context:
        assert all(sum(column) > 0 for column in np.transpose(measured)[:3]) and totals[-1][7] > 0
        assert not storage or min(totals[-1][8], totals[-1][9], totals[-1][11], totals[-1][12]) > 0


def test_what_the_host_evicts_is_found_in_storage() -> None:
    """Each tier has one state of one page: a is evicted to the host, then to storage, and comes back from there."""
    costs = Costs.of(MODEL, 16, 8, 16)
    storage = Tier(costs, policies.make("lru"), 1)
    lower = Tier(costs, policies.make("lru"), 1, storage)
    trace = columns([(user, 8) for user in (0, 1, 2, 0, 0, 2)])
    done = Simulation(trace, costs, policies.make("lru"), 1, lower).run()
    host, below = done.lower
    assert done.hits == 3 and (host.hits, below.hits) == (1, 1)  # storage: 0 at 3; device: 0 at 4; host: 2 at 5
    assert (host.read, below.read) == (1, 1) and done.flops == 3 * costs.saved[8]
    # The host takes 0, 1 and 2, and not 0 at the end, since the page is that of 2, which is in flight.
    assert (host.stored, host.written, host.refused) == (3, 3, 1)
    assert (below.stored, below.written, below.refused) == (1, 1, 1)  # 0, and not 1 while 0 is in flight


@pytest.mark.parametrize("storage_times", [0.0, 20.0])
def test_a_lower_tier_adds_hits_and_a_tier_for_everything_misses_first_visits_only(storage_times: float) -> None:
    replay = Replay(
        CacheSimConfig(
            MODEL, SMALL, ["lru"], [0.1], host_times=3.0, storage_times=storage_times, host_admit_visit=1, page=16
        )
    )
    alone = Simulation(replay.trace, replay.costs, policies.make("lru"), replay.sizes[0].pages).run()
    [row] = [row for row in replay.run() if row.policy == "lru"]
    tiers = [row.metrics[f"{tier}_hit_rate"] for tier in replay.tiers]
    assert row.metrics["hit_rate"] == pytest.approx(row.metrics["device_hit_rate"] + sum(tiers))
    assert row.metrics["device_hit_rate"] == alone.hits / 600 and min(tiers) > 0
    assert (row.metrics["limit_share"] == 1.0) == bool(storage_times)


FLOCK = SyntheticConfig("synthetic", users=3000, visits=12_000, history_median=40, max_history=400)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_replica_is_no_replicas(routing: str) -> None:
    config = CacheSimConfig(MODEL, SMALL, ["lru", "gdsf"], [0.2], host_times=2.0, routing=routing)
    replay = Replay(config)
    assert replay.routes.replica.max() == replay.routes.spilled == 0
    for row in replay.run():
        if row.policy in config.policies:
            lower = Tier(replay.costs, policies.make(row.policy, 2), 2 * row.size.pages)
            alone = Simulation(replay.trace, replay.costs, policies.make(row.policy), row.size.pages, lower).run()
            alone.seconds = row.outcome.seconds
            assert row.outcome == alone


def test_affinity_keeps_the_hit_rate_of_one_cache_and_random_routing_lowers_it() -> None:
    rates = {}
    for replicas, routing in ((1, "affinity"), (4, "affinity"), (4, "bounded"), (4, "random")):
        config = CacheSimConfig(MODEL, FLOCK, ["lru"], [0.1], replicas=replicas, routing=routing, window_s=1.0)
        replay = Replay(config)
        [row] = [row for row in replay.run() if row.policy == "lru"]
        rates[replicas, routing] = row.metrics["hit_rate"]
        assert row.outcome.requests == FLOCK.visits
        if replicas > 1:
            assert 1 <= row.metrics["imbalance"] < 2
        assert (replay.facts()["spilled_share"] > 0) == (routing == "bounded")
    one = rates[1, "affinity"]
    assert abs(rates[4, "affinity"] - one) < 0.02
    assert rates[4, "random"] < one - 0.05
    assert rates[4, "random"] < rates[4, "bounded"] < rates[4, "affinity"]


@pytest.mark.parametrize("replicas", [2, 5])
def test_bounded_routing_keeps_every_load_under_the_bound(replicas: int) -> None:
    trace, window = load(SMALL, 0), 0.4
    own, routes = route(trace, replicas, "affinity", window, 0).replica, route(trace, replicas, "bounded", window, 0)
    assert routes.spilled == (routes.replica != own).sum() > 0
    for i, now in enumerate(trace.times.tolist()):
        earlier = np.flatnonzero(trace.times[:i] + window > now)
        loads = np.bincount(routes.replica[earlier], minlength=replicas)
        most = np.ceil(FACTOR * (len(earlier) + 1) / replicas)
        assert loads[routes.replica[i]] < most
        assert routes.replica[i] == own[i] or loads[own[i]] >= most


def test_a_plan_is_arithmetic() -> None:
    fleet = FleetConfig(
        rate=1000.0, users=10_000, compute_us_a_token=1.0, copy_gb_s=10.0, launch_ms=2.0, batch=4.0, busy=0.5
    )
    none = plan(fleet, Demand(5000, 0.0, 0.0, [], [], [0.0], 100), [])
    assert none["fleet_gpu_ms"] == pytest.approx(5.5) and none["fleet_gpus"] == 11  # 5 ms, and 2 ms for each 4
    assert none["fleet_rps_a_gpu"] == pytest.approx(1000 / 11)
    # Launches of 40 ms for each 4: half of the batches take 10 ms a request instead of 5. Those of 12 ms hide.
    late = dataclasses.replace(fleet, eager_ms=40.0, eager_share=0.5)
    assert plan(late, Demand(5000, 0.0, 0.0, [], [], [0.0], 100), [])["fleet_gpu_ms"] == pytest.approx(8.0)
    hidden = dataclasses.replace(fleet, eager_ms=12.0)
    assert plan(hidden, Demand(5000, 0.0, 0.0, [], [], [0.0], 100), []) == none
    # A fifth is saved by the device. Loading all saves 2 of 4 ms and takes 1 ms, so all is loaded.
    found = plan(fleet, Demand(5000, 0.2, 0.4, [1e7], [5e6], [1e9, 3e9], 100, 1.5), ["host"])
    assert found["fleet_loaded_share"] == 1.0 and found["fleet_gpu_ms"] == pytest.approx(2.5)
    assert found["fleet_gpus"] == 8  # 1000/s of 2.5 ms, at half load, 1.5 times the mean on the busiest: 7.5
    assert found["fleet_device_gb"] == pytest.approx(100 / 8) and found["fleet_host_gb"] == pytest.approx(300 / 8)
    assert found["fleet_from_host_gb_s"] == pytest.approx(1.25) and found["fleet_to_host_gb_s"] == pytest.approx(0.625)
    # Copies as slow as computing: half of the states, so that both take 2 + 2 / 3 ms.
    slow = plan(fleet, Demand(5000, 0.2, 0.4, [4e7], [0.0], [1e9, 3e9], 100), ["host"])
    assert slow["fleet_loaded_share"] == pytest.approx(2 / 3) and slow["fleet_gpu_ms"] == pytest.approx(0.5 + 8 / 3)
    # Copies to the host fill the link.
    full = plan(fleet, Demand(5000, 0.2, 0.4, [1e7], [9e7], [1e9, 3e9], 100), ["host"])
    assert full["fleet_gpu_ms"] == pytest.approx(9.5)


def of_record(name: str) -> tuple[CacheSimConfig, dict[str, Any]]:
    """The configuration that simulates a kept record with its measured costs, and the record.

    The time of a token and of launching a batch's kernels are those of return_lru, for all.
    """
    folder = ROOT / "reports/reference/records"
    record, lru = (json.loads((folder / one / "record.json").read_text()) for one in (name, "return_lru"))
    spec, measured, actual = record["spec"], record["metrics"], record["actual"]
    known = {f.name for f in dataclasses.fields(SyntheticConfig)}
    workload = SyntheticConfig(**{key: value for key, value in spec["workload"].items() if key in known})
    model = HSTUConfig(**{key: value for key, value in spec["model"].items() if key in HSTUConfig.__annotations__})
    eager, graphs = (measured[f"engine/{kind}_batches"] for kind in ("eager", "graph"))
    fleet = FleetConfig(
        rate=400.0,
        users=791,
        compute_us_a_token=actual.get("cache_compute_us_a_token", lru["actual"]["cache_compute_us_a_token"]),
        copy_gb_s=actual.get("cache_copy_gb_s", 54.0),
        launch_ms=measured["batch_ms/p50"],
        batch=measured["batch_size/mean"],
        eager_ms=float(np.median([one["launches"] for one in lru["actual"]["graph_costs_ms"]])),
        eager_share=eager / (eager + graphs),
    )
    cache = spec["cache"]
    if cache["name"] == "none":
        return CacheSimConfig(model, workload, ["none"], sizes_gb=[12.0], seed=spec["seed"], fleet=fleet), record
    config = CacheSimConfig(
        model, workload, ["lru"], sizes_gb=[cache["memory_gb"]], host_times=cache["host_gb"] / cache["memory_gb"],
        admit_visit=cache["admit_visit"], host_admit_visit=cache["host_admit_visit"], seed=spec["seed"], fleet=fleet,
    )  # fmt: skip
    return config, record


@pytest.mark.parametrize("name, off", [("return_none", -0.082), ("return_lru", -0.015), ("return_lru_often", 0.046)])
def test_the_plan_of_a_kept_record_is_within_a_tenth(name: str, off: float) -> None:
    """Requests/s at the share of time that the engine was busy; docs/SCALING.md has the same figures."""
    config, record = of_record(name)
    [row] = [row for row in Replay(config).run() if row.policy == config.policies[0]]
    measured = record["metrics"]
    predicted = measured["engine_busy"] / row.metrics["fleet_gpu_ms"] * 1e3
    assert abs(predicted - measured["throughput_rps"]) < 0.1 * measured["throughput_rps"]
    assert predicted / measured["throughput_rps"] - 1 == pytest.approx(off, abs=0.002)  # the page's figure


@pytest.mark.parametrize("name", ["return_lru", "return_lru_often"])
def test_the_simulator_predicts_a_kept_record(name: str) -> None:
    """The cell had a GPU, batches and two tiers. Requests of a batch are looked up before any of them is stored."""
    config, record = of_record(name)
    measured = record["metrics"]
    [row] = [row for row in Replay(config).run() if row.policy == "lru"]
    assert row.size.pages == record["actual"]["cache_pages"]
    assert row.metrics["device_hit_rate"] == pytest.approx(measured["cache/device_hit_rate"], abs=0.005)
    written = measured["engine/cache_offloaded_bytes"] / measured["samples"] / 1e6
    assert row.metrics["host_written_mb"] == pytest.approx(written, rel=0.02)


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


def test_tiers_and_a_plan_have_tables_of_their_own(grbench_here: Grbench, tmp_path: Path) -> None:
    words = ["policies=[lru]", "host_times=2", "replicas=2", "fleet.rate=100000", "fleet.users=1000000000"]
    done = grbench_here("cachesim", *RUN, *words, "tracking=none")
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("outputs/cachesim/*/results.json")
    results = json.loads(path.read_text())
    assert "2 replicas by affinity" in results["title"] and results["title"] in done.stdout
    page = "\n\n".join(results_sections([("job", load_results(path))]))
    for row in results["rows"]:
        assert ("fleet_gpus" in row["metrics"]) == ("host_hit_rate" in row["metrics"]) == (row["policy"] == "lru")
        if row["policy"] == "lru":
            metrics = row["metrics"]
            assert f" {metrics['fleet_gpus']:.0f} " in done.stdout and f"| {metrics['fleet_gpus']:.0f} |" in page
            assert f"| {metrics['host_read_mb']:.3g} | {metrics['host_written_mb']:.3g} |" in page
            size = 1e6 * row["gb"] / results["trace"]["users"] * 1000 / metrics["fleet_gpus"]
            assert metrics["fleet_device_gb"] == pytest.approx(size)
    assert "storage" not in done.stdout + page


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
        ("storage_times=2", "set host_times too"),
        ("routing=nearest", "affinity, random, bounded"),
        ("fleet.busy=0", "fleet.busy=0.0: allowed is float >= 0.01 and <= 1"),
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
        (["workload.min_history=600"], "workload.min_history=600 is above workload.max_history=512"),
        (["workload=csv", "workload.path=missing.csv"], "missing.csv: no such file"),
        (["workload.revisit_rate=0.1"], "set it to"),
        (["replicas=1000", "shares=[0.001]"], "replicas=1000: a size of"),
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
