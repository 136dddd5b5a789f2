"""The quality of a search's configurations: which cells evaluate it, what was found, and what it is compared with.

Trained weights are evaluated once for each combination that changes the answers, never for each load. That takes
minutes on a CPU, so configurations that answer as the reference does are left out unless something reads their quality.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from grbench.config.schema import RunSpec, weights_of
from grbench.execution.gpu import visible_gpus
from grbench.execution.records import RESAMPLES_FILE, RunRecord
from grbench.quality.metrics import estimate_of
from grbench.tune.config import Declared
from grbench.tune.limits import LARGER
from grbench.tune.outcome import Configuration, Probe
from grbench.workloads.config import DrawnConfig
from grengines import registry
from grengines.cache.config import EIGHT_BITS, stored

REQUESTS, ALLOWED = "gate.quality_requests", "gate.allow_loss"
NONE = f"{REQUESTS}=0"
LOSSY = "[fp16,bf16,int8,fp8]"
ROUNDING = ("name", "precision", "kv_cache_precision")  # options of an engine that decide its answers


class Qualities:
    """The quality of each configuration, as far as it is known."""

    def __init__(self, declared: Declared, specs: Mapping[Configuration, RunSpec]) -> None:
        """specs: of each configuration, the default first."""
        self._specs = specs
        self._alike = {configuration: alike(spec) for configuration, spec in specs.items()}
        self._base = next(iter(self._alike.values()))  # of the default configuration
        self._metrics: dict[str, dict[str, float]] = {}  # by `alike`; {}: it was evaluated, and there is none
        self._ends: dict[str, dict[str, list[float]]] = {}  # their intervals
        self._evaluated: dict[str, tuple[Path, int]] = {}  # folder and seed of the cell that has them
        self._late: set[str] = set()  # those of which a probe did not end in time
        limits = declared.goal.limits
        self._loss_limited = any(is_loss(limit.metric) for limit in limits)
        self._limited = any(limit.metric.startswith("quality/") for limit in limits)
        self._requests, self._allowed = (declared.fixed_value(key) for key in (REQUESTS, ALLOWED))
        # A limit, the front of objective=pareto, and who types how many requests it takes read that of each.
        self._all = self._limited or declared.goal.objective == "pareto" or self._requests is not None
        self._several = len({_right(key) for key in self._alike.values()}) > 1  # other answers are right in some
        self._gpu = bool(visible_gpus())

    def trained(self, configuration: Configuration) -> bool:
        """Return True if the weights are trained, and the events say which answers are right."""
        spec = self._specs[configuration]
        drawn = isinstance(spec.workload, DrawnConfig) and spec.task != "rank"
        return not drawn and None not in weights_of(spec).values()

    def reads(self, configuration: Configuration) -> bool:
        """Return True if the search or its answer reads the quality of the configurations that answer as this one.

        Of those that answer as the reference does it is read for a limit, a front, or as what others are compared with.
        """
        if self._requests == "0" or not self.trained(configuration):
            return False
        compared = self.another_model(configuration) or (self._several and self._alike[configuration] == self._base)
        return self._all or compared or rounds(self._specs[configuration], self._gpu)

    def evaluates(self, configuration: Configuration, probe: Probe) -> bool:
        """Return True if the cell of a probe evaluates the quality."""
        return probe.quality or (self.reads(configuration) and self.due(configuration))

    def due(self, configuration: Configuration) -> bool:
        """Return True for trained weights that no cell has evaluated, unless the command leaves that out.

        Those that took too long are due no more, unless a limit needs them.
        """
        key = self._alike[configuration]
        ended = key in self._metrics or (key in self._late and not self._limited)
        return self.trained(configuration) and self._requests != "0" and not ended

    def give_up(self, configuration: Configuration, probe: Probe) -> None:
        """Note that a probe did not end in time: each of those that answer the same would take as long."""
        if self.evaluates(configuration, probe):
            self._late.add(self._alike[configuration])

    def words(self, configuration: Configuration, probe: Probe) -> list[str]:
        """Return the overrides by which the cell of a probe evaluates the quality, or leaves it out.

        A loss ends no cell: a limit decides, and without one nothing is cut.
        """
        if not self.trained(configuration):
            return []
        allowed = [f"{ALLOWED}={LOSSY}"] if self._allowed is None else []
        return allowed if self.evaluates(configuration, probe) else [*allowed, NONE]

    def learn(self, configuration: Configuration, folder: Path, record: RunRecord) -> None:
        """Take the quality that a record has; all configurations that answer the same have it.

        That of an earlier record with another number of requests is not what this search asks for.
        """
        found, key = quality_metrics(record), self._alike[configuration]
        asked = record.spec["gate"].get("quality_requests")
        if asked and asked != self._asked(configuration):
            return
        if found:
            self._metrics[key] = found
            ends = {name: its for name, its in record.intervals.items() if name.startswith("quality/")}
            self._ends[key] = {as_limited(name): its for name, its in ends.items()}
            self._evaluated[key] = folder, record.spec["seed"]
        elif record.ok and asked:
            self._metrics.setdefault(key, {})

    def metrics(self, configuration: Configuration) -> dict[str, float]:
        """Return the figures; {} if there are none.

        A model or a search with other options is another model, which the record compares with its own reference only.
        Its losses are those against the default configuration: none if that one has no quality.
        """
        found = self._metrics.get(self._alike[configuration], {})
        if not self.another_model(configuration):
            return found
        own = {name: value for name, value in found.items() if not is_loss(name)}
        return own | losses(own, self._metrics.get(self._base, {}))

    def intervals(self, configuration: Configuration) -> dict[str, list[float]]:
        """Return the intervals of the figures. A loss against the default configuration has none."""
        found = self._ends.get(self._alike[configuration], {})
        another = self.another_model(configuration)
        return {name: ends for name, ends in found.items() if not (another and is_loss(name))}

    def against_default(self, configuration: Configuration) -> dict[str, list[float]]:
        """Return the intervals of losses against the default configuration, over the same resamples of the users.

        Each is of the mean over tasks. The result is {} where that is not what losses are against, and without the
        resamples of both, or if their users differ.
        """
        from grbench.report.frame import ReportError, load_columns

        pair = [self._evaluated.get(key) for key in (self._alike[configuration], self._base)]
        if None in pair or not self.another_model(configuration) or len({seed for _, seed in filter(None, pair)}) > 1:
            return {}
        try:
            ours, theirs = (load_columns(folder / RESAMPLES_FILE) for folder, _ in filter(None, pair))
        except ReportError:
            return {}
        found = {}
        for name in ours.columns.intersection(theirs.columns):
            share = ours[name] / theirs[name]
            lost = share - 1 if name == "ne" else 1 - share
            found[f"quality/{name}_loss"] = estimate_of(0.0, lost.to_numpy()).interval
        return found

    def lacking(self, configuration: Configuration, record: RunRecord) -> bool:
        """Return True for an earlier measurement without the quality that the search reads: it is measured again."""
        if not record.ok or self.metrics(configuration):
            return False
        asked = record.spec["gate"]["quality_requests"]
        return self._limited or (self.reads(configuration) and asked != self._asked(configuration))

    def _asked(self, configuration: Configuration) -> int:
        """Return of how many requests the quality is."""
        return self._specs[configuration].gate.quality_requests

    def loss_unknown(self, configuration: Configuration) -> bool:
        """Return True if a limit asks for a loss against the default configuration, and that one has no quality."""
        return self._loss_limited and not self._metrics.get(self._base) and self.another_model(configuration)

    def another_model(self, configuration: Configuration) -> bool:
        """Return True if other answers are right than those of the default configuration."""
        return _right(self._alike[configuration]) != _right(self._base)

    def why_none(self, configuration: Configuration) -> str:
        """Return why trained weights have no figures."""
        if self._requests == "0":
            return f"{NONE} leaves it out"
        if self._alike[configuration] in self._late:
            return "the probe that was to evaluate it took too long; gate.quality_requests=100 evaluates fewer requests"
        if self._alike[configuration] in self._metrics:
            return "the workload does not say which answers are right, or has no requests later than the training"
        return "what computes in fp32 is evaluated only after its certification"


def rounds(spec: RunSpec, gpu: bool) -> bool:
    """Return True if a cell computes or stores anything in a lower precision than fp32. gpu: there is one here.

    A server chooses its precision itself, so that of engine=remote does not count.
    """
    precisions = registry.precisions_of(spec.engine, gpu).values()
    stages = [getattr(spec.engine, stage) for stage in registry.get(spec.engine.name).stages] or [spec.engine]
    pages = [getattr(stage, "kv_cache_precision", "engine") for stage in stages]
    return (
        any(precision != "fp32" for precision in precisions)
        or any(precision in EIGHT_BITS for precision in [*pages, stored(spec.cache)])
        or "fp8" in spec.kernel.requested().values()
    )


def is_loss(name: str) -> bool:
    """Return True for a figure of quality that is a loss against a reference."""
    return name.startswith("quality/") and name.endswith("_loss")


def as_limited(name: str) -> str:
    """Return the name of a metric in a limit: a loss has it at the end."""
    return re.sub("^quality/loss/(.*)", r"quality/\1_loss", name)


def quality_metrics(record: RunRecord) -> dict[str, float]:
    """Return the quality of a record as metrics: losses are those of the worst task, others the mean over tasks."""
    quality = record.gate.get("quality") or {}
    tasks: dict[str, dict[str, float]] = {
        task: {name: value for name, value in values.items() if not name.endswith("_interval")}
        for task, values in (quality.get("tasks") or {}).items()
    }
    found = {f"quality/{task}/{name}": value for task, values in tasks.items() for name, value in values.items()}
    for name in dict.fromkeys(name for values in tasks.values() for name in values):
        values = [task[name] for task in tasks.values() if name in task]
        found[f"quality/{name}"] = max(values) if name.endswith("loss") else sum(values) / len(values)
    figures = {as_limited(name): value for name, value in record.metrics.items() if name.startswith("quality/")}
    return figures | {name: float(value) for name, value in found.items()}


def losses(found: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Return what is lost of each figure of quality against the base, as shares of it."""
    lost = {}
    for name, value in found.items():
        figure = name.rpartition("/")[2]
        if LARGER.fullmatch(figure) and base.get(name):
            lost[f"{name}_loss"] = 1 - value / base[name]
        elif figure == "ne" and base.get(name):
            lost[f"{name}_loss"] = value / base[name] - 1
    return lost


def alike(spec: RunSpec) -> str:
    """Return a key that is equal for cells whose answers are the same: load and batching play no part.

    Nor do caches, but for the rounding of states in 8 bits.
    """
    engine = dataclasses.asdict(spec.engine)  # type: ignore[call-overload]
    stages = {
        name: {option: part.get(option) for option in ROUNDING}
        for name, part in engine.items()
        if isinstance(part, dict)
    }
    parts = {
        "engine": {**{option: engine.get(option) for option in ROUNDING}, **stages},
        "kernel": dataclasses.asdict(spec.kernel),
        "model": dataclasses.asdict(spec.model),
        "retrieval": dataclasses.asdict(spec.retrieval) if spec.retrieval else None,
        "states": stored(spec.cache),
        "workload": dataclasses.asdict(spec.workload),
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _right(key: str) -> str:
    """Return the part of the key of `alike` that says which answers are right: not the engine and the precisions."""
    parts = json.loads(key)
    return json.dumps([parts[name] for name in ("model", "retrieval", "workload")])
