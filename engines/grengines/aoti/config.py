"""Options of the AOTInductor engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option


@dataclass
class AOTIEngineConfig(DeviceOptions):
    """HSTU compiled ahead of time, with the kernel variants `torch` and `triton` of the `kernel` group."""

    name: str = "aoti"
    cuda_graphs: bool = False  # capture one graph for each (batch, length) bucket
    graph_lengths: list[int] = option([], ge=16)  # length buckets in tokens; empty: 16, 24, 32, 48, ... as needed
    package: str | None = None  # run this package, which holds machine code; null: from the cache, built if need be
    fallback: list[str] = option([])  # engines that answer what the package was not built for
