"""Times of calls, measured interleaved, and the device's own ceilings.

On a GPU the clock is the device's (events), and the host must never be the bottleneck. Every repetition is enqueued
without waiting. Before each one, the second-level cache is filled with other data, and the device is kept busy while
the host enqueues the call's kernels. The kernels are then ready one behind another when the device reaches them, and
none finds its inputs in the cache. The cache is filled by reads: written data would go to memory during the call, at
the cost of calls that write little themselves. On a CPU nothing is flushed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from grkernels import fp8

Call = Callable[[], Any]

MAX_ROUNDS = 1000
HOST_MARGIN = 2.0  # the device stays busy for this multiple of the time that the host needs to enqueue a call,
EVENTS_S = 1e-4  # and for this much longer, while the events are enqueued
CYCLES_A_SECOND = 2.0e9  # of the fastest GPU, so that any GPU is busy for at least the time that is needed


@dataclass
class Times:
    """Milliseconds of each repetition by name, the last call with what it returned, and the calls that failed."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, tuple[int, Any]] = field(default_factory=dict)  # number of the call, its result
    failed: dict[str, Exception] = field(default_factory=dict)


def interleaved(
    calls: Mapping[str, Sequence[Call]], device: str, *, repeats: int, min_time_s: float, seed: int = 0
) -> Times:
    """Time calls that have run before. Each round runs every name once, in a new order, on the next of its calls.

    There are at least `repeats` rounds, and more (at most 1000) while they fit into `min_time_s` seconds.
    """
    run = _on_gpu if device == "cuda" else _on_cpu
    return run(calls, repeats, min_time_s, np.random.default_rng(seed))


def median_ms(call: Call, device: str, repeats: int = 10) -> float:
    """Return the median milliseconds of one call that has run before. Raises as the call does."""
    times = interleaved({"call": [call]}, device, repeats=repeats, min_time_s=0.01)
    for error in times.failed.values():
        raise error
    return float(np.median(times.ms["call"]))


def _on_gpu(calls: Mapping[str, Sequence[Call]], repeats: int, min_time_s: float, rng: np.random.Generator) -> Times:
    times = Times()
    scratch = torch.zeros(torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int16, device="cuda")  # twice
    busy, round_s = {}, 0.0
    for name, (call, *_) in calls.items():
        host, total = _host_and_total(call)
        busy[name] = HOST_MARGIN * host + EVENTS_S
        round_s += total + busy[name]
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for i in range(_rounds(repeats, min_time_s, round_s)):
        for name in _order(calls, times, rng):
            scratch.amax()
            torch.cuda._sleep(int(busy[name] * CYCLES_A_SECOND))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                turn = i % len(calls[name])
                times.last[name] = turn, calls[name][turn]()
            except Exception as e:
                times.failed[name] = e
                continue
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    times.ms = {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in events.items()}
    return times


def _host_and_total(call: Call) -> tuple[float, float]:
    """Return the seconds until the host has enqueued the call and until the device is done, the least of three."""
    host = total = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host = min(host, time.perf_counter() - begin)
        torch.cuda.synchronize()
        total = min(total, time.perf_counter() - begin)
    return host, total


def _on_cpu(calls: Mapping[str, Sequence[Call]], repeats: int, min_time_s: float, rng: np.random.Generator) -> Times:
    times = Times({name: [] for name in calls})
    begun, done, rounds = time.perf_counter(), 0, repeats
    while done < rounds:
        for name in _order(calls, times, rng):
            begin = time.perf_counter()
            try:
                turn = done % len(calls[name])
                times.last[name] = turn, calls[name][turn]()
            except Exception as e:
                times.failed[name] = e
                continue
            times.ms[name].append(1e3 * (time.perf_counter() - begin))
        done += 1
        rounds = _rounds(repeats, min_time_s, (time.perf_counter() - begun) / done)
    return times


def _rounds(repeats: int, min_time_s: float, round_s: float) -> int:
    return min(max(repeats, int(min_time_s / round_s)), max(MAX_ROUNDS, repeats))


def _order(calls: Mapping[str, Sequence[Call]], times: Times, rng: np.random.Generator) -> list[str]:
    """Return a new order for a round. No call always runs after the same one, which would leave heat and caches."""
    alive = [name for name in calls if name not in times.failed]
    return [alive[i] for i in rng.permutation(len(alive))]


@dataclass(frozen=True)
class Ceilings:
    """Rates that this device reaches in this process, in this dtype: the two roofs of the roofline."""

    tflops: float  # of a large square matrix product
    tbps: float  # of a large copy; bytes read and bytes written both count
    matmul_size: int
    copy_bytes: int
    dtype: str

    def floor_s(self, flops: int, bytes_: int) -> float:
        """Return the least seconds that any implementation needs."""
        return max(flops / (self.tflops * 1e12), bytes_ / (self.tbps * 1e12))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def ceilings(device: str, dtype: str, torch_dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings once a process. fp32 products are exact: TF32 stays off, as in the variants."""
    n, size = (8192, 2 * 2**30) if device == "cuda" else (1024, 256 * 2**20)
    a, b = (torch.randn(n, n, device=device, dtype=torch_dtype) for _ in range(2))
    product = torch.empty_like(a)
    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    calls: dict[str, Call] = {"matmul": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    times = interleaved({k: [c] for k, c in calls.items()}, device, repeats=20, min_time_s=0.3)
    for error in times.failed.values():
        raise error
    seconds = {name: float(np.median(ms)) / 1e3 for name, ms in times.ms.items()}
    return Ceilings(2 * n**3 / seconds["matmul"] / 1e12, 2 * size / seconds["copy"] / 1e12, n, size, dtype)


@cache
def fp8_ceilings(roofs: Ceilings, device: str) -> Ceilings:
    """Return ceilings with the rate of products of e4m3 numbers, measured once a process.

    A CPU emulates them in the products that it has, so its own are the ceiling.
    """
    if device != "cuda":
        return roofs
    n = roofs.matmul_size
    a, b = (fp8.Scaled.of(torch.randn(n, n, device=device)) for _ in range(2))
    multiply = partial(fp8.product, a, b.values, b.scales.t().contiguous(), None, fast=True)
    multiply()
    return replace(roofs, tflops=2 * n**3 / median_ms(multiply, device, 20) / 1e9, dtype="fp8")
