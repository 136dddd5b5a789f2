"""Ranking quality by precision: the loss of AUC and normalised entropy with a trained model.

    python -m grbench train workload.max_history=128 'model.tasks=[rated,liked]' out=outputs/ranker
    python experiments/precisions.py model.weights=outputs/ranker/weights.safetensors

Engines rank the held-out requests of MovieLens-100K, and grbench/gate/quality.py compares them with the fp32 reference.
The Q/DQ rows are the models that TensorRT's plans of that precision are built from: fp16 with 8-bit projections, with
scales from earlier requests. ONNX Runtime runs them in wider types, with the plan's rounding but not its kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import common

from grbench import workloads
from grbench.gate import quality
from grbench.gate.rank import coarsest
from grengines.export import exporter
from grengines.runtime.batch import Encoding
from grengines.tensorrt import sample as samples
from grengines.tensorrt.quantise import quantise

CASES = [
    "engine=hstu engine.precision=fp32",
    "engine=hstu engine.precision=fp16",
    "engine=hstu engine.precision=bf16",
    "engine=hstu engine.precision=fp8",
    "engine=onnxruntime engine.precision=fp32",
    "engine=onnxruntime engine.precision=fp16",
    "engine=onnxruntime engine.precision=int8",
]
DEFAULTS = ["workload=ml_100k", "workload.max_history=128", "model=hstu_tiny", "model.tasks=[rated,liked]"]
EIGHT_BITS = ("int8", "fp8")
CALIBRATION = 16  # requests, as engine.calibration


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--case", action="append", metavar="OVERRIDES", help="an engine, by its overrides; repeat it")
    args = parser.parse_args(arguments)
    [base] = common.specs_of(parser, DEFAULTS, args.overrides, multirun=False)
    if base.model.weights is None:
        parser.error("model.weights=FILE is needed; `grbench train` writes one")
    rows = common.Rows(args, __file__, arguments)
    trace = workloads.build(base.workload, base.seed, base.latency_limit_ms)
    held_out = trace.requests[-base.gate.quality_requests :]
    with tempfile.TemporaryDirectory() as folder:
        cases = {case: case.split() for case in args.case or CASES}
        if not args.case:
            half = exporter.cached(base.model, trace.catalogue, base.seed, "fp16").onnx
            seen = trace.requests[: -base.gate.quality_requests]
            feeds = samples.feeds(seen, Encoding.of(base.model, trace.catalogue), CALIBRATION, tile_rows=128)
            for kind in EIGHT_BITS:
                onnx = quantise(half, Path(folder) / f"{kind}.onnx", kind, feeds)
                cases[f"Q/DQ {kind}"] = ["engine=onnxruntime", "engine.precision=fp16", f"engine.onnx={onnx}"]
        for case, words in cases.items():
            [spec] = common.specs_of(parser, DEFAULTS, [*args.overrides, *words], multirun=False)
            try:
                engine = common.engine_of(spec, held_out, spec.scenario.max_batch, trace.catalogue)
            except Exception as e:  # other precisions are compared all the same
                rows.fail(e, case=case)
                continue
            actual = engine.actual()
            found = quality.measure(spec, trace, engine, coarsest(actual), actual["device"])
            engine.close()
            assert found is not None  # the model has weights and the workload has labels
            beside, _ = found
            verdict = "passes" if beside.worst_loss <= quality.MAX_LOSS else "INCORRECT unless gate.allow_loss names it"
            for task, figures in beside.tasks.items():
                losses = {"auc": figures.auc, "auc_reference": figures.auc_reference, "auc_loss": figures.auc_loss}
                losses |= {"auc_loss_low": figures.auc_loss_interval[0], "auc_loss_high": figures.auc_loss_interval[1]}
                losses |= {"ne": figures.ne, "ne_reference": figures.ne_reference, "ne_loss": figures.ne_loss}
                rows.add(case=case, task=task, **losses, top_k_overlap=beside.top_k_overlap, gate=verdict)
    rows.note(f"{beside.requests} held-out requests, {beside.candidates} labelled candidates; losses are shares.")
    rows.close()


if __name__ == "__main__":
    common.run(main)
