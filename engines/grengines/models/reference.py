"""The fp32 reference of generation: the items that an engine should find, whatever the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import numpy as np
import torch

from grengines.api import Request, Retrieval
from grengines.semantic.search import Beams
from grengines.semantic.trie import Trie

Model = TypeVar("Model")

TOGETHER = 8192  # tokens of a search's prompts: launches take most of the time of short ones on a GPU


class GenerationReference(ABC, Generic[Model]):
    """Beam search for a few requests at a time, in fp32 by default.

    A subclass builds the model, and implements `_variant`, `_search` and `prefix_scores`.
    """

    def __init__(self, retrieval: Retrieval, device: torch.device | str) -> None:
        torch.set_float32_matmul_precision("highest")
        self._retrieval, self._device = retrieval, device
        self._trie = Trie.of(retrieval.ids).on(device)

    @torch.inference_mode()
    def search(
        self,
        requests: Sequence[Request],
        precision: str = "fp32",
        *,
        stored: str = "",
        blind: bool = False,
        width: int | None = None,
        k: int | None = None,
    ) -> Beams:
        """Return the k best items of each request.

        precision: of the weights and all products. stored: every row reads the prompt as pages in int8 or fp8 keep it,
        as in prompts that were read token by token. blind: attention returns zeros. width, k: instead of the configured
        beam width and k.
        """
        width, k = width or self._retrieval.beam_width, k or self._retrieval.k
        with self._variant(precision, stored, blind) as model:
            prompts = [self._prompt(request) for request in requests]
            found = [beams for group in _groups(prompts) for beams in self._search(model, group, width, k)]
        return Beams(*(np.concatenate([getattr(f, name) for f in found]) for name in ("items", "scores", "cuts")))

    def _prompt(self, request: Request) -> np.ndarray:
        """Return what `_search` reads of a request: its codes, int64 [tokens]."""
        return self._retrieval.prompt(request)

    @abstractmethod
    def prefix_scores(self, request: Request, items: np.ndarray) -> np.ndarray:
        """Return the fp32 log-probability of each prefix of the codes of `items` (int64 [n]): float32 [n, levels]."""

    @abstractmethod
    def _variant(self, precision: str, stored: str, blind: bool) -> AbstractContextManager[Model]:
        """Give the model in this precision, by eager PyTorch unless fp32. stored, blind: as for `search`."""

    @abstractmethod
    def _search(self, model: Model, prompts: Sequence[np.ndarray], width: int, k: int) -> Iterable[Beams]:
        """Yield the k best items after each prompt (int64 [tokens]), of one or several prompts at a time."""


def _groups(prompts: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Cut prompts into groups of TOGETHER tokens at most, or of one prompt."""
    group: list[np.ndarray] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > TOGETHER:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
