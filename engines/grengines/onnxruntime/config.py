"""Options of the ONNX Runtime engine. No torch or onnxruntime import here: configs compose fast."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import DeviceOptions, option
from grengines.refusals import Asked, own_kernels, whole_histories


@dataclass
class OnnxRuntimeConfig(DeviceOptions):
    """The exported ranking model in ONNX Runtime, whose own threads `cpu_threads` counts."""

    name: str = option("onnxruntime", "name of the engine")
    precision: str = option(
        "auto", "auto: fp16 on cuda, fp32 on cpu; bf16 needs cuda; int8, quantised at run time, needs a cpu",
        choices=["auto", "fp32", "fp16", "bf16", "int8"],
    )  # fmt: skip
    onnx: str | None = option(
        None, "an exported model.onnx; null: exported on first use, then from the cache", file=True
    )
    spinning: bool = option(False, "threads wait for work by spinning: faster alone, slower next to other work")
    optimisation: str = option(
        "all", "optimisation of the graph on loading", choices=["none", "basic", "extended", "all"]
    )
    tile_rows: int = option(0, "query rows of one attention step; 0: 128 on cpu, as many as fit on cuda", ge=0)


def contradiction(options: OnnxRuntimeConfig, asked: Asked) -> str | None:
    """Return None, or what the engine can't have: a cache, others' kernels, a precision of the other device."""
    if options.device == "cpu" and options.precision == "bf16":
        return "engine.precision=bf16 and engine.device=cpu: ONNX Runtime has no bf16 kernels there; use fp32 or fp16"
    if options.device == "cuda" and options.precision == "int8":
        return "engine.precision=int8 and engine.device=cuda: ONNX Runtime quantises on the CPU only; use fp16"
    return whole_histories(asked, "onnxruntime") or own_kernels(asked, "onnxruntime")
