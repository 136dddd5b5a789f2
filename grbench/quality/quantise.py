"""`grbench quantise`: a trained ranker's products in e4m3, what each loses in rounding, and what the answers lose."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from grbench.config.arguments import Arguments, CommandError
from grbench.config.compose import plan_jobs, prepare_hydra
from grbench.config.schema import ConfigError, RunSpec, to_spec
from grbench.execution.folders import require_parent
from grbench.execution.watch import watch
from grbench.quality.trained import as_run
from grbench.report.markdown import table
from grbench.workloads.item_map import map_of
from grengines.overrides import override
from grengines.runtime import atomic_io


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Write a trained ranker's weights with its products in e4m3 and a scale for each output channel. Shown are "
        "outliers and rounding errors of each product's weight and operands, with these scales and with one scale for "
        "all, and the loss of AUC and normalised entropy against fp32, with 95% intervals over users."
    )
    examples = [
        "quantise engine=hstu model.weights=outputs/ranker/weights.safetensors 'model.tasks=[rated,liked]' "
        "--out outputs/e4m3.safetensors",
    ]
    parser = Arguments("quantise", about, examples, "overrides as in `grbench evaluate`")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="safetensors file to write")
    parser.add_argument("--requests", type=int, default=16, help="requests that show the operands (default 16)")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done, 1 written but fp8 cannot run here, 2 the input cannot be used."""
    args = parser().parse_intermixed_args(words)
    if args.out.suffix != ".safetensors":
        raise CommandError(f"--out {args.out}: allowed is a name that ends in .safetensors")
    if args.requests < 1:
        raise CommandError(f"--requests {args.requests}: allowed is >= 1")
    require_parent(args.out)
    prepare_hydra()
    run_words = [*as_run(args.overrides)[0], "engine.precision=fp8"]
    say = partial(print, "grbench quantise:", file=sys.stderr, flush=True)
    _, jobs = plan_jobs("config", to_spec, run_words, False, args.config_dir, say)
    from grengines.api import UnavailableError
    from grengines.numerics import IncorrectError

    try:
        spec, _ = jobs[0].config
        _check(spec, args.out)
        print(_written(spec, args.out, args.requests, say))
    except UnavailableError as e:
        say(f"UNAVAILABLE: {e}; or set engine.device=cpu")
        return 1
    except (ValueError, OSError, IncorrectError) as e:
        raise e if isinstance(e, CommandError) else CommandError(" ".join(str(e).split())) from e
    return 0


def _check(spec: RunSpec, out: Path) -> None:
    if spec.engine.name != "hstu" or spec.task != "rank":
        raise ConfigError(f"engine={spec.engine.name} task={spec.task}: allowed is engine=hstu task=rank")
    weights = spec.ranking_model.weights
    if weights is None:
        raise ConfigError("model.weights=null: random weights have no quality; give a file, or run `grbench train`")
    if out.exists() and out.samefile(weights):
        raise ConfigError(f"--out {out}: it is model.weights; give another file")


def _written(spec: RunSpec, out: Path, count: int, say: Any) -> str:
    """Write the file and its map of items, then evaluate. Returns the page."""
    import torch

    from grbench import workloads
    from grbench.gate.base import sample
    from grbench.quality.evaluate import evaluate
    from grbench.quality.references import References
    from grengines.models.hstu import calibration
    from grengines.models.hstu.model import build_model
    from grkernels.operators import Operators

    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    model = build_model(spec.ranking_model, trace.catalogue, spec.seed, "cpu", torch.float32, Operators.reference())
    operands = calibration.operands(model, sample(trace.requests, count, spec.seed))
    source = Path(str(spec.ranking_model.weights))
    weights = calibration.write(source, out)
    if map_of(source).is_file():
        atomic_io.write(map_of(out), map_of(source).read_bytes())
    say(f"{out} is written")
    evaluation = evaluate(spec, 0, References(Path(), None), say, partial(watch, Console(stderr=True)))
    head = ["product", "spread", "outlier", "error", "with one scale"]
    rounding = [
        [f"{name.removesuffix('.weight')}, {kind}", *(f"{x:.3g}" for x in vars(loss).values())]
        for name, weight in weights.items()
        for kind, loss in (("weight", weight), ("operand", operands[name]))
    ]
    lost = [
        [name, f"{evaluation.figures[name].value:.4f}", f"{loss.value:.3%} ({loss.low:.3%} to {loss.high:.3%})"]
        for name, loss in evaluation.losses.items()
    ]
    parts = [
        table(head, rounding),
        "spread: the largest scale over the median one; outlier: the largest number of a row over the row's root mean "
        "square; error: relative, of rounding with a scale for each output channel or row, which are computed while "
        "the model runs; with one scale: for the weight, or for all rows of these requests (static).",
        f"{evaluation.requests:,} requests of {evaluation.users:,} users, answered in fp8:",
        table(["figure", "fp8", "loss against fp32 (95% interval)"], lost),
        *(evaluation.statement(name) for name in evaluation.losses),
        f"{out}: {out.stat().st_size / 1e6:.3g} MB, {source}: {source.stat().st_size / 1e6:.3g} MB. "
        f"Run it with {shlex.join(['engine.precision=fp8', override('model.weights', str(out))])}.",
    ]
    return "\n\n".join(parts)
