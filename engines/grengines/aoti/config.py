"""Options of the AOTInductor engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class AOTIEngineConfig:
    """HSTU compiled ahead of time, with the kernel variants `torch` and `triton` of the `kernel` group."""

    name: str = "aoti"
    device: str = option("auto", choices=["auto", "cpu", "cuda"])  # auto: cuda where there is one
    precision: str = option("auto", choices=["auto", "fp32", "fp16", "bf16"])  # auto: bf16 on cuda, fp32 on cpu
    cpu_threads: int = option(0, ge=0, le=1024)  # 0: as many as torch chooses
    cuda_graphs: bool = False  # capture one graph for each (batch, length) bucket
    graph_lengths: list[int] = option([], ge=16)  # length buckets in tokens; empty: 16, 24, 32, 48, ... as needed
    package: str | None = None  # run this package, which holds machine code; null: from the cache, built if need be
    fallback: list[str] = option([])  # engines that answer what the package was not built for
