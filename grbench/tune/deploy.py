"""The winner as a deployment file, which `grbench serve` loads."""

from __future__ import annotations

import os
import re
from pathlib import Path

from grbench import deployment
from grbench.config.compose import choices, compose_spec
from grbench.deployment import Certified, Deployment, Figure, Strategy
from grbench.report.cells import shown
from grbench.tune import answer
from grbench.tune.answer import Answer
from grbench.tune.config import Declared
from grbench.tune.live import BATCHING
from grengines import registry
from grengines.options import files
from grengines.overrides import override

FILE = "best.yaml"
# Overrides of how cells run, which are no part of a strategy, and what the deployment has keys for.
NOT_STRATEGY = ("task", "runner.", "tracking", "rerun", "skip_invalid", "hydra.", "scenario", "gate.", "seed")
GROUPS = ("model", "workload", "engine", "kernel", "cache")  # of options that make a strategy
STORAGE = "cache.storage_path"  # a folder whose content does not count, so that `files` leaves it out


def write(found: Answer, declared: Declared, folder: Path) -> Path:
    """Write the winner into a folder. Returns the path.

    It has certified figures only if it was certified, else a comment that says why it was not. A comment also names the
    rate that failed, and what trained weights lose.
    """
    fixed = [word for word in declared.fixed if not _besides(word)]
    batching = [word for word in declared.fixed if word.startswith("scenario.")]
    strategy = Strategy(
        name=found.trial.configuration.name.replace(" ", "-"),
        overrides=_from_anywhere(_whole([*fixed, *batching, *found.trial.configuration.words], declared), declared),
        certified=_figures(found, folder) if found.certified else None,
    )
    limits = {}
    for limit in declared.goal.limits:
        if limit.metric.startswith("latency_ms/"):
            limits[limit.metric.replace("/", ".", 1)] = limit.bound
        elif re.fullmatch(r"quality/\w+_loss", limit.metric):
            limits[f"{limit.metric.replace('/', '.', 1)}_pct"] = 100 * limit.bound
        elif limit.metric.startswith("gpu_memory_mib/"):
            limits["memory_gb"] = limit.bound * 2**20 / 1e9
    path = folder / FILE
    remarks = [] if found.certified else [f"The strategy is {answer.proof(found)}."]
    if found.trial.refuted:
        remarks.append(f"It failed its certification at {found.trial.refuted}.")
        remarks += [] if found.certified else [f"{answer.unproven(found)}."]
    if found.quality:
        remarks.append(f"{found.quality}.")
    own = None if declared.config_dir is None else str(Path(declared.config_dir).absolute())
    made = Deployment(deployment.VERSION, declared.task, limits, [strategy], config_dir=own)
    deployment.save(made, path, " ".join(remarks))
    return path


def _whole(words: list[str], declared: Declared) -> list[str]:
    """Return overrides that say by themselves what a strategy is, also to a version with other defaults.

    Before those of the search come the choices of groups, the batching and the precisions that nobody typed.
    """
    composed = [*words, f"task={declared.task}", f"scenario={declared.scenario}"]
    spec, _ = compose_spec(composed, declared.config_dir)
    stages = registry.get(spec.engine.name).stages
    engines = {f"engine.{stage}": getattr(spec.engine, stage) for stage in stages} or {"engine": spec.engine}
    groups = choices(composed, declared.config_dir)
    effective = {
        **{key: name for group in GROUPS for key, name in groups.items() if key.partition("@")[0] == group},
        **{f"{key}.precision": engine.precision for key, engine in engines.items() if hasattr(engine, "precision")},
        **{f"scenario.{name}": shown(getattr(spec.scenario, name)) for name in BATCHING},
    }
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    return [*(f"{key}={value}" for key, value in effective.items() if key not in typed), *words]


def _from_anywhere(words: list[str], declared: Declared) -> list[str]:
    """Return overrides with absolute paths, because a server may start in another folder.

    A path that stands in a YAML file, such as one of the user's own, becomes an override.
    """
    spec, _ = compose_spec([*words, f"task={declared.task}"], declared.config_dir)
    paths = files(spec) | {STORAGE: getattr(spec.cache, "storage_path", "")}
    found = []
    for word in words:
        key = word.partition("=")[0]
        path = paths.get(key.lstrip("+"))
        found.append(_absolute(key, path) if path else word)
    typed = {word.lstrip("+").partition("=")[0] for word in words}
    return [*found, *(_absolute(key, path) for key, path in paths.items() if path and key not in typed)]


def _absolute(key: str, path: str) -> str:
    return override(key, str(Path(path).absolute()))


def _besides(word: str) -> bool:
    return word.lstrip("+").startswith(NOT_STRATEGY)


def _figures(found: Answer, folder: Path) -> Certified:
    metrics, intervals = found.outcome.metrics, found.outcome.intervals
    latency = {
        name.removeprefix("latency_ms/"): Figure(metrics[name], *intervals.get(name, ()))
        for name in ("latency_ms/p50", "latency_ms/p99", "latency_ms/p99.9")
        if name in metrics
    }
    names = {"auc": 1.0, "auc_loss": 100.0, "ne_loss": 100.0, "hr10": 1.0, "hr10_loss": 100.0}
    quality = {
        f"{name}_pct" if name.endswith("loss") else name: scale * metrics[f"quality/{name}"]
        for name, scale in names.items()
        if f"quality/{name}" in metrics
    }
    reserved = metrics.get("gpu_memory_mib/reserved")
    record = found.outcome.folder
    return Certified(
        throughput_rps=found.rate,
        latency_ms=latency,
        quality=quality,
        memory_gb=None if reserved is None else reserved * 2**20 / 1e9,
        record=None if record is None else os.path.relpath(record, folder),
    )
