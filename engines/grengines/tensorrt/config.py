"""Options of the TensorRT engine. No torch or TensorRT import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


@dataclass
class TensorRTConfig:
    """The exported ranking model in TensorRT, or in TensorRT for RTX."""

    name: str = "tensorrt"
    library: str = option("auto", choices=["auto", "tensorrt", "tensorrt_rtx"])  # auto: the first that is installed
    # auto: bf16. int8 and fp8: the layers' products, with scales from the workload; the rest is fp16.
    precision: str = option("auto", choices=["auto", *PRECISIONS])
    profiles: int = option(2, ge=1, le=8)  # of batches up to so many quantiles of the workload's lengths
    calibration: int = option(16, ge=0, le=4096)  # requests that int8's and fp8's scales are taken from
    refit: bool = False  # a plan of one shape serves any weights: new ones are put into it
    plugin: bool = True  # attention by the project's Triton kernel (tensorrt only); false: by the body in ONNX
    cuda_graphs: bool = False  # one captured graph for each (batch, length) bucket
    plan: str | None = None  # a folder that `grbench build-plan` wrote; null: from the cache, or built
    fallback: list[str] = option([])  # engines that answer what the plan was not built for
