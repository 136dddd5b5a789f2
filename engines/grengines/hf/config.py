"""Options of the baseline engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class HFEngineConfig:
    """A generate loop over padded batches and one contiguous cache, in PyTorch with Hugging Face transformers."""

    name: str = "hf"
    device: str = option("auto", choices=["auto", "cpu", "cuda"])  # auto: cuda where there is one
    precision: str = option("auto", choices=["auto", "fp32", "fp16", "bf16"])  # auto: bf16 on cuda, fp32 on cpu
    cpu_threads: int = option(0, ge=0, le=1024)  # 0: as many as torch chooses
