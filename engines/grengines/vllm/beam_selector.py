"""The choice of the next codes of searches at the end of a level: dozens of small kernels, or one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grengines.runtime.buckets import batch_buckets
from grengines.runtime.graphs import capture
from grengines.semantic.search import best
from grengines.semantic.trie import TensorTrie


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, Tensor, Tensor]  # arguments of BeamSelector._choose
    made: tuple[Tensor, Tensor, Tensor]  # its result


class BeamSelector:
    """The next codes of beam searches.

    model: has `level_logits`. width, k: of the search. graphs: up to this number of searches at once are captured, for
    hidden rows of this embedding width and dtype; 0: none.
    """

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
        """Choose the next code of every beam.

        hidden [beams, E], nodes int64 [beams] and scores fp32 [beams], of each search at this level. Returns a tensor
        for the host, and nodes and scores of the next level, [searches, beams]. The first is int64 [2, searches,
        beams], each new beam's parent and token. At the last level it is float64 [2, searches, k], items (exact up to
        2^53, -1 for none) and scores.
        """
        if not self._buckets:
            return self._choose(level, torch.cat(list(hidden)), torch.stack(list(nodes)), torch.stack(list(scores)))
        parts, most = [], self._buckets[-1]
        for begin in range(0, len(hidden), most):
            some = slice(begin, begin + most)
            parts.append(self._replay(level, hidden[some], nodes[some], scores[some]))
        for_host, found, best_scores = zip(*parts, strict=True)
        if len(parts) == 1:
            return for_host[0], found[0], best_scores[0]
        return torch.cat(for_host, dim=1), torch.cat(found), torch.cat(best_scores)

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
        """Replay the smallest graph that has room. Its other places may hold anything: searches are independent."""
        count = len(hidden)
        one = self._graphs[level, next(b for b in self._buckets if b >= count)]
        for place, parts in zip(one.given, (hidden, nodes, scores), strict=True):
            torch.cat(list(parts), out=place.view(-1, *parts[0].shape[1:])[: count * len(parts[0])])
        one.graph.replay()
        for_host, found, best_scores = one.made
        return for_host[:, :count].clone(), found[:count].clone(), best_scores[:count].clone()
