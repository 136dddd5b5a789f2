"""Files of an import: the weights, and a YAML of the group `model` that names them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from grbench.importing.parts import Imported
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.weights import metadata_of
from grengines.options import violations
from grengines.overrides import literal
from grengines.runtime import atomic_io


def write(imported: Imported, out: Path) -> Path:
    """Write the weights to `out` and their options to model/NAME.yaml beside it, and return that path.

    Raises ValueError for options that grbench does not allow, and OSError.
    """
    tensors = {name: tensor.float().contiguous() for name, tensor in imported.tensors.items()}
    metadata = {"format": "pt"}
    if imported.schema == "hstu":
        config = HSTUConfig(**imported.options)
        if wrong := list(violations(config)):
            raise ValueError(f"model.{wrong[0]}")
        metadata = metadata_of(config)
    try:
        with atomic_io.replacing(out) as made:
            save_file(tensors, str(made), metadata=metadata)
    except SafetensorError as e:
        raise OSError(f"{out}: can't write weights: {e}") from None
    path = out.parent / "model" / f"{out.stem}.yaml"
    options = {"name": out.stem, **imported.options}
    if imported.weights_key == "model.weights":
        options["weights"] = literal(str(out.absolute()))
    head = f"defaults: [/schema/model/{imported.schema}@_here_, _self_]\n"
    atomic_io.write(path, (head + yaml.safe_dump(json.loads(json.dumps(options)), sort_keys=False)).encode())
    return path
