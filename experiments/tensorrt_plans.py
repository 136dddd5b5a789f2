"""Build times and sizes of TensorRT plans: python experiments/tensorrt_plans.py

Plans of the chosen models in every precision, for GPUs that need not be there, by TensorRT for RTX's compiler on this
machine's CPU. Profiles and 8-bit scales come from the workload. Every plan is loaded back and its checksum compared. No
plan is run. Prints a Markdown page; --out writes it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.execution.environment import describe_environment
from grengines.api import UnavailableError
from grengines.runtime.batch import Encoding
from grengines.runtime.profile import profiles
from grengines.tensorrt import plan as plans
from grengines.tensorrt import sample as samples
from grengines.tensorrt.config import PRECISIONS
from grengines.tensorrt.library import find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["hstu_tiny", "dlrm_v3"])
    parser.add_argument("--workload", default="ml_100k")
    parser.add_argument("--targets", nargs="+", default=["8.9", "12.0"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="builds of each plan, of which the fastest counts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    library, loads = find("tensorrt_rtx"), [os.getloadavg()[0]]
    rows, shapes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            spec = compose_spec([f"model={name}", f"workload={args.workload}"])[0]
            trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
            model, catalogue, encoding = spec.model, trace.catalogue, Encoding.of(spec.model, trace.catalogue)
            sizes = profiles(trace.requests, encoding, args.batch, 2)
            shapes.append(f"{name}: " + ", ".join(f"{s.longest} tokens a request" for s in sizes))
            for precision in args.precisions:
                for target in args.targets:
                    eight = plans.BASE[precision] != precision
                    facts = plans.Facts.of(
                        library, model, catalogue, 0, precision=precision, target=target, profiles=sizes
                    )
                    feeds = samples.feeds(trace.requests, encoding, args.calibration, facts.tile_rows) if eight else []
                    facts = plans.replace(facts, calibration=samples.digest(feeds) if eight else "")
                    try:
                        seconds = []
                        for _ in range(args.repeats):
                            made = plans.build(library, facts, model, catalogue, 0, Path(folder) / "plan", feeds)
                            seconds.append(made.manifest["build_s"])
                        plans.load(made.folder, facts, "")
                        figures = f"{min(seconds):.2f} | {made.manifest['bytes'] / 1e6:.1f} | built"
                    except UnavailableError as e:
                        figures = f"- | - | {e}"
                    rows.append(f"| {name} | {precision} | {target} | {figures} |")
                    print(rows[-1], flush=True)
    loads.append(os.getloadavg()[0])
    env = describe_environment()
    page = [
        "# TensorRT plans",
        "",
        f"`python experiments/tensorrt_plans.py --out reports/tensorrt_plans.md`, {time.strftime('%Y-%m-%d')}: "
        f"{library.name} {library.version} on {env['cpu']}, {env['cpu_cores']} cores, no GPU, load average "
        f"{loads[0]:.1f} to {loads[1]:.1f}. Workload {args.workload}, batches of at most {args.batch}, two profiles "
        f"({'; '.join(shapes)}). Built and read back; none was run. Time is the compiler's alone, the least of "
        f"{args.repeats} builds, without the export; a plan holds the weights.",
        "",
        "| model | precision | compute capability | build, s | MB | |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(page))
    if args.out:
        args.out.write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
