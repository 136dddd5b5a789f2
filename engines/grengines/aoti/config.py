"""Options of the AOTInductor engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option


@dataclass
class AOTIEngineConfig(DeviceOptions):
    """HSTU compiled ahead of time, with the kernel variants `torch` and `triton` of the `kernel` group."""

    name: str = option("aoti", "name of the engine")
    cuda_graphs: bool = option(False, "on cuda: capture a graph for each bucket of batch and length")
    graph_lengths: list[int] = option(
        [], "length buckets in tokens; empty: 16, 24, 32, 48, ... up to the longest", ge=16
    )
    package: str | None = option(
        None, "a .pt2 of this engine, which contains machine code; null: from the cache, or built"
    )
    fallback: list[str] = option([], "engines for requests that the package was not built for")
