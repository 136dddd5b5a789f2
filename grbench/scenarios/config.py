"""Options of the scenarios: how requests arrive. MLPerf's four run through LoadGen."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class ScenarioConfig:
    """Dynamic batching: a batch closes when it is full or its oldest request has waited long enough."""

    name: str = option("???", "name of the scenario in records")
    max_batch: int = option(
        16, "most requests of a batch; why 16: docs/PERFORMANCE.md, Size of a batch", ge=1, le=65536
    )
    max_wait_ms: float = option(0.0, "longest wait for more requests; 0: take those that are there", ge=0, le=60_000)
    queries: int = option(1024, "fewest requests to answer", ge=1)
    order: str = option(
        "fifo", "which waiting requests go together: by arrival, of similar length, or cached in the same tier; "
        "none begins more than 4 batches later than by arrival", choices=["fifo", "length", "hit"],
    )  # fmt: skip
    in_flight: int = option(
        0,
        "batches in flight, one behind another once it is full; 0: 2 where the engine can, else 1",
        ge=0,
        le=1024,
    )


@dataclass
class LoadGenConfig(ScenarioConfig):
    """A scenario of MLPerf LoadGen."""

    min_duration_s: float = option(0.0, "shortest measurement", ge=0)
    mode: str = option(
        "performance", "accuracy: LoadGen issues each request that has a ground truth once, its responses carry the "
        "answers, and `quality/loadgen/...` is computed from its log", choices=["performance", "accuracy"],
    )  # fmt: skip


@dataclass
class OfflineConfig(LoadGenConfig):
    """MLPerf offline: every request arrives at the start. Throughput counts."""

    name: str = option("offline", "name of the scenario in records")
    expected_qps: float = option(
        1000.0, "sizes the one query for `min_duration_s`", gt=0, only_with={"min_duration_s": ()}
    )


@dataclass
class ServerConfig(LoadGenConfig):
    """MLPerf server: Poisson arrivals at a fixed mean rate; p99 counts, against `latency_limit_ms`."""

    name: str = option("server", "name of the scenario in records")
    target_qps: float = option(100.0, "mean arrival rate", gt=0)
    stop_hopeless: bool = option(
        False, "end the cell once the engine was never as fast as the arrivals: status STOPPED, and no latencies"
    )


@dataclass
class SingleStreamConfig(LoadGenConfig):
    """MLPerf single stream: the next request is sent when the last is answered. Latency counts."""

    name: str = option("single_stream", "name of the scenario in records")
    max_batch: int = option(1, "most requests of a batch: one arrives at a time", ge=1, le=65536)


@dataclass
class MultiStreamConfig(LoadGenConfig):
    """MLPerf multi stream: queries of several requests each, one query at a time.

    `queries` counts requests. MLPerf's rules need at least 662 queries.
    """

    name: str = option("multi_stream", "name of the scenario in records")
    samples_per_query: int = option(8, "requests of a query", ge=1, le=65536)


@dataclass
class TraceReplayConfig(ScenarioConfig):
    """Requests arrive at the trace's own times, all intervals scaled by one factor."""

    name: str = option("trace_replay", "name of the scenario in records")
    mean_qps: float | None = option(None, "mean rate to scale to; null: the trace's own clock", gt=0)


@dataclass
class ClosedLoopConfig(ScenarioConfig):
    """Clients that each send their next request when their last is answered."""

    name: str = option("closed_loop", "name of the scenario in records")
    clients: int = option(16, "clients", ge=1, le=1_000_000)


def is_accuracy(config: ScenarioConfig) -> bool:
    """Return whether LoadGen runs in its accuracy mode."""
    return isinstance(config, LoadGenConfig) and config.mode == "accuracy"


def issuer_waits(config: ScenarioConfig) -> bool:
    """Return whether the load generator sends nothing while a batch is under way."""
    if isinstance(config, MultiStreamConfig):
        return config.in_flight < 2 or config.samples_per_query <= config.max_batch
    return isinstance(config, SingleStreamConfig)


def largest_batch(config: ScenarioConfig) -> int:
    """Return the most requests of a batch that an engine is prepared for: `max_batch`, or all that are issued.

    Where fewer can wait together, as with one client, quality is still measured in batches of `max_batch`.
    """
    return min(config.max_batch, issued(config) or config.max_batch)


def issued(config: ScenarioConfig) -> int | None:
    """Return the number of requests that a scenario issues; None for all, or where its shortest duration decides."""
    if is_accuracy(config):
        return None
    if isinstance(config, OfflineConfig):  # LoadGen issues one query, of a size that it computes so
        seconds = int(config.min_duration_s * 1000) / 1000
        return max(config.queries, int(1.1 * seconds * config.expected_qps))
    if isinstance(config, LoadGenConfig) and config.min_duration_s:
        return None
    query = config.samples_per_query if isinstance(config, MultiStreamConfig) else 1
    return -(-config.queries // query) * query
