"""The identity of a model: everything that decides its results."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import torch

import grengines
import grkernels
from grengines.api import RANDOM, Catalogue
from grengines.models.hstu.config import HSTUConfig
from grengines.overrides import override
from grengines.runtime.batch import Encoding
from grengines.runtime.cache_dir import sha256


def model_hash(model: HSTUConfig, catalogue: Catalogue, seed: int) -> str:
    """Return 16 hex digits over everything that decides the model's results: options, sizes of tables, weights.

    Raises ValueError for a weights file that can't be read.
    """
    options = {k: v for k, v in dataclasses.asdict(model).items() if k not in ("name", "weights")}
    encoding = dataclasses.asdict(Encoding.of(model, catalogue))
    return digest_of({"options": options, "encoding": encoding, "weights": weights_of(model, seed)})


def kv_hash(model: HSTUConfig, catalogue: Catalogue, seed: int, precision: str, attention: str, device: str) -> str:
    """Return 16 hex digits over everything that decides the keys and values of a history. Raises as `model_hash`.

    precision: of the engine. attention: its precision, which decides the keys and values of every layer but the first.
    Random weights depend on the version of PyTorch too.
    """
    return digest_of([model_hash(model, catalogue, seed), precision, attention, device, torch.__version__])


def weights_of(model: HSTUConfig, seed: int) -> str:
    """Return the source of the weights in words. Raises ValueError for a missing file."""
    if model.weights is None:
        return f"{RANDOM}{seed}"
    path = Path(model.weights)
    if not path.is_file():
        raise ValueError(f"model.weights: no file {path}; give a safetensors file, or null for random weights")
    return f"sha256 {sha256(path)}"


def sources() -> list[Path]:
    """Return the files whose code makes an export or a package of the model, or becomes part of one."""
    engines, kernels = (Path(next(iter(package.__path__))) for package in (grengines, grkernels))
    folders = (engines / name for name in ("aoti", "export", "models/hstu", "runtime"))
    ours = [engines / "last_layer.py", *(file for folder in folders for file in folder.glob("*.py"))]
    return sorted([*kernels.rglob("*.py"), *ours])


@functools.cache
def source_digest() -> str:
    """Return 16 hex digits over `sources`."""
    return digest_of([sha256(file) for file in sources()])


def digest_of(value: Any) -> str:
    """Return 16 hex digits over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def command(model: HSTUConfig, catalogue: Catalogue, seed: int, precision: str, folder: Path) -> str:
    """Return the command line that exports this model to `folder`."""
    defaults = HSTUConfig()
    changed = {k: v for k, v in dataclasses.asdict(model).items() if v != getattr(defaults, k) and k != "name"}
    weights = changed.pop("weights", None)
    words = [
        *("python", "-m", "grbench", "export", "--out", str(folder), "--items", str(catalogue.num_items)),
        *("--users", str(catalogue.num_users), "--actions", str(catalogue.num_actions)),
        *(["--precision", precision] if precision != "fp32" else []),
        *([override("model.weights", weights)] if weights else [f"seed={seed}"] if seed else []),
        *(f"model.{k}={json.dumps(v).replace(chr(34), '').replace(' ', '')}" for k, v in changed.items()),
    ]
    return shlex.join(words)
