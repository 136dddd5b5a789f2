"""Proof of `grbench compare` on real cells: what it claims of equal work, and of 5% more.

    python experiments/compare_proof.py
    python experiments/compare_proof.py runner.parallel=gpus

A trial measures three sides in turn, run by run with equal seeds: a model of 20 layers, the same again, and one of 21
layers. `compare` then judges the second and the third against the first. Of 20 trials it may claim a difference of
equal work in two, and must find the additional layer in 18. The exit code is 1 if it does not.

The additional layer is 5.2% of the FLOPs. A note says what it took in this proof.

All trials have the same four seeds. The cells of a seed follow each other, trial by trial, and a worker for each side
keeps its engine meanwhile, as `runner.keep_engine` allows. So a cell costs little more than its measurement. What
differs between two starts of one engine is then the same in all trials. So they are no independent experiments: the
proof is of the noise within one start, and a note says how much starts differ.

A batch takes the GPU several times as long as the host, because a GPU is steady and the cores of a shared machine are
not. With `runner.parallel=gpus` seeds run beside each other, each on a GPU of its own. A proof that was stopped goes on
from its records, in compare_proof under `runner.output_root`.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np

from grbench.config.arguments import CommandError
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, RunnerConfig, RunSpec
from grbench.execution.clock import at_most_every, pace
from grbench.execution.earlier import EarlierRecords
from grbench.execution.load import DISTURBED
from grbench.execution.places import Cell, Part, Places, local_parts
from grbench.execution.records import RunRecord, Status
from grbench.report.cells import Cell as Measured
from grbench.report.compare import Change, Verdict, compare, t_interval
from grbench.signals import exit_code, raised

DEFAULTS = [
    *("engine=hstu", "engine.device=cuda", "engine.cuda_graphs=true", "kernel=torch", "model=hstu_tiny"),
    *("model.embedding_dim=512", "model.heads=4", "model.qk_dim=128", "model.v_dim=128"),
    *("scenario=offline", "scenario.max_batch=16", "scenario.queries=960", "warmup_batches=3"),
    *("workload=synthetic", "workload.visits=64", "workload.users=64", "workload.items=1000"),
    *("workload.min_history=480", "workload.max_history=480"),  # with 32 candidates 512 tokens, a graph's length
    *("gate.requests=2", "gate.measured=1", "tracking=none", "runner.keep_engine=true"),
]
WORST_FIRST = (Verdict.SLOWER, Verdict.FASTER, Verdict.UNKNOWN, Verdict.UNDECIDED, Verdict.SAME)
LAYERS = {"base": 20, "equal": 20, "more": 21}
ALLOWED, NEEDED = 0.1, 0.9  # shares of the trials: of wrong claims, and of differences found
PROGRESS_S = 10.0

Trial = dict[str, list[Measured]]  # the measured cells of each side


class Waiting(NamedTuple):
    """A cell that is to be measured."""

    trial: int
    side: str
    spec: RunSpec
    folder: Path


class Trials:
    """The cells of all trials: those that have a record under `root`, and for each seed those that wait."""

    def __init__(self, sides: dict[str, RunSpec], trials: int, runs: int, root: Path, parts: Sequence[Part]) -> None:
        self.measured: list[Trial] = [{side: [] for side in sides} for _ in range(trials)]
        self.waiting: list[list[Waiting]] = [[] for _ in range(runs)]
        self._parts, self._total = parts, trials * runs * len(sides)
        self._failed = False
        for number, trial in enumerate(self.measured):
            earlier = {side: EarlierRecords([part.machine for part in parts]) for side in sides}
            for side, records in earlier.items():
                records.read(root / f"{number}" / side, failed=False)
            for seed, waiting in enumerate(self.waiting):
                specs = {side: replace(spec, seed=seed) for side, spec in sides.items()}
                found = [record for side, spec in specs.items() if (record := earlier[side].of(spec)[0])]
                if len(found) == len(sides):
                    for side, record in zip(sides, found, strict=True):
                        trial[side].append(record)
                else:  # all three: this time they may run on another GPU
                    waiting += [
                        Waiting(number, side, specs[side], root / f"{number}" / side / f"{seed}")
                        for side in _turned(list(sides), number + seed)
                    ]

    @property
    def done(self) -> int:
        """Cells that are measured."""
        return sum(len(side) for trial in self.measured for side in trial.values())

    def measure(self, runner: RunnerConfig) -> None:
        """Measure the cells that wait, those of a seed on one place. Raises CommandError for a cell that is not OK.

        The program exits upon a signal, after the records of running cells were kept.
        """
        begun, before = time.monotonic(), self.done
        if before:
            print(f"{before} of {self._total} cells have a record", file=sys.stderr)

        def say() -> None:
            took = pace(time.monotonic() - begun, self.done - before, self._total - before)
            print(f"{self.done} of {self._total} cells, {took}", file=sys.stderr, flush=True)

        progress = at_most_every(PROGRESS_S, say)
        places = Places(self._parts, lambda line: print(line, file=sys.stderr))
        try:
            with raised():
                for cells in filter(None, self.waiting):
                    places.give([self._cell(waiting, runner, progress) for waiting in cells])
                places.wait()
        except KeyboardInterrupt as interrupt:
            places.interrupt(getattr(interrupt, "number", signal.SIGINT))
            say()
            print("stopped; the same command goes on from here", file=sys.stderr)
            sys.exit(exit_code(interrupt))
        finally:
            if places.busy:  # a cell failed
                places.interrupt(signal.SIGINT)
            places.close()

    def _cell(self, waiting: Waiting, runner: RunnerConfig, progress: Callable[[], None]) -> Cell:
        trial, side, spec, folder = waiting

        def on_end(folder: Path, record: RunRecord) -> None:
            if record.ok:
                self.measured[trial][side].append((folder, record))
                progress()
            elif record.status is not Status.INTERRUPTED and not self._failed:
                self._failed = True
                raise CommandError(f"{side}, seed {spec.seed}: {record.status}: {record.error}", 2)

        return Cell(spec, runner, folder, None, [], None, on_event=lambda event: None, on_end=on_end, lane=side)


def _turned(sides: list[str], number: int) -> list[str]:
    """Return the sides in another order for each of three numbers in turn."""
    return sides[number % 3 :] + sides[: number % 3]


def judge(trial: Trial, side: str) -> tuple[Verdict, list[Change]]:
    """Return the verdict on a side against the base, and the changes with their intervals."""
    changes = compare(trial["base"], trial[side]).changes
    verdicts = {change.verdict() for change in changes}
    return next(v for v in WORST_FIRST if v in verdicts), changes


def notes_of(trials: Sequence[Trial], more: Sequence[Change]) -> list[str]:
    """Return what was measured, and how steadily. more: the first change of the side with more work, of each trial."""
    records = [record for trial in trials for side in trial.values() for _, record in side]
    metric = more[0].metric
    requests, measured_s = (
        np.median([record.metrics[name] for record in records]) for name in ("samples", "duration_s")
    )
    cell_s = np.median([record.duration_s for record in records])
    beside = records[0].environment.get("beside")
    of_runs = [{side: _by_seed(found, metric) for side, found in trial.items()} for trial in trials]
    pairs = np.array([trial["equal"] - trial["base"] for trial in of_runs])  # [trials, runs]
    notes = [
        f"{len(records)} cells; a run answers {requests:.0f} requests in {measured_s:.2g} s, and its cell takes "
        f"{cell_s:.2g} s (medians); seeds beside each other: {beside['cells'] + 1 if beside else 1}",
        f"standard deviation of a run, by equal runs of one seed: {_of_a_run(pairs.var(axis=1, ddof=1))} of {metric}",
    ]
    logs = np.log([change.ratio for change in more])
    if len(logs) > 1:
        within = pairs.var(axis=0, ddof=1)
        starts = pairs.mean(axis=0).var(ddof=1) - within.mean() / len(pairs)  # of means, less the noise of those
        notes.append(
            f"of the same engines, from trial to trial: {_of_a_run(within)}; between their starts: "
            f"{_of_a_run(max(starts, 0.0))}; all trials share {pairs.shape[1]} starts of each side, so the claims "
            "below are of the noise within one start only"
        )
        middle, half = t_interval(np.zeros(len(logs)), logs, paired=True, confidence=0.95)
        low, high = (math.exp(middle + sign * half) - 1 for sign in (-1, 1))
        notes.append(f"the additional layer changed {metric} by {math.expm1(middle):+.2%} [{low:+.2%}, {high:+.2%}]")
    if disturbed := sum(any(DISTURBED in note for note in record.notes) for record in records):
        notes.append(f"{disturbed} of {len(records)} cells ran beside other work: repeat the proof on an idle machine")
    return notes


def _of_a_run(variances: np.ndarray | float) -> str:
    """Return the standard deviation of a run, from variances of the difference of two."""
    return f"{math.sqrt(np.mean(variances) / 2):.2%}"


def _by_seed(side: Sequence[Measured], metric: str) -> np.ndarray:
    """Return the logarithm of a metric, [runs]."""
    return np.log([record.metrics[metric] for _, record in sorted(side, key=lambda cell: cell[1].spec["seed"])])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=20, help="comparisons of each kind (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="runs of each side in a trial (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.trials < 1 or args.runs < 2:
        parser.error(f"--trials {args.trials} --runs {args.runs}: allowed are at least 1 and 2")
    try:
        composed = {side: compose_spec([*DEFAULTS, *args.overrides, f"model.layers={n}"]) for side, n in LAYERS.items()}
        run = composed["base"][1]
        parts = local_parts(run.runner.parallel)
    except ConfigError as e:
        parser.error(str(e))
    rows = common.Rows(args, __file__, arguments)
    specs = {side: spec for side, (spec, _) in composed.items()}
    trials = Trials(specs, args.trials, args.runs, Path(run.runner.output_root) / "compare_proof", parts)
    trials.measure(run.runner)
    wrong = found = 0
    more = []
    for number, trial in enumerate(trials.measured):
        for side in ("equal", "more"):
            verdict, changes = judge(trial, side)
            wrong += side == "equal" and verdict not in (Verdict.SAME, Verdict.UNDECIDED)
            found += side == "more" and verdict is Verdict.SLOWER
            more += changes[:1] if side == "more" else []
            text = " ".join(f"{c.metric} {c.ratio:.4f} [{c.low:.4f}, {c.high:.4f}]" for c in changes)
            rows.add(trial=number, side=side, verdict=str(verdict), change=text)
    said = f"equal work: a difference is claimed in {wrong} of {args.trials}; 5% more work: found in {found}"
    for note in [*notes_of(trials.measured, more), f"{said} of {args.trials}"]:
        rows.note(note)
    rows.close()
    if wrong > ALLOWED * args.trials or found < NEEDED * args.trials:
        sys.exit(1)


if __name__ == "__main__":
    common.run(main)
