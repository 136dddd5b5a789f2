"""Options of the TensorRT engine. No torch or TensorRT import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option
from grengines.refusals import Asked, own_kernels, whole_histories

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
SCALED = ("int8", "fp8")  # by scales from the workload


@dataclass
class TensorRTConfig:
    """The exported ranking model in TensorRT, or in TensorRT for RTX."""

    name: str = option("tensorrt", "name of the engine")
    library: str = option(
        "auto", "auto: the first that is installed, tensorrt before tensorrt_rtx",
        choices=["auto", "tensorrt", "tensorrt_rtx"],
    )  # fmt: skip
    precision: str = option(
        "auto", "auto: bf16; int8 and fp8: the products of the layers, with scales from the workload, the rest in fp16",
        choices=["auto", *PRECISIONS],
    )  # fmt: skip
    profiles: int = option(
        2, "optimisation profiles, for batches up to this many quantiles of the workload's lengths", ge=1, le=8
    )
    calibration: int = option(
        16, "requests that the scales of int8 and fp8 come from", ge=0, le=4096, only_with={"precision": SCALED}
    )
    refit: bool = option(False, "one plan for any weights of this shape")
    plugin: bool = option(
        True, "attention by the project's Triton kernel (tensorrt only); false: by the body in ONNX",
        only_with={"library": ("auto", "tensorrt")},
    )  # fmt: skip
    cuda_graphs: bool = option(False, "capture a graph for each bucket of batch and length")
    plan: str | None = option(None, "a folder of `grbench build-plan`; null: from the cache, or built", file=True)
    fallback: list[str] = option([], "engines for requests that the plan was not built for")


def contradiction(options: TensorRTConfig, asked: Asked) -> str | None:
    """Return None, or what the engine can't have: a cache, others' kernels, other weights for scales."""
    if options.refit and options.precision in SCALED:
        return (
            f"engine.refit=true and engine.precision={options.precision}: scales belong to one set of weights; "
            "set engine.refit=false"
        )
    hint = " (engine.plugin has attention in Triton)"
    return whole_histories(asked, "tensorrt") or own_kernels(asked, "tensorrt", hint)
