"""The device that an engine's options ask for, and the precisions that an engine computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grengines.api import UnavailableError
from grengines.options import DeviceOptions

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRODUCTS = {"fp8": "bf16"}  # precisions of products only, each with that of everything else


@dataclass(frozen=True)
class Placement:
    """The device and the precision of an engine, and PyTorch's threads on a CPU (0: PyTorch's own choice)."""

    device: torch.device
    precision: str
    cpu_threads: int = 0


def chosen_device(options: DeviceOptions) -> torch.device:
    """Return the device; `auto` is cuda if there is a GPU.

    Raises UnavailableError for cuda if PyTorch can't use a GPU.
    """
    usable = torch.cuda.is_available()
    if options.device == "cuda" and not usable:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no NVIDIA GPU"
        raise UnavailableError(
            f"engine.device=cuda: {why}; use engine.device=cpu, or a CUDA build of torch and an NVIDIA GPU"
        )
    return torch.device("cuda", torch.cuda.current_device()) if usable and options.device != "cpu" else CPU
