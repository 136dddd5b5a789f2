"""The base of the ranking engines that may have the user-state cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from grengines.api import Request, Setup, Tier
from grengines.base import RankingEngine
from grengines.cache.config import PagedCacheConfig
from grengines.export.identity import kv_hash
from grengines.hstu.cached import CachedRanking
from grengines.hstu.passes import PagedModel
from grengines.runtime.batch import Bucket, HostBatch, pack
from grengines.runtime.device import Placement
from grengines.runtime.graph_costs import Graphs
from grengines.runtime.team import Alone, Team


class CachingRankingEngine(RankingEngine):
    """A ranking engine with the cache and the CUDA graphs that its options ask for. Satisfies CachingEngine."""

    def __init__(self, setup: Setup, placement: Placement, *, cuda_graphs: bool) -> None:
        super().__init__(setup, placement, cuda_graphs=cuda_graphs)
        self._cache = setup.cache
        self._page = setup.cache.page if isinstance(setup.cache, PagedCacheConfig) else 0
        self._graphs = Graphs()  # of batches without the cache
        self.user_cache: CachedRanking | None = None  # from `prepare` on, if the options ask for it

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        """Drop every cached user state. keep: move those above this tier, HOST or STORAGE, to it."""
        with self._lock:
            if self.user_cache is not None:
                self.user_cache.reset_cache(keep)

    def tier_of(self, user: int) -> Tier:
        """Return where the user's state is at this moment."""
        cache = self.user_cache  # another thread may close the engine
        return cache.states.tier_of(user) if cache is not None else Tier.NONE

    def state_bytes(self) -> dict[Tier, int]:
        """Return the bytes that users' states take at this moment, by tier."""
        cache = self.user_cache
        return cache.states.state_bytes() if cache is not None else {}

    def _make_cache(
        self,
        ranker: PagedModel,
        sample: Sequence[Request],
        attention: str,
        microbatch: int = 0,
        place: Callable[[Sequence[HostBatch]], dict[str, float]] = lambda hosts: {},
        team: Team | Alone | None = None,
    ) -> CachedRanking:
        """Return the cache of `ranker`. attention: the precision of its products. The rest: as of CachedRanking."""
        assert isinstance(self._cache, PagedCacheConfig)
        setup, model = self._setup, self._model_config
        identity = partial(kv_hash, model, setup.catalogue, setup.seed, self._precision, attention, self._device.type)
        self.user_cache = CachedRanking(ranker, microbatch, self._cache, sample, place, identity, team)
        return self.user_cache

    def _describe_cache(self) -> dict[str, Any]:
        """Return the facts of the cache and of the CUDA graphs."""
        cache = self.user_cache
        graphs = self._graphs if cache is None else cache.graphs
        return {
            **graphs.actual(), "cache": dataclasses.asdict(self._cache), **(cache.actual() if cache is not None else {})
        }  # fmt: skip

    def _unload(self) -> None:
        cache, self.user_cache, self._graphs = self.user_cache, None, Graphs()
        if cache is not None:
            cache.close()

    def _empty(self, bucket: Bucket) -> list[HostBatch]:
        """Return the input of a bucket's graph, an empty batch."""
        return [pack([], self._encoding, bucket=bucket, pin=self._cuda)]

    def _longest(self, sample: Sequence[Request]) -> Request:
        return max(sample, key=lambda r: len(r.history_items))
