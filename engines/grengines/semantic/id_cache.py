"""Semantic IDs of a catalogue in the cache folder. 10 million items take one or two minutes to compute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from grengines.api import Float32Array, Int64Array
from grengines.semantic import vectors
from grengines.semantic.ids import SemanticIds, build
from grengines.semantic.quantise import Progress
from grkernels.cache_folder import cache_folder

_MADE = 1  # raise it when the same input gets other ids than before


def of_interactions(
    users: Int64Array,
    items: Int64Array,
    num_items: int,
    *,
    levels: int,
    codes: int,
    seed: int,
    progress: Progress | None = None,
) -> SemanticIds:
    """Return IDs of items without features, from the users of each item: `vectors.from_interactions`, `ids.build`.

    users, items: int64 [n], pair by pair. progress: as in `ids.build`. Raises ValueError as they do, and if the
    cache folder can't be written.
    """
    pairs = hashlib.sha256()
    for column in (users, items):
        pairs.update(column.tobytes())
    key = {"pairs": pairs.hexdigest(), "items": num_items}
    return _kept(
        key, lambda: vectors.from_interactions(users, items, num_items, seed=seed), levels, codes, seed, progress
    )


def of_made_up(num_items: int, *, levels: int, codes: int, seed: int, progress: Progress | None = None) -> SemanticIds:
    """Return IDs of a synthetic catalogue, whose items lie in synthetic clusters: `vectors.clustered`."""
    clusters = min(1024, num_items)
    key = {"clusters": clusters, "items": num_items}
    return _kept(key, lambda: vectors.clustered(num_items, clusters=clusters, seed=seed), levels, codes, seed, progress)


def _kept(
    source: dict[str, Any],
    vectors_of: Callable[[], Float32Array],
    levels: int,
    codes: int,
    seed: int,
    progress: Progress | None,
) -> SemanticIds:
    """Return the file of this key, if it is complete. Else compute the IDs and write it."""
    made = {"version": _MADE, "scikit-learn": version("scikit-learn"), "numpy": version("numpy")}
    key = {**source, **made, "levels": levels, "codes": codes, "seed": seed}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    path = cache_folder() / "semantic_ids" / f"{digest}.safetensors"
    try:
        return SemanticIds.load(path, source["items"])
    except ValueError:  # missing or incomplete
        ids = build(vectors_of(), levels, codes, seed, progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ids.save(path)
    except OSError as e:
        reason = f"{path}: {e.strerror or e}"
        raise ValueError(f"{reason}; set GRBENCH_CACHE to a folder that can be written and has room") from e
    return ids
