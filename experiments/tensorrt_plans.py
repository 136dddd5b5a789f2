"""Build times and sizes of TensorRT plans.

    python experiments/tensorrt_plans.py model=hstu_tiny,dlrm_v3

Plans of the chosen models in every precision, for GPUs that need not be present, by TensorRT for RTX's compiler on this
machine's CPU. Profiles and 8-bit scales come from the workload. Every plan is loaded back and its checksum compared. No
plan is run. Time is the compiler's alone, without the export, the least of --rounds builds. A plan holds the weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

from grbench import workloads
from grbench.config.schema import RunSpec
from grengines.api import UnavailableError
from grengines.runtime.batch import Encoding
from grengines.runtime.profile import profiles
from grengines.tensorrt import plan as plans
from grengines.tensorrt import sample as samples
from grengines.tensorrt.config import PRECISIONS
from grengines.tensorrt.library import find


def measure(rows: common.Rows, spec: RunSpec, args: Any) -> None:
    """Build one model's plans."""
    library = find("tensorrt_rtx")
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    model, catalogue, encoding = spec.model, trace.catalogue, Encoding.of(spec.model, trace.catalogue)
    sizes = profiles(trace.requests, encoding, args.batch, 2)
    lengths = " and ".join(str(size.longest) for size in sizes)
    rows.note(f"{model.name}: {library.name} {library.version}, profiles of {lengths} tokens per request.")
    with tempfile.TemporaryDirectory() as folder:
        for precision in args.precisions:
            for target in args.targets:
                facts = plans.Facts.of(library, model, catalogue, 0, precision=precision, target=target, profiles=sizes)
                feeds: list[dict[str, Any]] = []
                if plans.BASE[precision] != precision:
                    feeds = samples.feeds(trace.requests, encoding, args.calibration, facts.tile_rows)
                    facts = replace(facts, calibration=samples.digest(feeds))
                row = {"model": model.name, "precision": precision, "compute_capability": target}
                try:
                    for _ in range(args.rounds):
                        made = plans.build(library, facts, model, catalogue, 0, Path(folder) / "plan", feeds)
                        row["build_s"] = min(made.manifest["build_s"], row.get("build_s", float("inf")))
                    plans.load(made.folder, facts, "")
                except UnavailableError as e:
                    rows.fail(e, **row)
                else:
                    rows.add(**row, size_mb=made.manifest["bytes"] / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=3)
    parser.add_argument("--targets", nargs="+", default=["8.9", "12.0"], help="compute capabilities")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batch", type=int, default=8, help="largest batch (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=4, help="requests of 8-bit scales (default: %(default)s)")
    args = parser.parse_args(arguments)
    specs = common.specs_of(parser, ["engine=hstu"], args.overrides)
    rows = common.Rows(args, __file__, arguments)
    for spec in specs:
        measure(rows, spec, args)
    rows.close()


if __name__ == "__main__":
    common.run(main)
