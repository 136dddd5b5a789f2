"""Items with semantic IDs of a few small codes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from grengines.semantic.ids import SemanticIds

SIZES = (4, 5, 6)


def catalogue(items: int, seed: int = 0, sizes: Sequence[int] = SIZES) -> SemanticIds:
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(*map(range, sizes))), dtype=np.int32)
    return SemanticIds(every[rng.permutation(len(every))[:items]], sizes)
