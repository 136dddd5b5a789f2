"""Beam searches as requests of vLLM, one request per level: admit, step, advance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import Cached, Finished, Int64Array
from grengines.vllm import compat
from grengines.vllm.beam_selector import BeamSelector
from grengines.vllm.core import VLLMCore
from grengines.vllm.rows import BeamRows


@dataclass
class Search:
    """One beam search in flight."""

    key: int
    prompt: Int64Array  # [tokens]
    ids: list[int]  # the same
    nodes: Tensor  # int64 [beams] of the trie
    scores: Tensor  # fp32 [beams]
    paths: Int64Array  # [beams, level]: tokens of each beam so far
    hidden: Tensor | None = None  # [rows, E]: the pooler's output of this level
    hashes: list[Any] = field(default_factory=list)  # of the prompt's whole blocks; empty at the first level
    details: dict[str, float] = field(default_factory=lambda: {"prefix_hit_tokens": 0.0, "reread_tokens": 0.0})

    @property
    def level(self) -> int:
        """Return the number of codes that are chosen."""
        return int(self.paths.shape[1])


class BeamScheduler:
    """Beam searches over a vLLM core.

    Each level of a search is one vLLM request: the prompt, and the beams as its last rows (grengines.vllm.rows). After
    the first level the prompt's KV cache comes from the prefix cache. Each step may advance searches of any level.

    width: of the hidden rows.
    """

    def __init__(
        self, core: VLLMCore, beams: BeamRows, select: BeamSelector, *, width: int, dtype: torch.dtype, device: Any
    ) -> None:
        self._core, self._beams, self._select = core, beams, select
        self._width, self._dtype, self._device = width, dtype, device
        # The root of the trie, and its score.
        self._root = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
        self._searches: dict[str, Search] = {}  # by vLLM request
        self.unfinished = 0  # searches in flight
        self.steps = 0  # of vLLM's scheduler so far
        self.next_number = 0  # of the next vLLM request

    def admit(self, key: int, prompt: Int64Array) -> None:
        """Begin one search. prompt: int64 [tokens]."""
        search = Search(key, prompt, prompt.tolist(), *self._root, np.zeros((1, 0), np.int64))
        self.unfinished += 1
        self._submit(search)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Run one step of vLLM, and take the next code of every search that is at the end of its level.

        Raises the errors of VLLMCore.step.
        """
        if not self.unfinished:
            return []
        outputs = self._core.step()
        self.steps += 1
        at_end: dict[int, list[Search]] = {}  # by level
        for output in outputs:
            search = self._searches.pop(output.request_id)
            self._count_tokens(search, output)
            if search.level:
                self._core.model.beam_requests -= 1
            at_end.setdefault(search.level, []).append(search)
        return [finished for level, searches in at_end.items() for finished in self._advance(level, searches)]

    def abandon(self) -> None:
        """Drop all searches, once vLLM has none of their requests."""
        self._searches.clear()
        self.unfinished = self._core.model.beam_requests = 0

    def _submit(self, search: Search) -> None:
        """Submit the vLLM request of the search's next level."""
        sequence, ids, wanted, name = search.prompt, search.ids, 1, str(self.next_number)
        if search.level:
            rows = self._beams.ids(search.paths.reshape(-1), self.next_number)
            sequence, ids, wanted = np.concatenate([sequence, rows]), ids + rows.tolist(), len(rows)
            self._core.model.beam_requests += 1
        self.next_number += 1
        search.hidden = torch.empty(wanted, self._width, dtype=self._dtype, device=self._device)
        self._searches[name] = search
        self._core.submit(name, ids, sequence, search.hidden, search.hashes)
        if not search.level:  # hashed once for all levels
            search.hashes = self._core.hashes_of(name)

    def _count_tokens(self, search: Search, output: Any) -> None:
        """Count prompt tokens: found in the prefix cache by the first level, and read again by later ones."""
        hit = min(compat.cached_tokens(output), len(search.prompt))
        if search.level == 0:
            search.details["prefix_hit_tokens"] += hit
        else:
            search.details["reread_tokens"] += len(search.prompt) - hit

    def _advance(self, level: int, searches: Sequence[Search]) -> list[Finished]:
        """Choose the next code of searches of one level. Submit their next level, or return their items."""
        # The rows of a beam are adjacent, and the last one predicts the next code.
        hidden = [s.hidden[level - 1 :: level] if level else s.hidden for s in searches if s.hidden is not None]
        for_host, nodes, scores = self._select(level, hidden, [s.nodes for s in searches], [s.scores for s in searches])
        found = for_host.cpu().numpy()
        if level + 1 < len(self._beams.sizes):
            for i, search in enumerate(searches):
                search.nodes, search.scores = nodes[i], scores[i]
                search.paths = np.column_stack([search.paths[found[0, i]], found[1, i]])
                self._submit(search)
            return []
        self.unfinished -= len(searches)
        return [_finished(search, *found[:, i]) for i, search in enumerate(searches)]


def _finished(search: Search, items: np.ndarray, scores: np.ndarray) -> Finished:
    """Make the result of a search from items (-1: none) and scores, float64 [k]."""
    real = items >= 0
    return Finished(
        search.key,
        items[real].astype(np.int64),
        scores[real].astype(np.float32),
        tokens=len(search.prompt),
        details=search.details,
        cached=Cached(int(search.details["prefix_hit_tokens"]), 0, len(search.prompt)),
    )
