"""Options of the baseline engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option
from grengines.refusals import Asked
from grkernels.families import AUTO


@dataclass
class HFEngineConfig(DeviceOptions):
    """A generate loop over padded batches and one contiguous cache, in PyTorch with Hugging Face transformers."""

    name: str = option("hf", "name of the engine")


def contradiction(options: HFEngineConfig, asked: Asked) -> str | None:
    """Return None, or which kernel is not PyTorch's."""
    for family, variant in asked.kernels.items():
        if variant not in (AUTO, "torch"):
            return f"kernel.{family}={variant}: engine hf is eager PyTorch; set kernel=auto"
    return None
