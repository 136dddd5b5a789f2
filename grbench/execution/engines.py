"""The engine of a run configuration."""

from __future__ import annotations

from collections.abc import Callable

from grbench.config.schema import RunSpec
from grengines import registry
from grengines.api import Catalogue, Engine, Retrieval

MOST_PREPARED = 20_000  # requests by which an engine chooses its buffers and buckets


def build(
    spec: RunSpec,
    catalogue: Catalogue,
    retrieval: Retrieval | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Return the engine, not prepared. report: as of Setup. Raises UnavailableError or ValueError, as the registry."""
    parts = (spec.engine, spec.model, spec.kernel, catalogue, spec.seed, spec.cache)
    return registry.build(*parts, task=spec.task, retrieval=retrieval, report=report)
