"""Limits on metrics of records: how they are typed, and how an outcome is judged by them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from grbench.config.schema import ConfigError, no_such_key
from grbench.execution.stats import PART_PERCENTILES, PERCENTILES, overloaded, surely_beyond
from grbench.quality.lists import NEW
from grbench.quality.metrics import CUTOFFS
from grbench.tune.outcome import Outcome
from grkernels.nearest import nearest

# Groups of a record's metrics: KEY.NAME=VALUE is a limit if KEY is one of them. `limits.METRIC=VALUE` takes any other.
LATENCIES = ("latency_ms", "queue_ms", "batch_ms", "transfer_ms", "compute_ms")
GROUPS = (*LATENCIES, "quality", "gpu", "gpu_memory_mib", "host_memory_mib")
SINGLE = ("throughput_rps", "goodput_rps", "engine_start_s", "energy_joules_per_request")
KEYS = (  # of limits that are typed most
    *(f"latency_ms.p{percent:g}" for percent in PERCENTILES),
    *(f"{part}.p{percent:g}" for part in LATENCIES[1:] for percent in PART_PERCENTILES),
    *("quality.auc_loss", "gpu_memory_mib.reserved", "host_memory_mib.peak", *SINGLE),
)
LARGER = re.compile(r"(g?auc|accuracy|(hr|ndcg|mrr)\d+(_new|_popular)?)")  # figures of quality of which more is better
# Metrics whose limit is the least allowed value. Of all others it is the largest.
FLOORS = re.compile(rf"throughput|goodput|cache/.*hit_rate|quality/(.*/)?{LARGER.pattern}$")
SHARE = re.compile(r"quality/(.*/)?(?!ne(_|$))")  # from 0 to 1: every figure of quality, and its loss, but entropies
# Metrics that do not depend on the load: an offline probe answers for them.
STATIC = re.compile(r"quality/|engine_start_s|gpu_memory_mib/|host_memory_mib/")
PERCENTILE = re.compile(r"(\w+_ms)/p([\d.]+)$")  # of the latency, of one of its parts, or of LoadGen's latency


class Verdict(StrEnum):
    """Judgement of an outcome by a limit, from the best to the worst, in the words that people read.

    After LIKELY, UNLIKELY and UNKNOWN more requests decide.
    """

    KEPT = "kept"
    LIKELY = "likely kept"  # the figure keeps it and its interval does not: good enough to order, not to certify
    UNLIKELY = "likely broken"  # the figure is beyond it, and no interval is
    UNKNOWN = "too few requests"  # for the figure
    BROKEN = "broken"


@dataclass(frozen=True)
class Limit:
    """A bound on one metric of a record. floor: the metric must not be below it."""

    metric: str
    bound: float

    @property
    def floor(self) -> bool:
        return FLOORS.search(self.metric) is not None

    @property
    def static(self) -> bool:
        """True if the metric does not depend on the load."""
        return STATIC.match(self.metric) is not None

    @property
    def percent(self) -> float | None:
        """The percentile of the latency that is limited: its interval decides. None for any other figure."""
        percentile = PERCENTILE.match(self.metric)
        return float(percentile[2]) if percentile and percentile[1] == "latency_ms" else None

    def __str__(self) -> str:
        value = f"{self.bound:.4g}" if not self.metric.endswith("loss") else f"{100 * self.bound:.4g}%"
        return f"{typed(self.metric)} {'>=' if self.floor else '<='} {value}"

    def judge(self, outcome: Outcome) -> Verdict:
        """Judge an outcome that is OK.

        A percentile of the latency keeps its limit only if the upper end of its 95% interval is below, and breaks it
        only if it is `surely_beyond`, or if the queue grows. Another figure breaks its limit by itself: longer probes
        do not make its interval narrower, and that of a part of the latency has none. Raises ConfigError for a metric
        that the outcome lacks.
        """
        if self.percent is None:
            if self.metric not in outcome.metrics:
                known = [name for name in outcome.metrics if not name.startswith("engine/")]
                raise ConfigError(f"limits: {no_such_key(self.metric, known)}")
            value = outcome.metrics[self.metric]
            low, high = outcome.intervals.get(self.metric, (value, value))
            if self.floor:
                value, high = -value, -low
            bound = -self.bound if self.floor else self.bound
            return Verdict.BROKEN if value > bound else Verdict.KEPT if high <= bound else Verdict.LIKELY
        interval = outcome.intervals.get(self.metric)
        if interval is not None and interval[1] <= self.bound:
            return Verdict.KEPT
        if surely_beyond(outcome.intervals, self.percent, self.bound):
            return Verdict.BROKEN
        found = outcome.metrics.get(self.metric)
        if found is None:
            return Verdict.UNKNOWN
        if overloaded(outcome.metrics):
            return Verdict.BROKEN if found > self.bound else Verdict.UNLIKELY
        return Verdict.LIKELY if found <= self.bound else Verdict.UNLIKELY

    def excess(self, outcome: Outcome) -> float | None:
        """Return by how much the metric is beyond the bound, as a share of it; None without the metric."""
        value = outcome.metrics.get(self.metric)
        if value is None or not self.bound:
            return None if value is None else value
        return (self.bound - value if self.floor else value - self.bound) / abs(self.bound)

    def shown(self, outcome: Outcome) -> str:
        """Return the metric of an outcome with its interval, for people."""
        value, interval = outcome.metrics.get(self.metric), outcome.intervals.get(self.metric)
        if value is None:
            return f"{typed(self.metric)} unknown"
        write = _share if self.metric.endswith("loss") else _figure
        ends = f" [{write(interval[0])}, {write(interval[1])}]" if interval else ""
        return f"{typed(self.metric)} {write(value)}{ends}"


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.3g}%"


def judge(limits: Sequence[Limit], outcome: Outcome) -> tuple[Verdict, Limit | None]:
    """Return the verdict on all limits, and the limit that decides it: one that is not kept for sure."""
    order = list(Verdict)
    verdicts = [(limit.judge(outcome), limit) for limit in limits]
    worst, decides = max(verdicts, key=lambda pair: order.index(pair[0]), default=(Verdict.KEPT, None))
    return (worst, None) if worst is Verdict.KEPT else (worst, decides)


def is_limit(key: str) -> bool:
    """Return True for a key of the command line that names a metric."""
    return (key.partition(".")[0] in (*GROUPS, "limits") and "." in key) or key in SINGLE


def refuse_misspelt(word: str, own: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for an override whose key no run has. own: options of the search; known: options of a run."""
    key = word.lstrip("+").partition("=")[0]
    options = {*own, *known}
    head = re.split("[.@/]", key)[0]
    if head in options:
        return
    near = next((limit for limit in KEYS if limit.endswith(f".{key}")), "")  # p99 alone
    near = near or nearest(key, {*KEYS, *options}).removeprefix("nearest: ").rstrip("; ")
    if near in KEYS:
        raise ConfigError(f"{word}: no such limit; nearest: {near}")
    if re.fullmatch(r"\w+(\.\w+)*=.*", word, re.DOTALL) and head != "hydra":
        raise ConfigError(no_such_key(head, options))


def parse(key: str, value: str) -> Limit:
    """Return the limit that KEY=VALUE types. Raises ConfigError."""
    metric = key.removeprefix("limits.")
    group, _, rest = metric.partition(".")
    if group in GROUPS and rest:
        metric = f"{group}/{rest}"
    head, _, name = metric.partition("/")
    if head in LATENCIES or PERCENTILE.match(metric):
        known = [f"p{p:g}" for p in (PERCENTILES if head.endswith("latency_ms") else PART_PERCENTILES)]
        known += ["mean"] if head == "latency_ms" else []
        if name not in known:
            allowed = ", ".join(f"{key.removesuffix(name)}{its}" for its in known)
            raise ConfigError(f"{key}={value}: records have no such figure; allowed: {allowed}")
    if not metric or metric.endswith("."):
        raise ConfigError(f"{key}={value}: name the figure too, such as latency_ms.p99")
    text, is_share = value.strip(), metric.startswith(("quality/", "cache/"))
    try:
        bound = float(text.removesuffix("%")) / 100 if is_share and text.endswith("%") else float(text)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise ConfigError(f"{key}={value}: it is no finite number{', and no share such as 0.1%' if is_share else ''}")
    if bound > 1 and (SHARE.match(metric) or metric.endswith("hit_rate")):
        raise ConfigError(f"{key}={value}: it is a share of at most 1; allowed are such as 0.7, or 0.1% for a loss")
    if bound < 0 or (bound == 0 and (head.endswith("_ms") or metric.endswith(("_mib", "_rps")))):
        raise ConfigError(f"{key}={value}: nothing keeps it; allowed is a number above 0")
    return Limit(metric, bound)


def parse_all(words: Sequence[tuple[str, str]], task: str) -> tuple[Limit, ...]:
    """Return the limits of a command line. Raises ConfigError, also for two that contradict each other."""
    found: dict[str, Limit] = {}
    for key, value in words:
        limit = parse(key, value)
        _refuse_another_tasks_figure(f"{key}={value}", limit.metric, task)
        if (other := found.get(limit.metric)) and other.bound != limit.bound:
            raise ConfigError(f"{key}: two limits, {other.bound:g} and {limit.bound:g}; give one")
        found[limit.metric] = limit
    return tuple(found.values())


def _refuse_another_tasks_figure(word: str, metric: str, task: str) -> None:
    """Raise ConfigError for a limit on a figure of quality that no record of this task has."""
    if not metric.startswith("quality/"):
        return
    _, *above, name = metric.split("/")
    if task != "rank":
        figures = [f"{kind}{k}{end}" for kind in ("hr", "ndcg", "mrr") for k in CUTOFFS for end in ("", NEW)]
    else:  # the mean over tasks, or behind the name of one
        figures = ["auc", "ne", *(("gauc", "accuracy") if above else ())]
    known = [*figures, *(f"{figure}_loss" for figure in figures)]
    if name not in known:
        raise ConfigError(
            f"{word}: task={task} has no such figure of quality; {nearest(name, known)}allowed: {', '.join(known)}"
        )


def flatten(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Return the limits of a YAML file as typed: {"latency_ms": {"p99": 80}} gives ("limits.latency_ms.p99", "80")."""
    words: list[tuple[str, str]] = []
    for name, value in tree.items():
        key = f"{path}.{name}" if path else f"limits.{name}"
        words += flatten(value, key) if isinstance(value, Mapping) else [(key, str(value))]
    return words


def typed(metric: str) -> str:
    """Return a metric as one types it in a limit: latency_ms.p99."""
    return metric.replace("/", ".", 1)
