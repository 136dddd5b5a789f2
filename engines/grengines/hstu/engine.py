"""The native engine: ranking with HSTU in PyTorch, on a CPU, one GPU, or several by heads."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from grengines.api import RankResult, Request, Setup, UnavailableError
from grengines.base import placement_of
from grengines.cache.config import stored
from grengines.cache.item_shards import ItemShards
from grengines.cache.items import HotRows
from grengines.hstu.caching_engine import CachingRankingEngine
from grengines.hstu.config import HSTUEngineConfig, graphs_asked
from grengines.hstu.passes import follow_ranking, whole
from grengines.last_layer import WHOLE, LastLayer
from grengines.models.hstu.fp8 import use_fp8
from grengines.models.hstu.model import HSTURanker, build_model
from grengines.models.hstu.shard import shard
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket, HostBatch, Layout, pack_slices
from grengines.runtime.buckets import first_batches, plan_buckets
from grengines.runtime.device import PRODUCTS
from grengines.runtime.graph_costs import Queue, Runner, capture, fillings
from grengines.runtime.graphs import GraphRunner
from grengines.runtime.results import collect
from grengines.runtime.shared_graphs import graph_runner
from grengines.runtime.slots import Slots
from grengines.runtime.team import Alone, Team, device_of, fewer_gpus
from grkernels import fp8, tuning
from grkernels.operators import Operators


class HSTUEngine(CachingRankingEngine):
    """Ranking with HSTU and the kernel variants of the configuration.

    With engine.tensor_parallel it is rank 0, and its team has the others. Raises UnavailableError for a device or a
    variant that this machine lacks.
    """

    name = "hstu"

    def __init__(self, options: HSTUEngineConfig, setup: Setup) -> None:
        super().__init__(setup, placement_of(options), cuda_graphs=options.cuda_graphs == "true")
        self._options = options
        self._ranks = options.tensor_parallel
        one_launch = self._cuda and not options.candidate_microbatch
        self._asked = graphs_asked(options) if one_launch else "false"
        self._products = self._precision if self._precision in PRODUCTS else ""
        if self._products and self._cuda and (why := fp8.refusal()):
            raise UnavailableError(f"engine.precision=fp8: {why}; set engine.precision=bf16")
        self._kernels = kernel_choice.choose(
            setup.kernels,
            self._model_config,
            self._device.type,
            self._base,
            page=self._page,
            stored=stored(self._cache),
            captured=self._asked != "false",
            products=self._products,
            ranks=self._ranks,
        )
        self.operators = Operators.of(self._kernels.variants)
        self._ranker: HSTURanker | None = None
        self._slots = Slots(self._device)
        self.team: Team | Alone = Alone(self._device)
        self._parameters = 0  # of the whole model
        self._items: HotRows | ItemShards | None = None

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Put the model on the device and capture the graphs."""
        setup = self._setup
        if self._ranks > 1:
            self.team = Team(self._ranks, self._device, follow_ranking, self._recipe())
        memory, shards = math.ceil(self._cache.item_memory_gb * 1e9), self._options.item_shards
        if lacking := fewer_gpus(shards, self._device, "engine.item_shards"):
            raise UnavailableError(lacking)
        self._ranker = ranker = build_model(
            self._model_config,
            setup.catalogue,
            setup.seed,
            self._device,
            self._dtype,
            self.operators,
            host_table=memory > 0 or shards > 1,
        )
        self._parameters = sum(p.numel() for p in ranker.parameters())
        if self._products:
            use_fp8(ranker)
        if isinstance(self.team, Team):
            shard(ranker, self.team.group)
        table = ranker.token_table.data
        if shards > 1:
            devices = [device_of(self._device, i) for i in range(shards)]
            self._items = ItemShards(table, devices, self._dtype, memory)
            ranker.use_parts(self._items.table)
        elif memory:
            self._items = HotRows.within(memory, table, device=self._device, dtype=self._dtype)
            ranker.use_table(self._items.table)
        begun = time.perf_counter()
        plan, longest = self._plan(sample, max_batch), self._longest(sample)
        if self._page:
            microbatch = self._options.candidate_microbatch
            cache = self._make_cache(ranker, sample, self._attention, microbatch, self._place, self.team)
            cache.capture(self._asked, plan, longest)
        else:
            self._graphs = capture(
                self._asked,
                plan,
                lambda buckets: graph_runner(self.team, GraphRunner, ranker, buckets, self._empty, self._device),
                partial(self._probe, ranker, longest),
            )
        self.start_s["graphs"] = time.perf_counter() - begun
        self.team.ready()

    @property
    def _attention(self) -> str:
        """The precision of attention's products."""
        return "fp8" if self._kernels.variants["hstu_attention"] == "fp8" else self._base

    def _recipe(self) -> dict[str, Any]:
        """Return the arguments of `follow_ranking`."""
        return {
            "model": self._model_config,
            "catalogue": self._setup.catalogue,
            "seed": self._setup.seed,
            "dtype": self._dtype,
            "variants": self._kernels.variants,
        }

    def _plan(self, sample: Sequence[Request], max_batch: int) -> list[Bucket]:
        """Return the buckets of which graphs may be captured. Attention in PyTorch pads sequences to one length."""
        return plan_buckets(
            sample,
            self._encoding,
            max_batch,
            self._options.graph_lengths,
            packed=self._kernels.variants["hstu_attention"] in ("triton", "cutlass", "fp8"),
            cached=self._page > 0,
        )

    def _probe(self, ranker: HSTURanker, longest: Request, bucket: Bucket, runner: Runner | None) -> Queue:
        """Return what queues a batch that fills a bucket, in its graph if there is a runner."""
        batches = fillings(bucket, longest, self._encoding)

        def queue() -> Callable[[], RankResult]:
            begun, layout = time.perf_counter(), Layout.of(next(batches).requests, ranker.encoding)
            return self._queue_packed(ranker, layout, bucket if runner else None, runner, begun)

        return queue

    @torch.inference_mode()
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        if self.user_cache is not None:
            self.user_cache.measure(self._largest(sample, max_batch))
            return
        by_size = self._largest(sample, len(sample))
        for n in first_batches(max_batch, self._device):
            self.rank(by_size[-n:])
            if self._cuda:  # kernels for shorter sequences may be others
                self.rank(by_size[len(by_size) // 2 :][:n])
                self.rank(by_size[:n])

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request.

        Threads take turns until a batch's work is queued, and wait for the device together. A batch that fails in the
        cache is counted, logged, and answered without it. Raises ValueError for more than max_batch requests,
        RuntimeError before `prepare`, and with the reason after the end of a rank.
        """
        ranker, cached = self._ready(self._ranker), self.user_cache
        self._check_size(requests)
        begun = time.perf_counter()
        with self.team.waiting():
            with self._turns as turn:
                uncached = partial(self._queue_whole, ranker)
                queued = cached.queue_or(requests, uncached) if cached is not None else uncached(requests)
            return self._ended(queued, begun, turn)

    def _queue_whole(self, ranker: HSTURanker, requests: Sequence[Request]) -> Callable[[], RankResult]:
        """Queue a batch of whole histories. The returned function waits for the device."""
        begun, layout = time.perf_counter(), Layout.of(requests, ranker.encoding)
        return self._queue_packed(ranker, layout, self._graphs.choose(layout.needed), self._graphs.runner, begun)

    def _queue_packed(
        self, ranker: HSTURanker, layout: Layout, bucket: Bucket | None, runner: Runner | None, begun: float
    ) -> Callable[[], RankResult]:
        """Queue a batch in a bucket's graph, or without a bucket kernel by kernel. begun: when its packing began."""
        slot = self._slots.take()
        if runner is not None and bucket is not None:
            slot.reserve(layout.length(bucket))
            hosts = [layout.pack(bucket, slot=slot)]
        else:
            hosts = pack_slices(layout, self._options.candidate_microbatch, pin=self._cuda)
        batch_ms = (time.perf_counter() - begun) * 1e3
        slot.marks.begin()
        details = self._place(hosts)
        if runner is not None and bucket is not None:
            runner.upload(bucket, slot.inputs)
            slot.marks.add()
            logits = runner.replay(bucket)
        else:
            with self.team.call("whole", hosts) as batches:
                slot.marks.add()
                logits = whole(ranker, batches)
        first = hosts[0]  # all further ones have candidates alone
        if not LastLayer.HALF.skips(first.padded_tokens, first.sizes["candidate_rows"]):
            details[WHOLE] = 1.0
        return collect(logits, hosts, slot.marks, batch_ms, details | self._graphs.counts(bucket), slot)

    def prefetch(self, users: Iterable[int]) -> None:
        """Start to copy the states of users from the host tier to the device, ahead of their requests."""
        if (cache := self.user_cache) is not None:
            cache.states.prefetch_users(users)

    def _describe(self) -> dict[str, Any]:
        return {
            **self._kernels.actual(),
            **self._describe_products(),
            "attention_precision": self._attention,
            **self._describe_operands(),
            "kernel_configs": tuning.provenance(),
            **self._describe_cache(),
            "candidate_microbatch": self._options.candidate_microbatch,
            "parameters": self._parameters,
            **self.team.actual(),
            "item_slots": self._items.slots if self._items else 0,  # rows of the token table on the devices; 0: all
            **(self._items.actual() if isinstance(self._items, ItemShards) else {}),
        }

    def _describe_operands(self) -> dict[str, Any]:
        """Return what writes q, k and v in e4m3: the projection, or a pass after it where keys and values are kept."""
        if self._attention != "fp8":
            return {}
        kept = self._page or self._options.candidate_microbatch
        projected = self._ranker is not None and self._ranker.projected_attention is not None and not kept
        return {"attention_operands": "projection" if projected else "pass"}

    def _describe_products(self) -> dict[str, Any]:
        """Return what computes products in fp8, with a note for one whose speed is that of no such product."""
        if not self._products:
            return {}
        how = fp8.runs_as(self._device.type)
        note = f"engine.precision=fp8 is {how} on a CPU: the quality is that of fp8, and the speed is not"
        return {"fp8_products": how, "notes": [note] if how == fp8.EMULATED else []}

    def _unload(self) -> None:
        super()._unload()
        if isinstance(self._items, ItemShards):
            self._items.close()
        self._ranker, self._items, self._slots = None, None, Slots(self._device)
        self.team.close()  # after the graphs, which hold collectives

    def _place(self, hosts: Sequence[HostBatch]) -> dict[str, float]:
        """Copy the batches' rows of a token table on the host to the device, and replace row numbers by slots.

        All parts of a batch share one lookup, since a lookup may evict the rows of the one before. Returns the item
        cache's counts. Raises RuntimeError, and changes nothing, if they need more rows than the device holds.
        """
        if self._items is None or not self._items.slots:
            return {}
        before = dataclasses.asdict(self._items.counters)
        self._items.place([host.token_rows for host in hosts])
        return {f"items_{k}": float(v - before[k]) for k, v in dataclasses.asdict(self._items.counters).items()}
