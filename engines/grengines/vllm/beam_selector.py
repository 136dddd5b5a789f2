"""The next codes of searches that have all rows of a level: dozens of small kernels, or one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grengines.runtime.graphs import batch_buckets, capture
from grengines.semantic.search import best
from grengines.semantic.trie import TensorTrie


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, Tensor, Tensor]  # as Choice._choose's arguments
    made: tuple[Tensor, Tensor, Tensor]  # and its result


class Choice:
    """model: has `level_logits`. width, k: of the search. graphs: up to so many searches at once are captured, for
    hidden rows of this embedding width and dtype; 0: none."""

    def __init__(
        self,
        model: Any,
        trie: TensorTrie,
        *,
        width: int,
        k: int,
        graphs: int = 0,
        embedding_dim: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._trie, self._width, self._k = model, trie, width, k
        self._first_tokens = [sum(trie.sizes[:level]) for level in range(len(trie.sizes))]
        self._graphs: dict[tuple[int, int], _Graph] = {}  # by level and searches
        self._buckets = batch_buckets(graphs) if graphs else []
        pool, beams = torch.cuda.graph_pool_handle() if graphs else None, 1
        for level, children in enumerate(trie.widths):
            for count in reversed(self._buckets):
                hidden = torch.zeros(count * beams, embedding_dim, dtype=dtype, device=trie.leaf_items.device)
                nodes = torch.zeros(count, beams, dtype=torch.int64, device=hidden.device)
                given = hidden, nodes, nodes.float()
                graph, made = capture(partial(self._choose, level, *given), pool)
                self._graphs[level, count] = _Graph(graph, given, made)
            beams = min(width, beams * children)

    def __call__(
        self, level: int, hidden: Sequence[Tensor], nodes: Sequence[Tensor], scores: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each search: hidden [beams, E], nodes int64 [beams] and fp32 scores [beams], of this level.

        Returns what the host needs to know, and nodes and scores of the next level, [searches, beams]. It needs to know
        int64 [2, searches, beams], each new beam's parent and token; at the last level float64 [2, searches, k], items
        (exact up to 2^53, -1 for none) and scores.
        """
        if not self._buckets:
            return self._choose(level, torch.cat(list(hidden)), torch.stack(list(nodes)), torch.stack(list(scores)))
        parts, most = [], self._buckets[-1]
        for begin in range(0, len(hidden), most):
            some = slice(begin, begin + most)
            parts.append(self._replay(level, hidden[some], nodes[some], scores[some]))
        told, found, best_scores = zip(*parts, strict=True)
        if len(parts) == 1:
            return told[0], found[0], best_scores[0]
        return torch.cat(told, dim=1), torch.cat(found), torch.cat(best_scores)

    def _choose(self, level: int, hidden: Tensor, nodes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._model.level_logits(hidden, level)
        parents, codes, nodes, scores = best(logits, self._trie, level, nodes, scores, self._width)
        if level + 1 < len(self._trie.sizes):
            return torch.stack([parents, codes + self._first_tokens[level]]), nodes, scores
        items = self._trie.items(nodes[:, : self._k].reshape(-1)).view(len(nodes), -1)
        return torch.stack([items.double(), scores[:, : self._k].double()]), nodes, scores

    def _replay(
        self, level: int, hidden: Sequence[Tensor], nodes: Sequence[Tensor], scores: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By the smallest graph that has room. What is in its other places does not matter: no search sees another."""
        count = len(hidden)
        one = self._graphs[level, next(b for b in self._buckets if b >= count)]
        for place, parts in zip(one.given, (hidden, nodes, scores), strict=True):
            torch.cat(list(parts), out=place.view(-1, *parts[0].shape[1:])[: count * len(parts[0])])
        one.graph.replay()
        told, found, best_scores = one.made
        return told[:, :count].clone(), found[:count].clone(), best_scores[:count].clone()
