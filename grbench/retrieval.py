"""What a cell's engine searches: the catalogue's semantic IDs, from a file or made from the workload."""

from __future__ import annotations

from grbench.config import RetrievalConfig
from grbench.workloads.config import SyntheticConfig, WorkloadConfig
from grbench.workloads.trace import Trace
from grengines.api import Retrieval
from grengines.semantic import ids as semantic
from grengines.semantic import vectors


def build_retrieval(config: RetrievalConfig, workload: WorkloadConfig, trace: Trace, seed: int) -> Retrieval:
    """Raises ValueError for a file that doesn't fit the catalogue, or codes that are too few for it.

    Items of recorded events are near each other where the same users touched them; those of a made-up workload, where
    nobody's taste says anything, lie in made-up clusters.
    """
    items = trace.catalogue.num_items
    if config.semantic_ids is not None:
        ids = semantic.SemanticIds.load(config.semantic_ids, items)
    else:
        if isinstance(workload, SyntheticConfig):
            found = vectors.clustered(items, clusters=min(1024, items), seed=seed)
        else:
            found = vectors.from_interactions(trace.events.users, trace.events.items, items, seed=seed)
        codes = config.codes or semantic.propose_codes(items, config.levels)
        ids = semantic.build(found, config.levels, codes, seed)
    return Retrieval(ids, config.k, config.beam_width, config.weights)
