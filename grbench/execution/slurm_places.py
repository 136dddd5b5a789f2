"""Places on a cluster of Slurm: each is a job, submitted by submitit, that measures cells and ends.

The output root is on a file system that the nodes share. A job writes what it says into a file there, which the
command reads. Slurm gives each job cores and GPUs of its own.
"""

from __future__ import annotations

import importlib
import json
import logging
import platform
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grbench.config.schema import ConfigError, RunnerConfig, SlurmConfig
from grbench.execution.clock import SILENCE_S, at_most_every
from grbench.execution.place import measure
from grbench.execution.places import Part, PartError, Place, number_asked, pipe
from grbench.execution.records import one_line
from grbench.execution.workers import Event

LOOK_S = 1.0  # between two looks at what a job says
ASK_S = 30  # between two questions to Slurm about the jobs, once they have run for a minute
START_MIN = 5  # for a job's processes to start, beside its cells
ENDED = (  # states of a job that runs no more: it is not queued again
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
FOLDER = "slurm"  # under the output root: what submitit writes for each job


class Job:
    """Function of a job: cells, as the JSON of a place, and the file that takes the messages."""

    def __init__(self, cells: str, messages: Path) -> None:
        self.cells, self.messages = cells, messages

    def __call__(self) -> None:
        """Measure the cells."""
        write_answered = at_most_every(SILENCE_S, self._write)  # as often as the command shows it

        def say(message: Event) -> None:
            (write_answered if "answered" in message else self._write)(message)

        cells = [cell | {"facts": cell["facts"] | {"host": platform.node()}} for cell in json.loads(self.cells)]
        measure([json.dumps(cells)], say)

    def _write(self, message: Event) -> None:
        with self.messages.open("a") as file:  # closed each time: another node sees it then
            file.write(json.dumps(message) + "\n")

    def checkpoint(self) -> None:
        """Return nothing: a cell that Slurm ends is not begun again in the same job."""


class SlurmPart(Part):
    """One job at a time. asked: of Slurm, for each job."""

    def __init__(
        self, submitit: Any, asked: dict[str, Any], parameters: dict[str, Any], beside: int, root: Path
    ) -> None:
        unknown: dict[str, Any] = {
            "cpu": None,
            "cpu_cores": None,
            "memory_gib": None,
            "gpus": [],
        }  # before a job has a node
        super().__init__({**unknown, "slurm": asked}, beside, {"slurm": asked})
        self.submitit, self.parameters, self._root = submitit, parameters, root

    def start(self) -> Place:
        return _SlurmPlace(self, self._root / FOLDER / uuid.uuid4().hex)


def slurm_parts(runner: RunnerConfig, slurm: SlurmConfig, root: Path) -> list[Part]:
    """Return as many parts as `runner.parallel` lets jobs run at a time. Raises ConfigError."""
    if find_spec("submitit") is None:
        raise ConfigError("runner.cluster=slurm: package submitit is not installed; pip install 'grbench[slurm]'")
    for program in ("sbatch", "srun", "sacct", "scancel"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"runner.cluster=slurm: {program} is not on the PATH; start this on a login node of the cluster"
            )
    a_number = "with runner.cluster=slurm it is the number of jobs at a time, from 1; slurm.gpus=1 gives each a GPU"
    count = number_asked(runner.parallel, a_number)
    submitit: Any = importlib.import_module("submitit")
    logging.getLogger("submitit").setLevel(logging.ERROR)
    watcher = submitit.SlurmJob.watcher = type(submitit.SlurmJob.watcher)(delay_s=ASK_S)
    # submitit's own takes a suspended job for one that has ended, and waits for one that was preempted.
    watcher.is_done = lambda job, mode="standard": watcher.get_state(job, mode).partition(" ")[0] in ENDED
    parameters = _parameters(slurm)
    try:
        submitit.SlurmExecutor(root / FOLDER).update_parameters(**parameters)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"slurm: submitit refuses these options ({one_line(e, keep_end=True)})") from None
    asked = {name: value for name, value in vars(slurm).items() if value and name != "time_min"}
    beside = 0 if slurm.exclusive else count - 1
    return [SlurmPart(submitit, asked, parameters, beside, root) for _ in range(count)]


def _parameters(slurm: SlurmConfig) -> dict[str, Any]:
    """Return the options of a job as submitit names them. Raises ConfigError."""
    further: dict[str, Any] = {"no-requeue": True}
    for option in slurm.options:
        name, _, value = option.partition("=")
        if not name or not value:
            raise ConfigError(f"slurm.options={option}: each is NAME=VALUE, such as reservation=night")
        further[name] = value
    known = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "gpus_per_node": slurm.gpus or None,
        "cpus_per_task": slurm.cores,
        "mem": f"{slurm.memory_gb}GB" if slurm.memory_gb else None,
        "exclusive": slurm.exclusive or None,
        "time": slurm.time_min,
    }
    fixed = {"job_name": "grbench", "stderr_to_stdout": True, "additional_parameters": further}
    return {name: value for name, value in known.items() if value is not None} | fixed


class _SlurmPlace(Place):
    waits = False

    def __init__(self, part: SlurmPart, folder: Path) -> None:
        self._part, self._folder_of_job, self._messages = part, folder, folder / "messages"
        self._job: Any = None
        self._given_up = threading.Event()
        self._submitted = threading.Event()
        super().__init__(part, pipe(self._said()))

    def _send(self, line: bytes) -> None:
        minutes = sum(cell.runner.timeout_s / 60 + START_MIN for cell in self.cells)
        executor = self._part.submitit.SlurmExecutor(self._folder_of_job)
        executor.update_parameters(**{"time": round(minutes), **self._part.parameters})
        try:
            self._job = executor.submit(Job(line.decode(), self._messages))
        except self._part.submitit.core.utils.FailedJobError as e:
            self._given_up.set()
            raise PartError(f"Slurm takes no job ({one_line(e, keep_end=True)})") from None
        finally:
            self._submitted.set()

    def _said(self) -> Iterator[bytes]:
        self._submitted.wait()
        read = 0
        while True:
            over = self._given_up.is_set() or self._job.done()  # asked first: what it said before is there then
            chunk = b""
            if self._messages.exists():
                with self._messages.open("rb") as file:
                    file.seek(read)
                    chunk = file.read()
            read += len(chunk)
            if chunk:
                yield chunk
            elif over:
                return
            else:
                self._given_up.wait(LOOK_S)

    def _signal(self, number: int) -> None:
        self._job.cancel(check=False)
        if number == signal.SIGKILL:
            self._given_up.set()

    def _how(self) -> str:
        state = self._job.watcher.get_state(self._job.job_id, mode="force")
        return f"job {self._job.job_id} of Slurm ended as {state} (its log is {self._job.paths.stdout})"

    def _where(self) -> str:
        return f" in job {self._job.job_id} of Slurm"
