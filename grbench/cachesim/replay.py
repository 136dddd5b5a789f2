"""One job: every policy at every size on one trace, beside Belady's rule and the limit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from grbench.cachesim import fleet, simulate, tiers
from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.costs import Costs
from grbench.cachesim.routing import route
from grbench.cachesim.simulate import Outcome, Progress, Simulation
from grbench.cachesim.tiers import Tier
from grbench.cachesim.trace import Columns, load
from grbench.config.schema import ConfigError
from grbench.tools.sizing import kv_bytes
from grbench.workloads.events import DataError
from grengines.cache import policies

BELADY, LIMIT = "belady", "limit"
# Takes the name of a simulation and its number of requests, and returns the function that reports progress.
Watch = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Size:
    """A size of the cache on the device, of all replicas together."""

    share: float  # of the total size of every user's last state
    pages: int
    gb: float  # 10^9 bytes


@dataclass(frozen=True)
class Row:
    """Result of a policy at a size."""

    policy: str
    size: Size
    outcome: Outcome
    metrics: dict[str, float]
    duration_s: float


def unwatched(what: str, requests: int) -> AbstractContextManager[Progress]:
    """Return a Watch that shows nothing."""
    return nullcontext(lambda done: None)


class Replay:
    """A trace and cache sizes to simulate. Raises ConfigError for unusable data or a size below one page."""

    def __init__(self, config: CacheSimConfig) -> None:
        self.config = config
        try:
            self.trace: Columns = load(config.workload, config.seed)
        except DataError as e:
            raise ConfigError(str(e)) from None
        longest = int(self.trace.lengths.max())
        self.costs = Costs.of(config.model, config.page, config.workload.num_candidates, longest)
        self.page_bytes = kv_bytes(config.model, config.page - config.model.contextual_seq_len, config.precision)
        self.footprint = int(np.array(self.costs.pages)[self.trace.last_lengths()].sum())  # pages
        self.sizes = self._sizes()
        self.routes = route(self.trace, config.replicas, config.routing, config.window_s, config.seed)
        parts = (self.routes.replica == i for i in range(config.replicas))
        self.parts = [self.trace.part(part) for part in parts if part.any()]

    def _sizes(self) -> list[Size]:
        one = self.page_bytes / 1e9
        if small := [gb for gb in self.config.sizes_gb if gb < one]:
            raise ConfigError(f"sizes_gb={small[0]:g}: a page takes {one:.3g} GB; allowed is at least that")
        pages = [int(gb / one) for gb in self.config.sizes_gb] or [
            max(round(share * self.footprint), 1) for share in self.config.shares
        ]
        if min(pages) < self.config.replicas:
            raise ConfigError(
                f"replicas={self.config.replicas}: a size of {min(pages)} pages has none for each; "
                "use fewer replicas, larger sizes or more users"
            )
        return [Size(n / self.footprint, n, n * one) for n in sorted(set(pages))]

    @property
    def tiers(self) -> dict[str, float]:
        """Sizes of the lower tiers, in sizes of the cache on the device."""
        times = zip(tiers.NAMES, (self.config.host_times, self.config.storage_times), strict=True)
        return {name: factor for name, factor in times if factor}

    def run(self, watch: Watch = unwatched) -> Iterator[Row]:
        """Simulate, size by size. Rows of the limit and of Belady's rule come first, as the others refer to them."""
        trace, costs = self.trace, self.costs
        for size in self.sizes:
            known: dict[str, list[Outcome]] = {}
            everywhere = size.pages + sum(int(size.pages * factor) for factor in self.tiers.values())
            for name in [LIMIT, BELADY, *self.config.chosen]:
                begin = time.perf_counter()
                with watch(f"{name} at {size.gb:.3g} GB", len(trace)) as progress:
                    if name == BELADY:
                        known[name] = [simulate.belady(trace, costs, everywhere, progress)]
                    elif name == LIMIT:
                        known[name] = [simulate.bound(trace, costs, everywhere)]
                    else:
                        known[name] = self._simulate(name, size.pages, progress)
                metrics = self._metrics(name, size, known)
                yield Row(name, size, simulate.total(known[name]), metrics, time.perf_counter() - begin)

    def _simulate(self, name: str, pages: int, progress: Progress) -> list[Outcome]:
        """Simulate a policy on each replica with its part of the pages."""
        outcomes: list[Outcome] = []
        for part in self.parts:
            before = sum(out.requests for out in outcomes)
            lower = None
            for factor in reversed(self.tiers.values()):
                policy = policies.make(name, self.config.host_admit_visit)
                lower = Tier(self.costs, policy, int(pages * factor) // self.config.replicas, lower)
            policy = policies.make(name, self.config.admit_visit)
            simulation = Simulation(part, self.costs, policy, pages // self.config.replicas, lower)
            outcomes.append(simulation.run(_after(before, progress)))
        return outcomes

    def facts(self) -> dict[str, float]:
        """Return figures of the trace and its routes. footprint: the total size of every user's last state."""
        most = max(len(part) for part in self.parts)
        return {
            "requests": len(self.trace),
            "users": self.trace.num_users,
            "footprint_gb": self.footprint * self.page_bytes / 1e9,
            "page_bytes": self.page_bytes,
            "most_hits": float((self.trace.next < len(self.trace)).mean()),
            "spilled_share": self.routes.spilled / len(self.trace),
            "busiest_replica": most * self.config.replicas / len(self.trace),
        }

    def _metrics(self, name: str, size: Size, known: dict[str, list[Outcome]]) -> dict[str, float]:
        out = simulate.total(known[name])
        events, work = self._events(self.trace), self._work(self.trace)
        metrics = {
            "hit_rate": out.hits / out.requests,
            "byte_hit_rate": out.tokens / events,
            "saved_flops_share": out.flops / work,
            "limit_share": _ratio(out.hits, known[LIMIT][0].hits),
            "requests_per_s": out.requests / out.seconds,
        }
        if BELADY in known:
            metrics["belady_share"] = _ratio(out.hits, known[BELADY][0].hits)
        if "lru" in known:
            metrics["over_lru"] = (out.hits - simulate.total(known["lru"]).hits) / out.requests
        if name == LIMIT:
            del metrics["requests_per_s"]
            return metrics
        metrics |= {"evictions": out.evictions, "refused": out.refused}
        if name == BELADY:
            return metrics
        candidates = self.config.workload.num_candidates
        if self.tiers or self.config.replicas > 1:
            metrics["device_hit_rate"] = (out.hits - sum(tier.hits for tier in out.lower)) / out.requests
            metrics["computed_tokens"] = (events - out.tokens) / out.requests + candidates
        for tier, counts in zip(self.tiers, out.lower, strict=True):
            metrics[f"{tier}_hit_rate"] = counts.hits / out.requests
            metrics[f"{tier}_read_mb"] = counts.read * self.page_bytes / out.requests / 1e6
            metrics[f"{tier}_written_mb"] = counts.written * self.page_bytes / out.requests / 1e6
        if self.config.replicas > 1:
            metrics["imbalance"] = self._imbalance(known[name])
        if self.config.fleet.rate:
            metrics |= fleet.plan(self.config.fleet, self._demand(out, size, metrics), list(self.tiers))
        return metrics

    def _demand(self, out: Outcome, size: Size, metrics: dict[str, float]) -> fleet.Demand:
        work, lower = self._work(self.trace), sum(tier.flops for tier in out.lower)
        return fleet.Demand(
            tokens=self._events(self.trace) / out.requests + self.config.workload.num_candidates,
            device_saved=(out.flops - lower) / work,
            lower_saved=lower / work,
            read=[1e6 * metrics[f"{tier}_read_mb"] for tier in self.tiers],
            written=[1e6 * metrics[f"{tier}_written_mb"] for tier in self.tiers],
            sizes=[1e9 * size.gb * factor for factor in (1.0, *self.tiers.values())],
            users=self.trace.num_users,
            imbalance=metrics.get("imbalance", 1.0),
        )

    def _imbalance(self, outcomes: list[Outcome]) -> float:
        """Return the FLOPs of the busiest replica over the mean."""
        left = [self._work(part) - out.flops for part, out in zip(self.parts, outcomes, strict=True)]
        return max(left) * self.config.replicas / sum(left)

    def _events(self, trace: Columns) -> float:
        return float(trace.lengths.sum(dtype=np.int64))

    def _work(self, trace: Columns) -> float:
        """Return the FLOPs of a trace without a cache."""
        counts = np.bincount(trace.lengths, minlength=len(self.costs.total))
        return float(counts @ np.array(self.costs.total))


def to_dict(row: Row) -> dict[str, object]:
    """Return a row as results.json has it."""
    size = dataclasses.asdict(row.size)
    return {"policy": row.policy, **size, "metrics": row.metrics, "outcome": dataclasses.asdict(row.outcome)}


def _after(before: int, progress: Progress) -> Progress:
    """Report progress of a part that follows `before` requests."""
    return lambda done: progress(before + done)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
