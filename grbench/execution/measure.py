"""The metrics of a record from a scenario's raw samples."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grbench.config.schema import RunSpec
from grbench.execution import stats
from grbench.execution.records import IN_RUN, PARTS
from grbench.scenarios import Measurement
from grbench.scenarios.config import (
    OfflineConfig,
    ScenarioConfig,
    ServerConfig,
    TraceReplayConfig,
    is_accuracy,
    issuer_waits,
)
from grbench.tools import sizing
from grbench.workloads.trace import Requests
from grengines.api import Request
from grengines.last_layer import LastLayer
from grengines.pipeline.config import STAGES
from grengines.remote.config import MOST, RemoteConfig

MOST_UNKNOWN = 0.05  # share of the latency that no part has before a note says so
CALLS_MS = 0.2  # between LoadGen and the batcher, to and fro
MOST_KEPT_BACK = 0.01  # share of requests that wait in the client of a server before a note says so
FEWER_RETURNS = 0.1  # share of returning users by which a run with a cache may be below the trace before a note says so


def summarise(
    measurement: Measurement, spec: RunSpec, requests: Sequence[Request], sizes: Sequence[int] = ()
) -> stats.Summary:
    """Return latency percentiles with intervals, throughput, goodput, parts of the latency, FLOP rate and padding.

    sizes: codes of each level, for tasks that generate.
    """
    samples = measurement.samples
    summary = stats.latency_summary(samples["latency_ms"], arrivals_s=samples["arrival_s"])
    if isinstance(spec.scenario, OfflineConfig):
        summary.notes.clear()  # of a wait for all requests before it, no percentile is of interest
        if interval := _rate_interval(samples):
            summary.intervals[IN_RUN] = interval
    metrics = summary.metrics
    for part in [*PARTS, *(f"{stage}_ms" for stage in STAGES if f"{stage}_ms" in samples)]:
        for percent in stats.PART_PERCENTILES:
            metrics[f"{part}/p{percent:g}"] = stats.percentile(samples[part], percent)

    unknown = 1.0 - sum(samples[part].sum() for part in PARTS) / samples["latency_ms"].sum()
    if abs(unknown) > MOST_UNKNOWN:
        summary.notes.append(f"{unknown:.0%} of the latency is in none of its parts ({', '.join(PARTS)})")

    answered = [requests[int(i)] for i in samples["request_id"]]
    count = len(answered)
    ends = samples["arrival_s"] + samples["latency_ms"] / 1e3
    duration_s = float(ends.max())
    metrics |= {
        "samples": float(count),
        "duration_s": duration_s,
        "throughput_rps": stats.throughput(count, duration_s),
        "goodput_rps": stats.goodput(samples["latency_ms"], [r.deadline_ms for r in answered], duration_s),
        "throughput_tokens_per_s": measurement.tokens / duration_s,
        "padding_waste": 1.0 - measurement.tokens / measurement.padded_tokens,
        "batch_size/mean": measurement.batch_mean,
        "engine_busy": measurement.busy_s / duration_s,
    }
    if isinstance(spec.scenario, ServerConfig | TraceReplayConfig) and (last_s := float(samples["arrival_s"].max())):
        metrics["offered_rps"] = (count - 1) / last_s
    if isinstance(spec.scenario, OfflineConfig) and duration_s < stats.SHORTEST_S and not is_accuracy(spec.scenario):
        summary.notes.append(
            f"the run took {duration_s:.2g} s: too short to rank by one run; runner.repeats=5 gives an interval, and "
            f"scenario.queries={math.ceil(2 * count * stats.SHORTEST_S / duration_s)} would take about "
            f"{2 * stats.SHORTEST_S:g} s"
        )
    if isinstance(spec.engine, RemoteConfig) and not isinstance(spec.scenario, OfflineConfig):
        summary.notes += _kept_back(samples, spec.scenario)
    metrics |= measurement.metrics
    summary.notes += _beside_loadgen(samples, metrics)
    details = measurement.details
    metrics |= {f"engine/{name}": value for name, value in details.items()}
    if "items_tokens" in details:
        metrics["cache/item_token_hit_rate"] = details["items_token_hits"] / max(details["items_tokens"], 1)
        metrics["cache/item_hit_rate"] = details["items_hits"] / max(details["items_distinct"], 1)
    if "cache_hits" in details:
        metrics |= _cache_metrics(details, sum(len(r.history_items) for r in answered))
        share, usual = returning_share(answered), returning_share(requests)
        metrics["cache/returning_share"] = share
        if usual - share > FEWER_RETURNS:
            summary.notes.append(
                f"{share:.0%} of these {count} requests are by users who came before in the run, and {usual:.0%} in "
                f"the whole trace: scenario.queries={len(requests)} shows the hits of all of it"
            )
        if faults := details.get("cache_faults"):
            summary.notes.append(
                f"the cache failed {faults:.0f} times, and those batches were answered without it; see worker.log"
            )
        if pages := details.get("cache_corrupt_pages"):
            summary.notes.append(
                f"{pages:.0f} pages of the storage tier were not as they were written, and were computed again"
            )
        if batches := details.get("cache_storage_off"):
            summary.notes.append(
                f"the storage tier was switched off for {batches:.0f} batches, since its disk failed; see worker.log"
            )
    else:
        whole = np.isin(samples["batch_index"], measurement.whole)
        for name, flops in _flops(spec, answered, whole, sizes, details).items():
            metrics[name] = flops / measurement.busy_s / 1e12
    return summary


def returning_share(requests: Sequence[Request]) -> float:
    """Return the share of requests by users of an earlier one: no cache that begins empty finds more."""
    users = requests.users if isinstance(requests, Requests) else [request.user_id for request in requests]
    return 1 - len(np.unique(users)) / len(users)


def _rate_interval(samples: dict[str, np.ndarray]) -> list[float] | None:
    """Return the 95% interval of the requests/s of an offline run, by its batches; None for a run of few batches."""
    ends = samples["arrival_s"] + samples["latency_ms"] / 1e3
    batches, place, counts = np.unique(samples["batch_index"], return_inverse=True, return_counts=True)
    last = np.zeros(len(batches))
    np.maximum.at(last, place, ends)
    order = np.argsort(last, kind="stable")
    found = stats.rate_interval(counts[order], np.diff(last[order], prepend=0.0))
    return None if found is None else list(found)


def _kept_back(samples: dict[str, np.ndarray], scenario: ScenarioConfig) -> list[str]:
    """Return a note if requests waited in the client of a server, because all calls that it makes were under way.

    Such a request finds as many unanswered ones as these calls hold.
    """
    if issuer_waits(scenario):
        return []
    calls = max(scenario.in_flight, 1)
    arrivals = np.sort(samples["arrival_s"])
    ends = np.sort(samples["arrival_s"] + samples["latency_ms"] / 1e3)
    unanswered = np.arange(len(arrivals)) - np.searchsorted(ends, arrivals, "right")
    share = float((unanswered >= calls * scenario.max_batch).mean())
    if share <= MOST_KEPT_BACK:
        return []
    more = f"; raise scenario.in_flight, at most {MOST}, to send more" if calls < MOST else ""
    return [
        f"{share:.0%} of the requests waited in the client, because all calls of scenario.in_flight={calls} were under "
        f"way: queue_ms has this wait, and the server saw no more calls at a time{more}"
    ]


def _beside_loadgen(samples: dict[str, np.ndarray], metrics: dict[str, float]) -> list[str]:
    """Return a note for each of LoadGen's percentiles that is outside the interval of ours, or far from it without one.

    LoadGen times queries: its latency is that of the last request of those that arrived together. It counts the calls
    between itself and Python too, for which CALLS_MS and 1% are allowed.
    """
    theirs = {percent: metrics.get(f"loadgen_latency_ms/p{percent:g}") for percent in stats.PERCENTILES}
    arrivals, query = np.unique(samples["arrival_s"], return_inverse=True)
    if len(arrivals) == 1 or not any(theirs.values()):  # offline: every latency is a wait for all requests before it
        return []
    latencies = np.zeros(len(arrivals))
    np.maximum.at(latencies, query, samples["latency_ms"])
    ours, notes = stats.latency_summary(latencies, arrivals_s=arrivals), []
    for percent, value in theirs.items():
        name = f"latency_ms/p{percent:g}"
        if value is None or name not in ours.metrics:
            continue
        middle = ours.metrics[name]
        low, high = ours.intervals.get(name) or stats.percentile_interval(latencies, percent) or (middle, middle)
        allowed = max(CALLS_MS, 0.01 * middle)
        if not low - allowed <= value <= high + allowed:
            ends = f" [{low:.3g}, {high:.3g}]" if name in ours.intervals else ""
            notes.append(
                f"LoadGen's own p{percent:g} is {value:.3g} ms, grbench's {middle:.3g}{ends} ms: "
                "requests waited between LoadGen and the batcher, or after their answers; don't rely on either"
            )
    return notes


def _flops(
    spec: RunSpec,
    answered: Sequence[Request],
    whole: npt.NDArray[np.bool_],
    sizes: Sequence[int],
    details: dict[str, float],
) -> dict[str, float]:
    """Return the FLOPs of all answers by metric: those that the engine did, and those of a full model.

    whole: whether a request's batch computed every row of the last layer, in an engine that decides by batch. Empty if
    a cache saved part of the work, because a rate would be meaningless. What was done is left out if it is not known.
    """
    if spec.task == "rank":
        model = spec.ranking_model

        def count(request: Request, rows: LastLayer) -> float:
            return sizing.flops(model, len(request.history_items), len(request.candidates), rows=rows)
    elif spec.task == "generate" and spec.retrieval is not None and not details.get("prefix_hit_tokens"):
        width = spec.retrieval.beam_width

        def count(request: Request, rows: LastLayer) -> float:
            return sizing.search_flops(spec.model, len(request.history_items), sizes, width, rows=rows)
    else:
        return {}
    found = {"full_model_tflops": sum(count(r, LastLayer.EVERY) for r in answered)}
    if (rows := sizing.last_layer(spec, spec.task)) is not None:
        usual = LastLayer.READ if rows is LastLayer.HALF else rows
        each = (LastLayer.EVERY if every else usual for every in whole)
        found["model_tflops"] = sum(map(count, answered, each))
    return found


def _cache_metrics(details: dict[str, float], events: int) -> dict[str, float]:
    """Return hit rates of requests and tokens, and the cost of the tiers below the device.

    events: events of all histories. The token hit rate is the share of them that was not computed again.
    """
    on_device = details["cache_hits"] + details["cache_partial_hits"]
    # There are none where every lookup failed: such batches are answered without the cache.
    lookups = max(on_device + details["cache_misses"] + details["cache_bypassed"], 1)
    below = {name: details[f"cache_{name}_hits"] for name in ("host", "storage") if f"cache_{name}_hits" in details}
    tokens = sum(details.get(f"cache_{name}_tokens", 0.0) for name in ("cached", "loaded", "storage"))
    metrics = {
        "cache/hit_rate": (on_device + sum(below.values())) / lookups,
        "cache/device_hit_rate": on_device / lookups,
        **{f"cache/{name}_hit_rate": hits / lookups for name, hits in below.items()},
        "cache/token_hit_rate": tokens / max(events, 1),
    }
    if details.get("cache_host_copy_ms"):
        metrics["cache/host_wait_share"] = details["cache_host_wait_ms"] / details["cache_host_copy_ms"]
        metrics["cache/host_copy_gb_s"] = details["cache_host_bytes"] / details["cache_host_copy_ms"] / 1e6
    if details.get("cache_storage_read_ms"):
        metrics["cache/storage_read_gb_s"] = (
            details["cache_storage_read_bytes"] / details["cache_storage_read_ms"] / 1e6
        )
    return metrics


def gpu_allocated_mib(device: str) -> float:
    """Return PyTorch's memory on the GPU in use now, in MiB; 0 on a CPU. A new peak begins here."""
    if device != "cuda":
        return 0.0
    import torch

    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def gpu_allocations(device: str) -> int:
    """Return how often PyTorch asked the GPU for memory so far, because it had no free block that fits."""
    if device != "cuda":
        return 0
    import torch

    return int(torch.cuda.memory_stats()["num_device_alloc"])


def memory(device: str, gate_mib: float) -> dict[str, float]:
    """Return peak memory of this process in MiB: of the host since it began, of the GPU since `gpu_allocated_mib`.

    gate_mib: what the gate holds on the GPU, which is no part of the peak. It is in the memory that PyTorch reserved.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    peaks = {"host_memory_mib/peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if device == "cuda":
        import torch

        peaks["gpu_memory_mib/peak"] = torch.cuda.max_memory_allocated() / 2**20 - gate_mib
        peaks["gpu_memory_mib/reserved"] = torch.cuda.max_memory_reserved() / 2**20
    return peaks


def write_samples(samples: dict[str, np.ndarray], path: Path) -> None:
    """Write columns of equal length as parquet. Raises OSError when the disk is full."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(samples)), path)
