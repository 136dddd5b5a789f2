"""Options of the ONNX Runtime engine. No torch or onnxruntime import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option


@dataclass
class OnnxRuntimeConfig(DeviceOptions):
    """The exported ranking model in ONNX Runtime, whose own threads `cpu_threads` counts."""

    name: str = "onnxruntime"
    # auto: fp16 on cuda, fp32 on cpu. int8: quantised at run time, cpu only. bf16: cuda only.
    precision: str = option("auto", choices=["auto", "fp32", "fp16", "bf16", "int8"])
    onnx: str | None = None  # an exported model.onnx; null: exported on first use, then from the cache folder
    spinning: bool = False  # threads wait for work by spinning: faster alone, slower beside other work
    optimisation: str = option("all", choices=["none", "basic", "extended", "all"])  # of the graph, on loading
    tile_rows: int = option(0, ge=0)  # query rows that attention takes at a time; 0: 128 on cpu, what fits on cuda
