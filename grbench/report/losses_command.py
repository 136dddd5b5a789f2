"""`grbench losses`: fill in what the steps of a deployment lose, from the records of a study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grbench import deployment as deployments
from grbench.config.arguments import Arguments, CommandError
from grbench.config.compose import prepare_hydra
from grbench.config.schema import ConfigError
from grbench.report.frame import ReportError, read_cells
from grbench.report.losses import automatic, options_of_spec, with_losses


def parser() -> argparse.ArgumentParser:
    """Return the flags of the command."""
    about = (
        "Fill in the loss of each step under `degrade`, its 95% interval and its record, from records of "
        "study=quality. The file is written again; of its comments only those at its top stay."
    )
    parser = Arguments("losses", about, ["losses best.yaml reports/quality"])
    parser.add_argument("file", type=Path, metavar="FILE", help="the deployment")
    parser.add_argument(
        "records", type=Path, metavar="FOLDER", help="the records, as a study or a kept report has them"
    )
    return parser


def main(words: Sequence[str]) -> int:
    """Run the command. Exit codes: 0 done; 2 a step has no record, or a file cannot be used: then nothing changes."""
    args = parser().parse_args(words)
    try:
        prepare_hydra()
        deployment = deployments.load(args.file)
        if not deployment.degrade:
            raise ConfigError(f"{args.file}: degrade: no step; write the steps first, without their losses")
        specs, cells = deployment.specs(args.file), read_cells([args.records])
        for name, spec in specs.items():
            for key, precision in automatic(spec).items():
                here = f"strategy {name}: {key}=auto is {precision} on this machine"
                print(f"grbench losses: {here}; name the precision where another one serves", file=sys.stderr)
        options = {name: options_of_spec(spec) for name, spec in specs.items()}
        deployment.degrade = with_losses(deployment, options, cells, args.records)
        deployments.save_again(deployment, args.file)
    except ConfigError as e:
        raise CommandError(e if str(e).startswith(str(args.file)) else f"{args.file}: {e}") from e
    except (ReportError, OSError) as e:
        raise CommandError(e) from e
    for step in deployment.degrade:
        for figure, value in step.loss.items():
            interval = " [{:.4f}, {:.4f}]".format(*ends) if (ends := step.intervals.get(figure)) else ""
            print(f"{step.name}: {figure} {value:.4f}{interval}, {step.record or 'as typed'}")
    return 0
