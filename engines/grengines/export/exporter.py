"""Export of a model to files: a torch.export program, ONNX, and a manifest that identifies them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import shlex
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch.export import ExportedProgram

from grengines.api import Catalogue, UnavailableError
from grengines.export.identity import digest_of, model_hash, source_digest, weights_of
from grengines.export.module import INPUTS, OUTPUT, ExportedRanker, trace
from grengines.export.onnx_attention import DOMAIN, OPSET, VERSION, onnx_function, onnx_node, register_schema
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.runtime import atomic_io
from grengines.runtime.cache_dir import sha256
from grengines.runtime.device import DTYPES
from grkernels.cache_folder import cache_folder

FORMAT = "grbench-export-1"
ONNX_FILE, PROGRAM_FILE, MANIFEST_FILE = "model.onnx", "model.pt2", "manifest.json"
EXTERNAL_BYTES = 256 * 2**20  # larger weights get a file of their own, since ONNX limits a file to 2 GiB
PRECISIONS = (*DTYPES, "int8")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")  # their versions decide the content of an export


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


def write_onnx(
    program: ExportedProgram, model: HSTUConfig, path: Path, metadata: dict[str, str], skip_hidden: bool
) -> None:
    """Write a program of `trace`, whose attention is `grbench::hstu_attention`, as ONNX. Raises OSError."""
    register_schema()
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(
        logging.ERROR
    )  # it warns that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own use of torch
        result = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={torch.ops.grbench.hstu_attention.default: onnx_node},
            verbose=False,
        )
    assert result is not None
    body = onnx_function(model.scaling_seqlen, model.contextual_seq_len, model.max_attn_len, skip_hidden)
    function = onnx_ir.serde.deserialize_function(body)
    result.model.functions[function.identifier()] = function
    result.model.opset_imports[DOMAIN] = VERSION
    result.model.graph.outputs[0].name = OUTPUT
    result.model.metadata_props.update(metadata)
    result.save(str(path), external_data=_bytes(program) >= EXTERNAL_BYTES)


def quantise(whole: Path, path: Path, large: bool) -> None:
    """Quantise the projections of the fp32 ONNX file `whole`, in a folder of its own, with ONNX Runtime's quantiser.

    Weights are 8 bits with a scale and a zero point for each channel. Inputs are quantised at run time. The tables, the
    attention and the head's last product stay fp32. Raises UnavailableError without onnxruntime.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise UnavailableError("int8 needs package onnxruntime; pip install 'grbench[onnx]'") from None
    model = onnx.load(whole, load_external_data=False)
    # The quantiser transposes weights of Gemms. Where the file also states their old shapes, as PyTorch 2.11's does,
    # ONNX Runtime 1.30 finds a contradiction. It infers shapes by itself.
    del model.graph.value_info[:]
    onnx.save(model, whole)
    kept = [
        node.name
        for node in model.graph.node
        if any(name.endswith(("action_table", "head_out.weight")) for name in node.input)
    ]
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises preprocessing, which the exporter did
    try:
        quantize_dynamic(
            whole,
            path,
            weight_type=QuantType.QUInt8,  # signed weights overflow on processors without VNNI: errors of 10%
            per_channel=True,
            op_types_to_quantize=["MatMul"],  # and former Gemms; not Gather, which reads the tables
            nodes_to_exclude=[*kept, *(f"{name}_MatMul" for name in kept)],  # the second: the name of a former Gemm
            use_external_data_format=large,
        )
    finally:
        logging.disable(before)


def export(
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    precision: str,
    folder: Path,
    files: Collection[str] = (ONNX_FILE, PROGRAM_FILE),
    skip_hidden: bool = False,
    keep: bool = False,
) -> Export:
    """Write the model in a precision of PRECISIONS to `folder`, which is created, or replaced if it has an export.

    files: the forms to write; int8 is ONNX only. skip_hidden: as in `onnx_function`. keep: if another process was
    faster, keep and return its export. Readers of the folder find a complete export or none. Raises ValueError for
    weights that don't fit or a folder with other files, UnavailableError for int8 without onnxruntime, and OSError.
    """
    atomic_io.check(folder, MANIFEST_FILE, "export")
    digest = model_hash(model, catalogue, seed)
    ranker = build_model(model, catalogue, seed, "cpu", DTYPES["fp32" if precision == "int8" else precision])
    parameters = sum(p.numel() for p in ranker.parameters())
    program = trace(ExportedRanker(ranker))
    with atomic_io.scratch(folder) as scratch:
        if ONNX_FILE in files:
            metadata = {"model_hash": digest, "precision": precision}
            if precision == "int8":
                whole = scratch / "fp32" / ONNX_FILE
                whole.parent.mkdir()
                write_onnx(program, model, whole, metadata, skip_hidden)
                quantise(whole, scratch / ONNX_FILE, _bytes(program) >= EXTERNAL_BYTES)
                shutil.rmtree(whole.parent)
            else:
                write_onnx(program, model, scratch / ONNX_FILE, metadata, skip_hidden)
        if PROGRAM_FILE in files and precision != "int8":
            torch.export.save(program, scratch / PROGRAM_FILE)
        manifest = {
            "format": FORMAT,
            "model_hash": digest,
            "precision": precision,
            "skip_hidden": skip_hidden,
            "model": dataclasses.asdict(model),
            "catalogue": dataclasses.asdict(catalogue),
            "weights": weights_of(model, seed),
            "parameters": parameters,
            "opset": OPSET,
            "domain": {DOMAIN: VERSION},
            "inputs": {n: {"dtype": str(t).removeprefix("torch."), "shape": s} for n, (t, s) in INPUTS.items()},
            "outputs": {OUTPUT: {"dtype": "float32", "shape": ["M", len(model.tasks)]}},
            "versions": versions(),
            "files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(scratch.iterdir())},
        }
        (scratch / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        while not atomic_io.publish(scratch, folder):
            if keep:
                with contextlib.suppress(ValueError):
                    return load(folder)
            atomic_io.discard(folder)
    return Export(folder, manifest)


def cached(
    model: HSTUConfig,
    catalogue: Catalogue,
    seed: int,
    precision: str,
    file: str = ONNX_FILE,
    skip_hidden: bool = False,
) -> Export:
    """Return the export of this model from the cache folder, which is made if it is missing or incomplete.

    The folder's name has the model, the precision, and a digest of versions and of the code that exports or is
    exported, so that no other combination finds it. Raises as `export`.
    """
    facts = {"versions": versions(), "source": source_digest(), "file": file, "skip_hidden": skip_hidden}
    folder = cache_folder() / "exports" / f"{model_hash(model, catalogue, seed)}-{precision}-{digest_of(facts)[:8]}"
    try:
        return load(folder)
    except ValueError:
        return export(model, catalogue, seed, precision, folder, (file,), skip_hidden, keep=True)


def note(found: Export, key: str, value: Any) -> Export:
    """Add an entry to an export's manifest, also on disk. Raises OSError."""
    manifest = {**found.manifest, key: value}
    atomic_io.write(found.folder / MANIFEST_FILE, (json.dumps(manifest, indent=1) + "\n").encode())
    return Export(found.folder, manifest)


def load(folder: Path) -> Export:
    """Open an export. Raises ValueError, one line, for a folder without one or with changed files."""
    manifest_file = folder / MANIFEST_FILE
    again = f"export the model again: python -m grbench export --out {shlex.quote(str(folder))}"
    if not manifest_file.is_file():
        raise ValueError(f"{folder}: no {MANIFEST_FILE}; {again}")
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
    """Return the versions of the installed packages that decide the content of an export."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _bytes(program: ExportedProgram) -> int:
    return sum(p.nbytes for p in program.state_dict.values())
