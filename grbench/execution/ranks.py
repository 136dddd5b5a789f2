"""GPUs that a cell takes: one, one for each process that shares the heads, or one for each part of the item table.

Where there is none, a cell can't have what an engine lacks on a CPU, such as CUDA graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig

from grbench.config.schema import ConfigError, RunConfig, RunSpec, to_spec
from grbench.execution.gpu import visible_gpus
from grengines import registry
from grengines.refusals import Asked

WHY = {
    "tensor_parallel": "the processes share its cores, and their times say nothing of GPUs",
    "item_shards": "all parts of the table are in its memory, and times say nothing of GPUs",
}


def gpus_of(options: Any) -> int:
    """Return the most GPUs that an engine of these options takes, where there are GPUs."""
    return _most(options)[0]


def asked_by(options: Iterable[Any]) -> str:
    """Return the option, with its value, by which one of the engines takes the most GPUs."""
    most, name = max(map(_most, options))
    return f"engine.{name}={most}"


def _most(options: Any) -> tuple[int, str]:
    """Return the most GPUs of an engine and its stages, and the option that asks for them."""
    own = [(getattr(options, name, 1), name) for name in WHY] if getattr(options, "device", "auto") != "cpu" else []
    stages = [_most(getattr(options, stage)) for stage in registry.get(options.name).stages]
    return max([*own, *stages], default=(1, ""))


def notes_of(actual: Mapping[str, Any]) -> list[str]:
    """Return notes where a CPU stood for several GPUs. actual: what an engine says of itself and its stages."""
    stages = [actual, actual.get("retrieve", {}), actual.get("rank", {})]
    there = [stage for stage in stages if stage.get("device") == "cpu"]
    most = {name: max((stage.get(name, 1) for stage in there), default=1) for name in WHY}
    return [f"engine.{name}={n} on a CPU only checks answers: {WHY[name]}" for name, n in most.items() if n > 1]


def require_gpus(specs: Iterable[RunSpec], cluster: str) -> int:
    """Return the most GPUs that one of the cells takes.

    Raises ConfigError if a machine with GPUs has fewer, or if `runner.cluster` gives each cell one.
    """
    engines = [spec.engine for spec in specs]
    asked = max(map(gpus_of, engines), default=1)
    if asked == 1:
        return 1
    option = asked_by(engines)
    if cluster != "none":
        raise ConfigError(
            f"{option} and runner.cluster={cluster}: a cell of a cluster has one GPU; set runner.cluster=none"
        )
    if 0 < (there := len(visible_gpus())) < asked:
        raise ConfigError(
            f"{option}: this machine has {there} of these GPUs; allowed is at most {there}, and "
            "engine.device=cpu checks the answers without"
        )
    return asked


def to_spec_here(cfg: DictConfig) -> tuple[RunSpec, RunConfig]:
    """Return `to_spec` of a cell that is measured by this command.

    Raises as it does, and ConfigError for what an engine can't have on a CPU, where this machine has no GPU.
    """
    spec, run = to_spec(cfg)
    if run.runner.cluster == "none" and (problem := lacking_here(spec)):
        raise ConfigError(problem)
    return spec, run


def lacking_here(spec: RunSpec) -> str | None:
    """Return None, or what an engine of this machine can't have, because the machine has no GPU."""
    engine = _on_cpu(spec.engine)
    if engine == spec.engine or visible_gpus():
        return None
    asked = Asked(spec.task, spec.model, spec.kernel.requested(), spec.cache)
    problem = registry.contradiction(engine, asked)
    return problem and f"this machine has no GPU, so device=auto is cpu: {problem}"


def _on_cpu(options: Any) -> Any:
    """Return an engine's options with the CPU as the device of its choice, and those of its stages."""
    changed = {stage: _on_cpu(getattr(options, stage)) for stage in registry.get(options.name).stages}
    if getattr(options, "device", None) == "auto":
        changed["device"] = "cpu"
    return dataclasses.replace(options, **changed)
