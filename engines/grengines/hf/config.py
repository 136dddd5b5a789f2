"""Options of the baseline engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option


@dataclass
class HFEngineConfig(DeviceOptions):
    """A generate loop over padded batches and one contiguous cache, in PyTorch with Hugging Face transformers."""

    name: str = option("hf", "name of the engine")
