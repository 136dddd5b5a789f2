"""The native engine for task generate: beam search over semantic IDs, on a CPU, one GPU, or several by heads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import GenerateResult, Request, Setup
from grengines.base import GeneratingEngine, placement_of
from grengines.cache.pool import PagePool
from grengines.hstu.config import HSTUEngineConfig, graphs_asked
from grengines.hstu.passes import follow_search, search
from grengines.models.hstu import beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HostPrompts, HSTUGenerator, Prompts, pack_prompts
from grengines.models.hstu.shard import shard
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket
from grengines.runtime.buckets import even_buckets, first_batches, length_buckets
from grengines.runtime.graph_costs import Graphs, Queue, Runner, capture
from grengines.runtime.graphs import GraphRunner
from grengines.runtime.results import collect_items
from grengines.runtime.shared_graphs import graph_runner
from grengines.runtime.team import Alone, Team
from grengines.runtime.timing import Marks
from grengines.semantic.trie import TensorTrie, Trie
from grkernels import tuning
from grkernels.operators import Operators


class HSTURetriever(GeneratingEngine):
    """Generation with HSTU.

    The prompts of a batch are encoded into pages that last for the batch. Each level of the search reads these keys and
    values once for all beams. With CUDA graphs, one graph has all of that for a (batch, length) bucket.

    With engine.tensor_parallel it is rank 0, and its team has the others. Raises UnavailableError for a device or a
    variant that this machine lacks.
    """

    name = "hstu"

    def __init__(self, options: HSTUEngineConfig, setup: Setup) -> None:
        super().__init__(setup, placement_of(options), cuda_graphs=options.cuda_graphs == "true")
        assert isinstance(setup.model, HSTUConfig), "the registry refuses other models"
        self._options, self._hstu = options, setup.model
        self._ranks = options.tensor_parallel
        self._asked = graphs_asked(options) if self._cuda else "false"
        self._kernels = kernel_choice.choose(
            setup.kernels,
            self._hstu,
            self._device.type,
            self._precision,
            page=beam.PAGE,
            captured=self._asked != "false",
            ranks=self._ranks,
        )
        self._operators = Operators.of(self._kernels.variants)
        self._model: HSTUGenerator | None = None
        self._pool: PagePool | None = None
        self._trie: TensorTrie | None = None
        self._graphs = Graphs()
        self.team: Team | Alone = Alone(self._device)
        self._parameters = 0  # of the whole model
        self._most_tokens = 0  # of a prompt

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        """Put the model on the device, make the pages and capture the graphs."""
        trie = Trie.of(self._retrieval.ids)
        if self._ranks > 1:
            self.team = Team(self._ranks, self._device, follow_search, self._recipe(trie))
        self._model = HSTUGenerator.build(
            self._hstu,
            self._retrieval.ids.sizes,
            self._operators,
            seed=self._setup.seed,
            device=self._device,
            dtype=self._dtype,
            weights=self._retrieval.weights,
        )
        self._parameters = sum(p.numel() for p in self._model.parameters())
        if isinstance(self.team, Team):
            shard(self._model, self.team.group)
        self._trie = trie.on(self._device)
        lengths = [len(self._model.prompt_of(self._retrieval, r)) for r in sample]
        self._most_tokens = max(lengths)
        self._pool = beam.pool_for(self._model, self._most_tokens, max_batch)
        with self.team.call("pages", [], tokens=self._most_tokens, batch=max_batch):
            pass  # this rank's are made
        self._graphs = capture(
            self._asked,
            even_buckets(self._options.graph_lengths or length_buckets(lengths), max_batch),
            lambda buckets: graph_runner(self.team, GraphRunner, self._search, buckets, self._empty, self._device),
            self._probe,
        )
        self.team.ready()

    def _recipe(self, trie: Trie) -> dict[str, Any]:
        """Return the arguments of `follow_search`."""
        return {
            "model": self._hstu,
            "trie": trie,
            "seed": self._setup.seed,
            "dtype": self._dtype,
            "variants": self._kernels.variants,
            "weights": self._retrieval.weights,
            "width": self._retrieval.beam_width,
            "k": self._retrieval.k,
        }

    def _empty(self, bucket: Bucket) -> list[HostPrompts]:
        """Return the input of a bucket's graph, an empty batch."""
        return [pack_prompts([], [], self._pool, bucket=bucket, pin=self._cuda, timed=self._ready(self._model).timed)]

    def _probe(self, bucket: Bucket, runner: Runner | None) -> Queue:
        """Return what queues a batch that fills a bucket, in its graph if there is a runner."""
        prompts = [np.zeros(min(bucket.length, self._most_tokens), np.int64)] * bucket.batch
        return lambda: self._queue(prompts, bucket if runner else None, runner)

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
        model = self._ready(self._model)
        self._check_size(requests)
        begun = time.perf_counter()
        prompts: list[np.ndarray] = [model.prompt_of(self._retrieval, r) for r in requests]
        lengths = [len(p) for p in prompts]
        if max(lengths) > self._most_tokens:
            raise ValueError(
                f"a prompt of {max(lengths)} tokens; the engine was prepared for up to {self._most_tokens}"
            )
        bucket = self._graphs.choose(Bucket.of(lengths))
        found_ms = (time.perf_counter() - begun) * 1e3
        with self.team.waiting():
            with self._turns as turn:
                queued = self._queue(prompts, bucket, self._graphs.runner, found_ms)
            return self._ended(queued, begun, turn)

    def _queue(
        self, prompts: Sequence[np.ndarray], bucket: Bucket | None, runner: Runner | None, found_ms: float = 0.0
    ) -> Callable[[], GenerateResult]:
        """Queue a search in a bucket's graph, or without a bucket kernel by kernel.

        found_ms: what it took to find the prompts. The next batch may have the pages once this one's work is queued:
        all work goes to one stream.
        """
        begun = time.perf_counter()
        pool = self._ready(self._pool)
        with beam.borrowed(pool, [len(p) for p in prompts]) as pages:
            host = pack_prompts(
                prompts, pages, pool, bucket=bucket, pin=self._cuda, timed=self._ready(self._model).timed
            )
            batch_ms = found_ms + (time.perf_counter() - begun) * 1e3
            marks = Marks(self._device)
            if runner is not None and bucket is not None:
                runner.upload(bucket, host.buffer)
                marks.add()
                found = runner.replay(bucket)
            else:
                with self.team.call("search", [host]) as [batch]:
                    marks.add()
                    found = self._search(batch)
            return collect_items(
                found,
                len(prompts),
                marks,
                batch_ms=batch_ms,
                tokens=host.tokens,
                padded_tokens=host.padded_tokens,
                details=self._graphs.counts(bucket),
            )

    def _describe(self) -> dict[str, Any]:
        return {
            **self._kernels.actual(),
            "kernel_configs": tuning.provenance(),
            **self._graphs.actual(),
            "parameters": self._parameters,
            **self.team.actual(),
        }

    def _unload(self) -> None:
        self._model, self._pool, self._trie, self._graphs = None, None, None, Graphs()
        self.team.close()  # after the graphs, which hold collectives

    def _search(self, batch: Prompts) -> Tensor:
        """Return the items and scores that the search finds, as `one_tensor` packs them."""
        assert self._model is not None and self._pool is not None and self._trie is not None
        width, k = self._retrieval.beam_width, self._retrieval.k
        return search(self._model, self._trie, self._pool, batch, width=width, k=k)
