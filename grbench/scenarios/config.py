"""Options of the scenarios: how requests arrive. MLPerf's four run through LoadGen."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class ScenarioConfig:
    """Dynamic batching, for every scenario. A batch closes when it is full or its oldest request has waited enough."""

    name: str = "???"
    max_batch: int = option(8, ge=1, le=65536)
    max_wait_ms: float = option(0.0, ge=0, le=60_000)  # 0: a batch closes at once
    queries: int = option(1024, ge=1)  # at least this many requests are answered
    in_flight: int = option(1, ge=1, le=16)  # batches at the same time; one behind another begins once it is full


@dataclass
class LoadGenConfig(ScenarioConfig):
    """Options that MLPerf's scenarios share."""

    min_duration_s: float = option(0.0, ge=0)  # and for at least this long


@dataclass
class OfflineConfig(LoadGenConfig):
    """MLPerf offline: every request arrives at the start. Throughput counts."""

    expected_qps: float = option(1000.0, gt=0)  # sizes the one big query when min_duration_s is set


@dataclass
class ServerConfig(LoadGenConfig):
    """MLPerf server: Poisson arrivals at a fixed mean rate. p99 counts, against latency_limit_ms."""

    target_qps: float = option(100.0, gt=0)


@dataclass
class SingleStreamConfig(LoadGenConfig):
    """MLPerf single stream: the next request is sent when the last is answered. Latency counts."""


@dataclass
class MultiStreamConfig(LoadGenConfig):
    """MLPerf multi stream: queries of several requests each, one query at a time. `queries` counts requests."""

    samples_per_query: int = option(8, ge=1, le=65536)


@dataclass
class TraceReplayConfig(ScenarioConfig):
    """Requests arrive at the trace's own times. One factor scales all intervals to reach a mean rate."""

    mean_qps: float | None = option(None, gt=0)  # null: the trace's own clock, unscaled


@dataclass
class ClosedLoopConfig(ScenarioConfig):
    """N clients: each sends its next request as soon as its last is answered."""

    clients: int = option(16, ge=1, le=1_000_000)
