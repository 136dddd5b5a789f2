"""Options of the AOTInductor engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import BucketOptions, option
from grengines.refusals import Asked, graphs_on_cpu
from grkernels.families import AUTO

VARIANTS = ("torch", "triton")  # kernel variants that can be part of a package


@dataclass
class AOTIEngineConfig(BucketOptions):
    """HSTU compiled ahead of time, with the kernel variants `torch` and `triton` of the `kernel` group."""

    name: str = option("aoti", "name of the engine")
    package: str | None = option(
        None, "a .pt2 of this engine, which contains machine code; null: from the cache, or built", file=True
    )
    fallback: list[str] = option([], "engines for requests that the package was not built for")


def contradiction(options: AOTIEngineConfig, asked: Asked) -> str | None:
    """Return None, or what can't be part of a package."""
    if asked.cache.item_memory_gb:
        return (
            f"cache.item_memory_gb={asked.cache.item_memory_gb:g}: a package has the whole table on the device; "
            "set cache.item_memory_gb=0"
        )
    for family, variant in asked.kernels.items():
        if variant not in (AUTO, *VARIANTS):
            return f"kernel.{family}={variant} can't be part of a package; those that can: {', '.join(VARIANTS)}"
    return graphs_on_cpu(options)
