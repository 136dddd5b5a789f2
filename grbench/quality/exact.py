"""The same model in fp32, by eager kernels of the native engine: its answers are what a loss is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from grbench.config.schema import RunSpec
from grbench.execution import engines
from grengines.api import Catalogue, Engine, Request, Retrieval
from grengines.cache.config import CacheConfig
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.pipeline.config import PipelineConfig
from grkernels.config import KernelConfig

TOGETHER = 8192  # tokens and beams of a batch: eager attention holds the scores of all pairs


def in_fp32(spec: RunSpec, actual: dict[str, Any]) -> RunSpec | None:
    """Return the same model in fp32, by eager kernels of the native engine, on the device of what ran.

    actual: what ran. The result is None if that is the same, and for a decoder, which the native engine does not have.
    Its batches are as large as fits, because an eager batch launches as many kernels whatever its size.
    """
    if not isinstance(spec.model, HSTUConfig) or is_exact(actual):
        return None
    native = HSTUEngineConfig(precision="fp32", device=actual["device"], cuda_graphs="false")
    engine = PipelineConfig(retrieve=native, rank=native) if spec.task == "recommend" else native
    levels = spec.retrieval.levels if spec.retrieval else 1
    longest = spec.workload.max_history * levels + spec.workload.num_candidates
    if spec.retrieval and levels > 1:
        longest += spec.retrieval.beam_width
    scenario = replace(spec.scenario, max_batch=max(TOGETHER // longest, 1))
    return replace(spec, engine=engine, kernel=KernelConfig(name="torch"), cache=CacheConfig(), scenario=scenario)


def is_exact(actual: dict[str, Any]) -> bool:
    """Return True if what ran is the native engine in fp32 with eager kernels: it would be compared with itself."""
    stages = [actual[stage] for stage in ("retrieve", "rank") if stage in actual] or [actual]
    return all(
        (stage.get("engine"), stage.get("precision"), stage.get("cache_precision", "fp32")) == ("hstu", "fp32", "fp32")
        and set(stage.get("kernels", {"": ""}).values()) == {"torch"}
        for stage in stages
    )


@contextmanager
def prepared(
    spec: RunSpec, catalogue: Catalogue, retrieval: Retrieval | None, requests: Sequence[Request]
) -> Iterator[Engine]:
    """Give the engine of a configuration, prepared for these requests. It is closed at the end."""
    engine = engines.build(spec, catalogue, retrieval)
    try:
        engine.prepare(requests, spec.scenario.max_batch)
        yield engine
    finally:
        engine.close()
