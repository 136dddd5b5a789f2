"""The calibration set of a plan: inputs of the exported model that give the 8-bit scales."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from grengines.api import Request
from grengines.export.module import inputs_of, longest_history
from grengines.runtime.batch import Encoding, pack


def feeds(requests: Sequence[Request], encoding: Encoding, count: int, tile_rows: int) -> list[dict[str, Any]]:
    """Return the exported model's inputs for each of `count` requests that are spread over the sample."""
    count = min(count, len(requests))
    chosen = [requests[i] for i in np.linspace(0, len(requests) - 1, count).astype(int)] if count else []
    return [
        {
            name: tensor.numpy()
            for name, tensor in inputs_of(
                pack([r], encoding).to(torch.device("cpu")), longest_history([r], encoding), tile_rows
            ).items()
        }
        for r in chosen
        if len(r.candidates)
    ]


def digest(inputs: Sequence[dict[str, Any]]) -> str:
    """Return 16 hex digits over a calibration set."""
    made = hashlib.sha256()
    for feed in inputs:
        for array in feed.values():
            made.update(np.ascontiguousarray(array).tobytes())
    return made.hexdigest()[:16]
