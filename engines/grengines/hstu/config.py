"""Options of the native engine. No torch import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class HSTUEngineConfig:
    """The native engine: HSTU in PyTorch with the kernel variants that the `kernel` group names."""

    name: str = "hstu"
    device: str = option("auto", choices=["auto", "cpu", "cuda"])  # auto: cuda where there is one
    precision: str = option("auto", choices=["auto", "fp32", "fp16", "bf16"])  # auto: bf16 on cuda, fp32 on cpu
    cpu_threads: int = option(0, ge=0, le=1024)  # 0: as many as torch chooses
    candidate_microbatch: int = option(0, ge=0)  # M-FALCON: prefill once, score this many at a time; 0: all in one pass
    cuda_graphs: bool = False  # capture one graph for each (batch, length) bucket
    graph_lengths: list[int] = option([], ge=16)  # length buckets in tokens; empty: 16, 24, 32, 48, ... as needed
