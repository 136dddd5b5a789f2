"""The weights that `grbench train` made: `grbench evaluate` takes those of the same words.

A training fits a configuration if it had the same task, model, data, levels of codes and seed. Of several the one with
the same workload options counts, then the latest.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from grbench.config.compose import explain
from grbench.config.schema import ConfigError, RunSpec, weights_of
from grbench.execution import results
from grbench.execution.records import ARTIFACTS
from grbench.training.config import IDS, WEIGHTS

TASKS = {"model": "rank", "retrieval": "generate"}  # what a training of each part learns


@dataclass
class Wanted:
    """Facts of a training that its words give, beside the options that a run has too."""

    out: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key, such as training.epochs


def as_run(words: Sequence[str]) -> tuple[list[str], Wanted]:
    """Return the overrides of the run that evaluates what these words train, and what else they say of the training.

    As in `grbench train`, the task is rank unless they say another one, or name an engine. A file of a part's weights
    says the task too, and both files the pipeline. Raises ConfigError for a word that is no override.
    """
    wanted, kept = Wanted(), list[str]()
    for word in words:
        key, _, value = word.partition("=")
        if key == "out":
            wanted.out = value
        elif key == "held_out" or key.startswith("training."):
            wanted.settings[key] = _typed(word)
        else:
            kept.append({"device": "engine.", "output_root": "runner."}.get(key, "") + word)
    keys, files = {word.partition("=")[0] for word in kept}, {"model.weights", "retrieval.weights"}
    if keys & {"engine", "study"} or "task=recommend" in kept or files <= keys:
        return kept, wanted
    engine = "hf" if any(word.startswith("model=decoder") for word in kept) else "hstu"
    task = ["task=generate"] if "retrieval.weights" in keys and "task" not in keys else []
    return [f"engine={engine}", *task, *kept], wanted


def _typed(word: str) -> Any:
    """Return the value of an override, as `grbench train` reads it. Raises ConfigError."""
    try:
        return OverridesParser.create().parse_overrides([word])[0].value()
    except OverrideParseException as e:
        raise ConfigError(explain(e)) from None


def with_trained(spec: RunSpec, wanted: Wanted, root: Path, overrides: Sequence[str]) -> tuple[RunSpec, list[str]]:
    """Return a configuration with the weights of trainings where it has none, and a line for each file that it uses.

    root: the folder of outputs. overrides: what was typed. Raises ConfigError if `wanted.out` has no such training.
    """
    lines = []
    typed_tasks = any(word.startswith("model.tasks=") for word in overrides)
    for part, file in weights_of(spec).items():
        found = None if file else _find(spec, part, wanted, root, typed_tasks)
        if found is None:
            lines += [f"task={spec.task}, {part}.weights={file}"] if file else []
            continue
        folder, training = found
        place = os.path.relpath(folder)
        changed: dict[str, Any] = {"weights": f"{place}/{WEIGHTS}"}
        if part == "model":
            changed["tasks"] = training["config"]["model"]["tasks"]
        elif (folder / IDS).is_file() and spec.retrieval and spec.retrieval.semantic_ids is None:
            changed["semantic_ids"] = f"{place}/{IDS}"
        spec = dataclasses.replace(spec, **{part: dataclasses.replace(getattr(spec, part), **changed)})
        lines.append(f"task={spec.task}, {part}.weights={changed['weights']}, trained at {training['started_at']}")
    return spec, lines


def _find(
    spec: RunSpec, part: str, wanted: Wanted, root: Path, typed_tasks: bool
) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the results of the training whose weights a part takes; None if there is none.

    Raises ConfigError if there is none in `wanted.out`.
    """
    found = []
    for folder, training in _trainings(Path(wanted.out) if wanted.out else root):
        config = training["config"]
        different = _different(spec, part, config, wanted, typed_tasks)
        if different and wanted.out and config.get("task") == TASKS[part]:
            raise ConfigError(f"out={wanted.out}: its training has {different}; give its words, or name another folder")
        if not different:
            same = config["workload"] == dataclasses.asdict(spec.workload)
            found.append((same, training["started_at"], folder, training))
    if not found:
        if wanted.out:
            task = TASKS[part]
            raise ConfigError(
                f"out={wanted.out}: no training with task={task} lies there; `grbench train task={task} "
                f"out={wanted.out}` and the other words make one, or set {part}.weights=FILE"
            )
        return None
    *_, folder, training = max(found, key=lambda one: one[:2])
    return folder, training


def _different(spec: RunSpec, part: str, config: dict[str, Any], wanted: Wanted, typed_tasks: bool) -> str:
    """Return the first option in which a training's differs from what is asked; "" if none does."""
    task = TASKS[part]
    asked: dict[str, Any] = {"task": task, "seed": spec.seed, **wanted.settings}
    left_out = ("weights",) if part == "model" and typed_tasks else ("weights", "tasks")
    asked |= {f"model.{k}": v for k, v in dataclasses.asdict(spec.model).items() if k not in left_out}
    asked |= {f"workload.{k}": getattr(spec.workload, k, None) for k in ("name", "path")}
    if part == "retrieval" and spec.retrieval is not None:
        asked |= {f"retrieval.{k}": getattr(spec.retrieval, k) for k in ("levels", "codes")}
    for key, value in asked.items():
        node: Any = config
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node != value:
            return f"{key}={node}"
    return ""


def _trainings(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder and the results of every training below a folder that has left weights."""
    for folder, below, names in os.walk(root):
        if ARTIFACTS in below:
            below.remove(ARTIFACTS)  # MLflow's copies
        if WEIGHTS in names and results.RESULTS_FILE in names:
            try:
                training = results.load(Path(folder, results.RESULTS_FILE))
            except (ValueError, OSError):
                continue
            if training.get("kind") == "train" and isinstance(training.get("config"), dict):
                yield Path(folder), training
