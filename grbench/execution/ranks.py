"""GPUs that a cell takes: one, or one for each process that shares the heads of its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grbench.config.schema import ConfigError, RunSpec
from grbench.execution.gpu import visible_gpus
from grengines import registry


def gpus_of(options: Any) -> int:
    """Return the most GPUs that an engine of these options takes, where there are GPUs."""
    own = getattr(options, "tensor_parallel", 1) if getattr(options, "device", "auto") != "cpu" else 1
    return max([own, *(gpus_of(getattr(options, stage)) for stage in registry.get(options.name).stages)])


def notes_of(actual: Mapping[str, Any]) -> list[str]:
    """Return a note where processes shared a model on a CPU. actual: what an engine says of itself and its stages."""
    stages = [actual, actual.get("retrieve", {}), actual.get("rank", {})]
    ranks = max((stage.get("tensor_parallel", 1) for stage in stages if stage.get("device") == "cpu"), default=1)
    if ranks == 1:
        return []
    return [
        f"engine.tensor_parallel={ranks} on a CPU only checks answers: the processes share its cores, and their times "
        "say nothing of GPUs"
    ]


def require_gpus(specs: Iterable[RunSpec], cluster: str) -> int:
    """Return the most GPUs that one of the cells takes.

    Raises ConfigError if a machine with GPUs has fewer, or if `runner.cluster` gives each cell one.
    """
    asked = max((gpus_of(spec.engine) for spec in specs), default=1)
    if asked == 1:
        return 1
    if cluster != "none":
        raise ConfigError(
            f"engine.tensor_parallel={asked} and runner.cluster={cluster}: a cell of a cluster has one GPU; set "
            "runner.cluster=none"
        )
    if 0 < (there := len(visible_gpus())) < asked:
        raise ConfigError(
            f"engine.tensor_parallel={asked}: this machine has {there} of these GPUs; allowed is at most {there}, and "
            "engine.device=cpu checks the answers without"
        )
    return asked
