"""Weights: random ones, or those of safetensors files, which contain no executable code."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grengines.models import header
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime import atomic_io

if TYPE_CHECKING:
    from grengines.models.hstu.generator import HSTUGenerator
    from grengines.models.hstu.model import HSTURanker
    from grengines.semantic.ids import SemanticIds

_FORMAT = "grbench-hstu-1"
SCALES = "_scales"  # behind the name of a tensor in e4m3: a number in fp32 for each of its rows
_E4M3 = "F8_E4M3"  # safetensors' name


def save_weights(
    model: HSTURanker | HSTUGenerator, path: str | Path, ids: SemanticIds | None = None, facts: Mapping[str, str] = {}
) -> None:
    """Write the model's parameters in their own dtype, with its configuration as metadata. Raises OSError.

    ids: of a trained generator, which has learned these IDs and no others. facts: further metadata.
    """
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    metadata = {**metadata_of(model.config), **facts}
    if ids is not None:
        metadata["semantic_ids"] = ids.digest
    try:
        with atomic_io.replacing(Path(path)) as made:
            save_file(tensors, str(made), metadata=metadata)
    except SafetensorError as e:
        raise OSError(f"{path}: can't write weights: {e}") from None


def metadata_of(config: HSTUConfig) -> dict[str, str]:
    """Return what a weights file says of its model's options."""
    return {"format": _FORMAT, "model": json.dumps(header.shape_of(config))}


def fill(model: HSTURanker | HSTUGenerator, weights: str | None, seed: int, mapped: Collection[str] = ()) -> None:
    """Give a model that was made on the device "meta" weights on the CPU: those of a file, or random ones.

    mapped: tensors that stay in the file. Raises ValueError for a file that doesn't fit.
    """
    # As Module.to_empty, but without SymPy, which that imports for half a second.
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False).eval()
    if weights is None:
        _initialise(model, seed)
    else:
        load_weights(model, weights, mapped=mapped)


def _initialise(model: HSTURanker | HSTUGenerator, seed: int) -> None:
    """Draw uniform weights of the standard deviations below.

    They give attention the weight that it has in a trained model. After LayerNorm, W of std 1/sqrt(E) gives q, k and v
    of unit scale and scores of order 1. Divided by N, attention is at most about 1e-3, near sqrt(eps) of the LayerNorm
    that follows. So u * LayerNorm(a) is comparable with u, and so is its part of the output. Norms and biases differ
    from 1 and 0, so that a missing one is noticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        kind, _, leaf = name.rpartition(".")
        if kind.endswith("norm"):
            mean, std = (1.0, 0.1) if leaf == "weight" else (0.0, 0.1)
        elif leaf == "bias":
            mean, std = 0.0, 0.1
        elif kind.endswith(".out"):
            parts = 3 if model.config.choices.output == "concat" else 1
            mean, std = 0.0, 1.0 / math.sqrt(p.shape[1] / parts)  # a third of its inputs, the attention itself, is tiny
        elif leaf == "weight":
            mean, std = 0.0, 1.0 / math.sqrt(p.shape[1])
        else:  # tables: the item weighs most
            mean, std = 0.0, 1.0 if leaf in ("token_table", "tower_table") else 0.5
        p.uniform_(mean - math.sqrt(3) * std, mean + math.sqrt(3) * std, generator=generator)


def load_weights(model: HSTURanker | HSTUGenerator, path: str | Path, mapped: Collection[str] = ()) -> None:
    """Fill the model's parameters from a file, converting to their dtype.

    mapped: names of parameters that stay in the file, memory-mapped and in its dtype.

    Matrices of products may be in e4m3 with a scale for each row, as `grbench quantise` writes them.

    Raises ValueError, one line with the file's name, for a file that is missing or not safetensors, that
    was written for another configuration, or whose tensors differ from the model's in name, shape or kind.
    """
    if not Path(path).is_file():
        raise ValueError(f"model.weights: no file {path}; give a safetensors file, or null for random weights")
    try:
        with safe_open(str(path), framework="pt") as f:
            _check(f, model, path)
            for name, p in model.named_parameters():
                if name in mapped:
                    p.data = f.get_tensor(name)
                else:
                    tensor = _numbers(f, name)
                    if not tensor.isfinite().all():
                        raise ValueError(f"{path}: tensor {name} has NaN or infinity; give other weights")
                    p.copy_(tensor)
    except (SafetensorError, OSError) as e:
        raise header.unreadable(path, e) from None


def is_product(name: str) -> bool:
    """Return True for a parameter that engine.precision=fp8 multiplies in e4m3, and that a file may hold so."""
    return name.endswith((".uvqk.weight", ".out.weight")) or name == "head_hidden.weight"


def _numbers(f: safe_open, name: str) -> Tensor:
    """Return a tensor of the file. Rows in e4m3 come times their scales."""
    tensor: Tensor = f.get_tensor(name)
    return tensor.float() * f.get_tensor(name + SCALES) if f.get_slice(name).get_dtype() == _E4M3 else tensor


def check_ids(path: str | Path, ids: SemanticIds) -> None:
    """Raise ValueError if a generator's file says that it was trained with other semantic IDs.

    Its answers would be wrong, and no shape need differ.
    """
    try:
        with safe_open(str(path), framework="np") as f:
            trained = (f.metadata() or {}).get("semantic_ids")
    except (SafetensorError, OSError):
        return  # `load_weights` has the words
    if trained not in (None, ids.digest):
        raise ValueError(
            f"{path}: trained with other semantic IDs; set retrieval.semantic_ids to the file beside the weights"
        )


def _check(f: safe_open, model: HSTURanker | HSTUGenerator, path: str | Path) -> None:
    header.Header(str(path), frozenset(f.keys()), f.metadata() or {}).check_options(model.config, model.not_used)
    expected = dict(model.named_parameters())
    found = set(f.keys())
    for name, p in expected.items():
        if name not in found:
            raise ValueError(f"{path}: tensor {name} {list(p.shape)} is missing; give weights of this model")
    in_e4m3 = {name for name in expected if is_product(name) and f.get_slice(name).get_dtype() == _E4M3}
    for name in in_e4m3:
        rows = [expected[name].shape[0], 1]
        if name + SCALES not in found or f.get_slice(name + SCALES).get_shape() != rows:
            raise ValueError(f"{path}: tensor {name} is in e4m3 without {name}{SCALES} {rows}; run `grbench quantise`")
    if unexpected := sorted(found - expected.keys() - {name + SCALES for name in in_e4m3}):
        raise ValueError(f"{path}: unexpected tensor {unexpected[0]}; give weights of this model")
    for name, p in expected.items():
        tensor = f.get_slice(name)
        if tensor.get_shape() != list(p.shape):
            hint = "rows follow the workload's catalogue and model.embedding_rows" if name.endswith("_table") else ""
            raise ValueError(
                f"{path}: tensor {name} is {tensor.get_shape()}, expected {list(p.shape)}; "
                + (hint or "give weights of this model")
            )
        if name not in in_e4m3 and not tensor.get_dtype().startswith(header.FLOATS):
            raise ValueError(f"{path}: tensor {name} is {tensor.get_dtype()}, expected floating point; save it in fp32")
