"""Options of a search, and how a command line is divided: limits, options of the search, and a run's overrides."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grbench.config.compose import axes_of, compose_many, explain, plan_jobs
from grbench.config.schema import ConfigError, RunConfig, checked
from grbench.config.schema import register_schemas as register_groups
from grbench.execution.gpu import visible_gpus
from grbench.report.cells import shown
from grbench.tune import limits
from grbench.tune.limits import Limit
from grbench.tune.trial import PROBE_S, Goal
from grengines import registry as engines
from grengines.options import option
from grkernels.nearest import nearest

OBJECTIVES = ("throughput", "latency", "cost", "pareto")
RATES = {"server": "scenario.target_qps", "trace_replay": "scenario.mean_qps"}  # scenarios that are probed at a rate
OWN = {  # options that the search sets, each with what a user may give instead; {}: the value
    "scenario.queries": "probe_s=20",
    "scenario.target_qps": "objective=latency rate={}",
    "scenario.mean_qps": "objective=latency rate={}",
    "scenario.min_duration_s": "probe_s={}",
    "scenario.expected_qps": "",
}
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
# Options of how cells run and of what is asked, which are no part of a strategy.
ONE_VALUE = re.compile(
    r"(task|scenario|seed|latency_limit_ms|warmup_batches|rerun|rerun_failed|skip_invalid)$"
    r"|(runner|slurm|tracking|gate|hydra)([.@/]|$)"
)


@dataclass
class TuneConfig:
    """Root of the configuration of `grbench tune`."""

    objective: str = option(
        "throughput", "throughput: most requests a second within the limits; latency: least p99 at `rate`; cost: least "
        "joules, or seconds of the machine, for 1000 requests; pareto: all that no other beats in everything",
        choices=OBJECTIVES,
    )  # fmt: skip
    budget: str = option(
        "5min",
        "time or cells that this call may take, what earlier records answer not counted: 90s, 60min, 2h, 40cells; "
        "0cells: only records",
    )
    rate: float | None = option(None, "objective=latency: requests a second", gt=0)
    space: Any = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    certify_runs: int = option(2, "runs with other seeds that certify the best; 0: none", ge=0, le=20)
    probe_s: float | None = option(
        None, "seconds of a probe at a rate, of at least 1000 requests; null: a sixtieth of `budget`, 4 to 20", gt=0
    )
    search_seed: int = option(0, "seed of the search's own choices", ge=0, le=2**31 - 1)


@dataclass(frozen=True)
class Budget:
    """Seconds or cells that one call of a search may take. What earlier records answer costs nothing."""

    seconds: float | None = None
    cells: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Return the budget that is typed. Raises ConfigError."""
        found = re.fullmatch(r"([\d.]+)\s*(s|min|h|cells?)", text.strip())
        if found and found[2].startswith("cell") and found[1].isdigit():
            return cls(cells=int(found[1]))
        try:
            if found and float(found[1]) > 0 and found[2] in UNITS:
                return cls(seconds=float(found[1]) * UNITS[found[2]])
        except ValueError:
            pass
        raise ConfigError(f"budget={text}: allowed are a time or a number of cells, such as 90s, 60min, 2h or 40cells")

    @property
    def probe_s(self) -> float:
        """The seconds of one server probe: a small part of the time."""
        return PROBE_S if self.seconds is None else min(max(self.seconds / 60, 4.0), PROBE_S)

    def __str__(self) -> str:
        if self.cells is not None:
            return f"{self.cells} cells"
        assert self.seconds is not None
        return f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.3g} min"


@dataclass(frozen=True)
class Declared:
    """A search as it was declared. fixed: overrides of every run. axes: the space; typed: those that must be used."""

    goal: Goal
    budget: Budget
    axes: dict[str, list[str]]
    typed: frozenset[str]
    fixed: list[str]
    seed: int
    task: str
    scenario: str
    config_dir: str | None

    def fixed_value(self, key: str) -> str | None:
        """Return the value that an override fixes, or None."""
        return next(
            (word.partition("=")[2] for word in reversed(self.fixed) if word.lstrip("+").startswith(f"{key}=")), None
        )


def register_schemas() -> None:
    """Register the dataclasses with Hydra. Safe to call twice."""
    register_groups()
    ConfigStore.instance().store(name="tune_schema", node=TuneConfig)


def declare(words: Sequence[str], config_dir: str | None = None) -> Declared:
    """Return the search that a command line declares. Raises ConfigError."""
    register_schemas()
    pairs = [(word, *word.lstrip("+").partition("=")[::2]) for word in words]
    names = {f.name for f in fields(TuneConfig)}
    own = [word for word, key, _ in pairs if key in names]
    _refuse_two_values(own)
    bounds = [(key, value) for _, key, value in pairs if limits.is_limit(key)]
    rest = [word for word, key, _ in pairs if key not in names and not limits.is_limit(key)]
    for word, key, value in pairs:
        if key in OWN:
            others = [other for other in words if other is not word]
            instead = shlex.join(["python", "-m", "grbench", "tune", *others, *OWN[key].format(value).split()])
            raise ConfigError(f"{word}: the search sets {key} for each probe; give instead: {instead}")
    for word in rest:
        limits.refuse_misspelt(word, names, [*(f.name for f in fields(RunConfig)), "study"])
    axes, fixed = axes_of(rest, config_dir)
    for _, key, value in pairs:
        if (key in axes and ONE_VALUE.match(key)) or (key in names and re.match(r"[^{[]*,", value)):
            raise ConfigError(f"{key}={value}: a search has one value of it; give one")
    typed = {**{word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in fixed}}
    scenario = typed.get("scenario", "server")
    if scenario not in RATES:
        allowed = f"{nearest(scenario, RATES)}allowed: {', '.join(RATES)}"
        raise ConfigError(f"scenario={scenario}: the search needs one with a rate; {allowed}")
    if "accuracy" in [typed.get("scenario.mode"), *axes.get("scenario.mode", [])]:
        raise ConfigError("scenario.mode=accuracy: the search measures performance; leave it out")
    engine = axes["engine"][0] if "engine" in axes else typed.get("engine")
    task = typed.get("task", "rank" if engine is None else _task(engine))
    if "task" not in typed:
        fixed.append(f"task={task}")
    if task == "recommend" and engine is None:
        fixed.append("engine=pipeline")
    if not any(key == "space" for _, key, _ in pairs):
        device = typed.get("engine.device", "auto")
        gpu = device == "cuda" or (device == "auto" and bool(visible_gpus()))
        study = "study" in typed  # its sweep is the space
        own.append("space=typed" if study else f"space={task}_{'gpu' if gpu else 'cpu'}")
    [job] = plan_jobs("tune", to_config, own, config_dir=config_dir)[1]
    config: TuneConfig = job.config
    asked = limits.parse_all([*limits.flatten(config.limits), *bounds], task)
    space = _axes(config.space, asked)
    every = {key: values for key, values in space.items() if key not in typed and not _settled(key, typed)}
    goal = _goal(config, asked, typed)
    return Declared(
        goal,
        Budget.parse(config.budget),
        {**every, **axes},
        frozenset(axes),
        fixed,
        config.search_seed,
        task,
        scenario,
        config_dir,
    )


def output_root(declared: Declared) -> Path:
    """Return the folder of the results of every run, before the runs are composed. Raises ConfigError.

    The file of any group may set it. Options of one group are left out: some runs may lack them.
    """
    keys = {word: word.lstrip("+").partition("=")[0] for word in declared.fixed}
    words = [word for word, key in keys.items() if "." not in key or key.startswith(("runner.", "hydra."))]
    [found] = compose_many([words], declared.config_dir)
    if isinstance(found, str):
        raise ConfigError(found)
    try:
        return Path(found.runner.output_root)
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e)) from None


def to_config(cfg: DictConfig) -> TuneConfig:
    """Check a composed configuration. Raises as `checked`."""
    return checked(cfg, TuneConfig)


def _task(engine: str) -> str:
    try:
        return next(iter(engines.get(engine).tasks))
    except ValueError as e:
        raise ConfigError(f"engine={engine}: {e}") from None


def _refuse_two_values(own: Sequence[str]) -> None:
    """Raise ConfigError for an option of the search with two different values: the last would win in silence."""
    found: dict[str, str] = {}
    for word in own:
        key = word.lstrip("+").partition("=")[0]
        if (other := found.setdefault(key, word)) != word:
            raise ConfigError(f"{other} {word}: a search has one value of {key}; give one")


def _settled(key: str, typed: dict[str, str]) -> bool:
    """Return True for an option of the default space that a typed one takes the place of: a variant of one family."""
    return key == "kernel" and any(word.startswith("kernel.") for word in typed)


def _axes(space: Any, asked: Sequence[Limit]) -> dict[str, list[str]]:
    """Return the options of a file of conf/space as typed. Raises ConfigError for one without a list of values.

    Those under `quality` change the answers. They are left out unless a limit on quality is asked for: the fastest
    answer would win, however bad.
    """
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(space))  # type: ignore[assignment]
    more = tree.pop("quality", {})
    if any(limit.metric.startswith("quality/") for limit in asked):
        tree |= more
    for key, values in tree.items():
        if not isinstance(values, list):
            raise ConfigError(f"space: {key} is {values!r}; allowed is a list of values, such as [1,2]")
    return {key: [shown(value) for value in values] for key, values in tree.items()}


def _goal(config: TuneConfig, asked: tuple[Limit, ...], typed: dict[str, str]) -> Goal:
    if config.objective == "latency" and config.rate is None:
        raise ConfigError("objective=latency: it needs the load, rate=REQUESTS_A_SECOND")
    if config.objective != "latency" and config.rate is not None:
        raise ConfigError(
            f"rate={config.rate:g}: only objective=latency takes it; objective={config.objective} finds the rate"
        )
    floor = next((limit for limit in asked if limit.metric in ("throughput_rps", "goodput_rps")), None)
    if floor and config.rate is not None and floor.bound > config.rate:
        raise ConfigError(
            f"{floor} and rate={config.rate:g}: no more requests are answered than arrive; raise rate by "
            f"{floor.bound / config.rate - 1:.0%}, or lower the limit"
        )
    _refuse_two_limits(asked, typed.get("latency_limit_ms"))
    if not any(limit.metric.startswith("latency_ms/") for limit in asked) and config.objective != "latency":
        bound = limits.parse("latency_limit_ms", typed.get("latency_limit_ms", "80")).bound
        asked = (*asked, Limit("latency_ms/p99", bound))
    weights = [typed.get(f"{group}.weights", "null") for group in ("model", "retrieval")]
    if any(limit.metric.startswith("quality/") for limit in asked) and set(weights) == {"null"}:
        quality = next(limit for limit in asked if limit.metric.startswith("quality/"))
        raise ConfigError(
            f"{quality}: quality is known only with trained weights and labels; give model.weights=FILE "
            "(docs/WEIGHTS.md), or leave the limit out"
        )
    return Goal(
        config.objective, asked, config.rate, config.certify_runs, config.probe_s or Budget.parse(config.budget).probe_s
    )


def _refuse_two_limits(asked: Sequence[Limit], latency_limit_ms: str | None) -> None:
    """Raise ConfigError for a p99 with another limit than LoadGen's. A limit on goodput needs `latency_limit_ms`."""
    bounds = {limit.metric: limit.bound for limit in asked}
    bound = bounds.get("latency_ms/p99")
    if latency_limit_ms is None or bound is None or "goodput_rps" in bounds:
        return
    if bound != limits.parse("latency_limit_ms", latency_limit_ms).bound:
        raise ConfigError(
            f"latency_limit_ms={latency_limit_ms} and latency_ms.p99={bound:g}: two limits of p99; leave one out"
        )
