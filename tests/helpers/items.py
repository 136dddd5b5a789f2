"""Items with semantic IDs of three small codes."""

from __future__ import annotations

import itertools

import numpy as np

from grengines.semantic.ids import SemanticIds

SIZES = (4, 5, 6)


def catalogue(items: int, seed: int = 0) -> SemanticIds:
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(*map(range, SIZES))), dtype=np.int32)
    return SemanticIds(every[rng.permutation(len(every))[:items]], SIZES)
