"""One cell in a fresh worker process. There is a record, whatever happens to the worker."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grbench.config.schema import RunnerConfig, RunSpec, batching
from grbench.execution import folders, oom, records
from grbench.execution.environment import describe_environment
from grbench.execution.load import LoadWatch, with_load
from grbench.execution.records import LOG_FILE, Outcome, RunRecord, Status
from grbench.execution.workers import Event, KeptWorker, Worker
from grbench.signals import ENDING, Stopped, deferred

STARTING = "it started"  # before a worker has reported a step


def run_cell(
    spec: RunSpec,
    runner: RunnerConfig,
    folder: Path,
    *,
    sweep_id: str | None = None,
    overrides: list[str] | None = None,
    config_dir: Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    kept: KeptWorker | None = None,
    beside: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> tuple[RunRecord, Path]:
    """Measure one cell and keep its record. Returns the record and the folder that has it.

    A record is never overwritten: if `folder` has one already, or another process measures there, the new one is kept
    in a folder beside it.
    `on_event` receives the worker's {"stage": ...} and {"answered": n} messages, and {} after a silence. kept: keeps
    the worker for a later cell of the same engine, and may have one for this cell; None: a fresh worker that ends with
    the cell. beside: the number of cells that may run beside this one, and its own `cores` and `gpu`; None: it runs
    alone. facts: further fields of the record's environment.

    Only Interrupted is raised, for any KeyboardInterrupt, after the worker has been stopped and its record kept.
    However the launcher ends, so does the worker.
    """
    started, begun = datetime.datetime.now(datetime.UTC), time.monotonic()
    with folders.unused(folder) as folder:
        interrupted: KeyboardInterrupt | None = None
        spec_hash, files = spec.hash, spec.file_contents()  # as it begins: a file may be replaced meanwhile
        outcome: Outcome | None = None
        work = _Work(spec, runner, folder, on_event, kept)
        record: RunRecord | None = None
        while record is None:  # again after a signal, which may come at any moment
            try:
                outcome = outcome or work.outcome()
                with deferred():
                    record = _record(
                        spec,
                        outcome,
                        beside,
                        facts or {},
                        spec_hash=spec_hash,
                        started_at=started.isoformat(timespec="seconds"),
                        duration_s=round(time.monotonic() - begun, 3),
                        files=files,
                        sweep_id=sweep_id,
                        overrides=overrides or [],
                        config_dir=str(config_dir) if config_dir else None,
                    )
                    folder = keep(record, folder)
            except KeyboardInterrupt as e:
                interrupted = e
                ended = f"{e or 'SIGINT'} ended the command while the cell ran"
                outcome = outcome or work.ended(Status.INTERRUPTED, ended)
        if interrupted is not None:
            raise Interrupted(record, folder, getattr(interrupted, "number", signal.SIGINT)) from interrupted
        return record, folder


@dataclass
class _Work:
    """The work of one cell in a worker, two if the first asks for the cell to be measured again.

    kept: as of `run_cell`. step, so_far: the worker's last report: the step in which it is, in words, and its outcome
    before that step.
    """

    spec: RunSpec
    runner: RunnerConfig
    folder: Path
    on_event: Callable[[Event], None]
    kept: KeptWorker | None
    step: str = STARTING
    so_far: Outcome = field(default_factory=Outcome)

    def outcome(self) -> Outcome:
        """Reserve the space for the record and run the cell. Returns an outcome also if the disk refuses."""
        try:
            records.reserve(self.folder)
            outcome, again = self._measured()
            if again is not None:
                self.on_event({"stage": f"measuring again, because {again}"})
                outcome, _ = self._measured()
                outcome.notes.append(f"measured a second time, because {again}")
            return outcome
        except OSError as e:
            status = Status.DISK_FULL if e.errno in (errno.ENOSPC, errno.EDQUOT) else Status.ERROR
            return self.ended(status, f"{self.folder}: {e.strerror or e}; free some space or set runner.output_root")

    def ended(self, status: Status, error: str) -> Outcome:
        """Return the outcome of a cell that ended here."""
        return dataclasses.replace(self.so_far, status=status, error=error)

    def _measured(self) -> tuple[Outcome, str | None]:
        """Run the cell in a worker and pass its messages on. The worker of a cell that ends well may be kept.

        Returns the worker's outcome, or how the worker ended, and why the cell is to be measured again, or None.
        """
        self.step, self.so_far = STARTING, Outcome()
        kills_before = oom.kills()
        worker = self.kept.give(self.spec, self.runner, self.folder) if self.kept is not None else None
        worker = worker or Worker(self.spec, self.runner, self.folder, keep=self.kept is not None)
        outcome: Outcome | None = None
        again: str | None = None
        timed_out, grace_s = False, 0.0  # Ctrl-C and the time limit stop the worker at once
        waits = False
        try:
            watch = LoadWatch(worker.pid, worker.gpu, _servers(self.spec))
            for event in worker.messages(time.monotonic() + self.runner.timeout_s):
                if "outcome" in event:
                    outcome = _outcome_of(event["outcome"])
                elif "so_far" in event:
                    self.so_far = _outcome_of(event["so_far"])
                elif "again" in event:
                    again = event["again"]
                else:
                    self.step = event.get("stage", self.step)
                    watch.see(event.get("stage"))
                    self.on_event(event)
            grace_s = 5.0
            waits = outcome is not None and outcome.waits
        except TimeoutError:
            timed_out = True
        finally:
            if not waits:
                worker.stop(grace_s)
        if waits:
            assert self.kept is not None and outcome is not None
            self.kept.keep(worker, self.spec, outcome.code)
        elif -worker.returncode in ENDING:  # who ends a whole job signals all its processes: ours may be on its way
            time.sleep(1.0)
        if outcome is None:
            killed_for_memory = worker.returncode == -signal.SIGKILL and oom.kills() > kills_before
            return self._without_outcome(worker.returncode, timed_out, killed_for_memory), again
        if outcome.status is Status.OK:
            device = outcome.actual["device"]
            outcome.metrics |= watch.metrics(device)
            outcome.notes = with_load(outcome.notes, watch.notes(device))
        return outcome, again

    def _without_outcome(self, code: int, timed_out: bool, killed_for_memory: bool) -> Outcome:
        """Return how a worker ended that reported no outcome. code: its exit code, negative for a signal."""
        where = f"while {self.step}; its log ends: {last_line(self.folder / LOG_FILE)}"
        if timed_out:
            limit = f"runner.timeout_s={self.runner.timeout_s:g}"
            return self.ended(Status.TIMEOUT, f"stopped after {limit} s, {where}")
        if killed_for_memory:
            why = "SIGKILL ended the worker while the kernel's out-of-memory killer ended a process"
            return self.ended(Status.OOM, f"{why}; use a smaller cell")
        if code > 0 and records.full(self.folder):
            why = f"the worker exited with {code} and no result, with no space left in {self.folder}"
            return self.ended(Status.DISK_FULL, f"{why}; free some and run it again")
        if code < 0:
            return self.ended(Status.KILLED, f"{signal.Signals(-code).name} ended the worker, {where}")
        return self.ended(Status.ERROR, f"the worker exited with {code} and no result, {where}")


def lost(
    spec: RunSpec,
    folder: Path,
    sweep_id: str | None,
    overrides: list[str],
    outcome: Outcome,
    facts: dict[str, Any],
    ran_s: float,
) -> tuple[Path, RunRecord]:
    """Keep the record of a cell whose process ended without one. Returns its folder and the record.

    facts: fields of the environment of that process that are not as here. ran_s: seconds that the cell ran until now.
    """
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ran_s)
    with folders.unused(folder) as folder, deferred():
        record = _record(
            spec,
            outcome,
            None,
            facts,
            spec_hash=spec.hash,
            started_at=started.isoformat(timespec="seconds"),
            duration_s=round(ran_s, 3),
            files=spec.file_contents(),
            sweep_id=sweep_id,
            overrides=overrides,
        )
        return keep(record, folder), record


def _record(
    spec: RunSpec, outcome: Outcome, beside: dict[str, Any] | None, facts: dict[str, Any], **known: Any
) -> RunRecord:
    """Return the record of a cell with this outcome. facts: of its environment. known: further fields of the record."""
    environment, notes = _environment(spec, outcome, beside, facts)
    ran = {name: value for name, value in vars(outcome).items() if name not in ("code", "notes", "waits")}
    if outcome.actual:
        ran["actual"] = outcome.actual | {"batching": batching(spec)}
    return RunRecord(
        spec=spec.to_dict(),
        requested=_requested(spec),
        environment=environment,
        **ran,
        notes=notes,
        **known,
    )


def _environment(
    spec: RunSpec, outcome: Outcome, beside: dict[str, Any] | None, facts: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the environment and the notes of a record.

    Code that was edited since the command began is noted, and so are cells that may have run beside this one.
    """
    environment, notes = describe_environment(spec.packages) | facts, list(outcome.notes)
    if beside is not None and beside["cells"]:
        environment = {**environment, "beside": beside}
        own = "cores and another GPU" if beside["gpu"] is not None else "cores"
        notes.append(f"up to {beside['cells']} other cells of the sweep ran beside this one, on other {own}")
    if outcome.ungated:
        notes.append(
            "the measurement had ended, but not all of its answers were checked: its figures are in the record's "
            "`ungated`, and are no result"
        )
    if outcome.code not in (None, environment["code"]):
        environment = {**environment, "code": outcome.code}
        notes.append(
            f"the code was edited after this command began: the cell ran code {outcome.code}, and not that of git_sha"
        )
    return environment, notes


class Interrupted(Stopped):
    """Ctrl-C or another signal while a cell ran. Carries the cell's record and folder."""

    def __init__(self, record: RunRecord, folder: Path, number: int) -> None:
        super().__init__(number)
        self.record, self.folder = record, folder


def keep(record: RunRecord, folder: Path) -> Path:
    """Save the record in `folder`, or in a temporary folder if the disk refuses. Returns the folder."""
    try:
        records.save(record, folder)
        return folder
    except OSError as e:
        spare = Path(tempfile.mkdtemp(prefix=f"grbench-{record.spec_hash}-"))
        record.notes.append(f"{folder} could not be written ({e.strerror or e}): this record is kept in {spare}")
        records.save(record, spare)
        return spare


def _outcome_of(message: dict[str, Any]) -> Outcome:
    return Outcome(**{**message, "status": Status(message["status"])})


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return "(no log)"
    return next((line.strip() for line in reversed(lines) if line.strip()), "(empty)")


def _requested(spec: RunSpec) -> dict[str, Any]:
    """Return the options of the engine and its kernels as asked for, beside those that ran (`actual`)."""
    asked = {f"engine.{k}": v for k, v in spec.to_dict()["engine"].items()}
    return asked | {f"kernel.{family}": name for family, name in spec.kernel.requested().items()}


def _servers(spec: RunSpec) -> list[str]:
    """Return the servers that a cell measures."""
    return [*filter(None, [getattr(spec.engine, "url", None)]), *getattr(spec.engine, "more_urls", ())]
