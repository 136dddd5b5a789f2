"""One job: every policy at every size on one trace, beside Belady's rule and the limit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from grbench.cachesim import simulate
from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.simulate import Costs, Outcome, Progress, Simulation
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
    """A cache size."""

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

    def _sizes(self) -> list[Size]:
        one = self.page_bytes / 1e9
        if small := [gb for gb in self.config.sizes_gb if gb < one]:
            raise ConfigError(f"sizes_gb={small[0]:g}: a page takes {one:.3g} GB; allowed is at least that")
        pages = [int(gb / one) for gb in self.config.sizes_gb] or [
            max(round(share * self.footprint), 1) for share in self.config.shares
        ]
        return [Size(n / self.footprint, n, n * one) for n in sorted(set(pages))]

    def run(self, watch: Watch = unwatched) -> Iterator[Row]:
        """Simulate, size by size. Rows of the limit and of Belady's rule come first, as the others refer to them."""
        trace, costs = self.trace, self.costs
        for size in self.sizes:
            known: dict[str, Outcome] = {}
            for name in [LIMIT, BELADY, *self.config.chosen]:
                begin = time.perf_counter()
                with watch(f"{name} at {size.gb:.3g} GB", len(trace)) as progress:
                    if name == BELADY:
                        known[name] = simulate.belady(trace, costs, size.pages, progress)
                    elif name == LIMIT:
                        known[name] = simulate.bound(trace, costs, size.pages)
                    else:
                        policy = policies.make(name, self.config.admit_visit)
                        known[name] = Simulation(trace, costs, policy, size.pages).run(progress)
                yield Row(name, size, known[name], self._metrics(name, known), time.perf_counter() - begin)

    def facts(self) -> dict[str, float]:
        """Return figures of the trace. footprint: the total size of every user's last state."""
        return {
            "requests": len(self.trace),
            "users": self.trace.num_users,
            "footprint_gb": self.footprint * self.page_bytes / 1e9,
            "page_bytes": self.page_bytes,
            "most_hits": float((self.trace.next < len(self.trace)).mean()),
        }

    def _metrics(self, name: str, known: dict[str, Outcome]) -> dict[str, float]:
        out = known[name]
        counts = np.bincount(self.trace.lengths, minlength=len(self.costs.total))
        metrics = {
            "hit_rate": out.hits / out.requests,
            "byte_hit_rate": out.tokens / float(counts @ np.arange(len(counts))),
            "saved_flops_share": out.flops / float(counts @ np.array(self.costs.total)),
            "limit_share": _ratio(out.hits, known[LIMIT].hits),
            "requests_per_s": out.requests / out.seconds,
        }
        if BELADY in known:
            metrics["belady_share"] = _ratio(out.hits, known[BELADY].hits)
        if "lru" in known:
            metrics["over_lru"] = (out.hits - known["lru"].hits) / out.requests
        if name != LIMIT:
            metrics |= {"evictions": out.evictions, "refused": out.refused}
        else:
            del metrics["requests_per_s"]
        return metrics


def to_dict(row: Row) -> dict[str, object]:
    """Return a row as results.json has it."""
    size = dataclasses.asdict(row.size)
    return {"policy": row.policy, **size, "metrics": row.metrics, "outcome": dataclasses.asdict(row.outcome)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
