"""A search replayed from a measured grid: how near does a strategy come to the best, after how many evaluations?

A grid has an offline cell of every configuration. Its batches give the times that a simulated queue draws from, so that
any rate can be probed, each time with other arrivals and other times. The true best rate of a configuration is that of
the median of many runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from grbench.execution import stats
from grbench.tune import rates
from grbench.tune.knowledge import BOTTOM, SIZES, Knowledge
from grbench.tune.limits import Limit
from grbench.tune.outcome import BudgetSpentError, Configuration, Outcome, Probe, Wanted
from grbench.tune.proposers import Axes, Listed, Neighbours, OneAtATime, OptunaProposer, Proposer
from grbench.tune.queue_model import BatchTimes, Floats, arrivals, latencies_ms
from grbench.tune.search import Search
from grbench.tune.surrogate import Surrogate
from grbench.tune.trial import Batching, Goal, carried
from grbench.tune.worth import pooled

CERTIFYING = 30  # cells for certification, beside those of the search
SPREAD = 0.02  # of run to run, as measured on an idle GPU
LONG, RUNS = 12_000, 15  # requests of the runs whose median is the truth: the highest rates of single ones vary by 6%
EXACT = 1.01  # ratio to which a run brackets its rate: a step of the ladder would hide regrets below 3%

OURS = "grbench"
STRATEGIES: dict[str, Callable[[Sequence[Configuration], Axes, int], Proposer]] = {
    "grbench": lambda some, axes, seed: Surrogate(some, axes, seed),
    "optuna tpe": lambda some, axes, seed: OptunaProposer(some, axes, seed, startup=10),
    "random": lambda some, axes, seed: Listed(some, seed),
    "hill climb": lambda some, axes, seed: Neighbours(some, axes, 3, seed),
    "first in order": lambda some, axes, seed: Listed(some),
    "one at a time": lambda some, axes, seed: OneAtATime(some, axes),
}


@dataclass(frozen=True)
class Measured:
    """A cell of the grid: its rate offline and its batches, or the status of its failure and the reason."""

    throughput: float = 0.0
    batches: Sequence[tuple[int, float]] = ()
    status: str = "OK"
    metrics: Mapping[str, float] = field(default_factory=dict)  # further ones, such as quality and memory
    error: str = ""


@dataclass
class Grid:
    """A measured grid and how its configurations batch."""

    axes: Axes
    cells: Mapping[Configuration, Measured]
    batching: Mapping[Configuration, Batching]

    def __post_init__(self) -> None:
        self._times: dict[Configuration, BatchTimes] = {}

    def times(self, configuration: Configuration) -> BatchTimes:
        """Return the times of batches, with the smaller sizes of configurations that differ in it only."""
        if configuration not in self._times:
            largest = self.batching[configuration].max_batch
            batches = [
                batch
                for other, cell in self.cells.items()
                if set(configuration.differs(other)) <= SIZES
                for batch in cell.batches
                if batch[0] <= largest
            ]
            self._times[configuration] = BatchTimes(batches, self.cells[configuration].throughput)
        return self._times[configuration]

    def truth(self, configuration: Configuration, limits: Sequence[Limit]) -> float:
        """Return the highest rate that keeps the limits in half of the runs; 0 for none."""
        cell = self.cells[configuration]
        if cell.status != "OK" or any(x.static and (x.excess(Outcome("OK", cell.metrics)) or 0) > 0 for x in limits):
            return 0.0
        bounds = [(limit.percent, limit.bound) for limit in limits if limit.percent is not None]
        return float(np.median([self._highest(configuration, bounds, seed) for seed in range(RUNS)]))

    def _highest(self, configuration: Configuration, bounds: Sequence[tuple[float, float]], seed: int) -> float:
        """Return the highest rate of one run that keeps percentiles within bounds; 0 for none."""
        mine, times = self.batching[configuration], self.times(configuration)
        high = self.cells[configuration].throughput  # more is kept only by runs that end before their queue is long

        def kept(rate: float) -> bool:
            rng = np.random.default_rng(seed)
            found = latencies_ms(
                arrivals(rate, LONG, rng), times.draw(rng), mine.max_batch, mine.max_wait_s, mine.in_flight
            )
            return all(np.percentile(found, percent) <= bound for percent, bound in bounds)

        low = high * rates.RATIO ** (-2 * BOTTOM)
        if not kept(low):
            return 0.0
        while high > low * EXACT:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if kept(middle) else (low, middle)
        return low


class Replay:
    """An `Evaluator` that draws outcomes from a grid. The budget is a number of cells. rounds: that they took."""

    grace = 0.0

    def __init__(self, grid: Grid, cells: int, seed: int, places: int = 1) -> None:
        self._grid, self._cells, self._seed, self.places = grid, cells, seed, places
        self.rounds = 0
        self._done: dict[tuple[Configuration, Probe], Outcome] = {}
        self._latencies: dict[int, Floats] = {}  # of the runs that certify, by the identity of their outcomes
        self._order = {configuration: i for i, configuration in enumerate(grid.cells)}

    @property
    def used(self) -> int:
        """The number of cells so far."""
        return len(self._done)

    def allow(self, cells: int) -> None:
        """Add cells to the budget, after the search."""
        self._cells = self.used + cells

    def together(self, wanted: Sequence[Wanted]) -> None:
        if self.places > 1:
            self._take(wanted)

    def evaluate(self, configuration: Configuration, probe: Probe) -> Outcome:
        self._take([(configuration, probe)])
        return self._done[configuration, probe]

    def _take(self, wanted: Sequence[Wanted]) -> None:
        """Draw the outcomes that were not yet drawn, in as few rounds as there can be."""
        new = [key for key in dict.fromkeys(wanted) if key not in self._done]
        if self.used + len(new) > self._cells:
            raise BudgetSpentError
        self.rounds += math.ceil(len(new) / self.places)
        for configuration, probe in new:
            step = rates.step_of(probe.rate) if probe.rate else 0
            of = (self._seed, self._order[configuration], step + 1000, probe.requests, probe.seed)
            self._done[configuration, probe] = self._draw(configuration, probe, np.random.default_rng(of))

    def pool(self, outcomes: Sequence[Outcome]) -> Outcome:
        return pooled(outcomes, [self._latencies[id(outcome)] for outcome in outcomes])

    def alike(self, probes: Sequence[Outcome], percent: float) -> float:
        return 0.0

    def known(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        return ()

    def certifying(self, configuration: Configuration) -> Sequence[tuple[Probe, Outcome]]:
        return ()

    def quality(self, configuration: Configuration) -> Mapping[str, float]:
        return {}

    def share(self, wanted: Sequence[Wanted]) -> float:
        return len(wanted) / self._cells

    def saving(self, configuration: Configuration) -> float:
        return 0.0

    def budget_for(self, wanted: Sequence[Wanted]) -> str:
        return f"{len(wanted)} cells: set budget={self.used + len(wanted)}cells"

    def left(self) -> float:
        return 1 - self.used / self._cells

    def _draw(self, configuration: Configuration, probe: Probe, rng: np.random.Generator) -> Outcome:
        cell, mine = self._grid.cells[configuration], self._grid.batching[configuration]
        if cell.status != "OK":
            return Outcome(cell.status, error=cell.error)
        slower = math.exp(rng.normal(0.0, SPREAD))
        if probe.rate is None:
            count = math.ceil(probe.requests / mine.max_batch)
            some = [cell.batches[i] for i in rng.integers(0, len(cell.batches), count)]
            return Outcome("OK", {**cell.metrics, "throughput_rps": cell.throughput / slower}, batches=some)
        at = arrivals(probe.rate, probe.requests, rng)
        service = self._grid.times(configuration).draw(rng)
        found = latencies_ms(at, lambda size: slower * service(size), mine.max_batch, mine.max_wait_s, mine.in_flight)
        summary = stats.latency_summary(found, arrivals_s=at)
        rate = {
            "throughput_rps": probe.requests / float((at + found / 1e3).max()),
            "offered_rps": (probe.requests - 1) / float(at[-1] - at[0]),
            "samples": float(probe.requests),
        }
        outcome = Outcome("OK", {**cell.metrics, **summary.metrics, **rate}, summary.intervals)
        if probe.seed:
            self._latencies[id(outcome)] = found
        return outcome


@dataclass
class Run:
    """One replayed search: the regret of its best after each cell, and what it certified.

    by_round: the regret after each round of cells beside each other.
    """

    regret: list[float]
    by_round: list[float]
    cells: int
    final: float | None  # regret of what was certified; None: nothing was
    claim: float | None  # the certified rate, as a share of the true one of its configuration

    @property
    def false_feasible(self) -> bool:
        """True if the certified rate is above the true one, by however little."""
        return self.claim is not None and self.claim > 1


def replay(
    grid: Grid,
    goal: Goal,
    strategy: str,
    cells: int,
    seed: int,
    truths: Mapping[Configuration, float],
    places: int = 1,
) -> Run:
    """Replay one search with a budget of cells. truths: `Grid.truth` of every configuration. places: cells at a time.

    The regret after a cell is that of the configuration that leads then, at its true best rate; 1 before any leads.
    """
    best = max(truths.values())
    evaluator = Replay(grid, cells, seed, places)
    regret, by_round = [1.0] * cells, [1.0] * cells
    configurations = list(grid.cells)

    def progress(trial: object, probe: Probe, outcome: Outcome, verdict: object) -> None:
        leader = knowledge.incumbent
        now = 1.0 if leader is None else 1 - truths[leader.configuration] / best
        for curve, taken in ((regret, evaluator.used), (by_round, evaluator.rounds)):
            curve[taken - 1 :] = [now] * (cells - taken + 1)

    proposer = STRATEGIES[strategy](configurations, grid.axes, seed)
    knowledge = Knowledge(goal, grid.batching)
    search = Search(knowledge, configurations, evaluator, proposer, progress, screen=strategy.startswith(OURS))
    search.run()
    run = Run(list(regret), by_round[: evaluator.rounds], evaluator.used, None, None)  # the certification has own cells
    evaluator.allow(CERTIFYING)
    certificate = search.certify() if goal.runs else None
    if certificate is None:
        return run
    claimed, true = carried(certificate.step, certificate.together), truths[certificate.trial.configuration]
    return replace(run, final=1 - true / best, claim=claimed / true if true else math.inf)
