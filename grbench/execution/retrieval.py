"""The semantic IDs that an engine searches."""

from __future__ import annotations

import time
from collections.abc import Callable

from grbench.config.schema import RetrievalConfig
from grbench.execution.clock import at_most_every, remaining
from grbench.workloads.config import DrawnConfig, WorkloadConfig
from grbench.workloads.events import Events
from grengines.api import Retrieval
from grengines.models.hstu.weights import check_ids
from grengines.semantic.ids import SemanticIds, one_level, propose_codes


def build_retrieval(
    config: RetrievalConfig,
    workload: WorkloadConfig,
    events: Events,
    seed: int,
    report: Callable[[str], None] = lambda text: None,
) -> Retrieval:
    """Return the semantic IDs that an engine searches: from a file, made from the workload, or the items themselves.

    With one level, an ID is the item itself. report: takes a line of progress now and then. Raises ValueError for a
    file that does not fit the catalogue, for weights that were trained with other IDs, or for too few codes.
    """
    if config.semantic_ids is not None:
        ids = SemanticIds.load(config.semantic_ids, events.num_items)
    elif config.levels == 1:
        ids = one_level(events.num_items)
    else:
        ids = _made(config, workload, events, seed, report)
    if config.weights is not None:
        check_ids(config.weights, ids)
    return Retrieval(ids, config.k, config.beam_width, config.weights)


def _made(
    config: RetrievalConfig, workload: WorkloadConfig, events: Events, seed: int, report: Callable[[str], None]
) -> SemanticIds:
    """Return IDs by which items of recorded events are near each other if the same users touched them.

    A synthetic workload has no such signal, so its items lie in random clusters.
    """
    from grengines.semantic import id_cache  # imports scikit-learn, which takes seconds

    items = events.num_items
    codes = config.codes or propose_codes(items, config.levels)
    begun = time.monotonic()

    def say(done: int, rows: int) -> None:
        rest = remaining(time.monotonic() - begun, done, rows)
        report(f"making semantic IDs of {items:,} items{f', {rest} left' if rest else ''}")

    progress = at_most_every(5.0, say)
    if isinstance(workload, DrawnConfig):
        return id_cache.of_made_up(items, levels=config.levels, codes=codes, seed=seed, progress=progress)
    return id_cache.of_interactions(
        events.users, events.items, items, levels=config.levels, codes=codes, seed=seed, progress=progress
    )
