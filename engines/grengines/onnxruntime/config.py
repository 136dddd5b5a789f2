"""Options of the ONNX Runtime engine. No torch or onnxruntime import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class OnnxRuntimeConfig:
    """The exported ranking model in ONNX Runtime."""

    name: str = "onnxruntime"
    device: str = option("auto", choices=["auto", "cpu", "cuda"])  # auto: cuda where this ONNX Runtime can use it
    # auto: fp16 on cuda, fp32 on cpu. int8: dynamic, cpu only. bf16: cuda only.
    precision: str = option("auto", choices=["auto", "fp32", "fp16", "bf16", "int8"])
    onnx: str | None = None  # an exported model.onnx; null: exported on first use, then from the cache folder
    cpu_threads: int = option(0, ge=0, le=1024)  # 0: as many as ONNX Runtime chooses
    spinning: bool = False  # threads wait for work by spinning: faster alone, slower beside other work
    optimisation: str = option("all", choices=["none", "basic", "extended", "all"])  # of the graph, on loading
    tile_rows: int = option(0, ge=0)  # query rows that attention takes at a time; 0: 128 on cpu, what fits on cuda
