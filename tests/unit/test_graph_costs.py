"""Buckets of CUDA graphs, and the measured choice between a graph and launches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers.hstu_oracle import make_requests
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grengines.api import Catalogue, RankResult, Request
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime.batch import Bucket, Encoding, Layout, pack
from grengines.runtime.buckets import (
    STEP,
    TILE,
    Buckets,
    batch_buckets,
    length_buckets,
    plan_buckets,
    total_buckets,
)
from grengines.runtime.graph_costs import BucketCosts, Costs, Graphs, capture, filling, timed, worth_capturing

CATALOGUE = Catalogue(num_users=20, num_items=300, num_actions=4)
ENCODING = Encoding.of(HSTUConfig(), CATALOGUE)


def requests_of(events: Sequence[int], candidates: Sequence[int]) -> list[Request]:
    return make_requests(np.random.default_rng(0), CATALOGUE, list(events), list(candidates))


def sizes(requests: Sequence[Request]) -> Bucket:
    return Layout.of(requests, ENCODING).needed


def test_steps() -> None:
    assert batch_buckets(1) == [1] and batch_buckets(12) == [1, 2, 4, 8, 12] and batch_buckets(16) == [1, 2, 4, 8, 16]
    assert length_buckets([3, 17, 24, 25, 700]) == [16, 24, 32, 768]
    assert total_buckets(20, 300) == [32, 64, 128, 256, 300]
    assert total_buckets(5, 7) == [7]
    steps = total_buckets(1024, 100_000)
    assert all(b <= -(-int(a * STEP) // TILE) * TILE for a, b in pairwise(steps))


def test_even_buckets_pad_each_sequence() -> None:
    requests = requests_of([10, 40], [6, 6])
    plan = plan_buckets(requests, ENCODING, 4, packed=False)
    assert set(plan) == {Bucket.even(b, n, 6) for b in (1, 2, 4) for n in (16, 48)}
    buckets = Buckets(plan)
    assert buckets.choose(sizes(requests)) == Bucket.even(2, 48, 6)
    assert buckets.choose(sizes(requests[:1])) == Bucket.even(1, 16, 6)
    assert buckets.choose(sizes([requests[0]] * 3)) == Bucket.even(4, 16, 6)
    for too_much in ([requests[0]] * 5, requests_of([43], [6]), requests_of([1], [7])):
        assert buckets.choose(sizes(too_much)) is None
    assert {b.length for b in plan_buckets(requests, ENCODING, 1, [64, 32, 64], packed=False)} == {32, 64}
    with_cache = plan_buckets(requests, ENCODING, 1, packed=False, cached=True)
    assert set(with_cache) == {Bucket.even(1, n, 6, 46) for n in (16, 24, 48)}
    assert Buckets(with_cache).choose(Bucket.of([9], [6], [46])) == Bucket.even(1, 16, 6, 46)
    assert Buckets(with_cache).choose(Bucket.of([9], [6], [49])) is None


@examples(200)
@given(
    events=st.lists(st.integers(0, 2000), min_size=1, max_size=16),
    candidates=st.integers(1, 300),
    chosen=st.randoms(use_true_random=False),
    count=st.integers(1, 16),
)
def test_a_packed_bucket_holds_any_batch_of_the_sample_with_little_padding(
    events: list[int], candidates: int, chosen: Any, count: int
) -> None:
    """Take any requests of the sample, some more than once. The tokens are padded to the next step."""
    requests = requests_of(events, [candidates] * len(events))
    buckets = Buckets(plan_buckets(requests, ENCODING, 16, packed=True))
    batch = [chosen.choice(requests) for _ in range(count)]
    bucket = buckets.choose(sizes(batch))
    assert bucket is not None
    host = pack(batch, ENCODING, bucket=bucket)
    assert bucket.batch < 2 * count or bucket.batch == 16
    assert host.padded_tokens == bucket.tokens <= max(2 * host.tokens, host.tokens * STEP + TILE, 32)
    assert bucket.candidates <= 2 * sum(len(r.candidates) for r in batch)


@examples(200)
@given(new=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_packed_buckets_hold_batches_with_cached_tokens(new: list[int]) -> None:
    """Cache all but some new events of histories of 500 events."""
    requests = requests_of([500] * len(new), [20] * len(new))
    buckets = Buckets(plan_buckets(requests, ENCODING, 8, packed=True, cached=True))
    bucket = buckets.choose(Bucket.of([n + 20 for n in new], [20] * len(new), [520] * len(new)))
    assert bucket is not None
    host = pack(requests, ENCODING, cached=[500 - n for n in new], bucket=bucket)
    assert host.max_kv_len == 520 and host.max_q_len == min(bucket.tokens, 520)
    assert host.padded_tokens <= max(2 * host.tokens, host.tokens + TILE, 32)


@examples(200)
@given(
    batch=st.sampled_from([1, 2, 8]),
    tokens=st.integers(1, 3000),
    events=st.integers(0, 500),
    candidates=st.integers(1, 40),
    cached=st.booleans(),
    context=st.sampled_from([0, 2]),
)
def test_what_fills_a_bucket_fits_it(
    batch: int, tokens: int, events: int, candidates: int, cached: bool, context: int
) -> None:
    encoding = Encoding.of(HSTUConfig(contextual_seq_len=context), CATALOGUE)
    like, longest = requests_of([events], [candidates])[0], context + events + candidates
    tokens = max(min(tokens, batch * longest), longest if context else 1)
    targets = min(tokens, candidates)
    bucket = Bucket(batch, tokens, min(tokens, batch * candidates), min(tokens, longest), targets, longest)
    requests, done = filling(bucket, like, encoding, cached=cached)
    host = pack(requests, encoding, cached=done if cached else None, bucket=bucket)
    assert 1 <= len(requests) <= batch and host.tokens > 0
    if not context and len(requests) == batch:
        assert host.tokens > tokens - batch  # what can't be shared evenly is left
    assert not (cached and not context) or all(len(r.history_items) == events for r in requests)
    rest = filling(bucket, like, encoding, cached=cached, fewer=3)
    fewer = pack(rest.requests, encoding, cached=rest.cached if cached else None, bucket=bucket).tokens
    new = host.tokens // len(requests) - context - len(requests[0].candidates)
    assert host.tokens - fewer == len(requests) * min(3, new)


def plan(*tokens: int, batch: int = 1) -> list[Bucket]:
    return [Bucket.even(batch, n // batch) for n in tokens]


def test_a_graph_pays_where_the_device_is_faster_than_the_launches() -> None:
    costs = BucketCosts(launches_s=2.0, replay_s=1.5)
    assert costs.pays() and costs.pays(before_s=0.4)
    assert not costs.pays(before_s=0.8) and not BucketCosts(1.0, 1.5).pays()


def test_a_near_tie_goes_to_the_graph_and_so_is_the_same_in_each_run() -> None:
    assert all(BucketCosts(1.0, replay_s).pays() for replay_s in (0.95, 1.0, 1.05, 1.09))
    assert not BucketCosts(1.0, 1.11).pays()
    assert BucketCosts(1.0, 0.5).pays(before_s=0.55) and not BucketCosts(1.0, 0.5).pays(before_s=0.65)


def test_larger_buckets_than_one_that_keeps_the_device_busy_are_not_measured() -> None:
    measured = []

    def eager(bucket: Bucket) -> Costs:
        measured.append(bucket)
        return Costs(1.0, bucket.tokens / 100)

    small, large = plan(50, 100, 120), plan(130, 1000)
    twice = plan(60, 400, 800, batch=2)
    assert worth_capturing([*large, *twice, *small], eager) == dict.fromkeys([*small, twice[0]], 1.0)
    assert measured == [*small, large[0], *twice[:2]]


class Graphed:
    """A runner that computes nothing."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = list(buckets)

    def keep(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = list(buckets)

    upload = replay = None  # type: ignore[assignment]


def probe(bucket: Bucket, runner: Any) -> Any:
    """Launches take no time on the host here; a replay takes a second for every token."""
    device_s = -1.0 if runner is None else bucket.tokens - 100.0
    result = RankResult(scores=[], batch_ms=0, transfer_ms=0, compute_ms=1e3 * device_s, tokens=0, padded_tokens=0)
    return lambda: lambda: result


def test_auto_keeps_the_graphs_that_pay() -> None:
    buckets = plan(50, 80, 120, 200)
    graphs = capture("auto", buckets, Graphed, probe)
    assert isinstance(graphs.runner, Graphed)
    assert list(graphs.buckets) == graphs.runner.buckets == buckets[:2]
    assert graphs.choose(Bucket.of([70])) == buckets[1] and graphs.choose(Bucket.of([81])) is None
    assert graphs.counts(buckets[0]) == {"graph_batches": 1.0, "eager_batches": 0.0}
    assert graphs.counts(None) == {"graph_batches": 0.0, "eager_batches": 1.0}
    assert graphs.pays(buckets[0], before_s=49.0) and not graphs.pays(buckets[0], before_s=51.0)
    actual = graphs.actual()
    assert actual["cuda_graphs"] == "true" and [b[1] for b in actual["graph_buckets"]] == [50, 80]
    assert [(c["tokens"], c["replay"]) for c in actual["graph_costs_ms"]] == [
        (50, -50e3), (80, -20e3), (120, 20e3), (200, 100e3)
    ]  # fmt: skip


def test_all_graphs_or_none_where_that_is_asked_for() -> None:
    buckets = plan(50, 200)
    everything = capture("true", buckets, Graphed, probe)
    assert list(everything.buckets) == buckets and everything.pays(buckets[1], before_s=1e9)
    for nothing in (capture("false", buckets, Graphed, probe), capture("auto", plan(200), Graphed, probe), Graphs()):
        assert nothing.runner is None and nothing.choose(Bucket.of([1])) is None
        assert nothing.counts(None) == {} and nothing.actual()["cuda_graphs"] == "false"


def test_costs_are_medians_after_a_first_batch() -> None:
    times = iter([100.0, 1.0, 5.0, 3.0, 2.0, 4.0])

    def queue() -> Any:
        result = RankResult(scores=[], batch_ms=0, transfer_ms=0, compute_ms=next(times), tokens=0, padded_tokens=0)
        return lambda: result

    costs = timed(queue)
    assert costs.device_s == pytest.approx(3e-3) and 0 < costs.host_s < 1
