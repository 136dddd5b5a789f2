"""The levels of beam searches, run in the vLLM step that ends their prompts: eager, or as one CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from grengines.models.hstu.generator import PromptKeys
from grengines.runtime.buckets import batch_buckets
from grengines.runtime.graphs import capture
from grengines.runtime.results import one_tensor
from grengines.semantic.trie import TensorTrie


class SearchingModel(Protocol):
    """A model inside vLLM that continues from prompts in vLLM's pages."""

    def search(
        self, last: Tensor, prompts: PromptKeys, trie: TensorTrie, *, width: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search as grengines.semantic.search.explore. last: [B, E], the encoded last token of each prompt."""


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    last: Tensor
    prompts: PromptKeys
    found: Tensor


class Levels:
    """Beam searches from the last tokens of their prompts on.

    The first code follows from the prompt's last hidden row. For each further level the model encodes the codes of all
    beams. Nothing waits for the device in between, so all levels are one CUDA graph. width, k: of the search.
    """

    def __init__(self, model: SearchingModel, trie: TensorTrie, *, width: int, k: int) -> None:
        self._model, self._trie, self._width, self._k = model, trie, width, k
        self._graphs: dict[int, _Graph] = {}  # by the number of searches, ascending

    def capture(self, most: int, last: Tensor, prompts: PromptKeys) -> None:
        """Capture graphs for up to `most` searches at once. last [1, E], prompts: of one search, of the most tokens."""
        pool = torch.cuda.graph_pool_handle()
        made = {}
        for count in reversed(batch_buckets(most)):
            rows, keys = last.repeat(count, 1), _repeated(prompts, count)
            graph, found = capture(partial(self._search, rows, keys), pool)
            made[count] = _Graph(graph, rows, keys, found)
        self._graphs = dict(sorted(made.items()))

    def __call__(self, last: Tensor, prompts: PromptKeys) -> Tensor:
        """Return the k items and scores of each search, float64 [B, k, 2] as `one_tensor` packs them.

        last: [B, E], the encoded last token of each prompt. prompts: the places of their keys and values.
        """
        most = max(self._graphs, default=0)
        if not most:
            return self._search(last, prompts)
        parts = [self._replay(rows, keys) for rows, keys in _split(last, prompts, most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _search(self, last: Tensor, prompts: PromptKeys) -> Tensor:
        items, scores, _ = self._model.search(last, prompts, self._trie, width=self._width, k=self._k)
        return one_tensor(items, scores)

    def _replay(self, last: Tensor, prompts: PromptKeys) -> Tensor:
        """Replay the smallest graph that has room. Its further searches have prompts of no tokens."""
        count = len(last)
        one = next(graph for size, graph in self._graphs.items() if size >= count)
        one.last[:count] = last
        one.prompts.lengths[:count] = prompts.lengths
        one.prompts.lengths[count:] = 0
        columns = one.prompts.page_table.shape[1]
        one.prompts.page_table[:count] = prompts.page_table[:, :columns]
        one.graph.replay()
        return one.found[:count].clone()


def _repeated(prompts: PromptKeys, count: int) -> PromptKeys:
    return PromptKeys(prompts.lengths.repeat(count), prompts.page_table.repeat(count, 1), prompts.longest)


def _split(last: Tensor, prompts: PromptKeys, most: int) -> list[tuple[Tensor, PromptKeys]]:
    """Cut into parts of at most `most` searches."""
    parts = zip(last.split(most), prompts.lengths.split(most), prompts.page_table.split(most), strict=True)
    return [(rows, PromptKeys(lengths, table, prompts.longest)) for rows, lengths, table in parts]
