"""Host time of a batch of the native engine, by its parts.

    python experiments/host_time.py
    python experiments/host_time.py kernel=triton engine.cuda_graphs=false

Batches of whole histories, and of users who are in the KV cache, are ranked one after another. Each row has the least
microseconds of each part: look-up and commit of cached states, packing, places in the pages, copies, launches, the
result's copy. `before_us` is the time from the call of `rank` until all is launched, and `after_us` from the end of the
wait for the device until `rank` returns. The host does the rest while the device computes. `outside_us` is the wall
clock around `rank` without the time between the copies on the device. It is what the host adds to a batch, if no other
batch is computed meanwhile.

`in_row_us` is the same with two batches in flight, as with `scenario.in_flight=2`: two threads rank batches of other
users, and each queues its next one while the device computes the other's. The time of all batches, less that between
the copies of each, is what a batch costs in a row with the device: the copies, and what the host is late. Where most of
a history is cached, each thread ranks the cached part alone, a whole hit, and then the batch, so that it appends each
time: `in_row_us` is the mean of both.

On a CPU nothing is computed: the model is small and returns zeros, and so do graphs, whose inputs are copied. So the
rows have the host's own work alone.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import common
import numpy as np
import torch

from grengines.api import Request
from grengines.cache.places import HostPlaces
from grengines.cache.states import UserStates
from grengines.hstu import cached, engine
from grengines.models.hstu.model import HSTURanker
from grengines.runtime.batch import Bucket, HostBatch, Layout
from grengines.runtime.buckets import plan_buckets
from grengines.runtime.graphs import GraphRunner
from grengines.runtime.timing import Marks

SMALL = [f"model.{key}" for key in ("layers=1", "embedding_dim=16", "heads=1", "qk_dim=16", "v_dim=16")]


class CopyRunner:
    """CUDA graphs on a machine without them: inputs are copied, and nothing is computed. Satisfies graph_costs.Runner.

    Arguments: as of GraphRunner.
    """

    def __init__(self, forward: Any, buckets: Sequence[Bucket], inputs: Callable[[Bucket], Any], device: Any) -> None:
        self._buffers = {b: torch.cat([host.buffer for host in inputs(b)]) for b in buckets}
        self._logits = {b: torch.zeros(b.candidates, 1) for b in buckets}

    def keep(self, buckets: Sequence[Bucket]) -> None:
        """Drop nothing: all graphs are asked for."""

    def upload(self, bucket: Bucket, inputs: torch.Tensor) -> None:
        self._buffers[bucket].copy_(inputs)

    def replay(self, bucket: Bucket) -> torch.Tensor:
        return self._logits[bucket]


RUNNER = GraphRunner if torch.cuda.is_available() else CopyRunner
PARTS: dict[str, list[tuple[Any, str]]] = {
    "states": [(UserStates, name) for name in ("lookup", "extend", "start_loading", "commit", "abort", "counts")],
    "pack": [(Layout, "of"), (Layout, "pack")],
    "places": [(HostPlaces, "of")],
    "copy": [(RUNNER, "upload"), (HostBatch, "to"), (HostPlaces, "to")],
    "launch": [(RUNNER, "replay"), (HSTURanker, "forward"), (HSTURanker, "paged")],
    "result": [(cached, "collect"), (engine, "collect")],
    "wait": [(Marks, "wait")],
}


class Clock:
    """Seconds that are spent in functions, by part, and the time at the end of the last one of each part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.ended: dict[str, float] = {}

    def watching(self, owner: Any, name: str, part: str) -> AbstractContextManager[object]:
        """Add up the time in a function of a class or a module inside the context."""
        found, bound = getattr(owner, name), isinstance(vars(owner)[name], classmethod)

        @wraps(found)
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return found(*args, **options)
            finally:
                self.ended[part] = time.perf_counter()
                self.spent[part] += self.ended[part] - begun

        return mock.patch.object(owner, name, staticmethod(timed) if bound else timed)


def zeros(ranker: HSTURanker, batch: Any, *_: Any, **__: Any) -> torch.Tensor:
    """The logits of a model that computes nothing."""
    return torch.zeros(len(batch.candidate_rows), len(ranker.config.tasks))


class Case(NamedTuple):
    """A batch, the batch that brings the engine into the state that it finds, and batches of others like these two."""

    name: str
    batch: Sequence[Request]
    earlier: Sequence[Request] = ()
    others: tuple[Sequence[Request], Sequence[Request]] | None = None  # earlier, then


def measure(rows: common.Rows, clock: Clock, rounds: int, made: Any, case: Case) -> None:
    """Time the case's batch."""
    name, batch, earlier, others = case
    wall, parts, result = [], defaultdict(list), None
    for _ in range(rounds):
        if earlier:
            made.rank(earlier)
        clock.spent.clear()
        begun = time.perf_counter()
        result = made.rank(batch)
        ended = time.perf_counter()
        wall.append(ended - begun - (result.compute_ms / 1e3 if torch.cuda.is_available() else 0.0))
        for part in PARTS:
            parts[part].append(clock.spent[part])
        parts["before"].append(clock.ended["launch"] - begun)
        parts["after"].append(ended - clock.ended["wait"])
    assert result is not None
    least = {f"{part}_us": 1e6 * min(times) for part, times in parts.items()}
    mine = [some for some in (earlier, batch) if some]
    rows.add(
        case=name,
        batch=len(batch),
        tokens=result.tokens,
        graph=result.details.get("graph_batches", 0.0) > 0,
        **least,
        outside_us=1e6 * min(wall),
        outside_p50_us=1e6 * float(np.median(wall)),
        in_row_us=in_row_us(made, [mine, others or mine], rounds),
        compute_us=1e3 * result.compute_ms,
    )


def in_row_us(made: Any, threads: Sequence[Sequence[Sequence[Request]]], rounds: int) -> float:
    """Rank each thread's batches in turn, beside the other threads'. Return what a batch takes but for its compute."""

    def run(batches: Sequence[Sequence[Request]]) -> list[float]:
        return [made.rank(batch).compute_ms for _ in range(rounds) for batch in batches]

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(threads)) as pool:
        computed_ms = [ms for some in pool.map(run, threads) for ms in some]
    return 1e6 * (time.perf_counter() - begun) / len(computed_ms) - 1e3 * float(np.mean(computed_ms))


def returning(parser: Any, args: Any, rows: common.Rows, clock: Clock) -> None:
    """Batches of users whose histories are in the cache, whole or all but a 32nd."""
    defaults = ["workload=synthetic", "model=wide_heads", "engine=hstu", "cache=lru"]
    more = [] if torch.cuda.is_available() else [*SMALL, "cache.memory_gb=0.1"]
    spec = common.specs_of(parser, [*defaults, "cache.memory_gb=4", *more], args.overrides, multirun=False)[0]
    users, known = common.requests_of(16, args.history, 256), args.history - args.history // 32
    made = common.engine_of(spec, users[:8], 8)
    if not torch.cuda.is_available():
        plan = plan_buckets(users, made.user_cache.encoding, 8, packed=True, cached=True)
        with mock.patch.object(cached, "GraphRunner", CopyRunner), torch.inference_mode():
            made.user_cache.capture("true", plan, users[0])
    earlier = [common.first_events(user, known) for user in users]
    for count in (8, 1):
        mine, others = slice(count), slice(8, 8 + count)
        for tokens, visits in (args.history, users), (known, earlier):
            name = f"{tokens} of {args.history} cached"
            case = Case(name, users[mine], visits[mine], (visits[others], users[others]))
            measure(rows, clock, args.rounds, made, case)
    made.close()


def whole(parser: Any, args: Any, rows: common.Rows, clock: Clock) -> None:
    """Batches of whole histories of very different lengths."""
    defaults = ["workload=synthetic_long", "model=dlrm_v3", "engine=hstu"]
    more = [] if torch.cuda.is_available() else [*SMALL, "model.embedding_rows=1000"]
    spec = common.specs_of(parser, [*defaults, *more], args.overrides, multirun=False)[0]
    requests = common.requests_of(16, args.longest, 2048, shortest=0.05)
    made = common.engine_of(spec, requests, len(requests))
    shortest = sorted(requests, key=lambda r: len(r.history_items))
    for batch in (requests, shortest[:1], shortest[-1:]):
        measure(rows, clock, args.rounds, made, Case("whole histories", batch))
    made.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__ or "", rounds=100)
    parser.add_argument("--history", type=int, default=4096, help="events of a returning user (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=16384, help="events of a whole history (default: %(default)s)")
    args = parser.parse_args(arguments)
    rows, clock = common.Rows(args, __file__, arguments), Clock()
    with ExitStack() as changes:
        for name in () if torch.cuda.is_available() else ("forward", "paged"):
            changes.enter_context(mock.patch.object(HSTURanker, name, zeros))
        for part, functions in PARTS.items():
            for owner, name in functions:
                changes.enter_context(clock.watching(owner, name, part))
        returning(parser, args, rows, clock)
        whole(parser, args, rows, clock)
    rows.close()


if __name__ == "__main__":
    common.run(main)
