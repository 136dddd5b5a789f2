"""Options of the AOTInductor engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import GraphOptions, option


@dataclass
class AOTIEngineConfig(GraphOptions):
    """HSTU compiled ahead of time, with the kernel variants `torch` and `triton` of the `kernel` group."""

    name: str = option("aoti", "name of the engine")
    package: str | None = option(
        None, "a .pt2 of this engine, which contains machine code; null: from the cache, or built"
    )
    fallback: list[str] = option([], "engines for requests that the package was not built for")
