"""Build a TensorRT plan, for a GPU that need not be there.

    python -m grengines.tensorrt.build --out outputs/plan --model conf/model/hstu_tiny.yaml --items 1682 --actions 2 \\
        --target 8.9 --precision bf16 --batch 8 --history 200 --candidates 50
    python -m grengines.tensorrt.build --out outputs/plan --weights trained.safetensors --target 12.0 \\
        --precision int8 --requests sample.npz

What the plan is built for is either one size (--history and --candidates) or follows from requests that were saved
(--requests; `python experiments/tensorrt_plans.py --requests FILE` saves a workload's), which int8 and fp8 need too:
their scales are taken from them. Exit codes: 0 built, 2 what was given can't be used, 3 the library is missing or
refuses.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from grengines.api import UnavailableError
from grengines.export.__main__ import described, model_arguments
from grengines.tensorrt.config import PRECISIONS

PROG = "grengines.tensorrt.build"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a plan in it is replaced")
    model_arguments(parser)
    parser.add_argument("--library", choices=["auto", "tensorrt", "tensorrt_rtx"], default="auto")
    parser.add_argument("--target", default="8.9", help="compute capability (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="most requests of a batch (default: %(default)s)")
    parser.add_argument("--history", type=int, help="most events of a history")
    parser.add_argument("--candidates", type=int, help="most candidates of a request")
    parser.add_argument("--requests", type=Path, help="saved requests, in the place of those two")
    parser.add_argument("--profiles", type=int, default=2, help="with --requests: how many (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=16, help="requests to take scales from (default: 16)")
    parser.add_argument("--refit", action="store_true", help="a plan that takes other weights later")
    parser.add_argument("--no-plugin", action="store_true", help="attention by the body in ONNX (tensorrt only)")
    args = parser.parse_args()
    try:
        return run(args)
    except UnavailableError as e:
        print(f"{PROG}: {' '.join(str(e).split())}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as e:
        print(f"{PROG}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Build what the command line asks for. Raises ValueError, UnavailableError, OSError."""
    model, catalogue = described(args)
    from grengines.runtime.batch import Encoding
    from grengines.runtime.profile import Sizes, profiles
    from grengines.tensorrt import plan as plans
    from grengines.tensorrt import sample
    from grengines.tensorrt.library import find

    library, encoding = find(args.library), Encoding.of(model, catalogue)
    feeds = []
    if args.requests:
        requests = sample.read(args.requests)
        sizes = profiles(requests, encoding, args.batch, args.profiles)
    elif args.history is not None and args.candidates is not None:
        for name, value in (("history", args.history), ("candidates", args.candidates), ("batch", args.batch)):
            if value < 1:
                raise ValueError(f"--{name} {value}: allowed is >= 1")
        requests, history = [], args.history + encoding.contextual_seq_len
        longest = history + args.candidates
        sizes = [Sizes(args.batch, args.batch * longest, longest, history, args.batch * args.candidates)]
    else:
        raise ValueError("what is it built for? give --history and --candidates, or --requests FILE")
    options = {
        "precision": args.precision,
        "target": args.target,
        "profiles": sizes,
        "refit": args.refit,
        "plugin": not args.no_plugin,
    }
    facts = plans.Facts.of(library, model, catalogue, args.seed, **options)
    if plans.BASE[args.precision] != args.precision:
        feeds = sample.feeds(requests, encoding, args.calibration, facts.tile_rows)
        facts = plans.Facts.of(library, model, catalogue, args.seed, calibration=sample.digest(feeds), **options)
    print(
        f"{library.name} {library.version}, {args.precision}, compute capability {args.target}, {len(sizes)} profiles"
    )
    made = plans.build(library, facts, model, catalogue, args.seed, args.out, feeds, Bar())
    print(f"{made.folder}: {made.manifest['bytes']:,} bytes, built in {made.manifest['build_s']:.1f} s")
    return 0


class Bar:
    """Prints each phase that took a while when it ends, and on a terminal how far it is."""

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


if __name__ == "__main__":
    sys.exit(main())
