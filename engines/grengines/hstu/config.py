"""Options of the native engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option


@dataclass
class HSTUEngineConfig(DeviceOptions):
    """The native engine: HSTU in PyTorch with the kernel variants that the `kernel` group names."""

    name: str = "hstu"
    candidate_microbatch: int = option(0, ge=0)  # M-FALCON: prefill once, score this many at a time; 0: all in one pass
    cuda_graphs: bool = False  # capture one graph for each (batch, length) bucket
    graph_lengths: list[int] = option([], ge=16)  # length buckets in tokens; empty: 16, 24, 32, 48, ... as needed
