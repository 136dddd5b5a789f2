"""`grbench build-plan`: build a TensorRT plan, also for a GPU that this machine lacks."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from grbench import workloads
from grbench.config.arguments import Arguments, CommandError
from grbench.config.schema import RunSpec
from grbench.tools.ranking_model import OVERRIDES, add_catalogue_flags, compose_ranking, require_folder
from grengines.api import Catalogue, Request, UnavailableError
from grengines.tensorrt.config import PRECISIONS


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Build a TensorRT plan of a ranking model, also for a GPU that this machine lacks. It covers either one size "
        "(--history and --candidates) or the requests of the workload. int8 and fp8 take their scales from those."
    )
    examples = [
        "build-plan --out outputs/plan --target 8.9 --history 200 --candidates 50 --items 1682 --actions 2",
        "build-plan --out outputs/plan --target 12.0 --precision int8 workload=ml_100k model.weights=FILE",
    ]
    parser = Arguments("build-plan", about, examples, OVERRIDES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a plan in it is replaced")
    add_catalogue_flags(parser)
    library = "library that builds; auto: the first that is installed (default: %(default)s)"
    parser.add_argument("--library", choices=["auto", "tensorrt", "tensorrt_rtx"], default="auto", help=library)
    parser.add_argument("--target", default="8.9", help="compute capability of the GPU (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="precision of the plan (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=8, help="most requests of a batch (default: %(default)s)")
    parser.add_argument("--history", type=int, help="most events of a history (default: as the workload)")
    parser.add_argument("--candidates", type=int, help="most candidates of a request (default: as the workload)")
    parser.add_argument(
        "--profiles", type=int, default=2, help="optimisation profiles for a workload (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", type=int, default=16, help="requests that 8-bit scales come from (default: %(default)s)"
    )
    parser.add_argument("--refit", action="store_true", help="build a plan that can load other weights later")
    parser.add_argument("--no-plugin", action="store_true", help="attention by the body in ONNX (tensorrt only)")
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 built, 2 the input cannot be used, 3 the library is missing or refuses."""
    args = parser().parse_intermixed_args(words)
    require_folder(args.out)
    try:
        build(args, *compose_ranking(args))
    except UnavailableError as e:
        raise CommandError(" ".join(str(e).split()), code=3) from e
    except (ValueError, OSError) as e:
        raise CommandError(" ".join(str(e).split())) from e
    return 0


def build(args: argparse.Namespace, spec: RunSpec, catalogue: Catalogue) -> None:
    """Build the plan. Raises ValueError, UnavailableError, OSError."""
    from grengines.runtime.batch import Encoding
    from grengines.runtime.profile import Sizes, profiles
    from grengines.tensorrt import plan as plans
    from grengines.tensorrt import sample
    from grengines.tensorrt.library import find

    for name in ("history", "candidates", "batch", "profiles", "calibration"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: allowed is >= 1")
    if (args.history is None) != (args.candidates is None):
        raise ValueError("--history and --candidates: give both, or none to build for the requests of the workload")
    model, library = spec.ranking_model, find(args.library)
    plans.require_target(library, args.target)
    encoding = Encoding.of(model, catalogue)
    requests: Sequence[Request] = []
    if args.history is None:
        requests = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms).requests
        sizes = profiles(requests, encoding, args.batch, args.profiles)
    else:
        history = args.history + encoding.contextual_seq_len
        longest = history + args.candidates
        sizes = [Sizes(args.batch, args.batch * longest, longest, history, args.batch * args.candidates)]
    options = {
        "precision": args.precision,
        "target": args.target,
        "profiles": sizes,
        "refit": args.refit,
        "plugin": not args.no_plugin,
    }
    facts, feeds = plans.Facts.of(library, model, catalogue, spec.seed, **options), []
    if plans.BASE[args.precision] != args.precision:
        feeds = sample.feeds(requests, encoding, args.calibration, facts.tile_rows)
        digest = sample.digest(feeds)
        facts = plans.Facts.of(library, model, catalogue, spec.seed, calibration=digest, **options)
    print(
        f"{library.name} {library.version}, {args.precision}, compute capability {args.target}, {len(sizes)} profiles"
    )
    made = plans.build(library, facts, model, catalogue, spec.seed, args.out, feeds, Bar())
    print(f"{made.folder}: {made.manifest['bytes']:,} bytes, built in {made.manifest['build_s']:.1f} s")


class Bar:
    """Prints each phase of a build that took over 50 ms when it ends, and on a terminal its progress."""

    def __init__(self) -> None:
        self._begun: dict[str, float] = {}

    def __call__(self, phase: str, share: float) -> None:
        begun = self._begun.setdefault(phase, time.perf_counter())
        if share >= 1.0:
            took = time.perf_counter() - begun
            del self._begun[phase]
            if took > 0.05:
                print(f"\r{phase}: {took:.2f} s", flush=True)
        elif sys.stdout.isatty():
            print(f"\r{phase}: {share:.0%}", end="", flush=True)
