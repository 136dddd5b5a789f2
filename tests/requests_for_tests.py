"""Requests with random content and chosen shape."""

from __future__ import annotations

import numpy as np

from grengines.api import Catalogue, Request

CATALOGUE = Catalogue(num_users=9, num_items=50, num_actions=3)


def make_request(history: int, candidates: int, seed: int = 0, catalogue: Catalogue = CATALOGUE) -> Request:
    """`history` events with growing timestamps, then `candidates` distinct items."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.integers(0, 100_000, history)).astype(np.int64)
    return Request(
        request_id=seed,
        user_id=int(rng.integers(catalogue.num_users)),
        history_items=rng.integers(0, catalogue.num_items, history),
        history_actions=rng.integers(0, 2**catalogue.num_actions, history),
        history_weights=rng.random(history, dtype=np.float32),
        history_timestamps=times,
        num_seen=0,
        candidates=rng.permutation(catalogue.num_items)[:candidates],
        timestamp=int(times[-1]) + int(rng.integers(0, 10_000)) if history else 0,
        arrival_s=0.0,
        deadline_ms=80.0,
    )
