"""Seconds that the engines of a search take to start: those that were measured of the most alike, else about a prior.

The seconds are those of a cell beside its measurement: process, imports, workload, engine, gate, warm-up, figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from grbench.config.schema import RunSpec
from grbench.tune.outcome import Configuration
from grengines import registry

FIRST_S = 12.0  # of an engine with nothing to compile, before any was measured
# A kernel that torch.compile makes costs a start of the compiler, as an engine that compiles (EngineSpec.start_cost).
KERNELS = {"compile": 4.0}


class Starts:
    """Learns from starts and says what the next one takes."""

    def __init__(self, specs: Mapping[Configuration, RunSpec]) -> None:
        self._priors = {configuration: FIRST_S * start_cost(spec) for configuration, spec in specs.items()}
        self._measured: dict[object, list[float]] = {}  # by `_kinds`
        self._ratios: list[float] = []  # measured seconds, as shares of the prior

    def add(self, configuration: Configuration, seconds: float) -> None:
        """Learn from a start: its seconds, or those after which it was stopped."""
        for kind in _kinds(configuration):
            self._measured.setdefault(kind, []).append(seconds)
        self._ratios.append(seconds / self._priors[configuration])

    def expected_s(self, configuration: Configuration) -> float:
        """Return the seconds of a start: of itself, else of the same engines and kernels, else of the same engines.

        The lower median of these: a first start may have compiled what later ones find. If none was measured, it is the
        prior, times the median by which measured starts were off.
        """
        for kind in _kinds(configuration):
            if kind in self._measured:
                return statistics.median_low(self._measured[kind])
        return self._priors[configuration] * (statistics.median(self._ratios) if self._ratios else 1.0)


def _kinds(configuration: Configuration) -> tuple[object, ...]:
    """Return what is equal for configurations that start alike: all, engines and kernels, then engines alone."""
    chosen = configuration.engines
    engines = tuple(pair for pair in chosen if pair[0].partition("@")[0] == "engine")
    return configuration, ("engines and kernels", chosen), ("engines", engines)


def start_cost(spec: RunSpec) -> float:
    """Return what the start of a cell costs as its engines declare it, as a multiple of one that compiles nothing."""
    engine = registry.get(spec.engine.name)
    names = [getattr(spec.engine, stage).name for stage in engine.stages] or [engine.name]
    parts = [registry.get(name).start_cost for name in names] + [KERNELS.get(spec.kernel.name, 1.0)]
    return 1.0 + sum(part - 1.0 for part in parts)
