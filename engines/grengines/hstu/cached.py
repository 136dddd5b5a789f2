"""Ranking with the user-state cache: only tokens that are not in pages are computed, and stored there."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from grengines.api import Cached, Float32Array, RankResult, Request, Tier
from grengines.cache import policies
from grengines.cache.config import PagedCacheConfig
from grengines.cache.events import Counters
from grengines.cache.history import History
from grengines.cache.host import HostTier, Onload
from grengines.cache.index import Plan, no_pages
from grengines.cache.places import HostPlaces, PagedBatch
from grengines.cache.policies import Policy
from grengines.cache.pool import PagePool
from grengines.cache.states import UserStates
from grengines.cache.storage import RESERVE_SHARE, ReadError, StorageTier
from grengines.export.identity import digest_of
from grengines.hstu.load_costs import LoadCosts
from grengines.hstu.passes import PagedModel, append, page_sizes
from grengines.models.hstu.config import stale_states
from grengines.runtime.batch import Bucket, HostBatch, JaggedBatch, Layout, pack, pack_slices
from grengines.runtime.buckets import first_batches
from grengines.runtime.device import DTYPES
from grengines.runtime.graph_costs import Filling, Graphs, Queue, Runner, capture, fillings
from grengines.runtime.graphs import GraphRunner
from grengines.runtime.results import collect
from grengines.runtime.shared_graphs import graph_runner
from grengines.runtime.slots import Slot, Slots
from grengines.runtime.team import Alone, Team
from grkernels.pages import EIGHT_BITS

FORMAT = 1  # of what the storage tier writes
# Counters of what lookups found and loads brought, and those that are of a storage tier.
LOOKUPS = (
    "hits", "partial_hits", "host_hits", "storage_hits", "misses", "bypassed", "cached_tokens", "loaded_tokens",
    "storage_tokens",
)  # fmt: skip
OF_STORAGE = {name for name in vars(Counters()) if name.startswith("storage")} | {"corrupt_pages"}
RUNS, MOST_S = 5, 1.0  # of the batches by which the cost of computing is measured; a slow one runs less often
# For batches of other sizes. A form of attention takes CUTLASS 4 s to compile, so several fit. What does not fit is
# compiled at its first use.
MOST_SIZES_S = 30.0
PRECISIONS = {dtype: name for name, dtype in (DTYPES | EIGHT_BITS).items()}


class CachedRanking:
    """Ranking over pages: the cached states, the host tier, and CUDA graphs of appends.

    place: renumbers packed tokens for the cache of item vectors; returns its counts. identity: returns a digest of what
    the keys and values of a history depend on, for the storage tier. team: the ranks that share the heads; each has
    pages for those that it has, and this one decides for all. Raises ValueError if the longest history of the sample
    does not fit in the empty pool, or if there can't be such a storage tier.
    """

    def __init__(
        self,
        ranker: PagedModel,
        microbatch: int,
        cache: PagedCacheConfig,
        sample: Sequence[Request],
        place: Callable[[Sequence[HostBatch]], dict[str, float]],
        identity: Callable[[], str],
        team: Team | Alone | None = None,
    ) -> None:
        if problem := stale_states(ranker.config):
            raise ValueError(problem)
        self._ranker, self._microbatch, self._cache, self._place = ranker, microbatch, cache, place
        self._device = ranker.device
        self._team = team or Alone(self._device)
        self._pin, self._slots = self._device.type == "cuda", Slots(self._device)
        self.encoding = ranker.encoding
        longest = ranker.encoding.contextual_seq_len + max(len(r.history_items) for r in sample)
        self.states = _make_states(ranker, cache, longest, identity)
        self._pages = self.states.pool.pages_for(longest)
        with self._team.call("pages", [], cache=cache, pages=self.states.pool.pages):
            pass  # this rank's are made
        tier, storage = self.states.tier, self.states.storage
        self._found = len(storage.states) if storage else 0
        self.costs = LoadCosts(tier.bytes_a_second() if tier else 0.0, storage.bytes_a_second() if storage else 0.0)
        self.graphs = Graphs()

    @torch.inference_mode()
    def capture(self, asked: str, plan: Sequence[Bucket], longest: Request) -> None:
        """Capture the graphs that are asked for. longest: a request of the longest history."""
        self.graphs = capture(
            asked,
            plan,
            lambda buckets: graph_runner(self._team, GraphRunner, self.forward, buckets, self._empty, self._device),
            partial(self._probe, longest),
        )

    def queue_or(
        self, requests: Sequence[Request], whole: Callable[[Sequence[Request]], Callable[[], RankResult]]
    ) -> Callable[[], RankResult]:
        """Queue a batch as `queue` does, and count what the cache did for it.

        A batch that fails is counted and logged. `whole` queues it then, without the cache. If the disk has not what
        was written there, the batch is queued again, without that state.
        """
        before, failed = self.states.counts(), False
        lookups = before
        while True:
            try:
                queued = self.queue(requests)
                break
            except ReadError as error:
                self._drain()
                lookups = self.states.counts()
                self.states.lost(error)
            except Exception as error:
                self.states.fault(f"{len(requests)} requests failed with the cache", error)
                self._drain()
                queued, failed = whole(requests), True
                break
        after = self.states.counts()
        # Of a batch that was queued more than once, the last lookups count.
        changes = {name: n - (lookups if name in LOOKUPS else before)[name] for name, n in after.items()}
        if failed:  # the states that were found were not used
            changes |= {**dict.fromkeys(LOOKUPS, 0), "misses": len(requests)}
        if self.states.storage is None:
            changes = {name: n for name, n in changes.items() if name not in OF_STORAGE}
        counted = {f"cache_{name}": float(change) for name, change in changes.items()}

        def answer() -> RankResult:
            result = queued()
            result.details.update(counted)
            return result

        return answer

    def _drain(self) -> None:
        """Wait for the device: work that is queued may still write to memory that was freed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def queue_whole(self, requests: Sequence[Request]) -> Callable[[], RankResult]:
        """Queue whole histories: no page is read or written, and no state is looked up."""
        begun = time.perf_counter()
        host = pack(requests, self._ranker.encoding, cached=[0] * len(requests), pin=self._pin)
        rows, sequences = host.padded_tokens, len(requests)
        places = HostPlaces.of(self.states.pool, [], [], rows, sequences=sequences, pin=self._pin)
        batch_ms, slot = (time.perf_counter() - begun) * 1e3, self._slots.take()
        slot.marks.begin()
        batch, there = host.to(self._device), places.to(self._device)
        slot.marks.add()
        logits = self._ranker.paged(batch, self.states.pool, there, write=False)
        return collect(logits, [host], slot.marks, batch_ms, {}, slot)

    def queue(self, requests: Sequence[Request]) -> Callable[[], RankResult]:
        """Queue a batch as grengines.api.Ranker.rank. The returned function waits for the device.

        A user's second request in a batch is in a later pass than the first, whose state it finds. An error loses no
        page, and leaves the index as before.
        """
        users = [r.user_id for r in requests]
        if len(set(users)) == len(users):
            return self._queue(requests)
        passes = _passes(users)
        queued = [self._queue([requests[i] for i in places]) for places in passes]
        return lambda: _merged([answer() for answer in queued], passes)

    def _queue(self, requests: Sequence[Request]) -> Callable[[], RankResult]:
        """Queue one pass over requests of different users."""
        states, tier, storage = self.states, self.states.tier, self.states.storage
        sent_down = tier.bytes_down if tier else 0
        disk = [storage.bytes_down, storage.bytes_up] if storage else []
        begun = time.perf_counter()
        now = max([r.arrival_s for r in requests])
        plans = states.lookup(requests, now)
        try:
            whole = self._extend(requests, plans)
            onload = states.start_loading(plans)  # as early as possible
            layout = Layout.of(requests, self._ranker.encoding, [plan.cached for plan in plans])
            slot, bucket = self._slots.take(), self._bucket(layout, onload)
            hosts, places = self._pack(layout, plans, bucket, slot, whole)
            batch_ms = (time.perf_counter() - begun) * 1e3
            slot.marks.begin()
            details = self._place(hosts)
            if self.graphs.runner is not None and bucket is not None:
                logits = self._replay(self.graphs.runner, bucket, onload, slot)
            else:
                logits = self._launch(hosts, places, any(plan.cached for plan in plans), onload, slot)
            # All is queued but the result's copy, so the device is busy while the host does the rest.
            details |= self.graphs.counts(bucket)
            queued = collect(logits, hosts, slot.marks, batch_ms, details, slot)
            for plan in plans:
                states.commit(plan)
        except BaseException:
            for plan in plans:
                states.abort(plan)  # does nothing for those that are committed
            raise
        states.prefetch(now, self._cache.prefetch_s)
        if tier is not None:
            details["cache_offloaded_bytes"] = float(tier.bytes_down - sent_down)
        if storage is not None:
            details["cache_storage_written_bytes"] = float(storage.bytes_down - disk[0])
            details["cache_storage_read_bytes"] = float(storage.bytes_up - disk[1])
            details["cache_storage_off"] = float(bool(storage.error))  # batches without the tier, whose disk failed
            details["cache_storage_wait_ms"] = onload.read_wait_ms if onload else 0.0
        cached = [_cached(plan) for plan in plans]
        if onload is not None:
            details["cache_host_bytes"] = float(onload.bytes)
        return partial(_with_cache, queued, cached, onload)

    def _extend(self, requests: Sequence[Request], plans: Sequence[Plan]) -> bool:
        """Make room for what is new. Return whether every request's whole history will be in pages."""
        if all(plan.stored == plan.tokens for plan in plans):
            return True
        shares = self._shares(requests, plans)
        stored = [self.states.extend(plan, share) for plan, share in zip(plans, shares, strict=True)]
        return all(stored)

    def _pack(
        self, layout: Layout, plans: Sequence[Plan], bucket: Bucket | None, slot: Slot, whole: bool
    ) -> tuple[list[HostBatch], HostPlaces]:
        """Lay out the uncached tokens, in slices of candidates if `whole`, and their places in the pool.

        Candidates on their own need the whole history in pages. Where it is not stored, all go in one pass. In a bucket
        both are the inputs of the slot, which the bucket's graph is given.
        """
        pool = self.states.pool
        if bucket is None:
            hosts = pack_slices(layout, self._microbatch if whole else 0, pin=self._pin)
            return hosts, HostPlaces.of(pool, plans, hosts[0].first_rows, hosts[0].padded_tokens, pin=self._pin)
        rows, sequences = bucket.tokens, bucket.batch
        slot.reserve(layout.length(bucket) + HostPlaces.length(sequences, rows, self._pages))
        host = layout.pack(bucket, slot=slot)
        places = HostPlaces.of(pool, plans, host.first_rows, rows, sequences=sequences, pages=self._pages, slot=slot)
        return [host], places

    def _replay(self, runner: Runner, bucket: Bucket, onload: Onload | None, slot: Slot) -> Tensor:
        """Queue a graph, behind all copies from the host. Return the logits."""
        runner.upload(bucket, slot.inputs)
        slot.marks.add()
        if onload is not None:
            onload.all_layers()
        return runner.replay(bucket)

    def _launch(
        self, hosts: Sequence[HostBatch], places: HostPlaces, cached: bool, onload: Onload | None, slot: Slot
    ) -> Tensor:
        """Queue kernels one by one, while states are copied from the host. Return the logits.

        cached: whether any request has cached tokens.
        """
        with self._team.call("append", [*hosts, places], cached=cached) as inputs:
            slot.marks.add()
            return append(self._ranker, self.states.pool, inputs, cached=cached, onload=onload)

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        """Drop every state, and what the policies learned. keep: only move states down to this tier."""
        if keep is not Tier.NONE:
            self.states.clear(keep)
        else:
            self.states.restart(*_policies(self._cache))

    def actual(self) -> dict[str, Any]:
        """Return what really runs, as JSON values."""
        tier = self.states.tier
        return {
            "cache_precision": PRECISIONS[self.states.pool.k[0].dtype],
            "cache_page_bytes": self.states.pool.page_bytes,
            "cache_pages": self.states.pool.pages,
            "cache_pages_most_used": self.states.pool.high_water,
            "cache_host_pages": tier.pages if tier else 0,
            "cache_copy_memory_bytes": tier.device_bytes if tier else 0,
            "cache_copy_gb_s": self.costs.copy_bytes_s / 1e9,
            **self.costs.actual(),
            "cache_launch_ms": self.costs.launch_s * 1e3,
            **self._storage(),
        }

    def _storage(self) -> dict[str, Any]:
        """Return the entries of `actual` for the storage tier, and a note if it was not empty at the start."""
        if (storage := self.states.storage) is None:
            return {}
        note = f"the storage tier had the states of {self._found} users from earlier runs: {storage.folder}"
        return {
            **storage.actual(),
            "cache_storage_found": self._found,
            "cache_storage_gb_s": self.costs.read_bytes_s / 1e9,
            **({"notes": [note]} if self._found else {}),
        }

    def close(self) -> None:
        """Release the memory of the host tier, and close the storage tier."""
        if self.states.storage is not None:
            self.states.storage.close()
        if self.states.tier is not None:
            self.states.tier.close()

    def measure(self, requests: Sequence[Request]) -> None:
        """Rank the largest batch until all is compiled, and measure the cost of computing. Drops every state.

        Before, a GPU ranks batches of other sizes (`rank_sizes`), and at the end states go to the host and come back.
        So no request waits for what the first of these takes: to compile and to load kernels, memory on the device,
        and streams.
        """
        with self.states.without_storage():
            if self._device.type == "cuda":
                self.rank_sizes(requests)
            result = self._fastest(requests)
            shorter = self._fastest([_newest(r, -(-len(r.history_items) // 4)) for r in requests])
            self.costs.measured(result, shorter)
            graphs, self.graphs = self.graphs, Graphs()
            self.costs.launch_s = min(self.queue(requests[:1])().compute_ms for _ in range(RUNS)) / 1e3
            self.graphs = graphs
            if self.states.tier is not None:
                self.move_states(requests)
        self.reset_cache()

    def rank_sizes(self, requests: Sequence[Request]) -> None:
        """Rank the batches of `_sizes` until MOST_SIZES_S have passed.

        Batches that fit in a graph are replayed; the kernels of graphs were compiled when they were captured.
        """
        begun = time.perf_counter()
        for batch in self._sizes(requests):
            self.queue(batch)()
            if time.perf_counter() - begun > MOST_SIZES_S:
                break

    def _sizes(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Yield N events, whole histories, and N new events behind a cached history, for N of 1, 4, 16 and so on.

        They come in batches of each size. Few rows have other kernels than many, one sequence has others than several,
        and few rows behind a long history have others than behind a short one. A whole history is computed once for
        each size: the request without its newest events finds the others in the state, which it cuts.
        """
        for n in first_batches(len(requests), self._device):
            batch = [dataclasses.replace(r, user_id=i) for i, r in enumerate(requests[-n:])]
            longest = max(len(r.history_items) for r in batch)
            sizes = [4**i for i in range(longest.bit_length() // 2 + 1) if 4**i < longest]
            for new in sizes:
                self.states.clear()
                yield [_newest(r, new) for r in batch]
            self.states.clear()
            yield batch
            if self.encoding.contextual_seq_len:  # a state serves the same history only
                yield batch
                continue
            for new in sizes:
                yield [_oldest(r, new) for r in batch]
                yield batch

    def move_states(self, requests: Sequence[Request]) -> None:
        """Send the states of a batch to the host in two parts and load them, then do so with one page and two more.

        The second part is the newest page of events: of a state that the host has, only new pages are sent.
        """
        costs, self.costs = self.costs, LoadCosts(self.costs.copy_bytes_s, self.costs.read_bytes_s)  # so all is loaded
        page, one = self._cache.page, requests[-1]
        for batch in (requests, *([one.with_events(slice(pages * page))] for pages in (1, 3, 4))):
            self.states.clear()  # else the host would have the few pages already
            for part in ([_oldest(r, page) for r in batch], batch, batch):
                self.queue(part)()
                self.reset_cache(keep=Tier.HOST)
        self.costs = costs

    def _fastest(self, requests: Sequence[Request]) -> RankResult:
        """Rank a batch of which nothing is cached: once until all is compiled, then several times.

        Returns the fastest result, since other work on the machine only adds time.
        """
        results: list[RankResult] = []
        begun = time.perf_counter()
        while len(results) < 2 or (len(results) <= RUNS and time.perf_counter() - begun < MOST_S):
            self.states.clear()
            results.append(self.queue(requests)())
        return min(results[1:], key=lambda result: result.compute_ms)

    def _shares(self, requests: Sequence[Request], plans: Sequence[Plan]) -> list[float]:
        """Return the share to load of the tokens that only a lower tier has, for each request."""
        more_below = self.states.tier is not None and any(plan.below > plan.on_device for plan in plans)
        if self._cache.onload_share or not more_below or not self.costs.compute_s:
            return [self._cache.onload_share or 1.0] * len(plans)
        return self.costs.shares(requests, plans, self.states, captured=self.graphs.runner is not None)

    def _bucket(self, layout: Layout, onload: Onload | None) -> Bucket | None:
        """Return the sizes of the graph for a batch, or None to launch its kernels one by one.

        They are launched if no graph holds the batch, and if kernels that overlap the copies from lower tiers are done
        sooner than a graph behind the copies.
        """
        if self.graphs.runner is None:
            return None
        bucket = self.graphs.choose(layout.needed)
        if bucket is None or self.states.pool.pages_for(max(layout.histories)) > self._pages:
            return None
        copying_s = 0.0
        if onload is not None:
            reading_s = onload.storage_bytes / self.costs.read_bytes_s if onload.storage_bytes else 0.0
            copying_s = max(onload.host_bytes / self.costs.copy_bytes_s, reading_s)
        return bucket if self.graphs.pays(bucket, copying_s) else None

    def forward(self, batch: JaggedBatch, places: PagedBatch) -> Tensor:
        """Encode a batch over its pages. Return logits fp32 [M, tasks]."""
        return self._ranker.paged(batch, self.states.pool, places)

    def _empty(self, bucket: Bucket) -> list[Any]:
        """Return the inputs of a graph for an empty batch."""
        layout = Layout.of([], self._ranker.encoding, [])
        hosts, places = self._pack(layout, [], bucket, Slots(self._device).take(), whole=False)
        return [*hosts, places]

    def _probe(self, longest: Request, bucket: Bucket, runner: Runner | None) -> Queue:
        """Return what queues a batch that fills a bucket, in its graph if there is a runner.

        It reads pages, whatever they hold, and writes to none.
        """
        batches = map(self._planned, fillings(bucket, longest, self._ranker.encoding, cached=True))

        def queue() -> Callable[[], RankResult]:
            requests, plans = next(batches)
            layout = Layout.of(requests, self._ranker.encoding, [plan.cached for plan in plans])
            slot = self._slots.take()
            hosts, places = self._pack(layout, plans, bucket if runner else None, slot, whole=False)
            slot.marks.begin()
            self._place(hosts)
            if runner is not None:
                logits = self._replay(runner, bucket, None, slot)
            else:
                logits = self._launch(hosts, places, any(plan.cached for plan in plans), None, slot)
            return collect(logits, hosts, slot.marks, 0.0, {}, slot)

        return queue

    def _planned(self, batch: Filling) -> tuple[list[Request], list[Plan]]:
        """Return requests, and plans of them that hold the pool's first pages without taking them."""
        pool, context = self.states.pool, self._ranker.encoding.contextual_seq_len
        plans = [
            Plan(
                request_id=r.request_id,
                user=r.user_id,
                history=History.of(r),
                tokens=context + len(r.history_items),
                now=0.0,
                cached=n,
                stored=n,
                pages=no_pages(range(pool.pages_for(n))),
            )
            for r, n in zip(*batch, strict=True)
        ]
        return batch.requests, plans


def _newest(request: Request, events: int) -> Request:
    """Return a request with only the newest events of its history."""
    return request.with_events(slice(-events, None))


def _oldest(request: Request, without: int) -> Request:
    """Return a request without the newest events of its history, but at least with one event."""
    return request.with_events(slice(max(len(request.history_items) - without, 1)))


def _passes(users: Sequence[int]) -> list[list[int]]:
    """Return places in the batch: each user's first request, then each user's second, and so on."""
    passes: list[list[int]] = []
    seen: Counter[int] = Counter()
    for i, user in enumerate(users):
        if seen[user] == len(passes):
            passes.append([])
        passes[seen[user]].append(i)
        seen[user] += 1
    return passes


def _cached(plan: Plan) -> Cached:
    """Return what a plan did not compute again."""
    loaded = plan.cached - plan.on_device
    from_storage = loaded if plan.on_storage else 0
    return Cached(plan.cached, loaded - from_storage, plan.tokens, from_storage)


def _with_cache(queued: Callable[[], RankResult], cached: list[Cached], onload: Onload | None) -> RankResult:
    """Wait for a result, and add what was cached and the times of the copies from the host."""
    result = queued()
    result.cached = cached
    if onload is not None:
        result.details["cache_host_wait_ms"], result.details["cache_host_copy_ms"] = onload.times_ms()
        if onload.storage_bytes:
            result.details["cache_storage_read_ms"] = onload.read_ms()
    return result


def _merged(results: Sequence[RankResult], passes: Sequence[Sequence[int]]) -> RankResult:
    """Merge the results of several passes: answers in the batch's order, sums of times and figures."""
    scores: list[tuple[int, Float32Array]] = []
    cached: list[tuple[int, Cached]] = []
    for result, places in zip(results, passes, strict=True):
        scores += zip(places, result.scores, strict=True)
        cached += zip(places, result.cached, strict=True)
    details: Counter[str] = Counter()
    for result in results:
        details.update(result.details)
    names = ("batch_ms", "transfer_ms", "compute_ms", "tokens", "padded_tokens")
    sums = {name: sum(getattr(result, name) for result in results) for name in names}
    order = itemgetter(0)
    return RankResult(
        scores=[s for _, s in sorted(scores, key=order)],
        cached=[c for _, c in sorted(cached, key=order)],
        details=dict(details),
        **sums,
    )


def _make_states(ranker: PagedModel, cache: PagedCacheConfig, longest: int, identity: Callable[[], str]) -> UserStates:
    """Return an empty cache. Raises ValueError if the longest history does not fit, RuntimeError without memory."""
    model = ranker.config
    try:
        pool = PagePool.within(int(cache.memory_gb * 1e9), **page_sizes(ranker, cache))
    except RuntimeError as e:  # the error of a CPU's allocator has no class of its own
        kind = torch.OutOfMemoryError if isinstance(e, torch.OutOfMemoryError) else RuntimeError
        raise kind(f"cache.memory_gb={cache.memory_gb:g}: no room for its pages, lower it; {e}") from e
    if pool.pages_for(longest) > pool.pages:
        needed = pool.pages_for(longest) * pool.page_bytes / 1e9
        raise ValueError(
            f"cache.memory_gb={cache.memory_gb:g}: the longest history, {longest} tokens, alone takes {needed:.3g} "
            "GB; give the cache more, or keep shorter histories (workload.max_history)"
        )
    policy, tier_policy, storage_policy = _policies(cache)
    tier = storage = None
    if cache.host_gb:
        host_bytes = int(cache.host_gb * 1e9)
        most = max(int(RESERVE_SHARE * host_bytes) // pool.page_bytes, pool.pages_for(longest))
        tier = HostTier(pool, host_bytes, most if cache.storage_gb else 0, prefetches=cache.prefetch_s > 0)
    if tier is not None and cache.storage_gb:
        key = digest_of([FORMAT, identity(), PRECISIONS[pool.k[0].dtype], cache.page])
        try:
            storage = StorageTier(tier, int(cache.storage_gb * 1e9), cache.storage_path, key)
        except BaseException:
            tier.close()
            raise
    return UserStates(
        pool,
        policy,
        contextual_seq_len=model.contextual_seq_len,
        tier=tier,
        tier_policy=tier_policy,
        storage=storage,
        storage_policy=storage_policy,
    )


def _policies(cache: PagedCacheConfig) -> tuple[Policy, Policy, Policy]:
    """Return the policies of the device, of the host tier and of the storage tier."""
    visits = (cache.admit_visit, cache.host_admit_visit, 1)  # storage takes all that the host admitted
    device, host, storage = (policies.make(cache.policy, visit) for visit in visits)
    return device, host, storage
