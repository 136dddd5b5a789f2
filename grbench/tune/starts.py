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
# With empty caches torch.compile takes longer than an engine that compiles a model once (EngineSpec.start_cost).
KERNELS = {"compile": 10.0}


class Starts:
    """Learns from starts and says what the next one takes."""

    def __init__(self, specs: Mapping[Configuration, RunSpec]) -> None:
        self._priors = {configuration: FIRST_S * start_cost(spec) for configuration, spec in specs.items()}
        self._ratios: dict[object, list[float]] = {}  # measured seconds, as shares of the prior, by `_kinds`

    def add(self, configuration: Configuration, seconds: float) -> None:
        """Learn from a start: its seconds, or those after which it was stopped."""
        for kind in _kinds(configuration):
            self._ratios.setdefault(kind, []).append(seconds / self._priors[configuration])

    def expected_s(self, configuration: Configuration) -> float:
        """Return the seconds of a start: the prior, times the lower median by which the most alike starts were off.

        Of equal engines and kernels these are the measured seconds. The lower one, because a first start may have
        compiled what later ones find.
        """
        ratios = next((self._ratios[kind] for kind in _kinds(configuration) if kind in self._ratios), [1.0])
        return self._priors[configuration] * statistics.median_low(ratios)


def _kinds(configuration: Configuration) -> tuple[object, ...]:
    """Return what configurations that start alike have in common: all, engines and kernels, engines, nothing."""
    chosen = configuration.engines
    engines = tuple(pair for pair in chosen if pair[0].partition("@")[0] == "engine")
    return configuration, ("engines and kernels", chosen), ("engines", engines), "every start"


def start_cost(spec: RunSpec) -> float:
    """Return what the start of a cell costs as its engines declare it, as a multiple of one that compiles nothing."""
    engine = registry.get(spec.engine.name)
    names = [getattr(spec.engine, stage).name for stage in engine.stages] or [engine.name]
    parts = [registry.get(name).start_cost for name in names] + [KERNELS.get(spec.kernel.name, 1.0)]
    return 1.0 + sum(part - 1.0 for part in parts)
