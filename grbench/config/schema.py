"""The configuration of a run: typed options, their registration with Hydra, and RunSpec.

Hydra checks keys and types when it composes. `to_spec` checks ranges and choices (`grengines.options`). This module
imports no torch, no mlflow and no engine, so composing is fast.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, InterpolationValidationError

from grbench.config.arguments import CommandError
from grbench.execution.records import spec_hash
from grbench.scenarios.config import (
    ClosedLoopConfig,
    MultiStreamConfig,
    OfflineConfig,
    ScenarioConfig,
    ServerConfig,
    SingleStreamConfig,
    TraceReplayConfig,
    is_accuracy,
)
from grbench.tracking.config import MlflowConfig, NoTrackingConfig, check_uri
from grbench.workloads import refusal
from grbench.workloads.config import (
    TRACES,
    CsvConfig,
    DrawnConfig,
    Ml100kConfig,
    RecBoleConfig,
    StepsConfig,
    SyntheticConfig,
    WorkloadOptions,
)
from grengines import registry as engines
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.models.decoder.config import DecoderConfig, too_few_rows
from grengines.models.hstu.config import HSTUConfig, one_level_only, without_effect
from grengines.options import expand_home, files, option, violations
from grengines.overrides import as_it_stands
from grengines.refusals import Asked
from grengines.runtime.cache_dir import content
from grengines.semantic.ids import wrong_codes
from grengines.spec import TASKS, CacheOptions, EngineOptions, EngineSpec, ModelOptions
from grkernels.config import KernelConfig, KernelGroup
from grkernels.nearest import nearest

Root = TypeVar("Root")
ONE_REQUEST = "single_stream sends a request after the answer to the one before"


class ConfigError(CommandError):
    """The configuration cannot be used. The message is one line that names the key and the allowed values."""


@dataclass
class GateConfig:
    """Options of the checks that every cell must pass before and after it is measured: see grbench/gate/."""

    requests: int = option(
        4, "requests compared with the fp32 reference before and after measuring, the shortest and longest among them",
        ge=2, le=64,
    )  # fmt: skip
    measured: int = option(
        128, "measured answers that are drawn at random and compared with the fp32 reference afterwards, besides a few "
        "of every batch size, place in it, history length and cache state", ge=1, le=100_000,
    )  # fmt: skip
    max_error_ratio: float = option(
        2.0, "largest error that passes, as a multiple of what rounding to the same precision costs the reference", gt=0
    )
    quality_requests: int = option(
        512, "with trained weights: last requests of the trace, ranked for AUC and normalised entropy, and users whose "
        "last item is to be found, for the hit rate; 0: none", ge=0,
    )  # fmt: skip
    allow_loss: list[str] = option(
        [],
        "precisions, of the engine, its attention or the KV cache's pages, that may lose more than 0.1% of AUC or "
        "normalised entropy, and whose HR@10 may be outside the 95% interval of fp32's or surely lose more than 0.1%",
        choices=["fp16", "bf16", "int8", "fp8"],
    )


@dataclass
class RetrievalConfig:
    """Options of the search, for tasks that generate: see docs/design/model.md."""

    k: int = option(10, "items of an answer", ge=1, le=2048)
    beam_width: int = option(32, "beams of a search, at least `k`", ge=1, le=2048)
    levels: int = option(
        3, "codes of an item's semantic ID; 1: the code is the item, and its token an item vector", ge=1, le=8
    )
    codes: int = option(0, "codes of a level; 0: as many as the size of the catalogue needs", ge=0, le=65536)
    semantic_ids: str | None = option(
        None, "safetensors file of semantic IDs; null: made from the workload's items", file=True
    )
    weights: str | None = option(None, "safetensors file of the generator; null: random weights from `seed`", file=True)


@dataclass
class RunnerConfig:
    """Options of how cells run and what is printed. They are no part of the measurement."""

    output_root: str = option("outputs", "folder for records, samples, logs and the MLflow database")
    timeout_s: float = option(1800.0, "time limit of a worker; beyond it: status TIMEOUT", gt=0, le=31_536_000)
    repeats: int = option(
        1, "runs of each cell, round by round over all cells, each with the next `seed`", ge=1, le=1000
    )
    memory_limit_gb: float | None = option(
        None, "host memory of a worker, 10^9 bytes; beyond it: status OOM; null: no limit", gt=0, le=1e6
    )
    keep_engine: bool = option(
        False, "cells one after another that differ only in arrivals, in_flight, order or in what is compared use one "
        "engine in one process; a record says so",
    )  # fmt: skip
    parallel: str = option(
        "1",
        "cells of a sweep, or probes of a search, at a time, each with cores and, where there are GPUs, a GPU of its "
        "own, or as many as engine.tensor_parallel or engine.item_shards; gpus: as many cells as there are GPUs for",
    )
    cluster: str = option(
        "none", "where cells run; none: this machine; ray: the Ray cluster of $RAY_ADDRESS or of this machine; slurm: "
        "jobs of Slurm, at most `parallel` at a time", choices=["none", "ray", "slurm"],
    )  # fmt: skip
    print: str = option("table", "form of the cells on standard output at the end", choices=["table", "json", "csv"])


@dataclass
class SlurmConfig:
    """Resources that a job asks of Slurm with `runner.cluster=slurm`."""

    partition: str | None = option(None, "partition; null: that of the cluster's choice")
    account: str | None = option(None, "account that is charged; null: the user's own")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features of a node, such as h100")
    gpus: int = option(0, "GPUs of a job; a cell uses one", ge=0, le=8)
    cores: int = option(8, "cores of a job", ge=1, le=1024)
    memory_gb: int | None = option(None, "host memory of a job; null: what the partition gives", ge=1, le=100_000)
    exclusive: bool = option(False, "a job has its node alone; else other jobs may use its other cores and GPUs")
    time_min: int | None = option(
        None, "time limit of a job in minutes; null: `runner.timeout_s` and 5 minutes for each of its cells", ge=1
    )
    options: list[str] = option([], "further options of sbatch, each NAME=VALUE, such as reservation=night")


def schemas() -> dict[str, dict[str, type]]:
    """Return the options class of every group's schemas.

    YAML files under conf/ build on them: `defaults: [/schema/<group>/<name>@_here_, _self_]`.
    """
    return {
        "model": {spec.kind: spec.options for spec in engines.model_specs()},
        "engine": {spec.name: spec.options for spec in engines.specs()},
        "kernel": {"kernel": KernelConfig},
        "cache": {"none": CacheConfig, "paged": PagedCacheConfig},
        "workload": {
            "ml_100k": Ml100kConfig,
            "recbole": RecBoleConfig,
            "csv": CsvConfig,
            "synthetic": SyntheticConfig,
            "steps": StepsConfig,
        },
        "scenario": {
            "offline": OfflineConfig,
            "server": ServerConfig,
            "single_stream": SingleStreamConfig,
            "multi_stream": MultiStreamConfig,
            "trace_replay": TraceReplayConfig,
            "closed_loop": ClosedLoopConfig,
        },
        "tracking": {"mlflow": MlflowConfig, "none": NoTrackingConfig},
    }


@dataclass
class RunConfig:
    """Root of the configuration. `python -m grbench --cfg job` prints it."""

    model: Any = field(default_factory=dict)
    engine: Any = field(default_factory=dict)
    kernel: Any = field(default_factory=dict)
    cache: Any = field(default_factory=dict)
    workload: Any = field(default_factory=dict)
    scenario: Any = field(default_factory=dict)
    tracking: Any = field(default_factory=dict)
    task: str = option(
        "auto", "work of each request; auto: the first task that the engine has", choices=["auto", *TASKS]
    )
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    latency_limit_ms: float = option(
        80.0, "goodput counts the answers within it; limit of p99 in the server scenario", gt=0
    )
    warmup_batches: int = option(8, "batches before measuring begins", ge=0, le=10_000)
    seed: int = option(0, "seed of the weights, the trace and the arrivals", ge=0, le=2**31 - 1)
    skip_invalid: bool = option(
        False, "sweeps: leave out the combinations that can't be, instead of refusing the sweep"
    )
    rerun: bool = option(False, "sweeps: measure again the cells that have a record")
    rerun_failed: bool = option(False, "sweeps: measure again the cells whose record is not OK")


@dataclass(frozen=True)
class RunSpec:
    """Specification of one cell. Two cells with the same `hash` are the same measurement."""

    model: ModelOptions
    engine: EngineOptions
    kernel: KernelGroup
    cache: CacheOptions
    workload: WorkloadOptions
    scenario: ScenarioConfig
    task: str  # rank, generate or recommend
    retrieval: RetrievalConfig | None  # None: the task does not generate
    gate: GateConfig
    latency_limit_ms: float
    warmup_batches: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the options as nested dictionaries."""
        return dataclasses.asdict(self)

    @property
    def hash(self) -> str:
        """Hash of every option (`spec_hash`) and of the way that traces are made.

        Of an option that names a file, the file's content counts, not its place.

        Raises OSError for a file that can't be read.
        """
        values = self.to_dict()
        for key, digest in self.file_contents().items():
            *groups, name = key.split(".")
            node = values
            for group in groups:
                node = node[group]
            node[name] = f"sha256:{digest}"
        return spec_hash(values | {"traces": TRACES})

    def file_contents(self) -> dict[str, str]:
        """Return the SHA-256 of each file that an option names, by the option's key. Raises OSError."""
        return {key: content(Path(path)) for key, path in files(self).items()}

    @property
    def packages(self) -> tuple[str, ...]:
        """Names that pip may know the packages by that the cell's engines need."""
        engine = engines.get(self.engine.name)
        its = [engine, *(engines.get(getattr(self.engine, stage).name) for stage in engine.stages)]
        return tuple(name for spec in its for package in spec.packages for name in package.distributions)

    @property
    def ranking_model(self) -> HSTUConfig:
        """The model's options, for tasks and tools that rank. Raises ConfigError for a model that does not rank."""
        if not isinstance(self.model, HSTUConfig):
            raise ConfigError(f"model={self.model.name}: it can't rank; name an HSTU model, such as model=hstu_tiny")
        return self.model


def register_schemas() -> None:
    """Register the schemas and the folder of studies with Hydra. Safe to call twice."""
    from hydra.core.config_store import ConfigStore  # takes 0.3 s, and workers compose nothing

    register_studies()
    found: dict[tuple[str, str], type] = {("", "run_schema"): RunConfig}
    found |= {(f"schema/{group}", name): node for group, nodes in schemas().items() for name, node in nodes.items()}
    for spec in engines.specs():  # an engine needs no file of its own
        if not (checkout_or_packaged("conf") / "engine" / f"{spec.name}.yaml").is_file():
            found["engine", spec.name] = spec.options
    for (group, name), node in found.items():
        if _registered.get((group, name)) is not node:  # Hydra takes milliseconds for each
            ConfigStore.instance().store(group=group or None, name=name, node=node)
    _registered.clear()  # of an engine that is gone: what was composed without it can be used again
    _registered.update(found)


_registered: dict[tuple[str, str], type] = {}


def registered() -> tuple[type, ...]:
    """Return the schemas that the last registration had."""
    return tuple(_registered.values())


def checked(cfg: DictConfig, root: type[Root]) -> Root:
    """Return a composed configuration as its dataclass `root`.

    Raises ConfigError for an unknown key, for a group that is built on none of its schemas, for a value outside its
    range, and for a file that can't be read. Raises OmegaConfBaseException for a missing value.
    """
    try:
        unknown = list(_unknown_keys(cfg))
        config = None if unknown else OmegaConf.to_object(cfg)
    except InterpolationResolutionError as e:
        if line := unresolved(cfg):
            raise ConfigError(line) from e
        raise
    if unknown:
        raise ConfigError("; ".join(unknown))
    assert isinstance(config, root)
    for group, options in schemas().items():
        if hasattr(config, group) and type(getattr(config, group)) not in options.values():
            raise ConfigError(f"{group}: build it on one of the schemas {', '.join(options)} (see conf/{group}/)")
    expand_home(config)
    if problems := list(violations(config)):
        raise ConfigError("; ".join(problems))
    if isinstance(tracking := getattr(config, "tracking", None), MlflowConfig):
        try:
            check_uri("tracking.uri", tracking.uri)
        except ValueError as e:
            raise ConfigError(str(e)) from None
    return config


def to_spec(cfg: DictConfig) -> tuple[RunSpec, RunConfig]:
    """Return the RunSpec of a composed configuration, and the whole configuration.

    Raises as `checked`, and ConfigError for options that contradict each other.
    """
    run = checked(cfg, RunConfig)
    return spec_of(run), run


def spec_of(run: RunConfig) -> RunSpec:
    """Return the RunSpec of a configuration whose values are in range.

    Raises ConfigError for options that contradict each other.
    """
    engine = engines.get(run.engine.name)
    able = list(engine.tasks)
    _check_stages(engine, run.engine)
    task = able[0] if run.task == "auto" else run.task
    if task not in able:
        raise ConfigError(f"task={task}: engine {engine.name} can't; allowed: auto, {', '.join(able)}")
    if problem := engines.model_spec(run.model).contradiction(run.model):
        raise ConfigError(problem)
    # A file has levels of its own.
    beam_tokens = 0 if run.retrieval.semantic_ids else run.retrieval.beam_width * (run.retrieval.levels - 1)
    asked = Asked(task, run.model, run.kernel.requested(), run.cache, beam_tokens)
    if problem := engines.contradiction(run.engine, asked):
        raise ConfigError(problem)
    if task == "generate" and isinstance(run.model, HSTUConfig) and (problem := without_effect(run.model)):
        raise ConfigError(problem)
    if task != "rank":
        _check_search(run)
    if problem := refusal(run.workload, run.seed):
        raise ConfigError(problem)
    problem = _one_at_a_time(run.engine, run.scenario)
    if problem and run.scenario.in_flight > 1:
        raise ConfigError(f"scenario.in_flight={run.scenario.in_flight}: {problem}; set scenario.in_flight=1")
    run.scenario.in_flight = run.scenario.in_flight or (1 if problem else 2)  # `batching` says why
    if run.scenario.order == "hit" and not isinstance(run.cache, PagedCacheConfig):
        raise ConfigError(
            f"scenario.order=hit: cache={run.cache.name} keeps no user states; set cache=lru, or scenario.order=length"
        )
    values = {f.name: getattr(run, f.name) for f in dataclasses.fields(RunSpec)}
    spec = RunSpec(**{**values, "task": task, "retrieval": None if task == "rank" else run.retrieval})
    if is_accuracy(spec.scenario):
        _check_accuracy(spec)
    return spec


def _one_at_a_time(options: EngineOptions, scenario: ScenarioConfig) -> str | None:
    """Return None if a batch may come while another is under way, and every working engine takes it; else the reason.

    For `grbench load`, the batches in flight are its connections, whatever the scenario.
    """
    if isinstance(scenario, SingleStreamConfig) and options.name != "remote":
        return ONE_REQUEST
    stages = engines.get(options.name).stages
    working = [getattr(options, stage).name for stage in stages] or [options.name]
    return next(filter(None, map(engines.one_at_a_time, working)), None)


def batching(spec: RunSpec) -> dict[str, str]:
    """Return the size of a batch and the batches in flight, each with where it comes from."""
    problem = _one_at_a_time(spec.engine, spec.scenario)
    single = isinstance(spec.scenario, SingleStreamConfig)
    overlaps = f"engine {spec.engine.name} takes a batch while another is under way"
    usual = {
        "max_batch": (type(spec.scenario).max_batch, ONE_REQUEST if single else "docs/PERFORMANCE.md, Size of a batch"),
        "in_flight": (1, problem) if problem else (2, overlaps),
    }
    set_to = {name: getattr(spec.scenario, name) for name in usual}
    return {
        name: f"{set_to[name]}, " + (f"the default: {why}" if set_to[name] == default else f"set instead of {default}")
        for name, (default, why) in usual.items()
    }


def check_truth(spec: RunSpec) -> None:
    """Raise ConfigError for a configuration that has no quality, because its events or its weights are random."""
    if isinstance(spec.workload, DrawnConfig):
        raise ConfigError(f"workload={spec.workload.name}: its events are random; evaluate on ml_100k, csv or recbole")
    weights = weights_of(spec)
    for part in (part for part, file in weights.items() if file is None):
        why = f"{part}.weights=null: random weights have no quality"
        if given := next((other for other, file in weights.items() if file is not None), None):
            alone = {"model": "rank", "retrieval": "generate"}[given]
            raise ConfigError(
                f"{why}, and engine={spec.engine.name} has two models, {' and '.join(weights)}; set engine=hstu "
                f"task={alone} for {given}.weights alone, or {part}.weights=FILE as well"
            )
        raise ConfigError(f"{why}; `grbench train` makes a file")


def weights_of(spec: RunSpec) -> dict[str, str | None]:
    """Return the weights files of the models that the task needs, by the group that names them."""
    parts = {"rank": ["model"], "generate": ["retrieval"], "recommend": ["model", "retrieval"]}[spec.task]
    return {part: getattr(getattr(spec, part), "weights", None) for part in parts}


def _check_search(run: RunConfig) -> None:
    """Raise ConfigError for a search that can't be, as far as that does not depend on the data."""
    retrieval = run.retrieval
    if retrieval.beam_width < retrieval.k:
        raise ConfigError(
            f"retrieval.beam_width={retrieval.beam_width}: allowed is >= retrieval.k={retrieval.k}, because a "
            "beam gives one item; set a wider beam or a smaller retrieval.k"
        )
    if retrieval.semantic_ids is not None or retrieval.levels == 1:
        return  # a file says its levels itself, and of one level the items are the codes
    if isinstance(run.model, HSTUConfig) and (problem := one_level_only(run.model, retrieval.levels)):
        raise ConfigError(problem)
    items = run.workload.items if isinstance(run.workload, DrawnConfig) else 1
    if retrieval.codes and (problem := wrong_codes(retrieval.levels, retrieval.codes, items)):
        raise ConfigError(f"retrieval.levels={retrieval.levels} retrieval.codes={retrieval.codes}: {problem}")
    codes = retrieval.levels * retrieval.codes
    if codes and isinstance(run.model, DecoderConfig) and (problem := too_few_rows(run.model, codes)):
        raise ConfigError(problem)


def _check_accuracy(spec: RunSpec) -> None:
    """Raise ConfigError where LoadGen's accuracy mode has no requests with a ground truth, or a time to fill."""
    check_truth(spec)
    if not spec.gate.quality_requests:
        raise ConfigError("gate.quality_requests=0: scenario.mode=accuracy issues these requests; allowed here is >= 1")
    if least := getattr(spec.scenario, "min_duration_s", 0.0):
        raise ConfigError(
            f"scenario.min_duration_s={least:g}: scenario.mode=accuracy issues each request once; leave one of them out"
        )


def _check_stages(engine: EngineSpec, run: Any) -> None:
    """Raise ConfigError for a stage of the engine with options `run` whose own engine lacks the stage's task."""
    for stage, task in engine.stages.items():
        options = getattr(run, stage)
        if type(options) not in schemas()["engine"].values():
            raise ConfigError(f"engine.{stage}: name an engine: engine@engine.{stage}=hstu")
        if task not in engines.get(options.name).tasks:
            able = [spec.name for spec in engines.specs() if task in spec.tasks]
            raise ConfigError(f"engine.{stage}={options.name}: it can't {task}; allowed: {', '.join(able)}")


def _unknown_keys(cfg: DictConfig, path: str = "") -> Iterator[str]:
    """Yield a line for each added key (`+key=value`) that the dataclass of its node does not have."""
    schema = OmegaConf.get_type(cfg)
    known = {f.name for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else set(cfg)
    for key in map(str, cfg):
        if key not in known:
            yield no_such_key(f"{path}{key}", known)
        elif not OmegaConf.is_missing(cfg, key) and isinstance(node := cfg[key], DictConfig):
            yield from _unknown_keys(node, f"{path}{key}.")


def unresolved(cfg: DictConfig) -> str:
    """Return the error line for the first option of a run whose `${` refers to nothing; "" if there is none."""
    tree = OmegaConf.to_container(cfg)
    assert isinstance(tree, dict)
    for key, text in _texts({name: value for name, value in tree.items() if name != "hydra"}):
        try:
            OmegaConf.select(cfg, key)
        except InterpolationValidationError:  # it refers to a value that is not allowed here
            continue
        except InterpolationResolutionError as e:
            why = str(e).splitlines()[0]
            absent = re.match(r"Interpolation key '(.*)' not found", why)
            key = re.sub(r"(\.\d+)+$", "", key)  # of a list
            return as_it_stands(key, text, f"there is no {absent[1]}" if absent else why)
    return ""


def _texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts with a `${` in a tree, each behind its key."""
    if isinstance(tree, str) and "${" in tree:
        yield path, tree
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in pairs:
        yield from _texts(value, f"{path}.{name}" if path else str(name))


def no_such_key(key: str, known: Iterable[str]) -> str:
    """Return the error line for an unknown key, with the nearest known one."""
    path, _, name = key.rpartition(".")
    near = nearest(name, known).replace(": ", f": {path}." if path else ": ")
    return f"{key}: no such key; {near}known keys: {', '.join(sorted(known))}"


def spec_to_json(spec: RunSpec) -> str:
    """Return a cell as JSON, for its worker: the values, and the schema of each group."""
    names = {g: next(n for n, s in options.items() if s is type(getattr(spec, g))) for g, options in _spec_groups()}
    return json.dumps({"values": spec.to_dict(), "schemas": names})


def spec_from_json(text: str) -> RunSpec:
    """Return the cell that `spec_to_json` wrote."""
    data = json.loads(text)
    values = data["values"]
    groups = {g: options[data["schemas"][g]](**values[g]) for g, options in _spec_groups()}
    for stage in engines.get(groups["engine"].name).stages:
        options = getattr(groups["engine"], stage)
        setattr(groups["engine"], stage, engines.get(options["name"]).options(**options))
    retrieval = RetrievalConfig(**values["retrieval"]) if values["retrieval"] else None
    return RunSpec(**{**values, **groups, "retrieval": retrieval, "gate": GateConfig(**values["gate"])})


def _spec_groups() -> list[tuple[str, dict[str, type]]]:
    fields = {f.name for f in dataclasses.fields(RunSpec)}
    return [(group, options) for group, options in schemas().items() if group in fields]


def register_studies() -> None:
    """Register the resolvers of Hydra's search path, and of files that studies name. Safe to call twice."""
    OmegaConf.register_new_resolver(
        "grbench_experiments", lambda: str(checkout_or_packaged("experiments")), replace=True
    )
    OmegaConf.register_new_resolver("grbench_file", _shipped, replace=True)


def _shipped(name: str) -> str:
    """Return the path of a file under experiments/: in a checkout that is the working folder the same for everybody."""
    path = checkout_or_packaged("experiments") / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def checkout_or_packaged(name: str) -> Path:
    """Return a data folder (conf, experiments): of the checkout if there is one, else of the installed package."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else package) / name
