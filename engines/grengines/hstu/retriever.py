"""The native engine for task generate: beam search over semantic IDs with HSTU, and the reference it is held to."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Catalogue, GenerateResult, Request, Retrieval
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.cache.pool import PagePool
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import check_graphs
from grengines.models.hstu import beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator, Prompts, pack_prompts
from grengines.models.hstu.model import zero_attention
from grengines.runtime import kernels as kernel_choice
from grengines.runtime.batch import Bucket
from grengines.runtime.device import DTYPES, resolve_device, resolve_precision
from grengines.runtime.graphs import GraphRunner, batch_buckets, choose_bucket, first_batches, length_buckets
from grengines.runtime.results import Marks, collect_items, one_tensor
from grengines.semantic.search import Beams, check_width
from grengines.semantic.trie import Trie
from grkernels import tuning
from grkernels.operators import Operators

PAGE = 64  # tokens


class HSTURetriever:
    """HSTU generates, on a CPU or one GPU. Satisfies grengines.api.Generator.

    A batch's prompts are encoded, and every code of every beam reads their keys and values once, from pages that last
    for the batch. With CUDA graphs one graph holds all of that for a (batch, length) bucket.

    Raises UnavailableError for a device, precision or variant that can't be had here, and ValueError for options that
    generating has no use for.
    """

    def __init__(
        self,
        config: HSTUEngineConfig,
        model: HSTUConfig,
        kernels: dict[str, str],
        catalogue: Catalogue,
        seed: int,
        cache: CacheConfig | PagedCacheConfig,
        retrieval: Retrieval,
    ) -> None:
        check_width(retrieval.beam_width, retrieval.k)
        if isinstance(cache, PagedCacheConfig) or cache.item_memory_gb:
            raise ValueError(
                f"cache={cache.name}: engine hstu keeps nothing of users when it generates; set cache=none"
            )
        if config.candidate_microbatch:
            raise ValueError("engine.candidate_microbatch is for ranking; set it to 0")
        self._config, self._model_config, self._seed, self._retrieval = config, model, seed, retrieval
        self._device = resolve_device(config.device)
        check_graphs(config, self._device)
        self._precision = resolve_precision(config.precision, self._device)
        self._kernels = kernel_choice.choose(kernels, model, self._device.type, self._precision, page=PAGE)
        self._operators = Operators.of(self._kernels.variants)
        self._threads_before = torch.get_num_threads()
        self._model: HSTUGenerator | None = None
        self._pool: PagePool | None = None
        self._lock = threading.Lock()
        self._graphs: GraphRunner | None = None
        self.buckets: list[Bucket] = []
        self._max_batch = self._longest = 0

    @torch.inference_mode()
    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Put the model on the device, make the pages, capture the graphs, and run the largest batch once.

        Raises ValueError for an empty sample or bad weights; out of memory shows here.
        """
        if not sample or max_batch < 1:
            raise ValueError(f"{len(sample)} sample requests, max_batch={max_batch}: both must be at least 1")
        if self._config.cpu_threads:
            torch.set_num_threads(self._config.cpu_threads)
        torch.set_float32_matmul_precision("highest")
        self._max_batch = max_batch
        ids = self._retrieval.ids
        self._model = HSTUGenerator.build(
            self._model_config,
            ids.sizes,
            self._operators,
            seed=self._seed,
            device=self._device,
            dtype=DTYPES[self._precision],
            weights=self._retrieval.weights,
        )
        self._trie = Trie.of(ids).on(self._device)
        lengths = [len(self._model.prompt(prompt_tokens(self._retrieval, r))) for r in sample]
        self._longest = max(lengths)
        self._pool = pool_for(self._model, self._longest, max_batch)
        if self._config.cuda_graphs:
            chosen = self._config.graph_lengths or length_buckets(lengths)
            found = [Bucket(b, n, 0) for n in chosen for b in batch_buckets(max_batch)]
            self.buckets = sorted(found, key=lambda b: (b.batch * b.length, b.batch))
            pool = self._pool
            self._graphs = GraphRunner(
                self._search,
                self.buckets,
                lambda bucket: [pack_prompts([], [], pool, bucket=bucket, pin=True)],
                self._device,
            )
        longest = [sample[i] for i in sorted(range(len(sample)), key=lengths.__getitem__)[-max_batch:]]
        for n in first_batches(max_batch, self._device):
            self.generate(longest[-n:])

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """As grengines.api.Generator. Calls from several threads take turns until a batch's work is queued, then wait
        for it side by side. Raises ValueError for more than max_batch requests or a longer prompt than it
        was prepared for, RuntimeError unprepared."""
        model, pool = self._model, self._pool
        if model is None or pool is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        if not 0 < len(requests) <= self._max_batch:
            raise ValueError(f"{len(requests)} requests in one batch; allowed is 1 to max_batch={self._max_batch}")
        begun = time.perf_counter()
        prompts = [model.prompt(prompt_tokens(self._retrieval, r)) for r in requests]
        lengths = [len(p) for p in prompts]
        if max(lengths) > self._longest:
            raise ValueError(f"a prompt of {max(lengths)} tokens; the engine was prepared for up to {self._longest}")
        bucket = choose_bucket(self.buckets, lengths)
        pin = self._device.type == "cuda"
        # The pages are the next batch's once this one's work is queued, since all of it goes to one stream.
        with self._lock, beam.borrowed(pool, lengths) as pages:
            host = pack_prompts(prompts, pages, pool, bucket=bucket, pin=pin)
            batch_ms = (time.perf_counter() - begun) * 1e3
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
                details={"eager_batches": float(bucket is None)} if self._config.cuda_graphs else {},
            )
        return queued()

    def actual(self) -> dict[str, Any]:
        """What really runs; JSON values."""
        cuda = self._device.type == "cuda"
        return {
            "engine": "hstu",
            "task": "generate",
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "precision": self._precision,
            "fp32_products": torch.get_float32_matmul_precision(),
            **self._kernels.actual(),
            "kernel_configs": tuning.provenance(),
            "graph_buckets": [list(b)[:2] for b in self.buckets],  # batch, length
            "beam_width": self._retrieval.beam_width,
            "k": self._retrieval.k,
            "semantic_ids": list(self._retrieval.ids.sizes),
            "timer": "CUDA events, one wait a batch" if cuda else "perf_counter",
            "cpu_threads": torch.get_num_threads(),
            "weights": self._retrieval.weights or f"random, seed {self._seed}",
            "parameters": sum(p.numel() for p in self._model.parameters()) if self._model else 0,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
        }

    def reset_cache(self, keep_host: bool = False) -> None:
        """Nothing is kept of users."""

    def close(self) -> None:
        """Release the model, the graphs and their memory; give the thread count back. Safe to call twice."""
        self._model, self._pool, self._graphs, self.buckets = None, None, None, []
        torch.set_num_threads(self._threads_before)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _search(self, batch: Prompts) -> Tensor:
        """What is found, as `one_tensor` makes it."""
        assert self._model is not None and self._pool is not None
        width, k = self._retrieval.beam_width, self._retrieval.k
        items, scores, _ = beam.run(self._model, self._trie, batch, self._pool, width=width, k=k)
        return one_tensor(items, scores)


class Reference:
    """What should be found, one request at a time: by the kernels' fp32 references, or by plain PyTorch in another
    precision."""

    def __init__(self, model: HSTUConfig, seed: int, retrieval: Retrieval, device: torch.device | str) -> None:
        torch.set_float32_matmul_precision("highest")
        self._retrieval, self._device = retrieval, device
        self._exact = HSTUGenerator.build(
            model,
            retrieval.ids.sizes,
            Operators.reference(),
            seed=seed,
            device=device,
            dtype=torch.float32,
            weights=retrieval.weights,
        )
        self._trie = Trie.of(retrieval.ids).on(device)

    @torch.inference_mode()
    def search(
        self,
        requests: Sequence[Request],
        precision: str = "fp32",
        *,
        blind: bool = False,
        width: int | None = None,
        k: int | None = None,
    ) -> Beams:
        """The k best items of each request. blind: with attention that returns zeros. width, k: in place of the
        configured ones."""
        model = self._exact
        if precision != "fp32":
            model = copy.deepcopy(model).to(DTYPES[precision])
            model.kernels = Operators.eager()
        kernels = model.kernels
        if blind:
            model.kernels = kernels.replace(hstu_attention=zero_attention)
        width, k = width or self._retrieval.beam_width, k or self._retrieval.k
        found = []
        for request in requests:
            tokens = prompt_tokens(self._retrieval, request)
            pool = pool_for(model, len(model.prompt(tokens)), 1)
            found.append(beam.search(model, self._trie, [tokens], pool, width=width, k=k))
        model.kernels = kernels
        return Beams(*(np.concatenate([getattr(f, name) for f in found]) for name in ("items", "scores", "cuts")))

    @torch.inference_mode()
    def prefix_scores(self, request: Request, items: np.ndarray) -> np.ndarray:
        """float32 [n, levels]: fp32 log-probability of each prefix of the codes of these items (int64 [n])."""
        tokens = prompt_tokens(self._retrieval, request)
        pool = pool_for(self._exact, len(self._exact.prompt(tokens)), 1)
        return beam.prefix_scores(self._exact, tokens, self._retrieval.ids.codes[items], pool)


def prompt_tokens(retrieval: Retrieval, request: Request) -> np.ndarray:
    """int64 [tokens]: the codes of the items of the history, level by level, oldest item first."""
    return retrieval.ids.tokens(request.history_items).reshape(-1)


def pool_for(model: HSTUGenerator, tokens: int, batch: int) -> PagePool:
    """Pages for so many prompts of at most so many tokens."""
    config = model.config
    return PagePool(
        layers=config.layers,
        pages=batch * -(-tokens // PAGE),
        page=PAGE,
        heads=config.heads,
        qk_dim=config.qk_dim,
        v_dim=config.v_dim,
        dtype=model.token_table.dtype,
        device=model.token_table.device,
    )
