"""Choice between CUDA graphs and single launches, by costs that are measured when the engine starts.

A batch whose kernels are launched one by one takes the longer of two times: the host's, to pack it and to launch its
kernels, and the device's. A graph takes the device's time for its bucket, padding included. That is at least the
device's time without padding. So a graph pays exactly where the device replays it in less time than the host needs for
the launches, and this is the same for all batches of a bucket. A near tie goes to the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, groupby
from statistics import median
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from grengines.api import BatchResult, Request
from grengines.runtime.batch import Bucket, Encoding
from grengines.runtime.buckets import Buckets

RUNS = 5  # batches of which the median counts, after one that compiles
NEAR = 1.1  # times the launches: within it the graph is preferred, since a near tie would differ from start to start
SLACK = 1.25  # eager device times up to this share of the launches' are close enough to capture a graph and time it


class Runner(Protocol):
    """The part of GraphRunner that decisions need."""

    def keep(self, buckets: Sequence[Bucket]) -> None: ...

    def upload(self, bucket: Bucket, inputs: Tensor) -> None: ...

    def replay(self, bucket: Bucket) -> Tensor: ...


class Costs(NamedTuple):
    """Seconds of a batch: on the host until all is queued, and on the device."""

    host_s: float
    device_s: float


class BucketCosts(NamedTuple):
    """Seconds of a batch that fills a bucket."""

    launches_s: float  # on the host, to pack it and to launch its kernels one by one
    replay_s: float  # on the device, in the bucket's graph

    def pays(self, before_s: float = 0.0) -> bool:
        """Return whether the graph ends first, or nearly so (NEAR).

        before_s: work that a graph waits for and that launches overlap.
        """
        return before_s + self.replay_s < NEAR * self.launches_s


Queue = Callable[[], Callable[[], BatchResult]]  # queues a batch; the returned function waits for it
Probe = Callable[[Bucket, Runner | None], Queue]  # a batch that fills the bucket; None: without its graph


@dataclass
class Graphs:
    """The CUDA graphs of an engine. By default there are none."""

    runner: Runner | None = None
    buckets: Buckets = field(default_factory=Buckets)
    costs: dict[Bucket, BucketCosts] = field(default_factory=dict)  # empty: not measured, a graph always pays

    def choose(self, needed: Bucket) -> Bucket | None:
        """Return the bucket of the graph for a batch of these sizes, as Buckets.choose; None to launch its kernels."""
        return self.buckets.choose(needed)

    def pays(self, bucket: Bucket, before_s: float) -> bool:
        """Return whether the bucket's graph ends first, or nearly, though it begins `before_s` later than launches."""
        return bucket not in self.costs or self.costs[bucket].pays(before_s)

    def counts(self, bucket: Bucket | None) -> dict[str, float]:
        """Return a batch's entries of `details`; empty without graphs."""
        return (
            {"graph_batches": float(bucket is not None), "eager_batches": float(bucket is None)} if self.runner else {}
        )

    def actual(self) -> dict[str, Any]:
        """Return the entries of a record."""
        return {
            "cuda_graphs": "true" if self.runner else "false",
            "graph_buckets": [list(b) for b in self.buckets],  # the fields of Bucket
            "graph_costs_ms": [
                {"batch": b.batch, "tokens": b.tokens, "launches": _ms(c.launches_s), "replay": _ms(c.replay_s)}
                for b, c in sorted(self.costs.items())
            ],
        }


def capture(asked: str, plan: Sequence[Bucket], make: Callable[[Sequence[Bucket]], Runner], probe: Probe) -> Graphs:
    """Capture the graphs that are asked for: true, all of the plan; false, none; auto, those that pay.

    make: captures the graphs of buckets.
    """
    if asked == "false":
        return Graphs()
    if asked == "true":
        return Graphs(make(plan), Buckets(plan))
    launches = worth_capturing(plan, lambda bucket: timed(probe(bucket, None)))
    if not launches:
        return Graphs()
    runner = make(list(launches))
    costs = {b: BucketCosts(s, timed(probe(b, runner)).device_s) for b, s in launches.items()}
    paying = [b for b, cost in costs.items() if cost.pays()]
    runner.keep(paying)
    return Graphs(runner if paying else None, Buckets(paying), costs)


def worth_capturing(plan: Iterable[Bucket], eager: Callable[[Bucket], Costs]) -> dict[Bucket, float]:
    """Return the buckets whose graphs may pay, each with the host's time for the launches.

    eager: measures a batch that fills a bucket, without a graph. More tokens take the device longer and the host no
    longer. So of each size of a batch only the buckets up to the first that keeps the device busy are measured.
    """
    worth: dict[Bucket, float] = {}
    for _, group in groupby(sorted(plan), key=lambda b: b.batch):
        for bucket in group:
            costs = eager(bucket)
            if costs.device_s > SLACK * costs.host_s:
                break
            worth[bucket] = costs.host_s
    return worth


def timed(queue: Queue) -> Costs:
    """Return the medians of several batches, one after another."""
    queue()()
    measured = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        queued = queue()
        host_s = time.perf_counter() - begun
        measured.append(Costs(host_s, queued().compute_ms / 1e3))
    return Costs(median(c.host_s for c in measured), median(c.device_s for c in measured))


class Filling(NamedTuple):
    """Requests that fill a bucket, and the tokens of each that are cached."""

    requests: list[Request]
    cached: list[int]


def fillings(bucket: Bucket, like: Request, encoding: Encoding, *, cached: bool = False) -> Iterator[Filling]:
    """Return endless batches that nearly fill a bucket, one after another of other sizes, as in a run.

    A size that comes again costs the host less: libraries choose their kernels anew for each. Arguments: of `filling`.
    """
    return cycle([filling(bucket, like, encoding, cached=cached, fewer=i) for i in range(RUNS + 1)])


def filling(bucket: Bucket, like: Request, encoding: Encoding, *, cached: bool = False, fewer: int = 0) -> Filling:
    """Return requests alike that fill a bucket. like: a request of the longest history.

    cached: all events that find no room in the bucket are cached; without it they are left out. fewer: new events of
    each that are left out or cached as well.
    """
    context, targets = encoding.contextual_seq_len, bucket.targets
    count = max(min(bucket.batch, bucket.tokens // (context + targets + 1)), 1)
    each = min(bucket.tokens // count, bucket.length)
    targets = min(targets, len(like.candidates), each)
    events = max(min(each - targets - context, len(like.history_items)) - fewer, 0)
    whole = cached and not context  # contextual tokens see the whole history: none of it is cached with new events
    kept = like.with_events(slice(0, len(like.history_items) if whole else events))
    requests = [replace(kept, user_id=i, candidates=like.candidates[:targets]) for i in range(count)]
    return Filling(requests, [len(r.history_items) - events if whole else 0 for r in requests])


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
