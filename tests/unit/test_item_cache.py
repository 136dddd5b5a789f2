"""The embedding hot cache: rows are at their slots whatever happened, hit rates under skew, side effects on a GPU."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hstu_oracle import make_requests
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grengines.api import Catalogue, RankResult, Request, Setup
from grengines.cache import items
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.cache.items import HotRows, Int64Array, RowCounters
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.models.hstu.weights import save_weights
from grkernels.choice import requested

WIDTH = 6
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def table(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element differs, also in half precision as far as the tests' sizes go by rows."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


def cache(rows: int = 40, slots: int = 8, device: str = "cpu", dtype: torch.dtype = torch.float32) -> HotRows:
    return HotRows(table(rows), slots=slots, device=device, dtype=dtype)


def check(hot: HotRows, rows: Int64Array, slots: Int64Array) -> None:
    assert slots.dtype == np.int64 and slots.shape == rows.shape
    found = hot.table[torch.from_numpy(slots).to(hot.table.device)].cpu()
    assert torch.equal(found, hot.host[torch.from_numpy(rows)].to(hot.table.dtype))


def array(*rows: int) -> Int64Array:
    return np.array(rows, np.int64)


def zipf(rows: int, power: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Probability of each rank, and its cumulative sum."""
    p = np.arange(1, rows + 1) ** -power
    p /= p.sum()
    return p, np.cumsum(p)


# -- what a lookup promises


@examples(100)
@given(data=st.data())
def test_slots_hold_the_rows_and_counters_count(data: st.DataObject) -> None:
    rows, slots = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
    hot = HotRows(table(rows), slots=slots, device="cpu", dtype=torch.float32)
    batches = data.draw(st.lists(st.lists(st.integers(0, rows - 1), max_size=20), max_size=25))
    expected, present = RowCounters(), set[int]()
    for batch in batches:
        distinct = set(batch)
        if len(distinct) > slots:
            with pytest.raises(RuntimeError):
                hot.lookup(array(*batch))
            continue
        check(hot, array(*batch), hot.lookup(array(*batch)))
        expected.tokens += len(batch)
        expected.token_hits += sum(row in present for row in batch)
        expected.distinct += len(distinct)
        expected.hits += len(distinct & present)
        expected.misses += len(distinct - present)
        slot_of = hot.snapshot().slot_of
        now = {int(row) for row in np.flatnonzero(slot_of >= 0)}
        assert distinct <= now and len(now) <= slots
        assert len(now) == min(slots, len(present | distinct))  # nobody goes while a slot is free
        expected.evictions += len((present | distinct) - now)
        present = now
        for row in now:  # not only the batch's: the map and the table agree
            assert torch.equal(hot.table[slot_of[row]], hot.host[row])
    expected.bytes = expected.misses * WIDTH * 4
    assert hot.counters == expected


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_distinct_rows_as_slots_fit_and_one_more_does_not(device: str) -> None:
    hot = cache(slots=8, device=device)
    for begin in (0, 4, 20, 0):  # nothing, half and nothing of it is there
        rows = np.arange(begin, begin + 8).repeat(3)
        check(hot, rows, hot.lookup(rows))
    before, slots = RowCounters(**vars(hot.counters)), hot.lookup(np.arange(8))
    counts = hot.snapshot()
    with pytest.raises(RuntimeError, match=r"9 different rows .* cache\.item_memory_gb holds 8; give it more"):
        hot.lookup(np.arange(9))
    assert np.array_equal(hot.snapshot().counts, counts.counts) and hot.snapshot().unit == counts.unit
    assert np.array_equal(hot.lookup(np.arange(8)), slots)
    assert hot.counters.misses == before.misses and hot.counters.bytes == before.bytes


@pytest.mark.parametrize("rows", [array(-1), array(0, 40), array(3, 1 << 40)])
def test_rows_outside_the_table_are_refused(rows: Int64Array) -> None:
    with pytest.raises(IndexError, match="of a table of 40 rows"):
        cache().lookup(rows)


def test_no_rows_need_no_slots() -> None:
    hot = cache()
    assert hot.lookup(array()).shape == (0,) and hot.counters == RowCounters()


def test_a_copy_that_fails_leaves_no_row_behind_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "STAGING_BYTES", 3 * WIDTH * 4)  # three rows a copy
    hot, rng = cache(), np.random.default_rng(0)
    copy, calls = items.gather_rows, 0

    def failing(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError("read error")
        copy(*args, **options)

    monkeypatch.setattr(items, "gather_rows", failing)
    failures = 0
    for _ in range(200):
        rows = rng.integers(0, 40, rng.integers(1, 9))
        before = RowCounters(**vars(hot.counters))
        try:
            check(hot, rows, hot.lookup(rows))
        except OSError:
            failures += 1
            assert hot.counters.misses == before.misses and hot.counters.bytes == before.bytes
        now = hot.snapshot()
        for row in np.flatnonzero(now.slot_of >= 0):
            assert torch.equal(hot.table[now.slot_of[row]], hot.host[row])
        assert np.isfinite(now.counts[now.row_of < 40]).all()  # nothing is held for a lookup that is over
    assert failures > 20
    monkeypatch.setattr(items, "gather_rows", copy)
    check(hot, np.arange(8), hot.lookup(np.arange(8)))  # no slot is lost


def test_counts_stay_finite_and_ordered_for_ever() -> None:
    hot = cache(slots=3)
    hot.lookup(array(7, 8, 9))
    for _ in range(6000):  # 125 half-lives, past the rescaling
        hot.lookup(array(7, 8))
    now = hot.snapshot()
    often = now.counts[now.slot_of[[7, 8]]]
    assert now.unit <= 2.0**60 and np.isfinite(now.counts).all()
    assert (often >= now.unit).all() and (often < 40 * now.unit).all()  # 1 / (1 - 2^(-1/24)) = 35
    hot.lookup(array(1, 2))
    slot_of = hot.snapshot().slot_of
    assert slot_of[9] < 0 and (slot_of[[7, 8]] >= 0).any()


def test_a_row_comes_back_with_its_count() -> None:
    hot = cache(rows=200, slots=16)
    for _ in range(50):
        hot.lookup(np.arange(16))
    hot.lookup(np.arange(16, 32))  # nothing else fits
    hot.lookup(array(0))
    for row in range(100, 140):
        hot.lookup(array(row))
    assert hot.snapshot().slot_of[0] >= 0


def test_the_hand_comes_by_every_slot() -> None:
    hot = cache(rows=600, slots=100)
    hot.lookup(np.arange(100))
    for row in range(100, 500):
        hot.lookup(array(row))
    assert (hot.snapshot().slot_of[:100] < 0).all()


# -- host tables


@pytest.mark.parametrize("kind", ["from_file", "memmap", "safetensors"])
def test_a_memory_mapped_table(tmp_path: Path, kind: str) -> None:
    data = table(1000)
    path = tmp_path / "table"
    if kind == "safetensors":
        save_file({"x": data}, str(path))
        with safe_open(str(path), framework="pt") as f:
            host = f.get_tensor("x")
    else:
        path.write_bytes(data.numpy().tobytes())
        if kind == "from_file":
            host = torch.from_file(str(path), shared=False, size=data.numel()).view(1000, WIDTH)
        else:
            host = torch.from_numpy(np.memmap(path, np.float32, "c", shape=(1000, WIDTH)))
    hot, rng = HotRows(host, slots=50, device="cpu", dtype=torch.float32), np.random.default_rng(0)
    for _ in range(20):
        rows = rng.integers(0, 1000, 60) % rng.integers(1, 1000)
        rows = rows[: len(rows) if len(set(rows.tolist())) <= 50 else 50]
        slots = hot.lookup(rows)
        assert torch.equal(hot.table[torch.from_numpy(slots)], data[torch.from_numpy(rows)])
    assert hot.counters.evictions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_as_a_whole_table_is(dtype: torch.dtype) -> None:
    hot = cache(dtype=dtype)
    rows = array(3, 39, 3)
    check(hot, rows, hot.lookup(rows))  # bit for bit


def test_the_budget_decides_the_slots() -> None:
    def within(budget: int) -> HotRows:
        return HotRows.within(budget, table(40), device="cpu", dtype=torch.bfloat16)

    assert [within(budget).slots for budget in (12, 12 * 9 + 11, 10**6)] == [1, 9, 40]
    with pytest.raises(ValueError, match=r"cache\.item_memory_gb: a row takes 12 bytes, the budget has 11"):
        within(11)
    with pytest.raises(ValueError, match="0 slots"):
        cache(slots=0)
    for host in (table(4).T, table(4)[0], table(4).to("meta"), table(0)):
        with pytest.raises(ValueError, match="the host table must be"):
            HotRows(host, slots=1, device="cpu", dtype=torch.float32)


# -- hit rates


def serve(hot: HotRows, cumulative: Any, order: Int64Array, rng: np.random.Generator, batches: int) -> float:
    """Token hit rate of batches of 400 independent draws of ranks; order[rank] is the row."""
    before = RowCounters(**vars(hot.counters))
    for _ in range(batches):
        hot.lookup(order[np.searchsorted(cumulative, rng.random(400)).clip(max=len(order) - 1)])
    return (hot.counters.token_hits - before.token_hits) / (hot.counters.tokens - before.tokens)


@pytest.mark.parametrize("power", [0.8, 1.0, 1.2])
def test_hit_rate_is_near_that_of_the_best_static_set(power: float) -> None:
    """With independent draws no cache expects more hits than the most frequent rows for ever give.

    Not all slots are theirs: the hand passes 8 slots for each row that goes, so a fetched row stays until an eighth
    of the slots was fetched after it; and counts over 16 times `slots` rows can't tell neighbours in rank apart. Half
    of the slots for the hottest rows is what is asked for.
    """
    rows, slots = 20_000, 2_000
    rng, (p, cumulative) = np.random.default_rng(1), zipf(rows, power)
    hot = HotRows(torch.zeros(rows, 1), slots=slots, device="cpu", dtype=torch.float32)
    order = rng.permutation(rows)
    serve(hot, cumulative, order, rng, 400)
    rate = serve(hot, cumulative, order, rng, 300)
    assert p[: slots // 2].sum() < rate < p[:slots].sum() + 0.01  # of 120k draws; the error is 0.0015


def test_a_new_fashion_is_followed() -> None:
    rows, slots = 20_000, 2_000
    rng, (p, cumulative) = np.random.default_rng(2), zipf(rows, 1.0)
    hot = HotRows(torch.zeros(rows, 1), slots=slots, device="cpu", dtype=torch.float32)
    serve(hot, cumulative, rng.permutation(rows), rng, 3000)
    fashion = rng.permutation(rows)
    assert serve(hot, cumulative, fashion, rng, 1) < 0.4
    serve(hot, cumulative, fashion, rng, 400)  # some 3 half-lives
    assert serve(hot, cumulative, fashion, rng, 100) > p[: slots // 2].sum()


# -- on a GPU


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "STAGING_BYTES", 256)  # several copies a lookup
    hot, rng = cache(500, 60, "cuda", dtype), np.random.default_rng(0)
    for _ in range(200):
        rows = (500 * rng.random(60) ** 4).astype(np.int64)
        check(hot, rows, hot.lookup(rows))
    assert hot.counters.evictions > 500


@GPU
def test_staging_is_not_overwritten_before_it_was_copied() -> None:
    hot = cache(1000, 100, "cuda")
    hot.lookup(np.arange(900, 1000))  # everything is allocated
    batches = [np.arange(begin, begin + 100) for begin in range(0, 900, 100)]
    pinned = torch.empty(len(batches), 100, dtype=torch.int64, pin_memory=True)
    seen = []
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s: until then nothing that is queued below begins
    begun = time.perf_counter()
    for i, rows in enumerate(batches):  # each replaces all rows of the one before
        pinned[i].copy_(torch.from_numpy(hot.lookup(rows)))
        if i == 1:
            assert time.perf_counter() - begun < 0.05  # two buffers: two lookups don't wait
        seen.append(hot.table[pinned[i].to("cuda", non_blocking=True)])
    for rows, found in zip(batches, seen, strict=True):
        assert torch.equal(found.cpu(), hot.host[torch.from_numpy(rows)])


@GPU
def test_a_cuda_graph_reads_what_later_lookups_fetched() -> None:
    hot, rng = cache(300, 40, "cuda"), np.random.default_rng(0)
    slots = torch.zeros(64, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        hot.table[slots]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = hot.table[slots] * 2
    results = []
    for _ in range(30):
        rows = (300 * rng.random(40) ** 2).astype(np.int64).repeat(2)[:64]
        slots.copy_(torch.from_numpy(hot.lookup(rows)).pin_memory(), non_blocking=True)
        graph.replay()
        results.append((rows, found.clone()))
    for rows, doubled in results:
        assert torch.equal(doubled.cpu(), hot.host[torch.from_numpy(rows)] * 2)
    assert hot.counters.evictions


# -- in the engine


CATALOGUE = Catalogue(num_users=30, num_items=400, num_actions=4)
MODEL = HSTUConfig(embedding_dim=32, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128, interaction=True)
CONTEXT = dataclasses.replace(MODEL, contextual_seq_len=2, interaction=False)
KERNELS = requested("torch")
ROW_GB = 32 * 4 / 1e9


def traffic(batches: int = 12, seed: int = 3) -> list[list[Request]]:
    rng = np.random.default_rng(seed)
    return [make_requests(rng, CATALOGUE, rng.integers(0, 20, 3).tolist(), [5, 3, 4]) for _ in range(batches)]


def answers(
    batches: list[list[Request]], cache: CacheConfig | PagedCacheConfig, model: HSTUConfig, **options: Any
) -> tuple[list[Any], list[RankResult], dict[str, Any]]:
    config = HSTUEngineConfig(**{"device": "cpu", "precision": "fp32", **options})
    engine = HSTUEngine(config, Setup(model, KERNELS, CATALOGUE, 5, cache))
    try:
        engine.prepare([r for batch in batches for r in batch], 3)
        results = [engine.rank(batch) for batch in batches]
        return [np.concatenate(r.scores) for r in results], results, engine.actual()
    finally:
        engine.close()


@pytest.mark.parametrize("model", [MODEL, CONTEXT], ids=["interaction", "contextual"])
@pytest.mark.parametrize("cache", [CacheConfig(), PagedCacheConfig(page=16, memory_gb=0.005)], ids=["none", "lru"])
@pytest.mark.parametrize("options", [{}, {"candidate_microbatch": 2}, {"precision": "bf16"}], ids=["", "micro", "bf16"])
def test_scores_are_those_of_the_whole_table(model: HSTUConfig, cache: Any, options: dict[str, Any]) -> None:
    batches = traffic()
    expected, without, whole = answers(batches, cache, model, **options)
    gb = 80 * ROW_GB / (2 if "precision" in options else 1)
    scores, results, actual = answers(batches, dataclasses.replace(cache, item_memory_gb=gb), model, **options)
    for ours, theirs in zip(scores, expected, strict=True):
        assert np.array_equal(ours, theirs)
    total = {k: sum(r.details[k] for r in results) for k in results[0].details if k.startswith("items_")}
    assert total["items_evictions"] > 100 and total["items_tokens"] == sum(r.padded_tokens for r in results)
    assert total["items_distinct"] == total["items_hits"] + total["items_misses"]
    assert not any(k.startswith("items_") for k in without[0].details)
    assert actual["item_slots"] == 80 and whole["item_slots"] == 0 and actual["parameters"] == whole["parameters"]


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_weights_from_a_file_stay_in_it(tmp_path: Path, saved: torch.dtype) -> None:
    path = str(tmp_path / "weights.safetensors")
    made = build_model(MODEL, CATALOGUE, 7, "cpu", saved)
    save_weights(made, path)
    model, batches = dataclasses.replace(MODEL, weights=path), traffic(4)
    with torch.inference_mode():
        loaded = build_model(model, CATALOGUE, 0, "cpu", torch.float32, host_table=True)
    assert loaded.token_table.dtype is saved and torch.equal(loaded.token_table, made.token_table)
    for precision in ("fp32", "bf16"):
        expected, *_ = answers(batches, CacheConfig(), model, precision=precision)
        scores, *_ = answers(batches, CacheConfig(item_memory_gb=80 * ROW_GB), model, precision=precision)
        assert all(np.array_equal(a, b) for a, b in zip(scores, expected, strict=True))


def test_a_budget_below_a_batch_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"different rows .*cache\.item_memory_gb holds 20; give it more"):
        answers(traffic(), CacheConfig(item_memory_gb=20 * ROW_GB), MODEL)
    with pytest.raises(ValueError, match=r"cache\.item_memory_gb: a row takes 128 bytes"):
        answers(traffic(), CacheConfig(item_memory_gb=1e-8), MODEL)


@pytest.mark.parametrize("cache", [CacheConfig(), PagedCacheConfig(page=16, memory_gb=0.005)], ids=["none", "lru"])
def test_a_failed_lookup_leaves_the_engine_usable(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = traffic(4)
    expected, *_ = answers(batches, cache, MODEL)
    small = dataclasses.replace(cache, item_memory_gb=80 * ROW_GB)
    engine = HSTUEngine(HSTUEngineConfig(device="cpu", precision="fp32"), Setup(MODEL, KERNELS, CATALOGUE, 5, small))
    engine.prepare([r for batch in batches for r in batch], 3)
    engine.rank(batches[0])
    gather = items.gather_rows

    def broken(*args: Any, **options: Any) -> None:
        raise OSError("read error")

    monkeypatch.setattr(items, "gather_rows", broken)
    with pytest.raises(OSError, match="read error"):
        engine.rank(batches[1])
    monkeypatch.setattr(items, "gather_rows", gather)
    engine.reset_cache()
    for batch, scores in zip(batches, expected, strict=True):
        assert np.array_equal(np.concatenate(engine.rank(batch).scores), scores)
    engine.close()


@GPU
@pytest.mark.parametrize(
    "options", [{"cuda_graphs": True}, {"candidate_microbatch": 2}, {}], ids=["graphs", "micro", ""]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_on_a_gpu_are_those_of_the_whole_table(precision: str, options: dict[str, Any]) -> None:
    batches, options = traffic(), {"device": "cuda", "precision": precision, **options}
    expected, *_ = answers(batches, CacheConfig(), MODEL, **options)
    gb = 80 * ROW_GB / (2 if precision == "bf16" else 1)
    scores, results, _ = answers(batches, CacheConfig(item_memory_gb=gb), MODEL, **options)
    assert all(np.array_equal(a, b) for a, b in zip(scores, expected, strict=True))
    assert sum(r.details["items_evictions"] for r in results) > 100
