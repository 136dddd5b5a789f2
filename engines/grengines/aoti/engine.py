"""engine=aoti: HSTU as a package of machine code with the project's kernels. No Python runs between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grengines.aoti import package as packages
from grengines.aoti.cached import PackagedRanker
from grengines.aoti.config import VARIANTS, AOTIEngineConfig
from grengines.aoti.package import Facts, Inputs, Package
from grengines.aoti.paged import PagedRanker
from grengines.api import RankResult, Request, Setup
from grengines.base import placement_of
from grengines.cache.config import stored
from grengines.export.attention import adapted
from grengines.export.identity import model_hash
from grengines.export.module import ExportedRanker
from grengines.fallback import OutsideError
from grengines.hstu.caching_engine import CachingRankingEngine
from grengines.models.hstu.model import build_model
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket, HostBatch, JaggedBatch, Layout, pack
from grengines.runtime.buckets import plan_buckets
from grengines.runtime.graph_costs import Queue, Runner, capture, fillings
from grengines.runtime.graphs import GraphRunner
from grengines.runtime.profile import Sizes, check, profiles
from grengines.runtime.results import collect
from grengines.runtime.timing import Marks
from grkernels import registry as kernel_registry
from grkernels.operators import Operators


class AOTIEngine(CachingRankingEngine):
    """Ranking with HSTU, compiled ahead of time by AOTInductor.

    Raises UnavailableError for a device or a variant that this machine lacks.
    """

    name = "aoti"

    def __init__(self, options: AOTIEngineConfig, setup: Setup) -> None:
        super().__init__(setup, placement_of(options), cuda_graphs=options.cuda_graphs == "true")
        self._options = options
        self._asked = options.cuda_graphs if self._cuda else "false"
        operators = {
            f: name
            for f, name in setup.kernels.items()
            if kernel_registry.family(f).of_model or (f == "paged_write" and self._page)
        }
        self._choice = kernel_choice.choose(
            operators,
            self._model_config,
            self._device.type,
            self._precision,
            page=self._page,
            stored=stored(self._cache),
            captured=self._asked != "false",
            compiled=True,
            allowed=VARIANTS,
        )
        self._kernels = self._choice.variants
        self._operators = Operators.of(self._kernels)
        self._package: Package | None = None
        self._inputs: Inputs | None = None
        self._build_s = 0.0

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Load the package, after building it if there is none yet, and capture the graphs.

        Raises ValueError for a package of another model, precision, device or version.
        """
        self._package = package = self._make_package(sample, max_batch)
        packed = self._kernels["hstu_attention"] == "triton"  # attention in PyTorch pads sequences to one length
        plan = plan_buckets(
            sample, self._encoding, max_batch, self._options.graph_lengths, packed=packed, cached=self._page > 0
        )
        plan = [b for b in plan if _sizes(b).fits(package.facts.most)]
        longest = self._longest(sample)
        if self._page:
            ranker = PackagedRanker(
                package, self._model_config, self._encoding, self._device, self._dtype, self._operators.paged_write
            )
            self._make_cache(ranker, sample, self._base).capture(self._asked, plan, longest)
            return
        self._inputs = Inputs(package.facts, self._device)
        self._graphs = capture(
            self._asked,
            plan,
            lambda buckets: GraphRunner(self._run, buckets, self._empty, self._device),
            partial(self._probe, longest),
        )

    def _probe(self, longest: Request, bucket: Bucket, runner: Runner | None) -> Queue:
        """Return what queues a batch that fills a bucket, in its graph if there is a runner."""
        batches = fillings(bucket, longest, self._encoding)

        def queue() -> Callable[[], RankResult]:
            requests = next(batches).requests
            host = pack(requests, self._encoding, bucket=bucket if runner else None, pin=self._cuda)
            return self._queue(host, bucket if runner else None, runner, 0.0)

        return queue

    @torch.inference_mode()
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        largest = self._largest(sample, max_batch)
        try:
            self.rank(largest)
            if self.user_cache is not None:
                self.user_cache.measure(largest)
        except OutsideError:  # engine.package may hold less than the sample
            if not self._options.fallback:
                raise

    @torch.inference_mode()
    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Score every candidate of every request. Threads take turns until a batch's work is queued.

        A batch that fails in the cache is counted, logged, and answered without it. Raises OutsideError for a batch
        that the package was not built for, RuntimeError before `prepare`.
        """
        package = self._ready(self._package)
        begun = time.perf_counter()
        check(requests, self._encoding, package.facts.most, _hint(self._options.package))
        if (cached := self.user_cache) is not None:
            with self._turns as turn:
                queued = cached.queue_or(requests, cached.queue_whole)
            return self._ended(queued, begun, turn)
        layout = Layout.of(requests, self._encoding)
        bucket = self._graphs.choose(layout.needed)
        host = layout.pack(bucket, pin=self._cuda)
        batch_ms = (time.perf_counter() - begun) * 1e3
        with self._turns as turn:
            queued = self._queue(host, bucket, self._graphs.runner, batch_ms)
        return self._ended(queued, begun, turn)

    def _queue(
        self, host: HostBatch, bucket: Bucket | None, runner: Runner | None, batch_ms: float
    ) -> Callable[[], RankResult]:
        """Queue a batch in a bucket's graph, or without a bucket kernel by kernel."""
        marks = Marks(self._device)
        if runner is not None and bucket is not None:
            runner.upload(bucket, host.buffer)
            marks.add()
            logits = runner.replay(bucket)
        else:
            batch = host.to(self._device)
            marks.add()
            logits = self._run(batch)
        return collect(logits, [host], marks, batch_ms, self._graphs.counts(bucket))

    def _describe(self) -> dict[str, Any]:
        package = self._package
        return {
            **self._choice.actual(),
            "kernel_configs": package.configs if package else [],
            "package": str(package.path) if package else None,
            "package_bytes": package.path.stat().st_size if package else 0,
            "package_build_s": self._build_s,  # 0: it existed
            "built_for": package.facts.most.__dict__ if package else {},
            "attention_tiles": package.facts.tiles if package else 0,  # of query rows, one after another
            **self._describe_cache(),
        }

    def _unload(self) -> None:
        super()._unload()
        self._package, self._inputs = None, None

    def _make_package(self, sample: Sequence[Request], max_batch: int) -> Package:
        """Load the package that `engine.package` names, else the one in the cache, which is built if it is missing."""
        model = self._model_config
        sizes = profiles(sample, self._encoding, max_batch, 2)
        digest = model_hash(model, self._setup.catalogue, self._setup.seed)
        facts = Facts.here(
            digest,
            self._precision,
            self._device,
            self._kernels,
            model.heads,
            sizes[-1],
            sizes[0],
            self._page,
            stored(self._cache),
        )
        path = Path(self._options.package) if self._options.package is not None else facts.path()
        if self._options.package is None and not path.exists():
            begun = time.perf_counter()
            self._build(facts)
            self._build_s = time.perf_counter() - begun
        return packages.load(path, facts, self._device)

    def _build(self, facts: Facts) -> None:
        setup = self._setup
        ranker = build_model(
            self._model_config, setup.catalogue, setup.seed, self._device, self._dtype, self._operators
        )
        # Only the eager variant processes its query rows in tiles.
        tiles = facts.tiles if self._kernels["hstu_attention"] == "torch" else 0
        if facts.page:
            packages.build(PagedRanker(ranker, self._operators, tiles), facts)
            return
        attend = adapted(self._operators.hstu_attention, **({"tiles": tiles} if tiles else {}))
        packages.build(ExportedRanker(ranker, attend, self._operators), facts)

    def _run(self, batch: JaggedBatch) -> Tensor:
        """Return the logits fp32 [M, tasks]."""
        assert self._package is not None and self._inputs is not None
        return self._package.run(self._inputs.of(batch))[0]


def _sizes(bucket: Bucket) -> Sizes:
    """Return the sizes of a bucket. A batch of it has at most the history that the sample has."""
    return Sizes(bucket.batch, bucket.tokens, bucket.length, 1, bucket.candidates)


def _hint(package: str | None) -> str:
    if package is not None:
        return "set engine.package=null, or engine.fallback=[hstu]"
    return "prepare it with requests as large, or set engine.fallback=[hstu]"
