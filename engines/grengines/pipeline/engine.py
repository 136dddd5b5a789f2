"""Two engines in a row: the first one retrieves items, the second one ranks them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grengines import registry
from grengines.api import (
    CachingEngine,
    ContinuousEngine,
    Finished,
    Float32Array,
    Generator,
    Int64Array,
    Ranker,
    RankResult,
    RecommendResult,
    Request,
    Setup,
    Tier,
)
from grengines.cache.config import CacheConfig
from grengines.pipeline.config import PipelineConfig


def build(options: PipelineConfig, setup: Setup) -> Pipeline:
    """Build the pipeline, with continuous batching if the first engine has it. The second engine has the cache.

    Where the package of the retrieving engine is missing, `options.if_missing` retrieves, and `actual` reports it.
    Raises what the engines raise.
    """
    retrieve, notes = registry.stage_options(options, "retrieve")
    assert setup.retrieval is not None, "a task that generates has semantic IDs"
    retriever: Any = registry.make(retrieve, replace(setup, cache=CacheConfig()), "generate")
    ranker: Any = registry.make(options.rank, setup, "rank")
    kind = ContinuousPipeline if isinstance(retriever, ContinuousEngine) else Pipeline
    return kind(retriever, ranker, setup.retrieval.k, notes)


class Pipeline:
    """The task recommend: each batch is retrieved, then ranked."""

    def __init__(self, retriever: Generator, ranker: Ranker, k: int, notes: list[str]) -> None:
        self.retriever, self.ranker, self._k, self._notes = retriever, ranker, k, notes
        self._max_batch = 0

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Prepare both engines."""
        self._max_batch = max_batch
        self.retriever.prepare(sample, max_batch)
        self.ranker.prepare([as_many(r, self._k) for r in sample], max_batch)

    def recommend(self, requests: Sequence[Request]) -> RecommendResult:
        """Retrieve items for every request, and order them by the ranking engine's first task."""
        begun = time.perf_counter()
        retrieved = self.retriever.generate(requests)
        between = time.perf_counter()
        items, scores, ranked = self._ranked(requests, retrieved.items)
        stages = {
            "retrieve": (between - begun) * 1e3 - retrieved.wait_ms,
            "rank": (time.perf_counter() - between) * 1e3 - ranked.wait_ms,
        }
        return RecommendResult(
            items=items,
            scores=scores,
            batch_ms=retrieved.batch_ms + ranked.batch_ms,
            transfer_ms=retrieved.transfer_ms + ranked.transfer_ms,
            compute_ms=retrieved.compute_ms + ranked.compute_ms,
            tokens=retrieved.tokens + ranked.tokens,
            padded_tokens=retrieved.padded_tokens + ranked.padded_tokens,
            wait_ms=retrieved.wait_ms + ranked.wait_ms,
            details=retrieved.details | ranked.details,
            stages=stages,
            cached=ranked.cached,
            fallback=ranked.fallback,
        )

    def actual(self) -> dict[str, Any]:
        """Return what really runs, stage by stage."""
        retrieve, rank = self.retriever.actual(), self.ranker.actual()
        devices, precisions = ({s[key] for s in (retrieve, rank)} for key in ("device", "precision"))
        return {
            "engine": "pipeline",
            "device": "cuda" if "cuda" in devices else "cpu",
            "precision": "/".join(sorted(precisions)),
            "retrieve": retrieve,
            "rank": rank,
            "notes": [*self._notes, *retrieve.get("notes", []), *rank.get("notes", [])],
        }

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        """Reset both engines' caches."""
        self.retriever.reset_cache(keep)
        self.ranker.reset_cache(keep)

    def tier_of(self, user: int) -> Tier:
        """Return where the ranking engine has the user's state; nowhere if it has no cache."""
        return self.ranker.tier_of(user) if isinstance(self.ranker, CachingEngine) else Tier.NONE

    def state_bytes(self) -> dict[Tier, int]:
        """Return the bytes that users' states take in the ranking engine, by tier."""
        return self.ranker.state_bytes() if isinstance(self.ranker, CachingEngine) else {}

    def close(self) -> None:
        """Close both, whatever the first one raises."""
        try:
            self.retriever.close()
        finally:
            self.ranker.close()

    def _ranked(
        self, requests: Sequence[Request], items: Sequence[Int64Array]
    ) -> tuple[list[Int64Array], list[Float32Array], RankResult]:
        """Rank the items of each request. Returns items and scores, best first, and the ranking engine's result."""
        result = self.ranker.rank([replace(r, candidates=found) for r, found in zip(requests, items, strict=True)])
        orders = [np.argsort(-scores[:, 0], kind="stable") for scores in result.scores]
        return (
            [found[order] for found, order in zip(items, orders, strict=True)],
            [scores[order] for scores, order in zip(result.scores, orders, strict=True)],
            result,
        )


class ContinuousPipeline(Pipeline):
    """A pipeline with continuous batching: the answers of each retrieval step are ranked at once, as one batch."""

    retriever: Any  # a Generator that is a ContinuousEngine

    def __init__(self, retriever: Generator, ranker: Ranker, k: int, notes: list[str]) -> None:
        super().__init__(retriever, ranker, k, notes)
        self._under_way: dict[int, tuple[Request, float]] = {}

    @property
    def unfinished(self) -> int:
        """Number of admitted requests without an answer."""
        return len(self._under_way)

    def admit(self, key: int, request: Request) -> None:
        """Begin one request. Raises what the retrieving engine raises."""
        self.retriever.admit(key, request)
        self._under_way[key] = request, time.perf_counter()

    def step(self) -> list[Finished]:
        """Advance the retrieving engine by one step, and rank its answers."""
        retrieved: list[Finished] = self.retriever.step()
        finished = []
        for begin in range(0, len(retrieved), self._max_batch):
            part = retrieved[begin : begin + self._max_batch]
            starts = [self._under_way.pop(end.key) for end in part]
            begun = time.perf_counter()
            items, scores, ranked = self._ranked([r for r, _ in starts], [end.items for end in part])
            details = {name: value / len(part) for name, value in ranked.details.items()}
            for end, (_, admitted), own, score in zip(part, starts, items, scores, strict=True):
                stages = {"retrieve": (begun - admitted) * 1e3, "rank": -begun * 1e3}
                tokens = end.tokens + ranked.tokens // len(part)
                finished.append(
                    Finished(
                        end.key, own, score, tokens, end.details | details, stages, end.cached, fallback=ranked.fallback
                    )
                )
        done = time.perf_counter()  # of all: the step returns its answers together
        for end in finished:
            end.stages["rank"] += done * 1e3
        return finished


def as_many(request: Request, count: int) -> Request:
    """Return the request with `count` candidates: its own, repeated from the first if it has fewer."""
    return replace(request, candidates=np.resize(request.candidates, count))
