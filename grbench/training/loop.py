"""The epochs of a training: optimiser, schedule, early stopping, and a checkpoint to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grbench.config.schema import ConfigError
from grbench.training.config import TrainingConfig
from grengines.runtime import atomic_io

CHECKPOINT = "checkpoint.pt"
SAVE_S = 20.0  # between two checkpoints
WARM_UP = 0.05  # share of the steps over which the learning rate rises
CLIP = 1.0  # norm of the gradient
Progress = Callable[[int, int, float], None]  # steps done, all at most, seconds of the last validation and the test


class Task(Protocol):
    """Something to train: a model, its data, its loss, and the figures that choose the best epoch."""

    examples: int

    @property
    def model(self) -> nn.Module:
        """The parameters."""

    def batches(self, epoch: int) -> Iterator[Any]:
        """Yield the batches of an epoch, in an order that depends on the seed and the epoch only."""

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, a scalar."""

    def validate(self) -> dict[str, float]:
        """Return figures of the model as it is. The first one chooses: the higher, the better."""

    def baseline(self) -> tuple[str, float]:
        """Return the first figure of `validate` without a model, after its name."""

    def test(self) -> dict[str, float]:
        """Return the figures of the data that was neither trained on nor chose the epoch."""


@dataclass
class Epoch:
    """An epoch that was trained, with the figures of its validation, if it has one."""

    number: int  # from 1
    loss: float
    figures: dict[str, float]
    seconds: float  # since training began, without earlier parts of a training that went on
    trained: int  # epochs in these seconds
    steps: int  # that were trained
    whole: int  # steps of a whole epoch
    steps_s: float  # of the steps
    check_s: float  # of the latest validation, about as long as the test; 0: there was none

    def to_dict(self) -> dict[str, Any]:
        return {"epoch": self.number, "loss": self.loss, **self.figures, "seconds": self.seconds, "steps": self.steps}


@dataclass
class State:
    """Progress of a training, as a checkpoint holds it. `best` are the weights of the best epoch."""

    history: list[dict[str, Any]]
    best: dict[str, Tensor]
    best_epoch: int
    best_figure: float

    @property
    def epochs(self) -> int:
        return len(self.history)


def train(
    task: Task,
    options: TrainingConfig,
    device: torch.device,
    seed: int,
    folder: Path,
    identity: str,
    report: Callable[[Epoch], None],
    progress: Progress = lambda done, total, after_s: None,
) -> State:
    """Train to the last epoch, the end of `minutes`, or until `patience` validations brought nothing.

    The model then has the best weights.

    folder: of the checkpoint. One of the same `identity` is gone on from; one of another raises ConfigError. The result
    is that of a training without a stop, on the same machine and its CPU, unless `minutes` cut an epoch short: they
    begin anew when a training goes on. Raises ConfigError for fewer minutes than the checks alone take.
    """
    model, steps_an_epoch = task.model, -(-task.examples // options.batch)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    total = options.epochs * steps_an_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total))
    averaged = Average(model, options.average)
    parts = (optimiser, schedule, averaged)
    state = _resume(folder / CHECKPOINT, identity, model, *parts)
    began = saved = time.perf_counter()
    before = state.epochs
    check_s = _check_s(task, options) if options.minutes else 0.0
    ends = began + options.most_s - 2 * check_s  # the last validation and the test
    while state.epochs < options.epochs and time.perf_counter() < ends and not exhausted(state, options):
        number = state.epochs + 1
        torch.manual_seed(seed * 100_003 + number)  # of dropout; an epoch does not depend on those before it
        at, left = (number - 1 - before) * steps_an_epoch, (options.epochs - before) * steps_an_epoch
        step = partial(_of_all, progress, at, left, 2 * check_s)
        stepped = time.perf_counter()
        loss, steps = _epoch(task, number, device, optimiser, schedule, averaged, step, ends)
        figures, steps_s = dict[str, float](), time.perf_counter() - stepped
        last = number == options.epochs or time.perf_counter() >= ends
        if last or number % options.validate_every == 0:
            checked = time.perf_counter()
            with torch.no_grad(), averaged.in_place():
                figures = task.validate()
                if (figure := next(iter(figures.values()))) > state.best_figure:
                    state.best_figure, state.best_epoch, state.best = figure, number, _copy(model)
            check_s = time.perf_counter() - checked
        seconds = time.perf_counter() - began
        epoch = Epoch(number, loss, figures, seconds, number - before, steps, steps_an_epoch, steps_s, check_s)
        state.history.append(epoch.to_dict())
        report(epoch)
        if time.perf_counter() - saved > SAVE_S:
            _save(folder / CHECKPOINT, identity, state, model, *parts)
            saved = time.perf_counter()
    model.load_state_dict(state.best)
    return state


class Average:
    """A moving average of a model's weights, which keeps a share of itself at each step.

    The share grows with the steps up to `share`, so that the average soon forgets the first weights.
    0: the weights themselves.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self._own: list[Tensor] = list(model.parameters())
        self._share, self._steps = share, 0
        self._mean = [p.detach().clone() for p in self._own] if share else []

    @torch.no_grad()
    def step(self) -> None:
        """Take in the weights of a step."""
        self._steps += 1
        if self._share:
            kept = min(self._share, self._steps / (self._steps + 9))
            torch._foreach_lerp_(self._mean, self._own, 1 - kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average, and its own weights again at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for own, mean in zip(self._own, self._mean, strict=bool(self._share)):
            kept = own.clone()
            own.copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "steps": self._steps}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._steps = values["steps"]
        for mean, its in zip(self._mean, values["mean"], strict=True):
            mean.copy_(its)


def _check_s(task: Task, options: TrainingConfig) -> float:
    """Return the seconds that a validation and the test will take each, by a validation before the first step.

    Raises ConfigError if `minutes` leave no time beside them.
    """
    begun = time.perf_counter()
    with torch.no_grad():
        task.validate()
    check_s = time.perf_counter() - begun
    if 3 * check_s >= options.most_s:  # this one, the last one, and the test
        raise ConfigError(
            f"training.minutes={options.minutes:g}: a validation takes {check_s:.3g} s here, and three are needed; set "
            f"more than {3 * check_s / 60:.2g}, or 0 for no limit"
        )
    return check_s


def _epoch(
    task: Task,
    number: int,
    device: torch.device,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    averaged: Average,
    progress: Callable[[int], None],
    ends: float,
) -> tuple[float, int]:
    """Train one epoch, or less of it if the time `ends` (of time.perf_counter) comes first.

    Returns the mean loss and the number of steps. Raises ConfigError if the loss is not finite.
    """
    total, trained = torch.zeros((), device=device), 0
    for done, batch in enumerate(task.batches(number)):
        if done and time.perf_counter() >= ends:
            break
        progress(done)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = task.loss(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        averaged.step()
        total += loss.detach()
        trained += 1
    mean = float(total) / max(trained, 1)
    if not math.isfinite(mean):
        raise ConfigError(f"the loss of epoch {number} is {mean}; set a lower training.rate")
    return mean, trained


def _of_all(progress: Progress, before: int, total: int, after_s: float, done: int) -> None:
    """Report `done` steps of an epoch, which `before` steps of this training came before."""
    progress(before + done, total, after_s)


def _rate(step: int, total: int) -> float:
    """Return the share of the highest learning rate: it rises linearly, then falls as a cosine."""
    rise = max(int(WARM_UP * total), 1)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def exhausted(state: State, options: TrainingConfig) -> bool:
    """Return whether the validations stopped improving."""
    return state.epochs - state.best_epoch >= options.patience * options.validate_every


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def _save(path: Path, identity: str, state: State, model: nn.Module, *parts: Any) -> None:
    """Write a checkpoint whole or not at all."""
    values = {
        **vars(state),
        "identity": identity,
        "model": model.state_dict(),
        "parts": [p.state_dict() for p in parts],
    }
    with atomic_io.replacing(path) as made:
        torch.save(values, made)


def _resume(path: Path, identity: str, model: nn.Module, *parts: Any) -> State:
    """Load a checkpoint, if there is one, into the model and the parts. Raises ConfigError for one that is not ours."""
    if not path.is_file():
        return State([], _copy(model), 0, -math.inf)
    device = next(model.parameters()).device
    try:
        values = torch.load(path, map_location=device, weights_only=True)
        found = values.pop("identity")
    except Exception as e:
        raise ConfigError(f"{path}: not a checkpoint ({type(e).__name__}); remove it to begin again") from None
    if found != identity:
        raise ConfigError(
            f"{path}: of a training with other options or data; remove it to begin again, or set another out="
        )
    model.load_state_dict(values.pop("model"))
    for part, its in zip(parts, values.pop("parts"), strict=True):
        part.load_state_dict(its)
    return State(**values)
