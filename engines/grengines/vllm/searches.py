"""Beam searches as requests of vLLM, one request a search: admit, step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grengines.api import Cached, Finished, Int64Array
from grengines.vllm import compat
from grengines.vllm.core import VLLMCore


@dataclass
class Search:
    """One beam search in flight."""

    key: int
    tokens: int  # of the prompt


class Searches:
    """Beam searches over a vLLM core.

    A search is one vLLM request, its prompt. The step that ends the prompt runs all levels (grengines.vllm.levels).
    """

    def __init__(self, core: VLLMCore) -> None:
        self._core = core
        self._in_flight: dict[str, Search] = {}  # by vLLM request
        self._number = 0  # of the next vLLM request

    @property
    def unfinished(self) -> int:
        """Return the number of searches in flight."""
        return len(self._in_flight)

    @property
    def steps(self) -> int:
        """Return the number of vLLM's steps so far that had tokens to compute."""
        return int(self._core.model.pooler.steps)

    def admit(self, key: int, prompt: Int64Array) -> None:
        """Begin one search. prompt: int64 [tokens]."""
        name = str(self._number)
        self._number += 1
        self._core.submit(name, prompt)
        self._in_flight[name] = Search(key, len(prompt))

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Schedule a step of vLLM. Return the searches that finished since. Raises the errors of VLLMCore.step."""
        if not self.unfinished:
            return []
        take = self._core.model.pooler.take
        return [
            _finished(self._in_flight.pop(done.request_id), done, take(done.request_id)) for done in self._core.step()
        ]


def _finished(search: Search, output: Any, found: np.ndarray) -> Finished:
    """Make the result of a search from vLLM's output, and items (-1: none) and scores, float64 [k, 2]."""
    items, scores = found.T
    real = items >= 0
    hit = min(compat.cached_tokens(output), search.tokens)
    return Finished(
        search.key,
        items[real].astype(np.int64),
        scores[real].astype(np.float32),
        tokens=search.tokens,
        details={"prefix_hit_tokens": float(hit)},
        cached=Cached(hit, 0, search.tokens),
    )
