"""The fp32 references of HSTU: the scores and the items that engines are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Catalogue, Float32Array, Request, Retrieval
from grengines.last_layer import LastLayer
from grengines.models.hstu import beam, quantised
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.model import build_model
from grengines.models.reference import GenerationReference
from grengines.runtime.batch import pack
from grengines.runtime.device import DTYPES
from grengines.semantic.search import Beams
from grkernels import rounding
from grkernels.operators import Operators


def zero_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Return zeros [Lq, H, dv] for attention: a comparison with the reference must notice it."""
    return v.new_zeros(q.shape[0], *v.shape[1:])


def through_pages(attention: Callable[..., Tensor], stored: str) -> Callable[..., Tensor]:
    """Return attention of one request whose history was kept in 8-bit pages (int8 or fp8), its candidates exactly."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        targets = options["num_targets"]
        history = k.shape[0] - (0 if targets is None else int(targets[0]))
        k, v = (torch.cat([rounding.through_pages(x[:history], stored), x[history:]]) for x in (k, v))
        return attention(q, k, v, **options)

    return attend


def prompts_through_pages(kernels: Operators, stored: str) -> Operators:
    """Return operators for which prompts are in 8-bit pages (int8 or fp8), and the codes of beams are exact."""
    attention, write = kernels.hstu_attention, kernels.paged_write

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if options.get("k_pages") is None:  # of prompts; with pages k and v are those of beams
            k, v = rounding.through_pages(k, stored), rounding.through_pages(v, stored)
        attended: Tensor = attention(q, k, v, **options)
        return attended

    def store(k: Tensor, v: Tensor, slots: Tensor, **pages: Tensor) -> None:
        write(rounding.through_pages(k, stored), rounding.through_pages(v, stored), slots, **pages)

    return kernels.replace(hstu_attention=attend, paged_write=store)


class RankingReference:
    """Scores of one request at a time: nothing is cached, padded or captured.

    The fp32 weights are made once, and stay on the host: the device has a copy of them during a call only, without the
    tables of tokens, of which each request copies its own rows.
    """

    def __init__(self, model: HSTUConfig, catalogue: Catalogue, seed: int, device: torch.device | str) -> None:
        self._model = build_model(model, catalogue, seed, "cpu", torch.float32, host_table=True)
        self._model.computed = LastLayer.EVERY
        self._device = torch.device(device)
        self._table = self._model.token_table.data
        tower = self._model.tower_table
        self._tower = None if tower is None else tower.data
        self._model.use_table(torch.empty(0), None if tower is None else torch.empty(0))

    @torch.inference_mode()
    def scores(
        self,
        requests: Sequence[Request],
        precision: str = "fp32",
        attention: Callable[..., Tensor] | None = None,
        stored: str = "",
        fp8_attention: bool = False,
    ) -> list[Float32Array]:
        """Return the logits [candidates, tasks] of each request.

        precision: fp32 by the kernels' references, or fp16, bf16, int8 or fp8 by the references rounded to it, which
        give the tolerances (grengines/models/hstu/quantised.py defines 8 bits). attention: replaces the operator.
        stored: every row reads the history as pages in int8 or fp8 keep it, as in a state that grew event by event.
        fp8_attention: q, k, v and SiLU of the scores are rounded to e4m3 as well, with a precision other than fp32.
        """
        dtype = DTYPES["fp32" if precision in quantised.KINDS else precision]
        here = precision == "fp32" and self._device.type == "cpu"
        model = self._model if here else copy.deepcopy(self._model).to(self._device, dtype)
        model.kernels = Operators.rounded(dtype)
        if precision in quantised.KINDS:
            quantised.quantise(model, precision)
        if fp8_attention and precision != "fp32":
            products = rounding.with_fp8_products(Operators.reference().hstu_attention)
            model.kernels = model.kernels.replace(hstu_attention=products)
        if stored:
            model.kernels = model.kernels.replace(hstu_attention=through_pages(model.kernels.hstu_attention, stored))
        if attention is not None:
            model.kernels = model.kernels.replace(hstu_attention=attention)
        answers = []
        for request in requests:
            host = pack([request], model.encoding)
            rows, host.token_rows[:] = np.unique(host.token_rows, return_inverse=True)
            chosen = torch.from_numpy(rows)
            tower = None if self._tower is None else self._tower[chosen].to(self._device, dtype)
            model.use_table(self._table[chosen].to(self._device, dtype), tower)
            answers.append(model(host.to(self._device)).cpu().numpy())
        return answers


class HSTUReference(GenerationReference[HSTUGenerator]):
    """Items that HSTU should find: by the kernels' fp32 references, or by these rounded to another precision."""

    def __init__(self, model: HSTUConfig, seed: int, retrieval: Retrieval, device: torch.device | str) -> None:
        super().__init__(retrieval, device)
        self._exact = HSTUGenerator.build(
            model,
            retrieval.ids.sizes,
            Operators.reference(),
            seed=seed,
            device=device,
            dtype=torch.float32,
            weights=retrieval.weights,
        )
        self._exact.computed = LastLayer.EVERY

    def _prompt(self, request: Request) -> np.ndarray:
        return self._exact.prompt_of(self._retrieval, request)

    @torch.inference_mode()
    def prefix_scores(self, request: Request, items: np.ndarray) -> np.ndarray:
        tokens = self._prompt(request)
        pool = beam.pool_for(self._exact, len(tokens), 1)
        return beam.prefix_scores(self._exact, tokens, self._retrieval.ids.codes[items], pool)

    @contextmanager
    def _variant(self, precision: str, stored: str, blind: bool) -> Iterator[HSTUGenerator]:
        model = self._exact
        if precision != "fp32":
            model = copy.deepcopy(model).to(DTYPES[precision])
            model.kernels = Operators.rounded(DTYPES[precision])
        kernels = model.kernels
        if stored:
            model.kernels = prompts_through_pages(kernels, stored)
        if blind:
            model.kernels = kernels.replace(hstu_attention=zero_attention)
        try:
            yield model
        finally:
            model.kernels = kernels

    def _search(self, model: HSTUGenerator, prompts: Sequence[np.ndarray], width: int, k: int) -> Iterable[Beams]:
        pool = beam.pool_for(model, max(map(len, prompts)), len(prompts))
        yield beam.search(model, self._trie, prompts, pool, width=width, k=k)
