"""The native engine for task generate: beam search over semantic IDs with HSTU, on a CPU or one GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grengines.api import GenerateResult, Request, Setup
from grengines.base import GeneratingEngine
from grengines.cache.pool import PagePool
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.hstu import beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator, Prompts, pack_prompts
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket
from grengines.runtime.device import Placement
from grengines.runtime.graphs import GraphRunner, bucket_grid, choose_bucket, first_batches, length_buckets
from grengines.runtime.results import Marks, collect_items, one_tensor
from grengines.semantic.trie import Trie
from grkernels import tuning
from grkernels.operators import Operators


class HSTURetriever(GeneratingEngine):
    """Generation with HSTU.

    The prompts of a batch are encoded into pages that last for the batch. Each level of the search reads these keys and
    values once for all beams. With CUDA graphs, one graph has all of that for a (batch, length) bucket.

    Raises UnavailableError for a device or a variant that this machine lacks, and ValueError for options of ranking.
    """

    name = "hstu"

    def __init__(self, options: HSTUEngineConfig, setup: Setup) -> None:
        super().__init__(setup, Placement.of(options), cuda_graphs=options.cuda_graphs)
        if options.candidate_microbatch:
            raise ValueError("engine.candidate_microbatch is for ranking; set it to 0")
        assert isinstance(setup.model, HSTUConfig), "the registry refuses other models"
        self._options, self._hstu = options, setup.model
        self._kernels = kernel_choice.choose(
            setup.kernels,
            self._hstu,
            self._device.type,
            self._precision,
            page=beam.PAGE,
            captured=options.cuda_graphs,
        )
        self._operators = Operators.of(self._kernels.variants)
        self._model: HSTUGenerator | None = None
        self._pool: PagePool | None = None
        self._graphs: GraphRunner | None = None
        self.buckets: list[Bucket] = []
        self._most_tokens = 0  # of a prompt

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Put the model on the device, make the pages and capture the graphs."""
        self._model = HSTUGenerator.build(
            self._hstu,
            self._retrieval.ids.sizes,
            self._operators,
            seed=self._setup.seed,
            device=self._device,
            dtype=self._dtype,
            weights=self._retrieval.weights,
        )
        self._trie = Trie.of(self._retrieval.ids).on(self._device)
        lengths = [len(self._model.prompt(self._retrieval.prompt(r))) for r in sample]
        self._most_tokens = max(lengths)
        self._pool = pool = beam.pool_for(self._model, self._most_tokens, max_batch)
        if self._options.cuda_graphs:
            self.buckets = bucket_grid(self._options.graph_lengths or length_buckets(lengths), max_batch)
            self._graphs = GraphRunner(
                self._search,
                self.buckets,
                lambda bucket: [pack_prompts([], [], pool, bucket=bucket, pin=True)],
                self._device,
            )

    @torch.inference_mode()
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        longest = self._longest(sample, max_batch)
        for n in first_batches(max_batch, self._device):
            self.generate(longest[-n:])

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Find the most likely next items of every request.

        Threads take turns until a batch's work is queued, and wait for the device together. Raises ValueError for more
        than max_batch requests or a prompt longer than those of `prepare`, RuntimeError before `prepare`.
        """
        model, pool = self._ready(self._model), self._ready(self._pool)
        self._check_size(requests)
        begun = time.perf_counter()
        prompts = [model.prompt(self._retrieval.prompt(r)) for r in requests]
        lengths = [len(p) for p in prompts]
        if max(lengths) > self._most_tokens:
            raise ValueError(
                f"a prompt of {max(lengths)} tokens; the engine was prepared for up to {self._most_tokens}"
            )
        bucket = choose_bucket(self.buckets, lengths)
        # The next batch may have the pages once this one's work is queued: all work goes to one stream.
        with self._turns as turn, beam.borrowed(pool, lengths) as pages:
            host = pack_prompts(prompts, pages, pool, bucket=bucket, pin=self._cuda)
            batch_ms = (time.perf_counter() - begun) * 1e3 - turn.waited_ms
            marks = Marks(self._device)
            if self._graphs is not None and bucket is not None:
                self._graphs.upload(bucket, host)
                marks.add()
                found = self._graphs.replay(bucket)
            else:
                batch = host.to(self._device)
                marks.add()
                found = self._search(batch)
            queued = collect_items(
                found,
                len(requests),
                marks,
                batch_ms=batch_ms,
                tokens=host.tokens,
                padded_tokens=host.padded_tokens,
                details={"eager_batches": float(bucket is None)} if self._options.cuda_graphs else {},
            )
        return self._ended(queued, begun, turn)

    def _describe(self) -> dict[str, Any]:
        return {
            **self._kernels.actual(),
            "kernel_configs": tuning.provenance(),
            "graph_buckets": [list(b)[:2] for b in self.buckets],  # batch, length
            "parameters": sum(p.numel() for p in self._model.parameters()) if self._model else 0,
        }

    def _unload(self) -> None:
        self._model, self._pool, self._graphs, self.buckets = None, None, None, []

    def _search(self, batch: Prompts) -> Tensor:
        """Return the items and scores that the search finds, as `one_tensor` packs them."""
        assert self._model is not None and self._pool is not None
        width, k = self._retrieval.beam_width, self._retrieval.k
        items, scores, _ = beam.run(self._model, self._trie, batch, self._pool, width=width, k=k)
        return one_tensor(items, scores)
