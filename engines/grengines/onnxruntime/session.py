"""Sessions of ONNX Runtime, and one-line errors for files that it can't open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch

from grengines import registry
from grengines.api import UnavailableError
from grengines.export.module import INPUTS, OUTPUT
from grengines.onnxruntime.config import OnnxRuntimeConfig
from grengines.runtime.device import CPU, Placement

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def placement_of(options: OnnxRuntimeConfig) -> Placement:
    """Resolve `auto`: cuda if ONNX Runtime and PyTorch, which holds the inputs, can use a GPU, and the precision.

    PyTorch's threads stay as they are. Raises UnavailableError for a device or a precision that ONNX Runtime lacks.
    """
    provider = PROVIDERS["cuda"] in onnxruntime.get_available_providers()
    usable = provider and torch.cuda.is_available()
    if options.device == "cuda" and not usable:
        why = "PyTorch finds no NVIDIA GPU" if provider else "this ONNX Runtime has no CUDA provider"
        raise UnavailableError(
            f"engine.device=cuda: {why}; use engine.device=cpu, or pip install onnxruntime-gpu on a machine with a GPU"
        )
    on_gpu = usable and options.device != "cpu"
    precision = registry.precision_of(options, usable)
    if precision == "bf16" and not on_gpu:
        raise UnavailableError(
            "engine.precision=bf16: ONNX Runtime's CPU provider has no bf16 kernels; use fp32, fp16 or int8"
        )
    if precision == "int8" and on_gpu:
        raise UnavailableError(
            "engine.precision=int8: ONNX Runtime quantises at run time on the CPU only; use fp16, or engine.device=cpu"
        )
    return Placement(torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU, precision)


def open_session(
    path: Path, config: OnnxRuntimeConfig, device: torch.device, stream: int, digest: str, precision: str, hint: str
) -> Any:
    """Open the file, which must be the export of model `digest` in `precision`.

    stream: handle of the CUDA stream to run on. hint: the fix that error messages name. Raises ValueError for a file
    that is missing, damaged or not this export, UnavailableError if the provider can't run it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = config.cpu_threads
    options.graph_optimization_level = _LEVELS[config.optimisation]
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(config.spinning)))
    provider: Any = PROVIDERS[device.type]
    if device.type == "cuda":
        onnxruntime.preload_dlls()  # PyTorch's CUDA libraries, or those that pip installed
        provider = (provider, {"device_id": str(device.index), "user_compute_stream": str(stream)})
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as e:  # ONNX Runtime's exceptions have no narrower base class
        why = _first_line(e)
        if type(e).__name__ == "NotImplemented":
            raise UnavailableError(f"engine onnxruntime, {precision} on {device.type}: {why}; use fp32") from None
        raise ValueError(f"{path}: ONNX Runtime can't load it ({why}); {hint}") from None
    if session.get_providers()[0] != PROVIDERS[device.type]:  # it continues without a provider that it can't start
        raise UnavailableError(
            f"engine.device={device.type}: ONNX Runtime could not start its {PROVIDERS[device.type]}; "
            "python -m grbench doctor shows the versions, engine.device=cpu needs none of its libraries"
        )
    facts = session.get_modelmeta().custom_metadata_map
    if [i.name for i in session.get_inputs()] != list(INPUTS) or [o.name for o in session.get_outputs()] != [OUTPUT]:
        raise ValueError(f"{path}: not an export of a ranking model; {hint}")
    for what, expected in (("model_hash", digest), ("precision", precision)):
        if facts.get(what) != expected:
            raise ValueError(f"{path}: exported with {what} {facts.get(what)}, the run's is {expected}; {hint}")
    return session


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
