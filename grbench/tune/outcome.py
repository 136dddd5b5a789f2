"""Configurations, probes and outcomes: a search asks for them and gets them.

The search knows nothing of cells. It calls an `Evaluator`, which measures (live.py) or replays measured cells
(replay.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

UNJUDGED = "UNJUDGED"  # status of an outcome that was not measured, because nothing could judge it
ENGINES = ("engine", "kernel")  # groups of options that choose them, of a stage too: engine@engine.rank


@dataclass(frozen=True)
class Configuration:
    """A value for each option of the space that applies, as (key, value) in the order of the space."""

    values: tuple[tuple[str, str], ...]

    def get(self, key: str) -> str | None:
        """Return the value of an option, or None if it does not apply."""
        return dict(self.values).get(key)

    @property
    def engines(self) -> tuple[tuple[str, str], ...]:
        """The options that choose engines and kernels, with their values."""
        chosen = [(key, value) for key, value in self.values if key.partition("@")[0] in ENGINES]
        return (*chosen, *((key, value) for key, value in self.values if key.startswith("kernel.")))

    @property
    def words(self) -> list[str]:
        """The overrides of a run."""
        return [f"{key}={value}" for key, value in self.values]

    @property
    def name(self) -> str:
        """A name for people: "hstu kernel=torch max_batch=16"."""
        parts = [v if k == "engine" or k == "engine.precision" else f"{_word(k)}={v}" for k, v in self.values]
        return " ".join(parts) or "the only configuration"

    def differs(self, other: Configuration) -> list[str]:
        """Return the options in which the other configuration has another value, or that one of the two lacks."""
        mine, its = dict(self.values), dict(other.values)
        return [key for key in dict.fromkeys([*mine, *its]) if mine.get(key) != its.get(key)]


def _word(key: str) -> str:
    return key.rpartition("@")[2].rpartition(".")[2]


@dataclass(frozen=True)
class Probe:
    """One measurement of a configuration. `rate` in requests a second; None: offline, all requests at once.

    seed: added to the run's own. It changes requests and arrivals. quality: evaluate trained weights, too.
    """

    rate: float | None
    requests: int
    seed: int = 0
    quality: bool = False


@dataclass
class Outcome:
    """The figures of one probe. Only status OK has figures of speed."""

    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    error: str = ""
    within: str = ""  # of a TIMEOUT: its time limit in words, and what gives more
    batches: Sequence[tuple[int, float]] = ()  # size and seconds of each batch, where the engine takes batches
    seconds: float = 0.0  # that the probe took
    kept: bool = False  # an earlier record answered it
    folder: Path | None = None  # of the record
    busy: float = 0.0  # cores that other processes used at a time at most, if its record notes them

    @property
    def ok(self) -> bool:
        return self.status == "OK"


Wanted = tuple[Configuration, Probe]


class BudgetSpentError(Exception):
    """The budget has no room for another probe."""


class Evaluator(Protocol):
    """Measures probes. It alone knows the budget.

    places: probes that it measures at a time. grace: share of the budget by which a certification may pass it.
    """

    places: int
    grace: float

    def together(self, wanted: Sequence[Wanted]) -> None:
        """Measure probes beside each other, so that `evaluate` has their outcomes. On one place it does nothing.

        Raises BudgetSpentError.
        """

    def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
        """Return the outcome of a probe; the same probe twice gives the same outcome. Raises BudgetSpentError."""

    def pool(self, outcomes: Sequence[Outcome]) -> Outcome:
        """Return what runs with several seeds show together: percentiles of all latencies, and figures of the worst."""

    def alike(self, probes: Sequence[Outcome], percent: float) -> float:
        """Return the independent samples that a request is worth, by how probes of one trace at other rates differ.

        0: not known, or each certifying run has a trace of its own.
        """

    def known(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        """Return the outcomes that earlier searches measured of a configuration, with their own seed, at no cost."""

    def certifying(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        """Return the runs of earlier searches that certify a configuration; they cost nothing."""

    def quality(self, configuration: Configuration) -> Mapping[str, float]:
        """Return the quality of a configuration from another one that answers the same; {} if none was measured."""

    def share(self, wanted: Sequence[Wanted]) -> float:
        """Return the share of the whole budget that probes take beside each other, as far as is known.

        Runs of earlier searches take none. A probe of this search counts, because it stands for others like it.
        """

    def saving(self, configuration: Configuration) -> float:
        """Return the share of the budget that the next probe of a configuration saves, because its engine is kept."""

    def budget_for(self, wanted: Sequence[Wanted]) -> str:
        """Return what probes take, and a budget with room for them: "about 53 s: set budget=2min"."""

    def left(self) -> float:
        """Return the share of the budget that is left."""
