"""Costs of states by their length, which a simulation looks up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from grbench.tools.sizing import flops
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig


@dataclass(frozen=True)
class Costs:
    """Costs of histories of 0, 1, 2, ... events: pages of their state, and operations.

    The last layer counts for the rows that are read: what a state saves then does not depend on the candidates.
    """

    page: int  # tokens
    exact: bool  # with contextual tokens a state serves the same history only
    pages: list[int]
    saved: list[float]  # FLOPs of the rows that the cached state saves
    total: list[float]  # FLOPs of the whole request

    @classmethod
    def of(cls, model: HSTUConfig, page: int, candidates: int, longest: int) -> Costs:
        context = model.contextual_seq_len
        lengths, work = range(longest + 1), partial(flops, model, rows=LastLayer.READ)
        return cls(
            page,
            context > 0,
            [-(-(context + n) // page) for n in lengths],
            [work(n, 0) - work(n, 0, context + n) for n in lengths],
            [work(n, candidates) for n in lengths],
        )
