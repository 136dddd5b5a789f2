"""Wall time of a sweep whose cells run beside each other, over that of the same sweep cell by cell.

    python experiments/parallel_sweep.py                                    # on all GPUs here
    python experiments/parallel_sweep.py --places 2 engine=hstu scenario=offline scenario.max_batch=1,2,4,8
    python experiments/parallel_sweep.py --places 2 --predict 18.4          # what is expected, without a run

A first run, which does not count, compiles kernels. Each round then runs `grbench -m` with the overrides twice, as
`runner.parallel=1` and as `runner.parallel=PLACES`, in turn first and second, into folders of their own. Time is wall
clock from the start of the command to its end, so starts of engines count. Cells of both must be OK. With N places a
sweep can't take less than 1/N of the time, and not less than its longest cell. A place has its share of the cores; cell
by cell, a cell has all of them.

`--predict SECONDS` takes this time for each cell of the sweep, as the `duration_s` of a kept record, and START_S for
the command itself. `slower_at_most` is how much longer a cell may take beside another one until the target is missed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import common

from grbench.execution import records

DEFAULTS = [
    "engine=hstu", "model=hstu_0p2b", "scenario=offline", "workload=synthetic", "scenario.queries=20000",
    "scenario.max_batch=4,8,16,32", "seed=0,1",
]  # fmt: skip
START_S = 3.0  # of Python with PyTorch before the first cell (docs/DEVELOPMENT.md); between cells it is below a second
TARGET = 0.52  # of two places


def predicted(cells: int, places: int, cell_s: float) -> dict[str, float]:
    """The figures of a sweep whose cells all take the same time, alone and beside others."""
    alone_s, turns = START_S + cells * cell_s, -(-cells // places)
    beside_s = START_S + turns * cell_s
    slower = (TARGET * 2 / places * alone_s - START_S) / turns / cell_s
    return {
        "cells": cells,
        "alone_s": alone_s,
        "wall_s": beside_s,
        "share": beside_s / alone_s,
        "slower_at_most": slower,
    }


def sweep(words: Sequence[str], places: str, folder: Path) -> tuple[float, list[float]]:
    """Run a sweep. Returns its seconds and those of each cell. Raises OSError for one that fails."""
    command = [sys.executable, "-m", "grbench", "-m", *words, f"runner.parallel={places}", "tracking=none"]
    begun = time.perf_counter()
    done = subprocess.run(
        [*command, f"runner.output_root={folder}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    took_s = time.perf_counter() - begun
    cells = [record for _, record in records.find(folder)]
    if done.returncode or not cells or not all(record.ok for record in cells):
        raise OSError(f"runner.parallel={places}: {done.stdout.strip().splitlines()[-1]}")
    return took_s, [record.duration_s for record in cells]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__ or "", rounds=2)
    parser.add_argument("--places", default="gpus", help="of runner.parallel (default: %(default)s)")
    parser.add_argument("--predict", type=float, metavar="SECONDS", help="of a cell: print what is expected, alone")
    args = parser.parse_args(arguments)
    words, rows = args.overrides or DEFAULTS, common.Rows(args, __file__, arguments)
    if args.places == "1":
        parser.error("--places 1: that is what the others are compared with; allowed are gpus and 2 or more")
    if args.predict:
        if not args.places.isdecimal():
            parser.error(f"--places {args.places}: --predict needs a number of GPUs")
        rows.add(
            parallel=args.places, **predicted(len(common.specs_of(parser, [], words)), int(args.places), args.predict)
        )
        rows.close()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sweep(words, args.places, Path(folder))
    taken: dict[str, list[float]] = {"1": [], args.places: []}
    for number in range(args.rounds):
        for places in list(taken)[:: 1 if number % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                took_s, cells = sweep(words, places, Path(folder))
            taken[places].append(took_s)
            rows.add(parallel=places, cells=len(cells), wall_s=took_s, cells_s=sum(cells), longest_cell_s=max(cells))
    alone, beside = (median(times) for times in taken.values())
    rows.note(f"runner.parallel={args.places} takes {beside / alone:.3f} of the time of runner.parallel=1 (medians).")
    rows.close()
    return 0


if __name__ == "__main__":
    common.run(main)
