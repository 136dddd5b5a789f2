"""Passes of HSTU over packed batches, as every rank launches them. Rank 0 has the engine, and the others follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grengines.api import Catalogue
from grengines.cache.config import PagedCacheConfig, stored
from grengines.cache.host import Onload
from grengines.cache.places import PagedBatch
from grengines.cache.pool import PagePool
from grengines.models.hstu import beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator, Prompts
from grengines.models.hstu.model import HSTURanker, build_model
from grengines.models.hstu.shard import shard
from grengines.runtime.batch import Encoding, JaggedBatch
from grengines.runtime.group import Group
from grengines.runtime.results import one_tensor
from grengines.runtime.shared_graphs import graph_calls
from grengines.runtime.team import Calls
from grengines.semantic.trie import TensorTrie, Trie
from grkernels.operators import Operators
from grkernels.pages import EIGHT_BITS


class PagedModel(Protocol):
    """The part of HSTURanker that appends to pages."""

    @property
    def config(self) -> HSTUConfig: ...

    @property
    def encoding(self) -> Encoding: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def paged(
        self,
        batch: JaggedBatch,
        pool: PagePool,
        places: PagedBatch,
        *,
        write: bool = True,
        read: bool = True,
        onload: Onload | None = None,
    ) -> Tensor:
        """Append as HSTURanker.paged."""


def whole(ranker: HSTURanker, batches: Sequence[JaggedBatch]) -> Tensor:
    """Return the logits of the batches that `pack_slices` made of whole histories, in its order."""
    if len(batches) == 1:
        logits: Tensor = ranker(batches[0])
        return logits
    state = ranker.prefill(batches[0])
    return torch.cat([ranker.delta(batch, state, keep=False)[0] for batch in batches[1:]])


def append(
    ranker: PagedModel, pool: PagePool, inputs: Sequence[Any], *, cached: bool, onload: Onload | None = None
) -> Tensor:
    """Return the logits of batches that append to pages. inputs: JaggedBatches, then their PagedBatch.

    cached: whether any request has cached tokens. The first batch writes to pages, and further ones read them.
    """
    *batches, places = inputs
    parts = [ranker.paged(batches[0], pool, places, write=True, read=cached, onload=onload)]
    parts += [ranker.paged(batch, pool, places, write=False, read=True) for batch in batches[1:]]
    return torch.cat(parts)


def search(model: HSTUGenerator, trie: TensorTrie, pool: PagePool, prompts: Prompts, *, width: int, k: int) -> Tensor:
    """Return the items and scores that a beam search finds, as `one_tensor` packs them."""
    items, scores, _ = beam.run(model, trie, prompts, pool, width=width, k=k)
    return one_tensor(items, scores)


def page_sizes(ranker: PagedModel, cache: PagedCacheConfig) -> dict[str, Any]:
    """Return the arguments of PagePool that say what a page is."""
    model = ranker.config
    return {
        "device": ranker.device,
        "layers": model.layers,
        "page": cache.page,
        "heads": model.heads,
        "qk_dim": model.qk_dim,
        "v_dim": model.v_dim,
        "dtype": EIGHT_BITS.get(stored(cache), ranker.dtype),
    }


def follow_ranking(
    group: Group,
    device: torch.device,
    *,
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    dtype: torch.dtype,
    variants: Mapping[str, str],
) -> Calls:
    """Make a rank of the ranking engine. Arguments: as of `build_model`."""
    ranker = build_model(model, catalogue, seed, device, dtype, Operators.of(variants))
    shard(ranker, group)
    pools: list[PagePool] = []

    def make_pages(inputs: Sequence[Any], cache: PagedCacheConfig, pages: int) -> None:
        pools[:] = [PagePool(pages=pages, **page_sizes(ranker, cache))]

    def captured(batch: JaggedBatch, *places: PagedBatch) -> Tensor:
        logits: Tensor = ranker.paged(batch, pools[0], *places) if places else ranker(batch)
        return logits

    return {
        **graph_calls(captured, device),
        "pages": make_pages,
        "whole": lambda batches: whole(ranker, batches),
        "append": lambda inputs, cached: append(ranker, pools[0], inputs, cached=cached),
    }


def follow_search(
    group: Group,
    device: torch.device,
    *,
    model: HSTUConfig,
    trie: Trie,
    seed: int,
    dtype: torch.dtype,
    variants: Mapping[str, str],
    weights: str | None,
    width: int,
    k: int,
) -> Calls:
    """Make a rank of the engine that generates. Arguments: as of HSTUGenerator.build and of the search."""
    generator = HSTUGenerator.build(
        model, trie.sizes, Operators.of(variants), seed=seed, device=device, dtype=dtype, weights=weights
    )
    shard(generator, group)
    there, pools = trie.on(device), list[PagePool]()

    def make_pages(inputs: Sequence[Any], tokens: int, batch: int) -> None:
        pools[:] = [beam.pool_for(generator, tokens, batch)]

    def run(prompts: Prompts) -> Tensor:
        return search(generator, there, pools[0], prompts, width=width, k=k)

    return {**graph_calls(run, device), "pages": make_pages, "search": lambda inputs: run(inputs[0])}
