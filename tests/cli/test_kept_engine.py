"""Cells that share one engine in one process measure what a fresh process measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command import Grbench

from grbench.config.compose import compose_spec
from grbench.execution import records
from grbench.execution.kept import engine_key

SMALL = (
    *("engine=hstu", "kernel=torch", "engine.cpu_threads=1", "cache=lru", "cache.memory_gb=0.0012"),
    *("model.layers=1", "workload=synthetic", "workload.users=40", "workload.items=100", "workload.visits=300"),
    *("workload.max_history=200", "workload.num_candidates=4", "warmup_batches=3", "gate.requests=2"),
    *("gate.measured=40", "tracking=none", "scenario=offline", "scenario.max_batch=4", "scenario.in_flight=1"),
)
DROPPED = ("scenario", "scenario.max_batch", "scenario.in_flight", "cache", "cache.memory_gb")  # at a hopeless rate
HITS = ("cache/hit_rate", "cache/token_hit_rate", "engine/cache_misses", "engine/cache_partial_hits")


def test_a_kept_engine_answers_as_a_fresh_one_and_its_cache_begins_empty(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path
) -> None:
    words = [*SMALL, "scenario.queries=150,250"]
    kept = grbench_here("-m", *words, "runner.output_root=kept", "runner.keep_engine=true")
    assert kept.returncode == 0, kept.stderr
    fresh = grbench_here("-m", *words, "runner.output_root=fresh")
    assert fresh.returncode == 0, fresh.stderr
    found = {
        root: {record.spec["scenario"]["queries"]: record for _, record in records.find(tmp_path / root)}
        for root in ("kept", "fresh")
    }
    second, alone = found["kept"][250], found["fresh"][250]
    assert second.spec_hash == alone.spec_hash
    assert 0 < alone.metrics["cache/hit_rate"] < 1
    for name in HITS:
        assert second.metrics[name] == alone.metrics[name], name
    for name in ("error", "error_after", "tolerance"):
        assert second.gate[name] == pytest.approx(alone.gate[name], rel=1e-4), name
    assert second.gate["measured"]["classes"] == alone.gate["measured"]["classes"]
    assert second.actual["cache_pages_most_used"] == alone.actual["cache_pages_most_used"]
    assert second.metrics["engine_start_s"] == found["kept"][150].metrics["engine_start_s"]
    assert any("had measured 1 other loads before" in note for note in second.notes)
    assert not any("other loads" in note for record in found["fresh"].values() for note in record.notes)
    logs = [folder / records.LOG_FILE for folder, _ in records.find(tmp_path / "kept")]
    assert all(log.is_file() for log in logs)


@pytest.mark.parametrize(
    "words, same",
    [
        (["scenario=server", "scenario.target_qps=50"], True),
        (["scenario.in_flight=2", "scenario.queries=7"], True),
        (["gate.measured=5", "gate.quality_requests=0", "warmup_batches=1"], True),
        (["scenario.max_batch=8"], False),
        (["seed=1"], False),
        (["cache.memory_gb=0.001"], False),
        (["workload.visits=200"], False),
        (["latency_limit_ms=20"], False),  # the deadline of its requests
        (["gate.requests=3"], False),
    ],
)
def test_cells_share_an_engine_only_if_it_cannot_tell_them_apart(words: list[str], same: bool) -> None:
    changed = [word for word in SMALL if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    one, other = compose_spec(list(SMALL))[0], compose_spec([*changed, *words])[0]
    assert (engine_key(one) == engine_key(other)) is same


def test_a_hopeless_rate_ends_early_without_a_latency(
    grbench_here: Grbench, forked_workers: None, tmp_path: Path
) -> None:
    load = ["scenario=server", "scenario.target_qps=20000", "scenario.queries=100000", "scenario.max_batch=1"]
    words = [word for word in SMALL if word.partition("=")[0] not in DROPPED]
    done = grbench_here(*words, *load, "latency_limit_ms=20", "scenario.stop_hopeless=true")
    assert done.returncode == 1, done.stderr
    [(folder, record)] = list(records.find(tmp_path))
    assert record.status is records.Status.STOPPED and "the queue grew by" in (record.error or "")
    assert not any(name.startswith(("latency", "throughput", "goodput")) for name in record.metrics)
    assert not record.intervals and not (folder / records.SAMPLES_FILE).exists()
