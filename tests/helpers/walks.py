"""Users who walk around a ring of items, so that a tiny model learns the next item in seconds."""

from __future__ import annotations

import numpy as np

from grbench.workloads.events import Events


def ring(users: int = 60, items: int = 20, length: int = 9) -> Events:
    """Return walks that begin at random places. The next item follows from the last."""
    starts = np.random.default_rng(0).integers(items, size=users)
    count = users * length
    return Events(
        users=np.repeat(np.arange(users), length),
        items=((starts[:, None] + np.arange(length)) % items).reshape(-1),
        actions=np.ones(count, np.int64),
        weights=np.ones(count, np.float32),
        timestamps=np.tile(np.arange(length) * 86_400, users),
        num_users=users,
        num_items=items,
        action_names=("rated",),
        item_ids=tuple(map(str, range(items))),
    )
