"""MLPerf's four scenarios, driven by MLPerf LoadGen.

LoadGen decides *when* a request is issued, and the trace decides *which*: the k-th request issued is the trace's k-th,
so that users return in their real order. A trace that ends begins again.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from time import perf_counter

import mlperf_loadgen as lg

from grbench.execution.stats import PERCENTILES, SAMPLES_NEEDED
from grbench.scenarios.batcher import Driven, RequestAt, Start, Ticket
from grbench.scenarios.config import (
    LoadGenConfig,
    MultiStreamConfig,
    OfflineConfig,
    ServerConfig,
    SingleStreamConfig,
)

_SUMMARY = "mlperf_log_summary.txt"


def run(
    config: LoadGenConfig,
    start: Start,
    request_at: RequestAt,
    latency_limit_ms: float,
    seed: int,
    folder: Path,
) -> Driven:
    """Run one LoadGen test to its end.

    folder: for LoadGen's logs. Returns the request loop with LoadGen's own figures and notes. Raises what the engine
    raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batcher = start(lambda tickets: lg.QuerySamplesComplete([lg.QuerySampleResponse(t.key, 0, 0) for t in tickets]))
    issued = 0

    def issue(samples: list[lg.QuerySample]) -> None:
        nonlocal issued
        now = perf_counter()
        first, issued = issued, issued + len(samples)
        batcher.submit(Ticket(request_at(first + i), now, sample.id) for i, sample in enumerate(samples))

    sut = lg.ConstructSUT(issue, lambda: None)
    qsl = lg.ConstructQSL(1024, 1024, lambda samples: None, lambda samples: None)  # the trace is in memory already

    def test() -> None:
        lg.StartTestWithLogSettings(sut, qsl, _settings(config, latency_limit_ms, seed), _logs(folder))
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)
        batcher.stopped.set()

    # LoadGen has a thread of its own: it would wait for ever for the answers of an engine that fails.
    loadgen = threading.Thread(target=test, name="loadgen", daemon=True)
    loadgen.start()
    batcher.stopped.wait()
    if batcher.failure is None:
        loadgen.join()
    batcher.close()
    return Driven(batcher, *_figures(folder / _SUMMARY, _queries(config)))


def _queries(config: LoadGenConfig) -> int:
    """Return the number of LoadGen's queries. In multi stream each has several requests."""
    return -(-config.queries // config.samples_per_query) if isinstance(config, MultiStreamConfig) else config.queries


def _settings(config: LoadGenConfig, latency_limit_ms: float, seed: int) -> lg.TestSettings:
    s = lg.TestSettings()
    s.mode = lg.TestMode.PerformanceOnly
    s.min_query_count = _queries(config)
    s.max_query_count = 0 if config.min_duration_s else s.min_query_count  # 0: no upper bound, the duration decides
    s.min_duration_ms = int(config.min_duration_s * 1000)
    s.qsl_rng_seed, s.sample_index_rng_seed, s.schedule_rng_seed = seed + 1, seed + 2, seed + 3
    limit_ns = int(latency_limit_ms * 1e6)
    match config:
        case OfflineConfig():
            s.scenario = lg.TestScenario.Offline
            s.offline_expected_qps = config.expected_qps
        case ServerConfig():
            s.scenario = lg.TestScenario.Server
            s.server_target_qps = config.target_qps
            s.server_target_latency_ns = limit_ns
            s.server_target_latency_percentile = 0.99
        case SingleStreamConfig():
            s.scenario = lg.TestScenario.SingleStream
        case MultiStreamConfig():
            s.scenario = lg.TestScenario.MultiStream
            s.multi_stream_samples_per_query = config.samples_per_query
        case _:
            raise TypeError(f"not a LoadGen scenario: {type(config).__name__}")
    return s


def _logs(folder: Path) -> lg.LogSettings:
    settings = lg.LogSettings()
    settings.log_output.outdir = str(folder)
    settings.log_output.copy_summary_to_stdout = False
    settings.enable_trace = False
    return settings


def _figures(summary: Path, queries: int) -> tuple[dict[str, float], list[str]]:
    """Return LoadGen's own percentiles, as a check on ours, and a note with its reasons if the run is INVALID.

    In multi stream the percentiles are of queries, not of requests. They need as many samples as ours.
    """
    text = summary.read_text()
    metrics = {}
    for percent, ns in re.findall(r"^(\d+\.\d+) percentile latency \(ns\)\s*:\s*(\d+)", text, re.MULTILINE):
        if float(percent) in PERCENTILES and queries >= SAMPLES_NEEDED.get(float(percent), 1):
            metrics[f"loadgen_latency_ms/p{float(percent):g}"] = int(ns) / 1e6
    valid = re.search(r"^Result is : VALID", text, re.MULTILINE) is not None
    metrics["loadgen_valid"] = float(valid)
    if valid:
        return metrics, []
    reasons = re.findall(r"^ \* (.*(?:\n [^*\s].*)*)", text, re.MULTILINE)  # a reason may span lines
    words = " ".join(" ".join(reasons).split())
    return metrics, [f"LoadGen calls this run INVALID by MLPerf's rules: {words}"]
