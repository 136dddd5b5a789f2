"""The goal of a search, and the trial of one configuration: all that is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from grbench.execution import energy
from grbench.tune import rates
from grbench.tune.limits import Limit, Verdict
from grbench.tune.outcome import Configuration, Outcome, Probe

PROBE_S = 20.0  # seconds of a server probe, where the budget is large
LONGER = 3  # times the requests, where an outcome proves nothing
ANSWERS = ("throughput_rps", "goodput_rps")  # metrics that are at most the offline rate
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


@dataclass(frozen=True)
class Refutation:
    """A rate that failed its certification: its step, what the runs show, and why, by which limit if there is one."""

    step: int
    outcome: Outcome
    verdict: Verdict
    limit: Limit | None
    why: str

    def __str__(self) -> str:
        return f"{rates.rate_of(self.step):.4g} requests/s {self.why}"


@dataclass
class Trial:
    """Knowledge of one configuration."""

    configuration: Configuration
    offline: Outcome | None = None
    top: int | None = None  # highest step that the offline rate allows
    predicted: float | None = None  # step that the simulated queue allows
    probes: dict[int, Outcome] = field(default_factory=dict)  # the last outcome at each step
    verdicts: dict[int, tuple[Verdict, Limit | None]] = field(default_factory=dict)
    certifying: dict[int, Outcome] = field(default_factory=dict)  # of runs at each step that certify, if within limits
    recalled: dict[int, list[Probe]] = field(default_factory=dict)  # such runs of earlier searches, all at each step
    measured: bool = False  # a probe of it has ended, however
    failed: str = ""  # why it is out at any load
    slow: str = ""  # the time limit, in words, that its offline probe ran past
    violation: float = 0.0  # by what share, 1 for a failure
    refuted: Refutation | None = None  # the lowest rate that failed its certification: nothing from there on counts

    @property
    def low(self) -> int | None:
        """The highest step that keeps the limits, for sure or likely."""
        return max((step for step in self.held if self.refuted is None or step < self.refuted.step), default=None)

    @property
    def held(self) -> list[int]:
        """The steps at which probes keep the limits, even where a certification failed."""
        return [step for step, (verdict, _) in self.verdicts.items() if verdict in HELD]

    @property
    def unproven(self) -> int | None:
        """The highest step at which certifying runs are within the limits, without proof, below each that broke one."""
        failed = self.refuted
        if failed is None:
            return None
        within = failed.step + (failed.verdict in HELD)
        return max((step for step in self.certifying if step < within), default=None)

    @property
    def high(self) -> int | None:
        """The lowest step above `low` that does not keep the limits, as probed, certified or by the offline rate."""
        low = self.low
        above = [s for s, (v, _) in self.verdicts.items() if v not in HELD and (low is None or s > low)]
        above += [] if self.refuted is None else [self.refuted.step]
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
    def most(self) -> int | None:
        """The highest step that it may have: what the offline rate allows, below one that failed its certification."""
        found = [] if self.top is None else [self.top]
        return min([*found, self.refuted.step - 1] if self.refuted else found, default=None)

    @property
    def binding(self) -> tuple[Verdict, Limit | None, Outcome] | None:
        """The reason why the rate is not higher: the verdict there, its limit, and the outcome that shows it."""
        high = self.high
        if self.refuted is not None and high == self.refuted.step:
            return self.refuted.verdict, self.refuted.limit, self.refuted.outcome
        return None if high is None or high not in self.verdicts else (*self.verdicts[high], self.probes[high])

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
        step = rates.step_of(rate)
        known = self.probes.get(step)
        if known is None or known.metrics.get("samples", 0.0) <= outcome.metrics.get("samples", 0.0):
            self.probes[step], self.verdicts[step] = outcome, verdict

    def refute(self, refutation: Refutation) -> None:
        """Note that a rate failed its certification. Where a run broke a limit, others of that rate do not clear it."""
        known = self.refuted
        if known is None or (refutation.step, refutation.verdict in HELD) <= (known.step, known.verdict in HELD):
            self.refuted = refutation

    def breaks(self, limit: Limit, outcome: Outcome) -> None:
        """Note that an outcome breaks a limit that does not depend on the load."""
        self.failed, self.violation = f"breaks {limit}: {limit.shown(outcome)}", limit.excess(outcome) or 1.0

    def cannot_reach(self, limits: Sequence[Limit]) -> Limit | None:
        """Return the limit on answers a second that the offline rate, the most that there can be, does not allow.

        A step of the ladder is left to chance: random arrivals come a little faster than the rate asked for.
        """
        most = math.inf if self.top is None else rates.rate_of(self.top + 1)
        return next((limit for limit in limits if limit.metric in ANSWERS and limit.bound > most), None)


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
