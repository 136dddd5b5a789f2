"""From a model to files: a torch.export program, ONNX, and a manifest that says what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch.export import ExportedProgram

from grengines.api import Catalogue
from grengines.device import DTYPES
from grengines.export.module import INPUTS, OUTPUT, ExportedRanker, trace
from grengines.export.onnx_attention import DOMAIN, OPSET, VERSION, onnx_function, onnx_node, register_schema
from grengines.files import cache_folder, sha256
from grengines.hstu.batch import Encoding
from grengines.hstu.config import HSTUConfig
from grengines.hstu.engine import build_model

FORMAT = "grbench-export-1"
ONNX_FILE, WEIGHTS_FILE, PROGRAM_FILE, MANIFEST_FILE = "model.onnx", "model.onnx.data", "model.pt2", "manifest.json"
EXTERNAL_BYTES = 256 * 2**20  # weights of this size and more get a file of their own; ONNX allows 2 GiB in one
PACKAGES = ("torch", "onnx", "onnxscript")  # whose versions decide what an export holds


@dataclass(frozen=True)
class Export:
    """A folder that `export` wrote."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def onnx(self) -> Path:
        return self.folder / ONNX_FILE

    @property
    def program(self) -> Path:
        return self.folder / PROGRAM_FILE


def model_hash(model: HSTUConfig, catalogue: Catalogue, seed: int) -> str:
    """16 hex digits over all that decides what the model computes: its options, its tables' sizes, its weights.

    Raises ValueError for a weights file that can't be read.
    """
    options = {k: v for k, v in dataclasses.asdict(model).items() if k not in ("name", "weights")}
    encoding = dataclasses.asdict(Encoding.of(model, catalogue))
    return _digest({"options": options, "encoding": encoding, "weights": _weights(model, seed)})


def write_onnx(program: ExportedProgram, model: HSTUConfig, path: Path, metadata: dict[str, str]) -> None:
    """Write a program of `trace`, whose attention is `grbench::hstu_attention`, as ONNX. Raises OSError."""
    register_schema()
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(
        logging.ERROR
    )  # torchvision is not missed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's about its own use of torch
        result = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={torch.ops.grbench.hstu_attention.default: onnx_node},
            verbose=False,
        )
    assert result is not None
    body = onnx_function(model.scaling_seqlen, model.contextual_seq_len, model.max_attn_len)
    function = onnx_ir.serde.deserialize_function(body)
    result.model.functions[function.identifier()] = function
    result.model.opset_imports[DOMAIN] = VERSION
    result.model.graph.outputs[0].name = OUTPUT
    result.model.metadata_props.update(metadata)
    large = sum(p.nbytes for p in program.state_dict.values()) >= EXTERNAL_BYTES
    result.save(str(path), external_data=large)


def export(
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    precision: str,
    folder: Path,
    files: Collection[str] = (ONNX_FILE, PROGRAM_FILE),
) -> Export:
    """Write the model in fp32, fp16 or bf16 to `folder`, which is made, or replaced where an export is in it.

    files: which of the two forms. Whoever reads the folder finds a whole export or none. Raises ValueError for weights
    that don't fit or a folder with something else in it, OSError where it can't be written.
    """
    if folder.exists() and not (folder / MANIFEST_FILE).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty and holds no export; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    digest = model_hash(model, catalogue, seed)
    ranker = build_model(model, catalogue, seed, "cpu", DTYPES[precision])
    parameters = sum(p.numel() for p in ranker.parameters())
    program = trace(ExportedRanker(ranker))
    scratch = folder.parent / f".{folder.name}.{os.getpid()}"
    scratch.mkdir()
    try:
        if ONNX_FILE in files:
            write_onnx(program, model, scratch / ONNX_FILE, {"model_hash": digest, "precision": precision})
        if PROGRAM_FILE in files:
            torch.export.save(program, scratch / PROGRAM_FILE)
        manifest = {
            "format": FORMAT,
            "model_hash": digest,
            "precision": precision,
            "model": dataclasses.asdict(model),
            "catalogue": dataclasses.asdict(catalogue),
            "weights": _weights(model, seed),
            "parameters": parameters,
            "opset": OPSET,
            "domain": {DOMAIN: VERSION},
            "inputs": {n: {"dtype": str(t).removeprefix("torch."), "shape": s} for n, (t, s) in INPUTS.items()},
            "outputs": {OUTPUT: {"dtype": "float32", "shape": ["M", len(model.tasks)]}},
            "versions": versions(),
            "files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(scratch.iterdir())},
        }
        (scratch / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Export(folder, manifest)


def cached(model: HSTUConfig, catalogue: Catalogue, seed: int, precision: str, file: str = ONNX_FILE) -> Export:
    """The export of this model in that form from the cache folder, made now if it isn't there or not whole.

    Its folder's name says model, precision and versions, so that another of either never finds it.
    """
    digest = model_hash(model, catalogue, seed)
    folder = cache_folder() / "exports" / f"{digest}-{precision}-{Path(file).suffix[1:]}-{_digest(versions())[:8]}"
    try:
        return load(folder)
    except ValueError:
        return export(model, catalogue, seed, precision, folder, (file,))


def load(folder: Path) -> Export:
    """Open an export. Raises ValueError, one line, for a folder without one or whose files are not those written."""
    manifest_file = folder / MANIFEST_FILE
    again = "export the model again: python -m grengines.export"
    if not manifest_file.is_file():
        raise ValueError(f"{folder}: no {MANIFEST_FILE} there; {again}")
    try:
        manifest = json.loads(manifest_file.read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{manifest_file}: not a manifest of this version ({e}); {again}") from None
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; {again}")
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            raise ValueError(f"{path}: not as it was written (size or sha256 differ from {MANIFEST_FILE}); {again}")
    return Export(folder, manifest)


def versions() -> dict[str, str]:
    """Of the packages that decide what an export holds."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _weights(model: HSTUConfig, seed: int) -> str:
    if model.weights is None:
        return f"random, seed {seed}"
    path = Path(model.weights)
    if not path.is_file():
        raise ValueError(f"model.weights: no file {path}; give a safetensors file, or null for random weights")
    return f"sha256 {sha256(path)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
