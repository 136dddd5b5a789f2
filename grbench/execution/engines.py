"""The engine of a run configuration."""

from __future__ import annotations

from grbench.config.schema import RunSpec
from grengines import registry
from grengines.api import Catalogue, Engine, Retrieval

MOST_PREPARED = 20_000  # requests by which an engine chooses its buffers and buckets


def build(spec: RunSpec, catalogue: Catalogue, retrieval: Retrieval | None = None) -> Engine:
    """Return the engine, not prepared. Raises UnavailableError or ValueError, as grengines.registry.build."""
    return registry.build(
        spec.engine, spec.model, spec.kernel, catalogue, spec.seed, spec.cache, task=spec.task, retrieval=retrieval
    )
