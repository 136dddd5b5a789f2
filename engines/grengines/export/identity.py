"""What names a model: everything that decides what it computes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from grengines.api import Catalogue
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime.batch import Encoding
from grengines.runtime.cache_dir import sha256


def model_hash(model: HSTUConfig, catalogue: Catalogue, seed: int) -> str:
    """16 hex digits over all that decides what the model computes: its options, its tables' sizes, its weights.

    Raises ValueError for a weights file that can't be read.
    """
    options = {k: v for k, v in dataclasses.asdict(model).items() if k not in ("name", "weights")}
    encoding = dataclasses.asdict(Encoding.of(model, catalogue))
    return digest_of({"options": options, "encoding": encoding, "weights": weights_of(model, seed)})


def weights_of(model: HSTUConfig, seed: int) -> str:
    """Where the weights come from, in words that name them. Raises ValueError for a file that isn't there."""
    if model.weights is None:
        return f"random, seed {seed}"
    path = Path(model.weights)
    if not path.is_file():
        raise ValueError(f"model.weights: no file {path}; give a safetensors file, or null for random weights")
    return f"sha256 {sha256(path)}"


def digest_of(value: Any) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def command(model: HSTUConfig, catalogue: Catalogue, seed: int, precision: str, folder: Path) -> str:
    """The command line that exports this model to `folder`."""
    defaults = HSTUConfig()
    changed = {k: v for k, v in dataclasses.asdict(model).items() if v != getattr(defaults, k) and k != "name"}
    weights = changed.pop("weights", None)
    words = [
        *("python", "-m", "grbench", "export", "--out", str(folder), "--items", str(catalogue.num_items)),
        *("--users", str(catalogue.num_users), "--actions", str(catalogue.num_actions)),
        *(["--precision", precision] if precision != "fp32" else []),
        *([f"model.weights={weights}"] if weights else [f"seed={seed}"] if seed else []),
        *(f"model.{k}={json.dumps(v).replace(chr(34), '').replace(' ', '')}" for k, v in changed.items()),
    ]
    return shlex.join(words)
