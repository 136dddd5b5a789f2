"""Requests of a workload as a file: what a plan's profiles and its 8-bit scales are made from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grengines.api import Request
from grengines.export.module import inputs_of, longest_history
from grengines.runtime.batch import Encoding, pack

SAVE = "python experiments/tensorrt_plans.py --requests FILE"
_ARRAYS = ("history_items", "history_actions", "history_weights", "history_timestamps", "candidates")
_FIELDS = [f.name for f in dataclasses.fields(Request)]


def save(requests: Sequence[Request], path: Path) -> None:
    """Write requests to a .npz file. Raises OSError."""
    columns: dict[str, Any] = {}
    for name in _FIELDS:
        values = [getattr(r, name) for r in requests]
        if name in _ARRAYS:
            columns[f"{name}_lengths"] = [len(v) for v in values]
            columns[name] = np.concatenate(values)
        else:
            columns[name] = values
    np.savez_compressed(path, **columns)


def read(path: Path) -> list[Request]:
    """The requests that `save` wrote. Raises ValueError, one line, for a file that holds none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
        count = len(columns["request_id"])
        parts: dict[str, list[Any]] = {}
        for name in _FIELDS:
            column = columns[name]
            if name in _ARRAYS:
                parts[name] = np.split(column, np.cumsum(columns[f"{name}_lengths"])[:-1])
            else:
                parts[name] = column.tolist()
        return [Request(**{name: parts[name][i] for name in _FIELDS}) for i in range(count)]
    except (OSError, ValueError, KeyError, IndexError, EOFError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path}: no saved requests ({reason}); to save some: {SAVE}") from None


def feeds(requests: Sequence[Request], encoding: Encoding, count: int, tile_rows: int) -> list[dict[str, Any]]:
    """Inputs of the exported model for `count` requests that are spread over the sample, one at a time."""
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
    """16 hex digits over a calibration set."""
    made = hashlib.sha256()
    for feed in inputs:
        for array in feed.values():
            made.update(np.ascontiguousarray(array).tobytes())
    return made.hexdigest()[:16]
