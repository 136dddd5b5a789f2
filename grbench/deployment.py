"""The deployment file: what `grbench tune` writes, `grbench serve` reads, and a person may edit.

A deployment is one or several strategies under limits. A strategy is an ordinary run configuration, as its overrides
give it, with the figures that were measured for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grbench.config.compose import compose_spec, explain
from grbench.config.schema import ConfigError, RunSpec
from grbench.execution.files import require_weights
from grengines.api import Request
from grengines.options import option, violations
from grengines.overrides import literal
from grengines.runtime import atomic_io
from grengines.spec import TASKS
from grkernels.nearest import nearest

VERSION = 1
LIMITS = {  # pattern of a limit's name: how it is written
    r"latency_ms\.(p50|p90|p99|p99\.9|mean)": "latency_ms.p99",
    r"quality\.\w+_loss_pct": "quality.auc_loss_pct",
    r"memory_gb": "memory_gb",
}
LOSS = r"\w+_loss(_pct)?"  # pattern of a loss's name
HEADER = "# A deployment of grbench: `grbench serve deployment=FILE` serves it.\n"


@dataclass
class Figure:
    """A measured value and its 95% interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class Certified:
    """Figures that a strategy's record has."""

    throughput_rps: float | None = option(None, "requests answered in a second", gt=0)
    latency_ms: dict[str, Figure] = field(default_factory=dict)  # by percentile: p50, p99
    quality: dict[str, float] = field(default_factory=dict)  # by metric: auc, auc_loss_pct
    memory_gb: float | None = option(None, "device memory in use, 10^9 bytes", ge=0)
    record: str | None = option(
        None, "record of the figures, relative to this file; of several runs, of that with the largest p99"
    )


@dataclass
class Serves:
    """The requests that a strategy takes. null: no limit."""

    min_history: int = option(0, "fewest events of a history", ge=0)
    max_history: int | None = option(None, "most events of a history", ge=0)
    max_candidates: int | None = option(None, "most candidates of a request", ge=1)

    def takes(self, request: Request) -> bool:
        """Return whether a request has such a size."""
        history, candidates = len(request.history_items), len(request.candidates)
        return (
            self.min_history <= history
            and (self.max_history is None or history <= self.max_history)
            and (self.max_candidates is None or candidates <= self.max_candidates)
        )


@dataclass
class Strategy:
    """One way to answer: a run configuration, with its certified figures."""

    name: str = option("???", "name in responses and metrics")
    overrides: list[str] = field(default_factory=list)  # of a run, such as engine=hstu
    certified: Certified | None = None
    serves: Serves = field(default_factory=Serves)


@dataclass
class Step:
    """A cheaper way to answer under overload, tried before a request is refused. It names one change."""

    name: str = option("???", "name in responses and metrics")
    max_candidates: int | None = option(None, "answer only the first candidates of a request", ge=1)
    max_history: int | None = option(None, "use only the newest events of a history", ge=1)
    stale_state: bool = option(False, "leave out the events that are new since the user's cached state")
    strategy: str | None = option(None, "use this strategy")
    loss: dict[str, float] = field(default_factory=dict)  # measured, by metric: auc_loss, hr10_loss, auc_loss_pct
    intervals: dict[str, list[float]] = field(default_factory=dict)  # 95%, of losses: [low, high]
    record: str | None = option(
        None, "absolute path of the folder of the record of the losses; `grbench losses` fills all three in"
    )

    @property
    def changes(self) -> list[str]:
        """Return the keys of the changes that the step makes."""
        return [key for key in CHANGES if getattr(self, key)]


CHANGES = ("max_candidates", "max_history", "stale_state", "strategy")


@dataclass
class Deployment:
    """Strategies in order of preference, the limits that they keep, and the steps that overload allows."""

    version: int = option("???", "version of the format", ge=VERSION, le=VERSION)
    task: str = option("???", "work of each request", choices=TASKS)
    limits: dict[str, float] = field(default_factory=dict)  # largest value, by name
    strategies: list[Strategy] = field(default_factory=list)
    degrade: list[Step] = field(default_factory=list)
    config_dir: str | None = option(None, "absolute path of the folder with your own YAML files, if overrides need it")

    def specs(self, source: str | Path = "deployment") -> dict[str, RunSpec]:
        """Return the composed configuration of each strategy, by name.

        source: the file, for errors. Raises ConfigError, one line with file, key and what is allowed.
        """
        if problem := next(_problems(self), None):
            raise ConfigError(f"{source}: {problem}")
        specs: dict[str, RunSpec] = {}
        for number, strategy in enumerate(self.strategies):
            key = f"strategies[{number}].overrides"
            try:
                spec, _ = compose_spec(_with_task(strategy.overrides, self.task), self.config_dir)
                require_weights(spec)
            except ConfigError as e:
                raise ConfigError(f"{source}: {key}: {e}") from None
            if any(other.workload != spec.workload for other in specs.values()):
                raise ConfigError(
                    f"{source}: {key}: the workload differs from that of strategy {next(iter(specs))}, and one "
                    "deployment has one catalogue; give both the same workload options"
                )
            first = next(iter(specs.values()), spec)
            if spec.task != "generate" and spec.ranking_model.tasks != first.ranking_model.tasks:
                own, common = (f"model.tasks=[{','.join(one.ranking_model.tasks)}]" for one in (spec, first))
                raise ConfigError(
                    f"{source}: {key}: {own} differs from that of strategy {next(iter(specs))}, and the scores of one "
                    f"deployment have the same columns; give both '{common}'"
                )
            specs[strategy.name] = spec
        return specs


def load(path: str | Path) -> Deployment:
    """Return the deployment that a file holds, checked by itself; `Deployment.specs` checks the overrides.

    Raises ConfigError, one line with file, key and what is allowed.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; give a deployment file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: not a deployment; it is a mapping with the keys {_keys(Deployment)}")
    try:
        deployment = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Deployment), _literal(content)))
    except OmegaConfBaseException as e:
        raise ConfigError(f"{path}: {explain(e)}") from None
    assert isinstance(deployment, Deployment)
    if problem := next(_problems(deployment), None):
        raise ConfigError(f"{path}: {problem}")
    return deployment


def _literal(content: Any) -> Any:
    """Return the content of a file with its texts as they stand: what an override refers to is of the run."""
    if isinstance(content, Mapping):
        return {key: _literal(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_literal(value) for value in content]
    return literal(content) if isinstance(content, str) else content


def save(deployment: Deployment, path: str | Path, remark: str = "") -> None:
    """Write a deployment file, replacing an existing one. Raises ConfigError for one that `load` would refuse.

    remark: for people, in comments at its top.
    """
    lines = textwrap.wrap(remark, 118, break_long_words=False, break_on_hyphens=False)
    _write(deployment, path, HEADER + "".join(f"# {line}\n" for line in lines))


def save_again(deployment: Deployment, path: str | Path) -> None:
    """Write a changed deployment into its file, which keeps the comments at its top. Raises as `save`, and OSError."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    _write(deployment, path, "".join(itertools.takewhile(lambda line: line.startswith("#"), lines)))


def _write(deployment: Deployment, path: str | Path, comments: str) -> None:
    """Write a deployment file below its comments. Raises ConfigError for one that `load` would refuse."""
    if problem := next(_problems(deployment), None):
        raise ConfigError(f"{path}: {problem}")
    text = yaml.safe_dump(_filled(deployment), sort_keys=False, allow_unicode=True, width=120)
    atomic_io.write(Path(path), (comments + text).encode())


def _problems(deployment: Deployment) -> Iterator[str]:
    """Yield a line for each thing that is wrong, with its key and what is allowed."""
    yield from violations(deployment)
    if (folder := deployment.config_dir) is not None and not (Path(folder).is_absolute() and Path(folder).is_dir()):
        yield f"config_dir={folder}: allowed is the absolute path of a folder that exists, with your own YAML files"
    for name, value in deployment.limits.items():
        if not any(re.fullmatch(pattern, name) for pattern in LIMITS):
            yield f"limits.{name}: no such limit; allowed are such as {', '.join(LIMITS.values())}"
        elif not value > 0:
            yield f"limits.{name}={value}: allowed is float > 0"
    if not deployment.strategies:
        yield "strategies: none; at least one is needed, with a name and overrides"
    for number, strategy in enumerate(deployment.strategies):
        key = f"strategies[{number}]"
        yield from (f"{key}.{line}" for line in violations(strategy))
        if not strategy.overrides:
            yield f"{key}.overrides: none; give those of a run, such as [engine=hstu]"
        if any(word.lstrip("+").partition("=")[0] == "task" for word in strategy.overrides):
            yield f"{key}.overrides: task= is the deployment's own key, task: {deployment.task}; leave it out here"
    for number, step in enumerate(deployment.degrade):
        key = f"degrade[{number}]"
        yield from (f"{key}.{line}" for line in violations(step))
        for metric in step.loss:
            if not re.fullmatch(LOSS, metric):
                yield f"{key}.loss.{metric}: no name of a loss; allowed are such as auc_loss, hr10_loss, auc_loss_pct"
        for metric, ends in step.intervals.items():
            if metric not in step.loss:
                its = f"allowed are {', '.join(step.loss)}" if step.loss else f"{key}.loss is empty; give the loss"
                yield f"{key}.intervals.{metric}: no loss of the step has this name; {its}"
            elif len(ends) != 2:
                yield f"{key}.intervals.{metric}: {len(ends)} numbers; allowed is [low, high]"
        if step.max_candidates and deployment.task != "rank":
            yield (
                f"{key}.max_candidates: a call to {deployment.task} sends no candidates; let a step name a strategy "
                "with a smaller retrieval.k"
            )
        if len(step.changes) != 1:
            yield f"{key}: {' and '.join(step.changes) or 'no change'}; a step has one of {', '.join(CHANGES)}"
        if step.strategy is not None and step.strategy not in _names(deployment.strategies):
            known = _names(deployment.strategies)
            yield f"{key}.strategy={step.strategy}: {nearest(step.strategy, known)}allowed are {', '.join(known)}"
    for key, named in (("strategies", deployment.strategies), ("degrade", deployment.degrade)):
        names = _names(named)
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield f"{key}: two have the name {twice}; give each its own"


def _names(named: list[Strategy] | list[Step]) -> list[str]:
    return [one.name for one in named]


def _with_task(overrides: list[str], task: str) -> list[str]:
    return [*overrides, f"task={task}"]


def _keys(schema: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(schema))


def _filled(value: Any) -> Any:
    """Return a value as plain data, without the fields that have their default, which `load` fills in."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _filled(its) for f in fields if (its := getattr(value, f.name)) != _default(f)}
    if isinstance(value, dict):
        return {key: _filled(its) for key, its in value.items()}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
