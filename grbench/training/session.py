"""Trainings of one invocation, one after another: weights on disk, figures in MLflow and on the screen."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from grbench import signals, workloads
from grbench.config.jobs import Invocation, Job
from grbench.config.schema import ConfigError
from grbench.execution import results
from grbench.execution.clock import pace
from grbench.execution.environment import describe_environment
from grbench.execution.folders import require_writable
from grbench.execution.records import LoggedRow, Status, spec_hash
from grbench.execution.row_session import RowSession
from grbench.quality.protocol import LeaveOneOut
from grbench.report.markdown import table
from grbench.training import loop
from grbench.training.config import IDS, WEIGHTS, TrainConfig, TrainingConfig
from grbench.training.folder import NO_PART, kept_line, require_own
from grbench.training.generate import GenerateTask, semantic_ids
from grbench.training.rank import RankTask
from grbench.workloads.events import Events
from grbench.workloads.item_map import save_items
from grengines.models.hstu.config import HSTUConfig, not_read
from grengines.options import files
from grengines.overrides import override
from grengines.runtime.cache_dir import content
from grengines.semantic.ids import SemanticIds

DIGITS = {"best_epoch": 0, "epochs": 0, "training_s": 1}  # behind the point, of figures that are no measure of quality


class TrainSession(RowSession):
    """Session that trains and keeps what was learned."""

    def __init__(self, first: Job, invocation: Invocation) -> None:
        super().__init__(first, invocation, command="train", suffix="train")
        if self._sweep and first.config.out is not None:
            raise ConfigError("out: the trainings of a sweep would write the same files; leave it out")
        self._finished: list[tuple[str, dict[str, float]]] = []
        self._doubts: list[str] = []

    @property
    def ok(self) -> bool:
        return True  # a training that cannot be ends with an error

    def print_tables(self) -> None:
        for name, figures in self._finished:
            Console(width=None).print(name, markup=False, highlight=False, soft_wrap=True)
            rows = [[key, f"{value:.{DIGITS.get(key, 4)}f}"] for key, value in figures.items()]
            print(table(["held out", "figure"], rows))

    def close(self, cut_short: str = "") -> int:
        """Close the session as any, then say which weights are not useful."""
        code = super().close(cut_short)
        for doubt in self._doubts:
            self.show(doubt)
        return code

    def run(self, job: Job) -> None:
        """Train one model. Raises ConfigError for data or options that cannot be used."""
        config: TrainConfig = job.config
        device, folder = _device(config), Path(config.out or job.folder).absolute()
        if folder != job.folder.absolute():  # the session holds that one
            require_writable(folder, f"out={config.out}", "set out to")
            self.hold(folder, "out")
        begun, started = datetime.datetime.now(datetime.UTC), time.perf_counter()
        here: list[loop.Epoch] = []  # epochs of this process, which may go on from a checkpoint
        try:
            typed = any(word.lstrip("+").startswith("model.tasks=") for word in job.overrides)
            task, events, ids = self._task(config, device, typed)
            known = {"kind": "train", **self.facts(), "config": dataclasses.asdict(config), "device": device.type}
            name = f"{config.task} {config.workload.name} {config.model.name} seed {config.seed}"
            parameters = sum(p.numel() for p in task.model.parameters())
            self.show(f"{name}: {task.examples:,} examples, {parameters:,} parameters, on {device.type}")
            identity = identity_of(config)
            require_own(folder, dataclasses.asdict(config), identity)
            if (folder / loop.CHECKPOINT).is_file():
                self.show(f"going on from {folder / loop.CHECKPOINT}")
            trains = time.perf_counter()

            def report(epoch: loop.Epoch) -> None:
                here.append(epoch)
                self.show(epoch_line(epoch, config.training))

            with self.watch("steps, at most", config.training.most_s) as show:
                state = loop.train(
                    task, config.training, device, config.seed, folder, identity,
                    report=report, progress=show,
                )  # fmt: skip
            with torch.no_grad():
                figures = task.test()
            if config.training.minutes:
                took = (time.perf_counter() - trains) / 60
                self.show(f"trained and tested in {took:.2g} of training.minutes={config.training.minutes:g}")
        except KeyboardInterrupt:
            self.show(kept_line(folder, config.out))
            raise
        except (ValueError, torch.OutOfMemoryError) as e:
            raise e if isinstance(e, ConfigError) else ConfigError(" ".join(str(e).split())) from e
        seconds = time.perf_counter() - started
        figures |= {"best_epoch": float(state.best_epoch), "epochs": float(state.epochs), "training_s": seconds}
        known |= {"identity": identity, "test": figures, "parameters": parameters}
        with signals.deferred():  # weights without the record of their training would be refused the next time
            self._save(folder, task, events, ids)
            file = results.save(folder, known, state.history)
            (folder / loop.CHECKPOINT).unlink(missing_ok=True)
            self.keep(file)
        random = (config.model if config.task == "rank" else config.retrieval).weights is None
        if doubt := doubt_of(state, here if random else [], task.baseline(), config.training):
            more = " and another out=FOLDER" if config.out else ""
            self._doubts.append(f"{os.path.relpath(folder / WEIGHTS)}: these weights are NOT useful yet: {doubt}{more}")
        self._tracker.log([_record(config, name, identity, begun, seconds, device, figures)], file)
        self._finished.append((f"{name}; to run it: {_command(config, job, folder, ids)}", figures))

    def _task(self, config: TrainConfig, device: torch.device, typed: bool) -> tuple[Any, Events, SemanticIds | None]:
        """Return what is trained, its events and its semantic IDs. Raises ValueError for unusable data.

        typed: the user named model.tasks. Else a ranker learns all that the workload labels, if those of the model's
        configuration are none of it.
        """
        if config.task == "rank":
            trace = workloads.build(config.workload, config.seed, latency_limit_ms=1.0)
            tasks, labelled = config.model.tasks, trace.events.action_names
            if not typed and not set(tasks) <= set(labelled):
                config.model.tasks = list(labelled)
                self.show(f"model.tasks=[{','.join(labelled)}]: all that the workload labels, instead of the model's")
            return RankTask(config, trace, device), trace.events, None
        split = LeaveOneOut(workloads.load_events(config.workload))
        self.show("making semantic IDs from the events of the training split")
        ids = semantic_ids(config, split)
        return GenerateTask(config, split, ids, device), split.events, ids

    def _save(self, folder: Path, task: Any, events: Events, ids: SemanticIds | None) -> None:
        """Write the weights, the map of items and the semantic IDs."""
        task.save(folder / WEIGHTS)
        self.show(f"{os.path.relpath(folder / WEIGHTS)}: the weights of the best epoch")
        save_items(events, folder / WEIGHTS)
        if ids is not None and ids.levels > 1:
            ids.save(folder / IDS)


def _device(config: TrainConfig) -> torch.device:
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError("device=cuda: PyTorch finds no GPU; `python -m grbench doctor` says why; allowed here: cpu")
    return torch.device("cuda" if there and config.device != "cpu" else "cpu")


def identity_of(config: TrainConfig) -> str:
    """Return the hash of what a training depends on: trainings with an equal one make the same weights."""
    return spec_hash(_identity(config))


def _identity(config: TrainConfig) -> dict[str, Any]:
    """Return what a training depends on; of a file its content counts."""
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in NO_PART}
    return values | {"files": {key: content(Path(path)) for key, path in files(config).items()}}


def epoch_line(epoch: loop.Epoch, options: TrainingConfig) -> str:
    """Return the line of an epoch. `patience` may end the training earlier than the time that is said to be left."""
    figures = ", ".join(f"{name} {value:.4f}" for name, value in epoch.figures.items())
    validated = f"; validation: {figures}" if figures else ""
    cut = "" if epoch.steps == epoch.whole else f" ({epoch.steps} of {epoch.whole} steps: training.minutes ended it)"
    last = bool(cut) or epoch.number == options.epochs
    of = epoch.trained + (0 if last else options.epochs - epoch.number)
    left = pace(epoch.seconds, epoch.trained, of, options.most_s, epoch.check_s)
    left += " for the test" if last else " at most"
    return f"epoch {epoch.number}{cut}: loss {epoch.loss:.4f}{validated}; {left}"


def doubt_of(state: loop.State, here: list[loop.Epoch], baseline: tuple[str, float], options: TrainingConfig) -> str:
    """Return why trained weights are not useful, and the option to set; "" if nothing speaks against them.

    here: epochs of this process; none if they began from trained weights, for which less than an epoch may do.
    baseline: name and figure of a ranking without a model.
    """
    steps, (name, figure) = sum(row["steps"] for row in state.history), baseline
    if here and steps < here[-1].whole:
        cut = here[-1]
        least = (3 * cut.check_s + cut.steps_s * cut.whole / cut.steps) / 60
        minutes = f"{max(math.ceil(10 * least) / 10, 2 * options.minutes):g}"
        return f"only {steps} of the {cut.whole} steps of an epoch were trained; set training.minutes={minutes} or more"
    if state.best_figure > figure:
        return ""
    cut_short = options.minutes and state.epochs < options.epochs and not loop.exhausted(state, options)
    remedy = (
        f"training.minutes={2 * options.minutes:g} or more" if cut_short else "another training.rate or more epochs"
    )
    return f"their validation, {state.best_figure:.4f}, is no better than {name}, {figure:.4f}; set {remedy}"


def _command(config: TrainConfig, job: Job, folder: Path, ids: SemanticIds | None) -> str:
    """Return the command that runs the trained model."""
    place = os.path.relpath(folder)
    groups, replaced = ("model", "workload", "retrieval.", "seed"), ("weights", "semantic_ids")
    idle = ["retrieval"] if ids is None else [f"model.{name}" for name in not_read("generate")]
    typed = [
        w
        for w in job.overrides
        if w.startswith(groups)
        and not w.partition("=")[0].endswith(replaced)
        and not any(f"{w.partition('=')[0]}.".startswith(f"{key}.") for key in idle)  # a run refuses those
    ]
    engine = "hstu" if isinstance(config.model, HSTUConfig) else "hf"
    words = [f"engine={engine}", f"task={config.task}", *typed]
    if ids is None:
        if not any(word.startswith("model.tasks=") for word in words):
            words.append(f"model.tasks=[{','.join(config.model.tasks)}]")
        words.append(override("model.weights", f"{place}/{WEIGHTS}"))
    else:
        words.append(override("retrieval.weights", f"{place}/{WEIGHTS}"))
        words += [override("retrieval.semantic_ids", f"{place}/{IDS}")] if ids.levels > 1 else []
    return shlex.join(["python", "-m", "grbench", *words])


def _record(
    config: TrainConfig,
    name: str,
    identity: str,
    begun: datetime.datetime,
    seconds: float,
    device: torch.device,
    figures: dict[str, float],
) -> LoggedRow:
    """Return the training as the store logs it: `spec` becomes params."""
    values = _identity(config)
    return LoggedRow(
        spec=values | {"training": values["training"] | {"name": name}},
        spec_hash=identity,
        status=Status.OK,
        started_at=begun.isoformat(),
        duration_s=seconds,
        actual={"device": device.type},
        environment=describe_environment(),
        metrics={f"test/{key}": value for key, value in figures.items()},
    )
