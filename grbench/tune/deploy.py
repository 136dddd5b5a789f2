"""The winner as a deployment file, which `grbench serve` loads."""

from __future__ import annotations

import os
from pathlib import Path

from grbench import deployment
from grbench.deployment import Certified, Deployment, Figure, Strategy
from grbench.tune import answer
from grbench.tune.answer import Answer
from grbench.tune.config import Declared

FILE = "best.yaml"
# Overrides of how cells run, which are no part of a strategy, and what the deployment has keys for.
NOT_STRATEGY = ("task", "runner.", "tracking", "rerun", "skip_invalid", "hydra.", "scenario", "gate.", "seed")


def write(found: Answer, declared: Declared, folder: Path) -> Path:
    """Write the winner into a folder. Returns the path.

    It has certified figures only if it was certified, else a comment that says why it was not.
    """
    fixed = [word for word in declared.fixed if not _besides(word)]
    batching = [word for word in declared.fixed if word.startswith("scenario.")]
    strategy = Strategy(
        name=found.trial.configuration.name.replace(" ", "-"),
        overrides=[*fixed, *batching, *found.trial.configuration.words],
        certified=_figures(found, folder) if found.certified else None,
    )
    limits = {}
    for limit in declared.goal.limits:
        if limit.metric.startswith("latency_ms/"):
            limits[limit.metric.replace("/", ".", 1)] = limit.bound
        elif limit.metric in ("quality/auc_loss", "quality/ne_loss"):
            limits[f"{limit.metric.replace('/', '.', 1)}_pct"] = 100 * limit.bound
        elif limit.metric.startswith("gpu_memory_mib/"):
            limits["memory_gb"] = limit.bound * 2**20 / 1e9
    path = folder / FILE
    remark = "" if found.certified else f"The strategy is {answer.proof(found)}."
    deployment.save(Deployment(deployment.VERSION, declared.task, limits, [strategy]), path, remark)
    return path


def _besides(word: str) -> bool:
    return word.lstrip("+").startswith(NOT_STRATEGY)


def _figures(found: Answer, folder: Path) -> Certified:
    metrics, intervals = found.outcome.metrics, found.outcome.intervals
    latency = {
        name.removeprefix("latency_ms/"): Figure(metrics[name], *intervals.get(name, ()))
        for name in ("latency_ms/p50", "latency_ms/p99", "latency_ms/p99.9")
        if name in metrics
    }
    names = {"auc": 1.0, "auc_loss": 100.0, "ne_loss": 100.0}
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
