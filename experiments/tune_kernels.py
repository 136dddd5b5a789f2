"""Launch configurations of every operator on this GPU: compile for all of them in parallel, then find the fastest.

    python experiments/tune_kernels.py            about 4 minutes on one H100
    grbench kernels study=kernels                 then measures with the tables that this wrote

Triton compiles on the host and keeps its kernels on disk. So one process for each family, or for a part of its shapes,
first runs every configuration while the others do, whatever the clock then says. One process then times them alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import common

from grkernels.registry import FAMILIES

# Attention compiles longest: its shapes are split among processes.
SHAPES = {"hstu_attention": ["4x128_*", "4x256_b32*,4x256_b16*,4x256_b8_delta_3968+384", "*page*"]}
QUICK = ["repeats=5", "min_time_s=0.02", "peers=false", "tracking=none", "tune=true"]


def command(families: Sequence[str], variants: str, *overrides: str) -> list[str]:
    """One job of the kernel benchmark that tunes."""
    chosen = [f"families=[{','.join(families)}]", f"variants=[{variants}]"]
    return [sys.executable, "-m", "grbench", "kernels", *chosen, *QUICK, *overrides]


def commands(root: Path) -> tuple[list[list[str]], list[str]]:
    """The jobs that compile, for all at once, and the one that tunes after them."""
    parts = [(family, shapes) for family in FAMILIES for shapes in SHAPES.get(family, ["*"])]
    compiling = [
        command([family], "triton", f"shapes=[{_quoted(shapes)}]", f"output_root={root}/compiled/{number}")
        for number, (family, shapes) in enumerate(parts)
    ]
    return compiling, command(FAMILIES, "triton,cutlass", f"output_root={root}/tuned")


def _quoted(shapes: str) -> str:
    return ",".join(f"'{shape}'" for shape in shapes.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("outputs/tuning"), help="results (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    args = parser.parse_args(arguments)
    compiling, tuning = commands(args.root)
    if args.dry_run:
        print("\n".join(" ".join(words[1:]) for words in [*compiling, tuning]))
        return 0
    common.need_gpu(parser)
    args.root.mkdir(parents=True, exist_ok=True)
    with (args.root / "compile.log").open("w") as log:
        processes = [subprocess.Popen(words, stdout=log, stderr=log) for words in compiling]
        for process in processes:
            process.wait()  # a configuration that cannot be compiled is found again by the job that tunes
    return subprocess.call(tuning)


if __name__ == "__main__":
    common.run(main)
