"""The baseline engine for task generate: HSTU and decoders in a naive generate loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from grengines.api import GenerateResult, Request, Setup
from grengines.base import GeneratingEngine, placement_of
from grengines.hf.config import HFEngineConfig
from grengines.hf.models import PaddedDecoder, PaddedHSTU, PaddedModel
from grengines.hf.search import pad, search
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.model import Decoder
from grengines.models.hstu.generator import HSTUGenerator
from grengines.runtime.results import collect_items, one_tensor
from grengines.runtime.timing import Marks
from grengines.semantic.trie import TensorTrie, Trie
from grkernels.operators import Operators


class HFEngine(GeneratingEngine):
    """Generation with a static batch, padding, and a contiguous cache that is copied to every beam.

    A cache too large for the device is an error of the allocator, and the record's status is OOM. Raises
    UnavailableError for a device that this machine lacks.
    """

    name = "hf"

    def __init__(self, options: HFEngineConfig, setup: Setup) -> None:
        super().__init__(setup, placement_of(options))
        self._model: PaddedModel | None = None
        self._trie: TensorTrie | None = None
        self._parameters = 0

    @torch.inference_mode()
    def _load(self, sample: Sequence[Request], max_batch: int) -> None:
        self._model, self._parameters = self._build()
        self._trie = Trie.of(self._retrieval.ids).on(self._device)

    @torch.inference_mode()
    def _warm_up(self, sample: Sequence[Request], max_batch: int) -> None:
        self.generate(self._longest(sample, max_batch))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        """Find the most likely next items of every request.

        Raises ValueError for more than max_batch requests, RuntimeError before `prepare`.
        """
        model, trie = self._ready(self._model), self._ready(self._trie)
        self._check_size(requests)
        begun = time.perf_counter()
        prompts = [model.prompt(self._retrieval.prompt(r)) for r in requests]
        host = pad(prompts, pin=self._cuda)
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

    def _describe(self) -> dict[str, Any]:
        decoder = isinstance(self._model_config, DecoderConfig)
        return {
            "attention": "transformers' sdpa" if decoder else "dense, eager PyTorch",
            "prompt": "encoded once, its cache copied to every beam",
            "parameters": self._parameters,
            "transformers": version("transformers"),
        }

    def _unload(self) -> None:
        self._model = self._trie = None

    def _build(self) -> tuple[PaddedModel, int]:
        """Build the model. Returns it with its number of parameters."""
        config, sizes, weights = self._model_config, self._retrieval.ids.sizes, self._retrieval.weights
        seed, device, dtype = self._setup.seed, self._device, self._dtype
        if isinstance(config, DecoderConfig):
            decoder = Decoder.build(config, sizes, seed=seed, device=device, dtype=dtype, weights=weights)
            return PaddedDecoder(decoder), sum(p.numel() for p in decoder.layers.parameters())
        eager = Operators.eager()
        generator = HSTUGenerator.build(config, sizes, eager, seed=seed, device=device, dtype=dtype, weights=weights)
        return PaddedHSTU(generator), sum(p.numel() for p in generator.parameters())
