"""Options of the native engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import GraphOptions, option


@dataclass
class HSTUEngineConfig(GraphOptions):
    """The native engine: HSTU in PyTorch with the kernel variants that the `kernel` group names."""

    name: str = option("hstu", "name of the engine")
    candidate_microbatch: int = option(
        0, "M-FALCON: prefill once, then rank this many candidates at a time; 0: all in one pass", ge=0
    )
