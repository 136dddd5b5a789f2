"""Proof of `grbench compare` on real cells: what it claims of equal work, and of 5% more.

    CUDA_VISIBLE_DEVICES= python experiments/compare_proof.py runner.parallel=8
    python experiments/compare_proof.py engine.device=cuda model=hstu_0p2b scenario.queries=20000

A trial measures three sides in turn, run by run with equal seeds: a model of 19 layers, the same again, and one of 20
layers. `compare` then judges the second and the third against the first. Of 20 trials it may claim a difference of
equal work in two, and must find the additional layer in 18. The exit code is 1 if it does not.

The additional layer is 5% more work. Everything outside the layers takes as much processor time as one of them: 51 ms
of 640 requests, and a layer 48, by models of 5 to 40 layers on two cores of a Xeon. So 19 layers cost 20 parts, and 20
cost 21; 60 pairs of runs there gave 4.9% (standard error 0.8%), and the layer is 5.4% of the FLOPs. A note says what it
took in this proof.

With `runner.parallel` several seeds are measured at a time. The three sides of a seed stay on its cores, which should
be whole physical ones of a quiet machine. A proof that was stopped goes on from its records, in compare_proof under
`runner.output_root`.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

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
    *("engine=hstu", "engine.device=cpu", "engine.cpu_threads=1", "model=hstu_tiny"),
    *("scenario=offline", "scenario.queries=2000", "warmup_batches=3"),
    *("workload=synthetic", "workload.history_median=16", "workload.min_history=8", "workload.max_history=32"),
    *("workload.num_candidates=8", "gate.requests=2", "gate.measured=16", "tracking=none"),
]
WORST_FIRST = (Verdict.SLOWER, Verdict.FASTER, Verdict.UNKNOWN, Verdict.UNDECIDED, Verdict.SAME)
LAYERS = {"base": 19, "equal": 19, "more": 20}
ALLOWED, NEEDED = 0.1, 0.9  # shares of the trials: of wrong claims, and of differences found
PROGRESS_S = 10.0

Trial = dict[str, list[Measured]]  # the measured cells of each side


class Trials:
    """The cells of all trials: those that have a record under `root`, and those that are to be measured."""

    def __init__(self, sides: dict[str, RunSpec], trials: int, runs: int, root: Path, parts: Sequence[Part]) -> None:
        self.measured: list[Trial] = [{side: [] for side in sides} for _ in range(trials)]
        self._parts, self._total = parts, trials * runs * len(sides)
        self.waiting: list[list[tuple[int, str, RunSpec, Path]]] = []
        self._failed = False
        earlier = {side: EarlierRecords([part.machine for part in parts]) for side in sides}
        for side, records in earlier.items():
            records.read(root / side, failed=False)
        for seed in range(trials * runs):
            self.waiting.append([])
            for side in _turned(list(sides), seed):
                spec, trial = replace(sides[side], seed=seed), seed // runs
                found, _ = earlier[side].of(spec)
                if found is not None:
                    self.measured[trial][side].append(found)
                else:
                    self.waiting[seed].append((trial, side, spec, root / side / f"{seed}"))

    @property
    def done(self) -> int:
        """Cells that are measured."""
        return sum(len(side) for trial in self.measured for side in trial.values())

    def measure(self, runner: RunnerConfig) -> None:
        """Measure the cells that wait, the sides of each seed on one place.

        Raises CommandError for a cell that is not OK. The program exits upon a signal, after the records of running
        cells were kept.
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
                for sides in filter(None, self.waiting):
                    places.give([self._cell(*waiting, runner, progress) for waiting in sides])
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

    def _cell(
        self, trial: int, side: str, spec: RunSpec, folder: Path, runner: RunnerConfig, progress: Callable[[], None]
    ) -> Cell:
        def on_end(folder: Path, record: RunRecord) -> None:
            if record.ok:
                self.measured[trial][side].append((folder, record))
                progress()
            elif record.status is not Status.INTERRUPTED and not self._failed:
                self._failed = True
                raise CommandError(f"{side}, seed {spec.seed}: {record.status}: {record.error}", 2)

        return Cell(spec, runner, folder, None, [], None, on_event=lambda event: None, on_end=on_end)


def _turned(sides: list[str], seed: int) -> list[str]:
    """Return the sides in another order for each of three seeds in turn."""
    return sides[seed % 3 :] + sides[: seed % 3]


def judge(trial: Trial, side: str) -> tuple[Verdict, list[Change]]:
    """Return the verdict on a side against the base, and the changes with their intervals."""
    changes = compare(trial["base"], trial[side]).changes
    verdicts = {change.verdict() for change in changes}
    return next(v for v in WORST_FIRST if v in verdicts), changes


def notes_of(trials: Sequence[Trial], more: Sequence[Change]) -> list[str]:
    """Return what was measured, and how steadily. more: the first change of the side with more work, of each trial."""
    records = [record for trial in trials for side in trial.values() for _, record in side]
    metric, beside = more[0].metric, records[0].environment.get("beside")
    of_runs = [{side: _by_seed(found, metric) for side, found in trial.items()} for trial in trials]
    pairs = np.array([trial["equal"] - trial["base"] for trial in of_runs])  # [trials, runs]
    spread = pairs.std(axis=1, ddof=1)
    requests, measured_s = (
        np.median([record.metrics[name] for record in records]) for name in ("samples", "duration_s")
    )
    cell_s = np.median([record.duration_s for record in records])
    where = f"{beside['cells'] + 1} seeds, cores of each: {len(beside['cores'])}" if beside else "one seed"
    notes = [
        f"{len(records)} cells; a run answers {requests:.0f} requests in {measured_s:.1f} s, and its cell takes "
        f"{cell_s:.1f} s (medians); at a time: {where}",
        f"standard deviation of a run, by equal runs of one seed: {math.sqrt((spread**2).mean() / 2):.2%} of {metric}",
    ]
    logs = np.log([change.ratio for change in more])
    if len(logs) > 1:
        middle, half = t_interval(np.zeros(len(logs)), logs, paired=True, confidence=0.95)
        low, high = (math.exp(middle + sign * half) - 1 for sign in (-1, 1))
        notes.append(f"the additional layer changed {metric} by {math.expm1(middle):+.2%} [{low:+.2%}, {high:+.2%}]")
    if disturbed := sum(any(DISTURBED in note for note in record.notes) for record in records):
        notes.append(f"{disturbed} of {len(records)} cells ran beside other work: repeat the proof on an idle machine")
    return notes


def _by_seed(side: Sequence[Measured], metric: str) -> np.ndarray:
    """Return the logarithm of a metric, [runs]."""
    return np.log([record.metrics[metric] for _, record in sorted(side, key=lambda cell: cell[1].spec["seed"])])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--trials", type=int, default=20, help="comparisons of each kind (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=6, help="runs of each side in a trial (default: %(default)s)")
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
