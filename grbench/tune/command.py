"""`grbench tune`: search for the best strategy under limits."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

from grbench.config.arguments import Arguments
from grbench.config.schema import ConfigError
from grbench.execution.folders import only_command


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Search for the best strategy under limits on latency, quality and memory, certify it, and write a deployment "
        "file. An override with several values is an option of the search, and one with one value is fixed. "
        "docs/TUNING.md explains it."
    )
    examples = [
        "tune                                                    # MovieLens-100K on this machine, 5 minutes",
        "tune latency_ms.p99=20 engine=hstu scenario.max_batch=4,8,16",
        "tune objective=latency rate=100 budget=20cells",
        "tune quality.auc_loss=0.1% budget=60min model=dlrm_v3 model.weights=FILE workload=csv workload.path=FILE",
    ]
    what = "overrides of a run, METRIC=LIMIT such as latency_ms.p99=80, and objective, budget, rate, space"
    return Arguments("tune", about, examples, what)


def main(words: Sequence[str]) -> int:
    """Run the command.

    Exit codes: 0 done, 1 nothing keeps the limits, 2 the declaration is wrong or the answer can't be written, 130
    Ctrl-C.
    """
    from grbench.tune import config, space

    args = parser().parse_intermixed_args(words)
    declared = config.declare(args.overrides, args.config_dir)
    root = config.output_root(declared)
    with contextlib.ExitStack() as holds:  # before the space, which takes ten seconds
        try:
            holds.enter_context(only_command(root.absolute(), ["tune", *words]))
        except OSError as e:
            why = f"{e.strerror or e}; set runner.output_root to a folder that can be written"
            raise ConfigError(f"runner.output_root={root}: {why}") from None
        built = space.build(declared.axes, declared.typed, declared.fixed, args.config_dir)
        from grbench.tune.session import TuneSession

        return TuneSession(declared, built, list(words)).run()
