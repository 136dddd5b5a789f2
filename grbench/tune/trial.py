"""The goal of a search, and the trial of one configuration: all that is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from grbench.execution import energy
from grbench.tune import rates
from grbench.tune.limits import Limit, Verdict
from grbench.tune.outcome import Configuration, Outcome, Probe

PROBE_S = 20.0  # seconds of a server probe, where the budget is large
LONGER = 3  # times the requests, where an outcome is unsure
HELD = (Verdict.KEPT, Verdict.LIKELY)  # verdicts by which the search orders; only KEPT certifies


@dataclass(frozen=True)
class Goal:
    """Objective and limits. rate: requests a second, for the objective latency."""

    objective: str
    limits: tuple[Limit, ...]
    rate: float | None = None
    runs: int = 2  # that certify
    probe_s: float = PROBE_S


@dataclass(frozen=True)
class Batching:
    """Options of a configuration's batches."""

    max_batch: int
    max_wait_s: float = 0.0
    in_flight: int = 1


@dataclass
class Trial:
    """Knowledge of one configuration."""

    configuration: Configuration
    offline: Outcome | None = None
    top: int | None = None  # highest step that the offline rate allows
    predicted: int | None = None  # step that the simulated queue allows
    probes: dict[int, Outcome] = field(default_factory=dict)  # the last outcome at each step
    verdicts: dict[int, tuple[Verdict, Limit | None]] = field(default_factory=dict)
    certifying: dict[int, Outcome] = field(default_factory=dict)  # of runs at each step that certify, if within limits
    measured: bool = False  # a probe of it has ended, however
    failed: str = ""  # why it is out at any load
    slow: str = ""  # the time limit, in words, that its offline probe ran past
    violation: float = 0.0  # by what share, 1 for a failure
    refuted: str = ""  # at which rate its last certifying run failed, and why

    @property
    def low(self) -> int | None:
        """The highest step that keeps the limits, for sure or likely."""
        return max((step for step, (verdict, _) in self.verdicts.items() if verdict in HELD), default=None)

    @property
    def high(self) -> int | None:
        """The lowest step above `low` that does not keep the limits, or that the offline rate rules out."""
        low = self.low
        above = [s for s, (v, _) in self.verdicts.items() if v not in HELD and (low is None or s > low)]
        above += [] if self.top is None else [max(self.top, low or self.top) + 1]
        return min(above, default=None)

    @property
    def best(self) -> Outcome | None:
        """The outcome at the highest rate that keeps the limits."""
        return None if self.low is None else self.probes[self.low]

    @property
    def carried(self) -> float | None:
        """The highest rate that keeps the limits, as `carried` has it."""
        return None if self.low is None else carried(self.low, self.probes[self.low])

    @property
    def binding(self) -> tuple[Limit | None, Outcome | None]:
        """The limit that keeps the rate from being higher, with the outcome that shows it."""
        high = self.high
        return (
            (None, None) if high is None or high not in self.verdicts else (self.verdicts[high][1], self.probes[high])
        )

    @property
    def estimate(self) -> float | None:
        """The step that the configuration reaches, as far as is known."""
        if self.failed or (self.top is None and self.low is None):
            return None
        guess = float(self.predicted if self.predicted is not None else self.top or 0)
        if self.high is not None:
            guess = min(guess, self.high - 0.5)
        return guess if self.low is None else max(guess, self.low)

    @property
    def least_excess(self) -> float:
        """The least share by which a rate is beyond a limit; 1 if no limit was decisive."""
        found = [
            limit.excess(outcome) or 0.0
            for step, outcome in self.probes.items()
            if (limit := self.verdicts[step][1]) is not None
        ]
        return max(min(found, default=1.0), 1e-3)

    def enter(self, rate: float, outcome: Outcome, verdict: tuple[Verdict, Limit | None]) -> None:
        """Enter the outcome at a rate, unless one of more requests is there: a longer probe of an earlier search."""
        step = rates.step_below(rate * 1.001)
        known = self.probes.get(step)
        if known is None or known.metrics.get("samples", 0.0) <= outcome.metrics.get("samples", 0.0):
            self.probes[step], self.verdicts[step] = outcome, verdict

    def breaks(self, limit: Limit, outcome: Outcome) -> None:
        """Note that an outcome breaks a limit that does not depend on the load."""
        self.failed, self.violation = f"breaks {limit}: {limit.shown(outcome)}", limit.excess(outcome) or 1.0


def carried(step: int, outcome: Outcome) -> float:
    """Return the requests a second that an outcome at a step of the ladder proves: offered, and answered.

    Random arrivals come a little faster or more slowly than the rate that was asked for.
    """
    return min(rates.rate_of(step), outcome.metrics["throughput_rps"])


def cost(step: int, outcome: Outcome) -> float:
    """Return the cost of 1000 requests: joules where the energy is known, else seconds of the machine."""
    return 1000 * outcome.metrics.get(energy.METRIC, 1.0 / carried(step, outcome))


Progress = Callable[[Trial, Probe, Outcome, Verdict | None], None]  # what is called after each probe


def quiet(trial: Trial, probe: Probe, outcome: Outcome, verdict: Verdict | None) -> None:
    """Show no progress."""
