"""The engine with its user-state cache: for all tiers, policies and faults, answers equal the reference."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hstu_oracle import make_requests
from helpers.replays import Replays

from grengines.api import Catalogue, RankResult, Request, Setup, Tier
from grengines.cache import host, policies
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.cache.extents import Extents, cut, joined
from grengines.cache.host import HostTier, Load, Onload
from grengines.cache.pool import PagePool, PoolFullError
from grengines.hstu.cached import CachedRanking
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.hstu.load_costs import LoadCosts
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.reference import RankingReference
from grengines.runtime.batch import Bucket, Encoding
from grengines.runtime.buckets import batch_buckets, plan_buckets
from grengines.runtime.graph_costs import BucketCosts
from grengines.runtime.slots import Slots
from grkernels.choice import requested

CATALOGUE = Catalogue(num_users=30, num_items=400, num_actions=4)
MODEL = HSTUConfig(embedding_dim=32, layers=3, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128)
CONTEXT = dataclasses.replace(MODEL, contextual_seq_len=2)
PAGE_GB = MODEL.layers * 16 * MODEL.heads * (MODEL.qk_dim + MODEL.v_dim) * 4 / 1e9  # of 16 tokens
HISTORY = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]


def traffic(users: int, rounds: int, seed: int = 0, longest: int = 60) -> list[list[Request]]:
    """Return rounds of requests by all users, in a new order each, with histories that grow in between."""
    rng = np.random.default_rng(seed)
    last = make_requests(rng, CATALOGUE, list(rng.integers(longest // 2, longest, users)), [6] * users)
    made = []
    for round_ in range(rounds):
        requests = []
        for i, user in enumerate(rng.permutation(users)):
            events = len(last[user].history_items) * (round_ + 1) // rounds
            history = {f: getattr(last[user], f)[:events] for f in HISTORY}
            arrival = float(round_ * users + i)
            requests.append(dataclasses.replace(last[user], user_id=int(user), arrival_s=arrival, **history))
        made.append(requests)
    return made


def started(
    cache: CacheConfig | PagedCacheConfig, rounds: list[list[Request]], model: HSTUConfig = MODEL, **options: Any
) -> Any:
    kernels = requested(options.pop("kernel", "torch"))
    config = HSTUEngineConfig(**{"device": "cpu", "precision": "fp32", **options})
    engine = HSTUEngine(config, Setup(model, kernels, CATALOGUE, 5, cache))
    engine.prepare([r for requests in rounds for r in requests], max(map(len, rounds)))
    return engine


def error(result: RankResult, expected: list[Any]) -> float:
    ours, theirs = np.concatenate(result.scores), np.concatenate(expected)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@functools.cache
def visits_with_answers(contextual: int) -> list[tuple[list[Request], list[Any]]]:
    """Return visits of six users, one by one, and the reference's scores of each."""
    rounds = [[r] for requests in traffic(6, 5) for r in requests]
    rounds += [[r] for requests in traffic(6, 5)[-1:] for r in requests] * 2
    reference = RankingReference(CONTEXT if contextual else MODEL, CATALOGUE, 5, "cpu")
    return [(requests, reference.scores(requests)) for requests in rounds]


def test_the_start_moves_states_to_the_host_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """First copies take memory and kernels that no request should wait for, whole states as well as single pages.

    They go there too: of a state that the host has, only new pages are sent.
    """
    loaded: list[int] = []
    sent: set[tuple[int, bool]] = set()  # pages, and whether the host has some
    load, store = HostTier.load, HostTier.store

    def counted(tier: HostTier, asked: Sequence[Load]) -> Onload:
        loaded.append(sum(len(one.pages) for one in asked))
        return load(tier, asked)

    def noted(tier: HostTier, user: int, tokens: int, history: Any, pages: Any, same: int, now: float) -> bool:
        before, taken = tier.bytes_down, store(tier, user, tokens, history, pages, same, now)
        sent.add(((tier.bytes_down - before) // tier.pool.page_bytes, same >= tier.pool.page))
        return taken

    monkeypatch.setattr(HostTier, "load", counted)
    monkeypatch.setattr(HostTier, "store", noted)
    monkeypatch.setattr("grengines.hstu.cached.LoadCosts.shares", nothing_loaded)
    rounds = traffic(4, 1, longest=100)
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB, host_gb=1000 * PAGE_GB), rounds)
    largest = sum(-(-len(r.history_items) // 16) for r in rounds[0])
    assert largest > 16 and {largest, 1, 2, 3, 4} <= set(loaded)
    assert {(1, False), (2, False), (3, False), (1, True)} <= sent and max(sent)[0] > 4
    assert engine.user_cache.states.tier.bytes_down > 0
    assert {engine.tier_of(r.user_id) for r in rounds[0]} == {Tier.NONE}
    assert engine.user_cache.costs.copy_bytes_s and engine.user_cache.costs.compute_s


def nothing_loaded(costs: LoadCosts, requests: Sequence[Request], *_: Any, **__: Any) -> list[float]:
    """Stand for a machine that computes any state sooner than it copies one."""
    return [0.0] * len(requests)


@torch.inference_mode()
@pytest.mark.parametrize("model", [MODEL, CONTEXT], ids=["", "context"])
def test_the_start_on_a_gpu_ranks_few_new_events_and_many_in_batches_of_each_size(
    model: HSTUConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel is compiled for few rows and for many, so each kind has to come before the first request.

    Few rows behind a long history have a kernel of their own. Each history is computed once for each size of a batch.
    """
    rounds = traffic(4, 1, longest=200)
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB), rounds, model)
    cached: CachedRanking = engine.user_cache
    context = model.contextual_seq_len
    seen: dict[int, set[int]] = {}  # of each size of a batch: the new events of a request, where most are cached
    whole: dict[int, set[int]] = {}  # and the events where none is
    computed: Counter[int] = Counter()  # events
    queue = cached.queue

    def noted(requests: Sequence[Request]) -> Callable[[], RankResult]:
        result = queue(requests)()
        size, new = len(requests), [c.of - c.tokens for c in result.cached]
        seen.setdefault(size, set()).update(n for n, c in zip(new, result.cached, strict=True) if c.tokens > 32)
        whole.setdefault(size, set()).update(n for n, c in zip(new, result.cached, strict=True) if not c.tokens)
        computed[size] += sum(new)
        return lambda: result

    monkeypatch.setattr(cached, "queue", noted)
    monkeypatch.setattr("grengines.hstu.cached.first_batches", lambda largest, device: batch_buckets(largest))
    cached.rank_sizes(rounds[0])
    assert seen.keys() == whole.keys() == {1, 2, 4}
    for size in seen:
        events = [len(r.history_items) + context for r in rounds[0][-size:]]
        new = {n + context for n in (1, 4, 16, 64)}
        assert seen[size] == ({0} if context else {0, *new}) and whole[size] == {*new, *events}
        assert computed[size] == sum(events) + (1 if context else 2) * size * sum(new)
    computed.clear()
    monkeypatch.setattr("grengines.hstu.cached.MOST_SIZES_S", 0.0)
    cached.rank_sizes(rounds[0])
    assert computed == {1: 1 + context}  # the first batch alone


@pytest.mark.parametrize("policy", ["lru", "lfu", "gdsf", "predictive"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("model", "microbatch"), [(MODEL, 0), (MODEL, 4), (CONTEXT, 0)], ids=["", "micro", "context"])
def test_answers_from_the_host_equal_the_reference(
    policy: str, share: float, model: HSTUConfig, microbatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pages for two of six users and host memory for four, there are hits, host hits and misses."""
    monkeypatch.setattr(host, "STAGED_SHARE", 0.5)
    visits = visits_with_answers(model.contextual_seq_len)
    last, answers = visits[-1]
    cache = PagedCacheConfig(
        policy, policy, page=16, memory_gb=9 * PAGE_GB, host_gb=16 * PAGE_GB, onload_share=share, prefetch_s=3.0
    )
    engine = started(cache, [requests for requests, _ in visits], model, candidate_microbatch=microbatch)
    total: Counter[str] = Counter()
    for requests, expected in visits:
        result = engine.rank(requests)
        assert error(result, expected) < 1e-5
        total.update(result.details)
    assert total["cache_faults"] == total["cache_policy_errors"] == 0
    if total["cache_refused"] == 0:  # only `predictive` refuses states that it expects to be useless
        assert total["cache_offloads"] > 0 and total["cache_evictions"] > 0
        assert total["cache_host_hits"] > 0 and total["cache_loaded_tokens"] > 0 and total["cache_host_bytes"] > 0
    else:
        assert policy == "predictive"
    assert engine.actual()["kernels"]["paged_write"] == "torch" and engine.actual()["cache_pages_most_used"] <= 9
    assert total["cache_offloads"] == 0 or total["cache_offloaded_bytes"] > 0
    assert engine.actual()["cache_host_pages"] == 16 and engine.actual()["cache_copy_gb_s"] > 0
    # States on the device move to the host on demand, and answers from there are equally correct.
    engine.reset_cache(keep=Tier.HOST)
    result = engine.rank(last)
    assert result.details["cache_hits"] == 0 and error(result, answers) < 1e-5
    engine.reset_cache()
    assert engine.rank(last).details["cache_host_hits"] == 0
    engine.close()


def test_a_forgotten_past_teaches_the_policy_nothing() -> None:
    rounds = traffic(4, 2)
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB, admit_visit=2), rounds)
    stored = []
    for _ in range(2):
        engine.reset_cache()
        for requests in rounds:
            stored.append(len(requests) - engine.rank(requests).details["cache_refused"])
    assert stored == [0, 4, 0, 4]


def test_what_is_loaded_balances_copying_and_computing() -> None:
    rounds = traffic(2, 2, longest=400)
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB, host_gb=1000 * PAGE_GB), rounds)
    cached: CachedRanking = engine.user_cache
    pool = cached.states.pool
    engine.rank(rounds[-1])
    engine.reset_cache(keep=Tier.HOST)
    cached.costs.copy_bytes_s, cached.costs.compute_s = (
        pool.page_bytes / pool.page / 3e-6,
        1e-6,
    )  # copying takes three times as long
    details = engine.rank(rounds[-1]).details
    events = sum(len(r.history_items) for r in rounds[-1])
    tokens = events + sum(len(r.candidates) for r in rounds[-1])
    assert 0.6 * tokens / 4 < details["cache_loaded_tokens"] <= tokens / 4  # whole pages, rounded down
    engine.reset_cache(keep=Tier.HOST)
    cached.costs.compute_s = 1.0  # computing is slow: all is loaded
    assert engine.rank(rounds[-1]).details["cache_loaded_tokens"] == events


@torch.inference_mode()
def test_the_cost_of_a_token_is_that_of_an_undisturbed_batch_or_is_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the tokens': 2 ms of fixed work and 10 us a token, and every other batch is disturbed."""
    monkeypatch.setattr("grengines.hstu.cached.RUNS", 5)
    rounds = traffic(2, 2, longest=400)
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB), rounds)
    cached: CachedRanking = engine.user_cache
    queue, calls = cached.queue, itertools.count()

    def on_this_clock(requests: Sequence[Request]) -> Callable[[], RankResult]:
        result = queue(requests)()
        fixed_ms = 500.0 if next(calls) % 2 == 0 else 2.0
        return lambda: dataclasses.replace(result, compute_ms=fixed_ms + 0.01 * result.tokens)

    monkeypatch.setattr(cached, "queue", on_this_clock)
    largest = sorted((r for requests in rounds for r in requests), key=lambda r: len(r.history_items))[-1:]
    tokens = sum(len(r.history_items) + len(r.candidates) for r in largest)
    assert tokens < 600  # the fixed work is a quarter of the time at 600 tokens
    cached.measure(largest)
    took_ms = 2.0 + 0.01 * tokens
    assert cached.costs.compute_s == pytest.approx(took_ms / tokens / 1e3)  # what loading is weighed against
    assert "cache_compute_us_a_token" not in cached.actual()
    assert cached.actual()["cache_compute_withheld"] == (
        f"the largest batch, {tokens} tokens, takes {took_ms:.3g} ms, of which 2 ms do not depend on the tokens"
    )
    users = [dataclasses.replace(largest[0], user_id=user) for user in range(2)]
    monkeypatch.setattr("grengines.hstu.load_costs.MOST_FIXED", 2.0 / (2.0 + 0.01 * 2 * tokens) + 1e-6)
    cached.measure(users)
    assert cached.actual()["cache_compute_us_a_token"] == pytest.approx(1e3 / tokens + 10.0)
    assert "cache_compute_withheld" not in cached.actual()


@pytest.mark.parametrize("packed", [False, True])
def test_prefetched_states_are_loaded_whole_and_then_a_graph_is_replayed(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grengines.hstu.cached.GraphRunner", Replays)
    rounds = traffic(2, 2, longest=400)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB, host_gb=1000 * PAGE_GB), rounds)
    cached: CachedRanking = engine.user_cache
    sample = [r for requests in rounds for r in requests]
    plan = plan_buckets(sample, Encoding.of(MODEL, CATALOGUE), 2, packed=packed, cached=True)
    cached.capture("true", plan, max(sample, key=lambda r: len(r.history_items)))
    runner: Any = cached.graphs.runner
    tier = cached.states.tier
    assert tier is not None
    requests = rounds[-1]
    tokens = sum(len(r.history_items) for r in requests)
    for prefetched, launches_s, replays, eager in (
        (True, 1.0, 2, 0.0),  # nothing to wait for, slow launches: everything is loaded and a graph is replayed
        (True, 0.0, 1, 1.0),  # free launches: computing overlaps the copies
        (False, 1e-9, 2, 0.0),  # copies are slower than computing: nothing is loaded
    ):
        engine.reset_cache()
        runner.count, cached.graphs.costs = 0, {}
        engine.rank(requests)
        engine.reset_cache(keep=Tier.HOST)
        if prefetched:
            engine.prefetch(r.user_id for r in requests)
            assert all(tier.prefetched(r.user_id) for r in requests)
        cached.costs.copy_bytes_s, cached.costs.compute_s, cached.costs.launch_s = 1.0, 1e-6, launches_s
        cached.graphs.costs = {bucket: BucketCosts(launches_s, 0.0) for bucket in plan}
        result = engine.rank(requests)
        assert error(result, reference.scores(requests)) < 1e-5
        assert result.details["cache_loaded_tokens"] == tokens * prefetched
        assert (runner.count, result.details["eager_batches"]) == (replays, eager)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("model", [MODEL, CONTEXT], ids=["", "context"])
def test_measuring_graphs_changes_no_state(packed: bool, model: HSTUConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every bucket beside the states of users, whose answers stay right, in graphs too."""
    monkeypatch.setattr("grengines.hstu.cached.GraphRunner", Replays)
    monkeypatch.setattr("grengines.runtime.graph_costs.SLACK", 1e9)
    rounds = traffic(3, 3, longest=80)
    reference = RankingReference(model, CATALOGUE, 5, "cpu")
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB), rounds, model)
    cached: CachedRanking = engine.user_cache
    engine.rank(rounds[0])
    before = cached.states.snapshot().states
    sample = [r for requests in rounds for r in requests]
    plan = plan_buckets(sample, Encoding.of(model, CATALOGUE), 3, packed=packed, cached=True)
    cached.capture("auto", plan, max(sample, key=lambda r: len(r.history_items)))
    assert set(cached.graphs.costs) == set(plan)
    assert cached.states.snapshot().states == before
    cached.capture("true", plan, sample[0])
    for requests in rounds[1:]:
        result = engine.rank(requests)
        assert error(result, reference.scores(requests)) < 1e-5
        assert result.details["graph_batches"] == 1.0
    engine.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("early", [False, True])
def test_memory_of_a_batch_is_used_again_once_its_answer_was_taken(
    early: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queue two batches before an answer is taken. early: plant the fault that the second has the memory of the first.

    On a GPU, which is kept busy meanwhile, both the inputs and the result of the first are overwritten then. So it
    stores the states of the second's users: its own come only once.
    """
    if device == "cpu":
        monkeypatch.setattr("grengines.hstu.cached.GraphRunner", Replays)
    _, second, third = traffic(3, 3, longest=400)
    first = [  # of the same lengths, so that inputs are overwritten by inputs of the same layout
        dataclasses.replace(r, user_id=r.user_id + 3, history_items=r.history_items[::-1].copy()) for r in second
    ]
    engine = started(PagedCacheConfig(page=16, memory_gb=1000 * PAGE_GB), [third], device=device)
    cached: CachedRanking = engine.user_cache
    plan = plan_buckets(third, cached.encoding, 3, packed=False, cached=True)
    cached.capture("true", plan, max(third, key=lambda r: len(r.history_items)))
    runner: Any = cached.graphs.runner
    upload, uploaded = runner.upload, list[int]()

    def noted(bucket: Bucket, inputs: torch.Tensor) -> None:
        uploaded.append(inputs.data_ptr())
        upload(bucket, inputs)

    monkeypatch.setattr(runner, "upload", noted)
    if early:
        one = Slots(torch.device(device)).take()
        monkeypatch.setattr(Slots, "take", lambda slots: one)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    with torch.inference_mode():
        if device == "cuda":
            square = torch.ones(8192, 8192, device=device)
            for _ in range(8):  # about 0.1 s: until then nothing that is queued below begins
                torch.mm(square, square)
        queued = [cached.queue(requests) for requests in (first, second)]
        wrong = [error(answer(), reference.scores(requests)) > 1e-4 for answer, requests in zip(
            queued, (first, second), strict=True
        )]  # fmt: skip
        assert wrong == [early, False]
        assert (uploaded[0] == uploaded[1]) == early
        assert error(cached.queue(third)(), reference.scores(third)) < 1e-4 and uploaded[2] in uploaded[:2]
    engine.close()


FAULTS = {
    "onload": (host.Onload, "layer"),
    "starting to load": (HostTier, "load"),
    "offload": (HostTier, "store"),
    "allocation": (PagePool, "allocate"),
    "writing": (None, "paged_write"),  # None stands for the engine's operators
    "policy: victim": (policies.LRU, "victim"),
    "policy: touch": (policies.LRU, "touch"),
    "policy: admit": (policies.LRU, "admit"),
    "policy: prefetch": (policies.LRU, "prefetch"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_counted_and_logged_and_the_answer_is_right(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every third call raises the error of a GPU that is out of memory."""
    rounds = [[r] for requests in traffic(6, 4) for r in requests]
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    memory = {"memory_gb": 9 * PAGE_GB, "host_gb": 30 * PAGE_GB}
    at_once = {"admit_visit": 1, "host_admit_visit": 1}  # every state is stored, so the faults are reached early
    engine = started(PagedCacheConfig(page=16, prefetch_s=1.0, onload_share=1.0, **memory, **at_once), rounds)
    owner, name = FAULTS[what]
    owner = owner or engine.operators
    original, calls = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise torch.OutOfMemoryError("no memory left, says the test")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    total: Counter[str] = Counter()
    for requests in rounds:
        before = engine.user_cache.states.counters().faults
        result = engine.rank(requests)
        assert error(result, reference.scores(requests)) < 1e-5
        total.update(result.details)
        ways = ("hits", "partial_hits", "misses", "bypassed")
        assert sum(result.details[f"cache_{way}"] for way in ways) == len(requests)
        if what in ("onload", "allocation", "writing") and engine.user_cache.states.counters().faults > before:
            assert result.details["cache_misses"] == len(requests) and not result.details["cache_cached_tokens"]
    assert calls > 3
    assert total["cache_policy_errors" if "policy" in what else "cache_faults"] >= calls // 3
    assert "says the test" in caplog.text and any(r.levelno == logging.WARNING for r in caplog.records)
    # Once the faults stop, every user is served from the cache again, and no page is lost.
    monkeypatch.undo()
    engine.reset_cache()
    states = engine.user_cache.states
    assert states.pool.used == 0 and states.tier.extents.available == states.tier.pages
    engine.rank(rounds[-1])
    assert engine.rank(rounds[-1]).details["cache_hits"] == 1
    engine.close()


def test_many_threads_get_right_answers_and_lose_nothing() -> None:
    """Eight threads share users, and another thread evicts them in between."""
    rounds = traffic(8, 6, seed=1)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    expected = {id(r): s for requests in rounds for r, s in zip(requests, reference.scores(requests), strict=True)}
    cache = PagedCacheConfig(page=16, memory_gb=14 * PAGE_GB, host_gb=20 * PAGE_GB)
    engine = started(cache, rounds)
    states, wrong, done = engine.user_cache.states, [], threading.Event()

    def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            requests = [rounds[rng.integers(6)][rng.integers(8)] for _ in range(rng.integers(1, 5))]
            result = engine.rank(requests)
            if error(result, [expected[id(r)] for r in requests]) > 1e-5:
                wrong.append(requests)

    def evicting() -> None:
        while not done.wait(0.002):
            for user in range(8):
                states.evict(user)

    threads = [threading.Thread(target=client, args=[seed]) for seed in range(8)]
    saboteur = threading.Thread(target=evicting)
    for thread in (*threads, saboteur):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    saboteur.join()
    assert not wrong
    counts = states.counters()
    assert counts.faults == counts.policy_errors == counts.bypassed == 0 < counts.hits
    assert not states.snapshot().in_flight
    engine.reset_cache()
    assert states.pool.used == 0 and states.tier is not None and states.tier.extents.available == states.tier.pages
    engine.close()


def test_extents_are_few_and_exact() -> None:
    rng, extents, held = np.random.default_rng(0), Extents(50), []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            extents.free(held.pop(rng.integers(len(held))))
        else:
            n = int(rng.integers(1, 20))
            if n > extents.available:
                with pytest.raises(PoolFullError, match=f"{n} pages of the host asked for"):
                    extents.allocate(n)
                continue
            held.append(extents.allocate(n))
            assert sum(length for _, length in held[-1]) == n
        pages = [p for runs in (*held, extents.free_runs) for begin, n in runs for p in range(begin, begin + n)]
        assert sorted(pages) == list(range(50))
        free = sorted(extents.free_runs)
        assert all(a + n < b for (a, n), (b, _) in pairwise(free))  # adjacent free runs are merged
    assert list(cut([(10, 3), (20, 5)], 1, 6)) == [(11, 2), (20, 3)]
    assert joined([(0, 2), (2, 3), (7, 1)]) == [(0, 5), (7, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["false", "auto", "true"])
@pytest.mark.parametrize(("kernel", "precision"), [("torch", "fp32"), ("triton", "bf16"), ("cutlass", "bf16")])
def test_on_a_gpu(kernel: str, precision: str, graphs: str) -> None:
    """Hits, host hits, evictions and prefetches occur, and answers equal the reference, with and without graphs."""
    model = dataclasses.replace(MODEL, qk_dim=32, v_dim=32, embedding_dim=64)
    rounds = [requests[i : i + 3] for requests in traffic(9, 8, longest=300) for i in (0, 3, 6)]
    reference = RankingReference(model, CATALOGUE, 5, "cuda")
    page_gb = model.layers * 16 * model.heads * 64 * (4 if precision == "fp32" else 2) / 1e9
    cache = PagedCacheConfig(
        "lru", "predictive", page=16, memory_gb=60 * page_gb, host_gb=100 * page_gb, prefetch_s=9.0
    )
    if graphs != "false":  # so small a model would otherwise be computed again rather than loaded
        cache.onload_share = 1.0
    options = {"device": "cuda", "precision": precision, "cuda_graphs": graphs, "kernel": kernel}
    engine = started(cache, rounds, model, **options)
    total: Counter[str] = Counter()
    for requests in rounds * 3:
        expected = reference.scores(requests)
        half = np.concatenate(reference.scores(requests, precision))
        whole = np.concatenate(expected)
        allowed = 2 * float(np.linalg.norm(half - whole) / np.linalg.norm(whole)) + 2e-5
        result = engine.rank(requests)
        assert error(result, expected) < allowed
        total.update(result.details)
    assert total["cache_faults"] == total["cache_policy_errors"] == 0
    assert min(total[f"cache_{name}"] for name in ("hits", "misses", "host_hits", "offloads", "evictions")) > 0
    assert graphs == "false" or total["graph_batches"] > 0
    engine.reset_cache(keep=Tier.HOST)
    assert engine.rank(rounds[-1]).details["cache_hits"] == 0
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_batches_queued_behind_each_other_on_a_gpu(cached: bool, graphs: bool) -> None:
    """Four threads pack and queue batches while the device computes, and every answer equals the reference."""
    rounds = [requests[i : i + 3] for requests in traffic(9, 8, longest=300) for i in (0, 3, 6)]
    page_gb = MODEL.layers * 16 * MODEL.heads * (MODEL.qk_dim + MODEL.v_dim) * 4 / 1e9
    cache = PagedCacheConfig(page=16, memory_gb=60 * page_gb, host_gb=100 * page_gb) if cached else CacheConfig()
    engine = started(cache, rounds, device="cuda", cuda_graphs=graphs, kernel="torch")
    expected = [RankingReference(MODEL, CATALOGUE, 5, "cuda").scores(requests) for requests in rounds]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            for result, scores in zip(threads.map(engine.rank, rounds), expected, strict=True):
                assert error(result, scores) < 2e-5
                assert result.compute_ms > 0
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_evictions_and_host_hits_after_the_start_take_no_memory_of_the_gpu(graphs: bool) -> None:
    """Six users take turns on pages for two. All have histories of the length that the start ranked and moved."""
    last = make_requests(np.random.default_rng(0), CATALOGUE, [150] * 6, [6] * 6)
    rounds = [[dataclasses.replace(r, user_id=user, arrival_s=float(user))] for user, r in enumerate(last)]
    memory = {"memory_gb": 25 * PAGE_GB, "host_gb": 100 * PAGE_GB, "onload_share": 1.0}
    cache = PagedCacheConfig(page=16, admit_visit=1, host_admit_visit=1, **memory)
    engine = started(cache, rounds, device="cuda", cuda_graphs=graphs)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cuda")
    expected = [reference.scores(requests) for requests in rounds]
    names = ("num_device_alloc", "segment.all.allocated")
    before = [torch.cuda.memory_stats()[name] for name in names]
    results = [engine.rank(requests) for requests in rounds * 3]
    assert [torch.cuda.memory_stats()[name] for name in names] == before
    assert all(error(result, scores) < 2e-5 for result, scores in zip(results, expected * 3, strict=True))
    total = sum((Counter(result.details) for result in results), Counter[str]())
    assert (total["cache_misses"], total["cache_host_hits"], total["cache_evictions"]) == (18, 12, 16)
    assert total["cache_offloads"] == 16 and not total["cache_faults"]
    engine.close()
