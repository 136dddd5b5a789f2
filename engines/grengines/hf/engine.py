"""The baseline engine for task generate: HSTU and decoders in a plain generate loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from grengines.api import Catalogue, GenerateResult, Request, Retrieval
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hf.config import HFEngineConfig
from grengines.hf.models import PaddedDecoder, PaddedHSTU, PaddedModel
from grengines.hf.search import pad, search
from grengines.hstu.retriever import prompt_tokens
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.model import Decoder
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.runtime.device import DTYPES, resolve_device, resolve_precision
from grengines.runtime.results import Marks, collect_items, one_tensor
from grengines.semantic.search import check_width
from grengines.semantic.trie import TensorTrie, Trie
from grkernels.families import AUTO
from grkernels.operators import Operators


class HFEngine:
    """Generates with a static batch, padding and a contiguous cache that is copied to every beam. Satisfies
    grengines.api.Generator. A cache too large for the device is an error of the allocator: the record says OOM.

    Raises UnavailableError for a device that can't be had, and ValueError for options that it has no use for.
    """

    def __init__(
        self,
        config: HFEngineConfig,
        model: HSTUConfig | DecoderConfig,
        kernels: dict[str, str],
        catalogue: Catalogue,
        seed: int,
        cache: CacheConfig | PagedCacheConfig,
        retrieval: Retrieval,
    ) -> None:
        check_width(retrieval.beam_width, retrieval.k)
        if isinstance(cache, PagedCacheConfig) or cache.item_memory_gb:
            raise ValueError(f"cache={cache.name}: engine hf keeps nothing between batches; set cache=none")
        for family, variant in kernels.items():
            if variant not in (AUTO, "torch"):
                raise ValueError(f"kernel.{family}={variant}: engine hf is eager PyTorch; set kernel=auto")
        self._config, self._model_config, self._seed, self._retrieval = config, model, seed, retrieval
        self._device = resolve_device(config.device)
        self._precision = resolve_precision(config.precision, self._device)
        self._threads_before = torch.get_num_threads()
        self._model: PaddedModel | None = None
        self._trie: TensorTrie | None = None
        self._max_batch = self._parameters = 0
        self._lock = threading.Lock()

    @torch.inference_mode()
    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Put the model on the device and run the largest batch once.

        Raises ValueError for an empty sample or bad weights; out of memory shows here.
        """
        if not sample or max_batch < 1:
            raise ValueError(f"{len(sample)} sample requests, max_batch={max_batch}: both must be at least 1")
        if self._config.cpu_threads:
            torch.set_num_threads(self._config.cpu_threads)
        torch.set_float32_matmul_precision("highest")
        self._max_batch = max_batch
        self._model, self._parameters = self._build()
        self._trie = Trie.of(self._retrieval.ids).on(self._device)
        self.generate(sorted(sample, key=lambda r: len(r.history_items))[-max_batch:])

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """As grengines.api.Generator. Raises ValueError for more than max_batch requests, RuntimeError unprepared."""
        model, trie = self._model, self._trie
        if model is None or trie is None:
            raise RuntimeError("the engine is not prepared, or closed; call prepare() first")
        if not 0 < len(requests) <= self._max_batch:
            raise ValueError(f"{len(requests)} requests in one batch; allowed is 1 to max_batch={self._max_batch}")
        pin = self._device.type == "cuda"
        begun = time.perf_counter()
        prompts = [model.prompt(prompt_tokens(self._retrieval, r)) for r in requests]
        host = pad(prompts, pin)
        batch_ms = (time.perf_counter() - begun) * 1e3
        with self._lock:
            marks = Marks(self._device)
            padded = host.to(self._device, non_blocking=True)
            marks.add()
            width, k = self._retrieval.beam_width, self._retrieval.k
            items, scores, _ = search(model, trie, padded, width=width, k=k)
            return collect_items(
                one_tensor(items, scores),
                len(requests),
                marks,
                batch_ms=batch_ms,
                tokens=sum(map(len, prompts)),
                padded_tokens=host.numel(),
                details={},
            )()

    def actual(self) -> dict[str, Any]:
        """What really runs; JSON values."""
        cuda = self._device.type == "cuda"
        decoder = isinstance(self._model_config, DecoderConfig)
        return {
            "engine": "hf",
            "task": "generate",
            "device": self._device.type,
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "precision": self._precision,
            "fp32_products": torch.get_float32_matmul_precision(),
            "attention": "transformers' sdpa" if decoder else "dense, eager PyTorch",
            "prompt": "encoded once, its cache copied to every beam",
            "beam_width": self._retrieval.beam_width,
            "k": self._retrieval.k,
            "semantic_ids": list(self._retrieval.ids.sizes),
            "timer": "CUDA events, one wait a batch" if cuda else "perf_counter",
            "cpu_threads": torch.get_num_threads(),
            "weights": self._retrieval.weights or f"random, seed {self._seed}",
            "parameters": self._parameters,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "cuda": torch.version.cuda if cuda else None,
        }

    def reset_cache(self, keep_host: bool = False) -> None:
        """Nothing is kept of users."""

    def close(self) -> None:
        """Release the model and its memory; give the thread count back. Safe to call twice."""
        self._model = self._trie = None
        torch.set_num_threads(self._threads_before)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _build(self) -> tuple[PaddedModel, int]:
        """The model and how many parameters it has."""
        sizes, seed, device, weights = self._retrieval.ids.sizes, self._seed, self._device, self._retrieval.weights
        dtype, config = DTYPES[self._precision], self._model_config
        if isinstance(config, DecoderConfig):
            decoder = Decoder.build(config, sizes, seed=seed, device=device, dtype=dtype, weights=weights)
            return PaddedDecoder(decoder), sum(p.numel() for p in decoder.layers.parameters())
        eager = Operators.eager()
        generator = HSTUGenerator.build(config, sizes, eager, seed=seed, device=device, dtype=dtype, weights=weights)
        return PaddedHSTU(generator), sum(p.numel() for p in generator.parameters())
