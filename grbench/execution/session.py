"""The cells of one invocation: their records, tracking, progress and table."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from grbench.config.jobs import Invocation, Job
from grbench.config.schema import ConfigError, RunConfig, RunSpec, SlurmConfig
from grbench.execution import records
from grbench.execution.clock import SILENCE_S, at_most_every, pace, remaining
from grbench.execution.earlier import EarlierRecords
from grbench.execution.folders import only_command
from grbench.execution.kept import engine_key
from grbench.execution.places import Cell, Part, Places, local_parts
from grbench.execution.records import RunRecord, Status
from grbench.execution.runner import Interrupted, run_cell
from grbench.execution.workers import Event, KeptWorker
from grbench.report.cells import Planned, label
from grbench.scenarios.config import is_accuracy, issued
from grbench.tracking import CellTracker, where_to_look

FEW = 2  # measured cells that show how long the others take


class Measured(NamedTuple):
    """A measured cell: the folder of its record, the record, and whether that is an earlier one."""

    folder: Path
    record: RunRecord
    kept: bool


class CellSession:
    """Runs cells and keeps their records. `end` ends it; `close` also prints the table.

    run: the options of the first cell. quiet: print no progress. rare: print only a line now and then of a cell that
    takes long. gpus: the most that one of the cells takes. alone: the caller holds the command line (`only_command`).
    """

    def __init__(
        self,
        run: RunConfig,
        invocation: Invocation,
        quiet: bool = False,
        rare: bool = False,
        gpus: int = 1,
        alone: bool = False,
    ) -> None:
        self._invocation, self._repeats = invocation, run.runner.repeats
        self._total = invocation.total * self._repeats
        repeated_in = ("seed=",) if self._repeats > 1 else ()
        self._shared = {word for word in invocation.common if not word.startswith(repeated_in)}
        self._form = run.runner.print
        self._jobs: list[Job] = []
        self._cells: list[tuple[Path, RunRecord]] = []
        self._root = Path(run.runner.output_root).absolute()
        self._screen = Console(stderr=True, quiet=quiet or rare)
        self._progress_screen, self._rare = Console(stderr=True, quiet=quiet), rare
        self._sweep_id = invocation.sweep.name if invocation.sweep else None
        with contextlib.ExitStack() as holds:  # a notebook may keep the error, and this with it
            if self._sweep_id and not alone:
                holds.enter_context(only_command(self._root, invocation.words))
            self.parts = _parts(run, self._root, gpus)  # before anything is recorded, since a cluster may refuse them
            self._holds = holds.pop_all()
        self._places = Places(self.parts, self._say) if self.parts else None
        self._tracking, self._rerun = run.tracking, run.rerun
        self._tracker = CellTracker(run.tracking, self._root)
        if self._sweep_id:
            facts = {"overrides": " ".join(invocation.words), "cells": str(self._total)}
            self._tracker.start_sweep(self._sweep_id, facts)
        self._kept = KeptWorker() if run.runner.keep_engine else None
        self._later: list[tuple[Path, RunRecord]] = []  # to draw and to track once no cell runs
        self._next: list[Cell] = []  # cells of one engine, for the next free place
        self._begun = 0  # cells, earlier records included
        self._done = self._measured_here = 0  # of them, and without earlier records
        self._first_s = 0.0  # when the first cell without an earlier record began
        self._say_rest_now_and_then = at_most_every(SILENCE_S, self._say_rest)
        self._earlier = EarlierRecords([part.machine for part in self.parts] or [{}])
        if self._sweep_id and not run.rerun:
            self._earlier.read(self._root, failed=not run.rerun_failed)

    def run(self, job: Job) -> None:
        """Measure one cell, or keep its earlier record; log it. Raises KeyboardInterrupt after keeping the record."""
        self._jobs.append(job)
        if self._repeats > 1:
            self._measure(repeated(job, 0))
        else:
            self._measure(job)

    def finish(self) -> None:
        """Run every cell again, `runner.repeats` times in all, round by round: a slow hour then meets all cells."""
        for repeat in range(1, self._repeats):
            for job in self._jobs:
                self._measure(repeated(job, repeat))
        if self._places is not None:
            self._flush(self._places)
            with self._interrupting(self._places):
                self._places.wait()
            self._publish_later()

    def has(self, job: Job) -> bool:
        """Return True if an earlier record of this cell would be kept."""
        spec, run = job.config
        return self._earlier.of(spec, run.runner.timeout_s)[0] is not None

    def measure(self, jobs: Sequence[Job]) -> list[Measured]:
        """Measure cells, beside each other where there are places. Returns for each what was measured, in their order.

        Raises KeyboardInterrupt after keeping the records.
        """
        self._jobs += jobs
        found: dict[int, Measured] = {}
        for i, job in enumerate(jobs):
            measured = self._measure(job, functools.partial(found.__setitem__, i))
            if measured is not None:
                found[i] = measured
            elif self._places is not None:
                self._flush(self._places)  # also cells of one engine run beside each other
        if self._places is not None:
            with self._interrupting(self._places):
                self._places.settle()
            self._publish_later()
        return [found[i] for i in range(len(jobs))]

    def _measure(self, job: Job, ended: Callable[[Measured], None] = lambda measured: None) -> Measured | None:
        """Measure one cell. Returns None where it runs beside others and has only begun; `ended` then takes it."""
        spec: RunSpec = job.config[0]
        run: RunConfig = job.config[1]
        own = [word for word in job.overrides if word not in self._shared]
        name = label(Planned(spec.to_dict(), own))
        self._begun += 1
        title = f"{self._begun}{f'/{self._total}' if self._total else ''} {name}"
        earlier, why_not = self._earlier.of(spec, run.runner.timeout_s)
        if earlier is not None:
            folder, record = earlier
            again = "rerun=true" if record.ok else "rerun_failed=true"
            whose = f"{record.status} in a record of {record.started_at} in {os.path.relpath(folder)}"
            self._say(f"{title}: {whose}, kept ({again} measures it again)")
            self._finish(folder, record, kept=True)
            return Measured(folder, record, True)
        if why_not:
            self._say(f"{title}: {why_not}, so it is measured again")
        self._first_s = self._first_s or time.monotonic()
        if self._places is not None:
            self._begin(self._places, job, self._progress_of(spec, title, redrawn=False), ended)
            return None
        with self._progress_of(spec, title) as progress:
            try:
                record, folder = run_cell(
                    spec,
                    run.runner,
                    job.folder,
                    sweep_id=self._sweep_id,
                    overrides=list(job.overrides),
                    config_dir=self._invocation.config_dir,
                    on_event=progress.show,
                    kept=self._kept,
                )
            except Interrupted as interruption:
                self._finish(interruption.folder, interruption.record)
                raise
        self._finish(folder, record)
        return Measured(folder, record, False)

    def _progress_of(self, spec: RunSpec, title: str, redrawn: bool = True) -> CellProgress:
        return progress_of(spec, self._progress_screen, title, redrawn, self._rare)

    def _begin(self, places: Places, job: Job, progress: CellProgress, ended: Callable[[Measured], None]) -> None:
        """Take a cell that runs beside others, and start those before it once a place is free.

        Progress is printed in lines. With `runner.keep_engine` cells of one engine have one place.
        """
        spec, run = job.config

        def on_end(folder: Path, record: RunRecord) -> None:
            self._ended(progress.title, folder, record)
            ended(Measured(folder, record, False))

        cell = Cell(
            spec,
            run.runner,
            job.folder,
            self._sweep_id,
            list(job.overrides),
            self._invocation.config_dir,
            on_event=progress.show,
            on_end=on_end,
        )
        if not (run.runner.keep_engine and self._next and engine_key(self._next[0].spec) == engine_key(spec)):
            self._flush(places)
        self._next.append(cell)

    def _flush(self, places: Places) -> None:
        """Start the cells that wait for a place."""
        cells, self._next = self._next, []
        if cells:
            with self._interrupting(places):
                places.give(cells)

    def _ended(self, title: str, folder: Path, record: RunRecord) -> None:
        """Take the record of a cell that ran beside others, whose cores nothing else may use now."""
        self._say(f"{title}: {record.status}{f', {record.error}' if record.error else ''}")
        self._list(folder, record)
        self._count(record, kept=False)
        self._later.append((folder, record))

    def _publish_later(self) -> None:
        """Draw and track the cells that ran beside each other."""
        later, self._later = self._later, []
        for folder, record in later:
            self._publish(folder, record)

    @contextlib.contextmanager
    def _interrupting(self, places: Places) -> Iterator[None]:
        """Pass a signal that comes meanwhile on to the cells that run, and keep their records."""
        try:
            yield
        except KeyboardInterrupt as e:
            places.interrupt(getattr(e, "number", signal.SIGINT))
            raise

    def _finish(self, folder: Path, record: RunRecord, kept: bool = False) -> None:
        self._list(folder, record)
        self._publish(folder, record, kept)
        self._count(record, kept)

    def _list(self, folder: Path, record: RunRecord) -> None:
        """Take a record into the lists of the invocation and of the sweep."""
        if self._sweep_id:
            self._earlier.add(folder, record)  # a sweep may ask for the same cell twice
        if all(folder != known for known, _ in self._cells):
            self._cells.append((folder, record))
            if self._invocation.sweep:
                with contextlib.suppress(OSError):  # the disk may be full; the records themselves are kept
                    records.list_cells(self._invocation.sweep, [folder for folder, _ in self._cells])

    def _count(self, record: RunRecord, kept: bool) -> None:
        """Count a cell that has ended, and now and then say how many are left."""
        if record.status is Status.INTERRUPTED:
            return
        self._done += 1
        if not kept:
            self._measured_here += 1
            self._say_rest_now_and_then()

    def _say_rest(self) -> None:
        """Say how many cells are left, and once a few were measured how long they take at the same pace."""
        left = self._total - self._done
        if left <= 0:  # a search has no total
            return
        here, took_s = self._measured_here, time.monotonic() - self._first_s
        paced = pace(took_s, here, here + left) if here >= FEW else pace(took_s)
        self._say(f"{self._done} of {self._total} cells done, {left} left; {paced}")

    def _publish(self, folder: Path, record: RunRecord, kept: bool = False) -> None:
        """Draw and track a cell that has ended."""
        if record.status is Status.INTERRUPTED:
            return
        if record.ok and not kept:
            from grbench.report.frame import ReportError
            from grbench.report.groups import group_cells
            from grbench.report.latency_charts import latency_cdf

            [group] = group_cells([(folder, record)])
            with contextlib.suppress(OSError, ReportError):  # a picture is no result; the disk may be full
                if chart := latency_cdf(group):
                    chart.png(folder / "latency_cdf.png")
        self._tracker.log(record, folder, kept)

    def _say(self, line: str) -> None:
        self._screen.print(line, soft_wrap=True, markup=False, highlight=False)

    @property
    def records(self) -> list[RunRecord]:
        """The record of each cell, in the order in which the cells ran."""
        return [record for _, record in self._cells]

    def end(self, cut_short: bool = False, answer: str = "", files: Sequence[Path] = ()) -> None:
        """End an idle worker and the sweep's tracking.

        cut_short: something ended the session before its last cell. answer, files: of the sweep's run in MLflow.
        """
        if self._kept is not None:
            self._kept.close()
        if self._places is not None:
            if self._places.busy:  # a signal came between two cells
                self._places.interrupt(signal.SIGINT)
            self._places.close()
            self._publish_later()
        if self._sweep_id:
            self._tracker.end_sweep(self._cells, cut_short, answer, files)
        self._holds.close()

    def close(self, cut_short: str = "") -> int:
        """End the session and print the table of all cells. Returns 0 if every cell is OK, else 1.

        cut_short: what ended the session before its last cell, in a word.
        """
        self.end(bool(cut_short))
        self._print_cells()
        if cut_short:
            left = self._total - sum(record.status is not Status.INTERRUPTED for _, record in self._cells)
            again = "measures all again (rerun=true)" if self._rerun else "goes on from here"
            again = f"; the same sweep {again}" if self._sweep_id and left else ""
            self._screen.print(f"{cut_short} with {left} of {self._total} cells to go{again}")
        where = shlex.quote(os.path.relpath(self._root))
        places = {"records": where, "report": f"python -m grbench report {where}"}
        if runs := where_to_look(self._tracking, self._root):
            places["MLflow"] = runs
        self._say("   ".join(f"{name}: {place}" for name, place in places.items()))
        return 0 if all(record.ok for _, record in self._cells) else 1

    def _print_cells(self) -> None:
        if self._form == "table":
            from grbench.report.table import print_cells

            print_cells(Console(), self._cells)
        else:
            from grbench.report import rows

            sys.stdout.write(rows.as_json(self._cells) if self._form == "json" else rows.as_csv(self._cells))


def _parts(run: RunConfig, root: Path, gpus: int) -> list[Part]:
    """Return the parts of machines that measure cells beside each other; none: this process measures them.

    Raises ConfigError.
    """
    unasked = vars(SlurmConfig())
    changed = [f"slurm.{name}={value}" for name, value in vars(run.slurm).items() if value != unasked[name]]
    if changed and run.runner.cluster != "slurm":
        raise ConfigError(f"{changed[0]}: only jobs of Slurm take it; add runner.cluster=slurm, or leave it out")
    if run.runner.cluster == "ray":
        from grbench.execution.ray_places import ray_parts

        return ray_parts(run.runner.parallel, root)
    if run.runner.cluster == "slurm":
        from grbench.execution.slurm_places import slurm_parts

        return slurm_parts(run.runner, run.slurm, root)
    return local_parts(run.runner.parallel, gpus) if run.runner.parallel != "1" else []


def repeated(job: Job, repeat: int) -> Job:
    """Return a run of the job's cell: the first is 0, and later ones have another seed and a folder beside its own."""
    spec, run = job.config
    seed = spec.seed + repeat
    typed = [word for word in job.overrides if word.partition("=")[0] not in ("seed", "runner.repeats")]
    return Job(
        (dataclasses.replace(spec, seed=seed), run),
        job.folder.with_name(f"{job.folder.name}-run{repeat + 1}") if repeat else job.folder,
        (*typed, f"seed={seed}", "runner.repeats=1"),
    )


def progress_of(spec: RunSpec, screen: Console, title: str, redrawn: bool = True, rare: bool = False) -> CellProgress:
    """Return the progress of a cell, with the number of answers or the duration that its scenario has."""
    if count := spec.gate.quality_requests if is_accuracy(spec.scenario) else issued(spec.scenario):
        return CellProgress(screen, title, count, redrawn=redrawn, rare=rare)
    least_s: float = getattr(spec.scenario, "min_duration_s", 0.0)
    return CellProgress(screen, title, spec.scenario.queries, least_s, redrawn, rare)


class CellProgress:
    """The state of a cell: one line on a terminal, else a line for each stage, and now and then for the answers.

    It is redrawn only on a message, never by a timer: a busy launcher would disturb the measurement.
    queries: the fewest answers of the scenario. least_s: its shortest duration. redrawn: False for lines also on a
    terminal. rare: such lines, and of the stages too only now and then.
    """

    def __init__(
        self,
        screen: Console,
        title: str,
        queries: int,
        least_s: float = 0.0,
        redrawn: bool = True,
        rare: bool = False,
    ) -> None:
        self._screen, self.title, self._redrawn = screen, title, redrawn and not rare and screen.is_terminal
        self._queries, self._least_s = queries, least_s
        self._begun, self._stage_begun = time.monotonic(), time.monotonic()
        self._stage = "starting"
        self._say_now_and_then = at_most_every(SILENCE_S, self._say)
        self._say_stage = self._say_now_and_then if rare else self._say
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=screen,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task(escape(title), total=queries, pace="")

    def __enter__(self) -> CellProgress:
        if self._redrawn:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._redrawn:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Take one message of the worker. All times count from the beginning of the cell."""
        now = time.monotonic()
        took = pace(now - self._begun)
        if "answered" in event:
            answered, seconds = event["answered"], now - self._stage_begun
            in_time = round(answered * self._least_s / seconds) if seconds else 0  # at the same pace
            total = max(self._queries, in_time, answered)  # some end after the duration
            if rest := remaining(seconds, answered, total):
                took += f", {rest} of answers left"
            self._bar.update(self._task, completed=answered, total=total, pace=took)
            if not self._redrawn:
                self._say_now_and_then(f"{answered} of {'about ' * (total > self._queries)}{total} answers, {took}")
        else:
            if "stage" in event:
                self._stage, self._stage_begun = event["stage"], now
            self._bar.update(self._task, description=escape(f"{self.title}: {self._stage}"), pace=took)
            if not self._redrawn:
                self._say_stage(self._stage if now - self._begun < 1 else f"{self._stage} ({took})")
        if self._redrawn:
            self._bar.refresh()

    def _say(self, what: str) -> None:
        self._screen.print(f"{self.title}: {what}", soft_wrap=True, markup=False, highlight=False)
