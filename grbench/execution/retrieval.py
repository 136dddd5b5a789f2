"""What a cell's engine searches: the catalogue's semantic IDs, from a file or made from the workload."""

from __future__ import annotations

import time
from collections.abc import Callable

from grbench.config.schema import RetrievalConfig
from grbench.workloads.config import SyntheticConfig, WorkloadConfig
from grbench.workloads.trace import Trace
from grengines.api import Retrieval
from grengines.semantic import id_cache
from grengines.semantic.ids import SemanticIds, propose_codes

TELL_S = 5.0  # between two tellings of how far the ids are


def build_retrieval(
    config: RetrievalConfig,
    workload: WorkloadConfig,
    trace: Trace,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Retrieval:
    """Raises ValueError for a file that doesn't fit the catalogue, or codes that are too few for it.

    Items of recorded events are near each other where the same users touched them; those of a made-up workload, where
    nobody's taste says anything, lie in made-up clusters. tell: called with what is being done, where that takes long.
    """
    items = trace.catalogue.num_items
    if config.semantic_ids is not None:
        ids = SemanticIds.load(config.semantic_ids, items)
    else:
        codes = config.codes or propose_codes(items, config.levels)
        told = time.monotonic()

        def progress(done: int, rows: int) -> None:
            nonlocal told
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                tell(f"making semantic IDs of {items:,} items, {done / rows:.0%}")

        if isinstance(workload, SyntheticConfig):
            ids = id_cache.of_made_up(items, levels=config.levels, codes=codes, seed=seed, progress=progress)
        else:
            users, touched = trace.events.users, trace.events.items
            ids = id_cache.of_interactions(
                users, touched, items, levels=config.levels, codes=codes, seed=seed, progress=progress
            )
    return Retrieval(ids, config.k, config.beam_width, config.weights)
