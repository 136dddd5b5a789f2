"""A plan: from what a simulation counts and what a GPU was measured to take, to GPUs, memory and traffic.

A trace with fewer users stands for the fleet's users. A consistent hash samples users uniformly, so each replica sees
such a trace, and hit rates depend on the cache's share of all states (docs/SCALING.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grengines.options import option


@dataclass
class FleetConfig:
    """The load of a fleet, and measured costs of one of its GPUs."""

    rate: float = option(0.0, "requests/s to plan for; 0: no plan", ge=0, le=1e9)
    users: int = option(1_000_000_000, "users of the fleet, for which those of the trace stand", ge=1, le=10**12)
    compute_us_a_token: float = option(
        0.1, "GPU time of a token of a whole history and its candidates: actual.cache_compute_us_a_token of a record, "
        "or 1e6 * engine_busy / throughput_tokens_per_s of one without a cache", gt=0, le=1e6,
    )  # fmt: skip
    launch_ms: float = option(
        0.0, "time of a batch that its computation does not hide: packing and launches", ge=0, le=1e6
    )
    eager_ms: float = option(
        0.0, "time in which the host launches the kernels of a batch without a CUDA graph, which takes no less: the "
        "median `launches` of actual.graph_costs_ms of a record", ge=0, le=1e6,
    )  # fmt: skip
    eager_share: float = option(
        1.0, "share of the batches that have no CUDA graph: of a record's engine/eager_batches and graph_batches",
        ge=0, le=1,
    )  # fmt: skip
    batch: float = option(8.0, "requests of a batch, on average", ge=1)
    copy_gb_s: float = option(
        54.0, "bandwidth between a GPU and its host, each way: actual.cache_copy_gb_s of a record", ge=0.001
    )
    busy: float = option(0.7, "most of the time that a GPU is busy, so that latencies keep their limit", ge=0.01, le=1)


@dataclass(frozen=True)
class Demand:
    """Work that a simulated policy leaves, as means over the requests, and sizes of its tiers."""

    tokens: float  # of the whole request
    device_saved: float  # share of FLOPs
    lower_saved: float  # share of FLOPs, by states that are loaded to the device
    read: Sequence[float]  # bytes loaded from each lower tier
    written: Sequence[float]  # bytes that each lower tier takes
    sizes: Sequence[float]  # bytes of the device and of each lower tier, all replicas together
    users: int  # of the trace
    imbalance: float = 1.0  # work of the busiest replica over the mean


def plan(fleet: FleetConfig, demand: Demand, tiers: Sequence[str]) -> dict[str, float]:
    """Return the figures of a plan. tiers: names of the lower ones.

    Of the lower tiers' states the share is loaded that takes as long as computing all else meanwhile, as
    `cache.onload_share=0` does, or everything. Copies to the host take no time from the GPU until they fill the link.
    A batch without a graph takes as long as the GPU or as launching its kernels, whichever is longer; all batches
    are taken to have the mean size.
    """
    whole_s = demand.tokens * fleet.compute_us_a_token / 1e6
    bandwidth = fleet.copy_gb_s * 1e9
    copy_s, left_s = sum(demand.read) / bandwidth, whole_s * (1 - demand.device_saved)
    gain_s = whole_s * demand.lower_saved
    loaded = min(left_s / (gain_s + copy_s), 1.0) if copy_s else 0.0
    down_s = demand.written[0] / bandwidth if demand.written else 0.0
    gpu_s = max(left_s - loaded * gain_s, down_s)
    late_s = max(fleet.eager_ms / 1e3 / fleet.batch - gpu_s, 0.0)  # what launches take beyond that
    busy_s = gpu_s + fleet.eager_share * late_s + fleet.launch_ms / 1e3 / fleet.batch
    gpus = math.ceil(fleet.rate * busy_s * demand.imbalance / fleet.busy)
    a_gpu = fleet.rate / gpus
    per_gpu = fleet.users / demand.users / gpus / 1e9
    figures = {
        "fleet_gpu_ms": 1e3 * busy_s,
        "fleet_rps_a_gpu": a_gpu,
        "fleet_gpus": gpus,
        "fleet_loaded_share": loaded,
        "fleet_device_gb": demand.sizes[0] * per_gpu,
    }
    for i, name in enumerate(tiers):
        figures[f"fleet_{name}_gb"] = demand.sizes[i + 1] * per_gpu
        figures[f"fleet_from_{name}_gb_s"] = loaded * demand.read[i] * a_gpu / 1e9
        figures[f"fleet_to_{name}_gb_s"] = demand.written[i] * a_gpu / 1e9
    return figures
