"""Proof of `grbench compare` on real cells: what it claims of equal work, and of 5% more.

    python experiments/compare_proof.py
    python experiments/compare_proof.py engine.device=cuda scenario.queries=20000

A trial measures three sides in turn, run by run with equal seeds: a model of 20 layers, the same again, and one of 21
layers, which is 5% more work. `compare` then judges the second and the third against the first. Of 20 trials it may
claim a difference of equal work in two, and must find the additional layer in 18. The exit code is 1 if it does not.
The machine must be quiet.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import common

import grbench
from grbench.report.compare import Verdict, compare
from grbench.report.frame import read_cells

DEFAULTS = [
    "engine=hstu",
    "model=hstu_tiny",
    "workload=synthetic",
    "scenario=offline",
    "scenario.queries=2000",
    "gate.requests=2",
    "tracking=none",
]
WORST_FIRST = (Verdict.SLOWER, Verdict.FASTER, Verdict.UNKNOWN, Verdict.UNDECIDED, Verdict.SAME)
LAYERS = {"base": 20, "equal": 20, "more": 21}
ALLOWED, NEEDED = 0.1, 0.9  # shares of the trials: of wrong claims, and of differences found


def measure(root: Path, overrides: Sequence[str], seeds: Sequence[int]) -> None:
    """Measure one run of each side for each seed, in another order each time. Exits for a cell that is not OK."""
    sides = list(LAYERS)
    for number, seed in enumerate(seeds):
        turned = sides[number % 3 :] + sides[: number % 3]
        for side in turned:
            options = [*DEFAULTS, *overrides, f"model.layers={LAYERS[side]}", f"seed={seed}"]
            [record] = grbench.run(options, output_root=root / side, progress=False)
            if not record.ok:
                sys.exit(f"{side}, seed {seed}: {record.status}: {record.error}")


def judge(root: Path, side: str) -> tuple[Verdict, str]:
    """Return the verdict on a side against the base, and the change with its interval."""
    changes = compare(read_cells([root / "base"]), read_cells([root / side])).changes
    verdicts = {change.verdict() for change in changes}
    text = " ".join(f"{change.metric} {change.ratio:.4f} [{change.low:.4f}, {change.high:.4f}]" for change in changes)
    return next(v for v in WORST_FIRST if v in verdicts), text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=20, help="comparisons of each kind (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side in a trial (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.trials < 1 or args.runs < 2:
        parser.error(f"--trials {args.trials} --runs {args.runs}: allowed are at least 1 and 2")
    common.specs_of(parser, DEFAULTS, args.overrides, multirun=False)
    rows = common.Rows(args, __file__, arguments)
    wrong = found = 0
    with tempfile.TemporaryDirectory(prefix="grbench-proof-") as folder:
        for trial in range(args.trials):
            root = Path(folder) / f"{trial}"
            measure(root, args.overrides, range(trial * args.runs, (trial + 1) * args.runs))
            for side in ("equal", "more"):
                verdict, change = judge(root, side)
                wrong += side == "equal" and verdict not in (Verdict.SAME, Verdict.UNDECIDED)
                found += side == "more" and verdict is Verdict.SLOWER
                rows.add(trial=trial, side=side, verdict=str(verdict), change=change)
    said = f"equal work: a difference is claimed in {wrong} of {args.trials}; 5% more work: found in {found}"
    rows.note(f"{said} of {args.trials}")
    rows.close()
    if wrong > ALLOWED * args.trials or found < NEEDED * args.trials:
        sys.exit(1)


if __name__ == "__main__":
    common.run(main)
