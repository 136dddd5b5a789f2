"""The device, the precision and the threads that an engine's options ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from grengines import registry
from grengines.api import UnavailableError
from grengines.options import DeviceOptions

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRODUCTS = {"fp8": "bf16"}  # precisions of products only, each with that of everything else


class PrecisionOptions(Protocol):
    """Options of an engine that has a precision."""

    name: str
    precision: str


@dataclass(frozen=True)
class Placement:
    """The device and the precision of an engine, and PyTorch's threads on a CPU (0: PyTorch's own choice)."""

    device: torch.device
    precision: str
    cpu_threads: int = 0

    @classmethod
    def of(cls, options: DeviceOptions) -> Placement:
        """Resolve `auto`: cuda if there is a GPU, and the precision by the engine's row.

        Raises UnavailableError for cuda if PyTorch can't use a GPU.
        """
        usable = torch.cuda.is_available()
        if options.device == "cuda" and not usable:
            why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no NVIDIA GPU"
            raise UnavailableError(
                f"engine.device=cuda: {why}; use engine.device=cpu, or a CUDA build of torch and an NVIDIA GPU"
            )
        on_gpu = usable and options.device != "cpu"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU
        return cls(device, precision_of(options, on_gpu), options.cpu_threads)


def precision_of(options: PrecisionOptions, on_gpu: bool) -> str:
    """Return the precision that an engine's options ask for: for `auto`, that of the engine's row in the registry."""
    return options.precision if options.precision != "auto" else registry.auto_precision(options.name, on_gpu)
