"""Ranking quality by precision: the loss of AUC and normalised entropy with a trained model.

    python -m grbench train workload.max_history=128 'model.tasks=[rated,liked]' out=outputs/ranker
    python experiments/precisions.py model.weights=outputs/ranker/weights.safetensors

Engines rank the held-out requests of MovieLens-100K, and grbench/gate/quality.py compares them with the fp32 reference.
The Q/DQ rows are the models that TensorRT's plans of that precision are built from: fp16 with 8-bit projections, with
scales from earlier requests. ONNX Runtime runs them in wider types, with the plan's rounding but not its kernels.
The rows "rounded" have no engine: the reference itself rounds operands of products, of attention or of both to fp8, as
it does for the tolerance of engines that have these. Any machine computes them, and heads may have any size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from grbench import workloads
from grbench.config.schema import RunSpec
from grbench.gate import quality
from grbench.gate.rank import coarsest
from grbench.quality.rankings import Rankings
from grbench.quality.references import References
from grengines.export import exporter
from grengines.models.hstu.reference import RankingReference
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
ROUNDED: dict[str, dict[str, Any]] = {  # options of RankingReference.scores
    "rounded: bf16": {"precision": "bf16"},
    "rounded: bf16, attention in fp8": {"precision": "bf16", "fp8_attention": True},
    "rounded: products in fp8": {"precision": "fp8"},
    "rounded: products and attention in fp8": {"precision": "fp8", "fp8_attention": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--case", action="append", metavar="OVERRIDES", help="an engine, by its overrides; repeat it")
    some.add_argument("--rounded", action="store_true", help="only the rows without an engine")
    args = parser.parse_args(arguments)
    [base] = common.specs_of(parser, DEFAULTS, args.overrides, multirun=False)
    if base.model.weights is None:
        parser.error("model.weights=FILE is needed; `grbench train` writes one")
    rows = common.Rows(args, __file__, arguments)
    trace = workloads.build(base.workload, base.seed, base.latency_limit_ms)
    held_out = trace.requests[-base.gate.quality_requests :]
    rankings = quality.rankings_of(base, trace)
    assert rankings is not None  # the model has weights and the workload has labels
    if not args.case:
        add_rounded(rows, base, rankings)
    with tempfile.TemporaryDirectory() as folder:
        references = References.of_process(Path(folder))
        cases = {} if args.rounded else {case: case.split() for case in args.case or CASES}
        if cases and not args.case:
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
            found = quality.measure(spec, trace, engine, coarsest(actual), actual["device"], references)
            engine.close()
            assert found is not None and found[0] is not None  # as `rankings`
            add(rows, case, found[0])
    users = len({r.user_id for r in rankings.requests})
    candidates = sum(map(len, rankings.labels))
    rows.note(
        f"{len(rankings.indices)} held-out requests of {users} users, {candidates} labelled candidates; losses are "
        "shares of the fp32 reference's figures, low and high their 95% interval over users, of pairs."
    )
    rows.close()


def add_rounded(rows: common.Rows, spec: RunSpec, rankings: Rankings) -> None:
    """Add the rows of ROUNDED."""
    reference = RankingReference(spec.ranking_model, rankings.trace.catalogue, spec.seed, "cpu")
    expected = reference.scores(rankings.requests)
    for case, options in ROUNDED.items():
        found = reference.scores(rankings.requests, **options)
        add(rows, case, quality.compare(found, expected, rankings, case))


def add(rows: common.Rows, case: str, beside: quality.Quality) -> None:
    """Add a row for each task."""
    verdict = "passes" if beside.worst_loss <= quality.MAX_LOSS else "INCORRECT unless gate.allow_loss names it"
    for task, figures in beside.tasks.items():
        losses = {"auc": figures.auc, "auc_reference": figures.auc_reference, "auc_loss": figures.auc_loss}
        losses |= {"auc_loss_low": figures.auc_loss_interval[0], "auc_loss_high": figures.auc_loss_interval[1]}
        losses |= {"ne": figures.ne, "ne_reference": figures.ne_reference, "ne_loss": figures.ne_loss}
        losses |= {"ne_loss_low": figures.ne_loss_interval[0], "ne_loss_high": figures.ne_loss_interval[1]}
        rows.add(case=case, task=task, **losses, top_k_overlap=beside.top_k_overlap, gate=verdict)


if __name__ == "__main__":
    common.run(main)
