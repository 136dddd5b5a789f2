"""Where an engine runs and in what precision, from its options."""

from __future__ import annotations

import torch

from grengines.api import UnavailableError

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(choice: str) -> torch.device:
    """auto, cpu or cuda -> a device. Raises UnavailableError where that needs a GPU that PyTorch can't use."""
    usable = torch.cuda.is_available()
    if choice == "cuda" and not usable:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no NVIDIA GPU"
        raise UnavailableError(
            f"engine.device=cuda: {why}; use engine.device=cpu, or a CUDA build of torch and an NVIDIA GPU"
        )
    return torch.device("cuda", torch.cuda.current_device()) if usable and choice != "cpu" else CPU


def resolve_precision(choice: str, device: torch.device) -> str:
    """auto -> bf16 on a GPU, fp32 on a CPU."""
    return choice if choice != "auto" else "bf16" if device.type == "cuda" else "fp32"
