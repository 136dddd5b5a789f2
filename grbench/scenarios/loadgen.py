"""MLPerf's four scenarios, driven by MLPerf LoadGen.

LoadGen decides *when* a request is issued, and the trace decides *which*: the k-th request issued is the trace's k-th,
so that users return in their real order. A trace that ends begins again. In accuracy mode LoadGen chooses both: each
request once, in its own order.

LoadGen's thread can be late: it waits for the interpreter, or the machine stops the process. In `server` the latency
counts from the time at which LoadGen scheduled the request, as LoadGen's own does. LoadGen does not pass that time on,
so `scheduled_s` draws it as LoadGen does, and `_check_schedule` compares it with LoadGen's log.
"""

from __future__ import annotations

import errno
import itertools
import math
import re
import threading
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import mlperf_loadgen as lg
import numpy as np

from grbench.execution.clock import ClockMovedError, WallClock
from grbench.execution.records import full
from grbench.execution.stats import PERCENTILES, SAMPLES_NEEDED
from grbench.scenarios.accuracy import AccuracyRun
from grbench.scenarios.batcher import Batcher, Driven, RequestAt, RequestLoop, Start, Ticket
from grbench.scenarios.config import (
    LoadGenConfig,
    MultiStreamConfig,
    OfflineConfig,
    ServerConfig,
    SingleStreamConfig,
)
from grbench.scenarios.growth import PERIOD_S, Growth, HopelessError

CHECK_CLOCK_S = 0.5
_SUMMARY, _DETAIL = "mlperf_log_summary.txt", "mlperf_log_detail.txt"


def run(
    config: LoadGenConfig,
    start: Start,
    request_at: RequestAt,
    latency_limit_ms: float,
    seed: int,
    folder: Path,
    accuracy: AccuracyRun | None = None,
) -> Driven:
    """Run one LoadGen test to its end.

    folder: for LoadGen's logs. accuracy: the data set in accuracy mode. Returns the request loop with LoadGen's own
    figures and notes. Raises what the engine raised, ClockMovedError (after a step back LoadGen waits for as long,
    after one ahead it issues all at once), and HopelessError with `stop_hopeless`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    respond = accuracy.responses if accuracy else lambda tickets: _empty(ticket.key for ticket in tickets)
    batcher = start(lambda tickets: lg.QuerySamplesComplete(respond(tickets)))
    settings = _settings(config, latency_limit_ms, seed)
    due = scheduled_s(settings.schedule_rng_seed, config.target_qps) if isinstance(config, ServerConfig) else None
    issued, origin = 0, math.inf
    issuing, given_up = threading.Lock(), False

    def submit(samples: list[lg.QuerySample]) -> None:
        nonlocal issued, origin
        arrived = perf_counter()
        if due is not None:  # no request is issued before its time: the earliest one shows when the test began
            after = next(due)
            origin = min(origin, arrived - after)
            arrived = origin + after
        first, issued = issued, issued + len(samples)
        places = [sample.index for sample in samples] if accuracy else range(first, issued)
        batcher.submit(
            Ticket(request_at(place), arrived, sample.id) for place, sample in zip(places, samples, strict=True)
        )

    def issue(samples: list[lg.QuerySample]) -> None:
        try:
            with issuing:
                if not given_up:
                    submit(samples)
                    return
            lg.QuerySamplesComplete(_empty(sample.id for sample in samples))
        except BaseException as e:  # LoadGen calls this from C++, where it would end the process
            batcher.fail(e)

    sut = lg.ConstructSUT(issue, lambda: None)
    size = len(accuracy.requests) if accuracy else 1024
    qsl = lg.ConstructQSL(size, size, lambda samples: None, lambda samples: None)  # the trace is in memory already

    def test() -> None:
        try:
            lg.StartTestWithLogSettings(sut, qsl, settings, _logs(folder))
            lg.DestroyQSL(qsl)
            lg.DestroySUT(sut)
        except BaseException as e:
            batcher.fail(e)
        batcher.stopped.set()

    # LoadGen has a thread of its own: it would wait for ever for the answers of an engine that fails.
    loadgen = threading.Thread(target=test, name="loadgen", daemon=True)
    clock = WallClock()
    loadgen.start()
    growth = None
    if isinstance(config, ServerConfig) and config.stop_hopeless:
        growth = growth_of(config, latency_limit_ms)
    _watch(batcher, clock, growth)
    if batcher.failure is None:
        loadgen.join()

    def finish(limit_s: float) -> bool:
        nonlocal given_up
        with issuing:
            given_up = True
            waiting = batcher.waiting()
        lg.QuerySamplesComplete(_empty(ticket.key for ticket in waiting))
        loadgen.join(limit_s)
        return not loadgen.is_alive()

    with issuing:  # until LoadGen's thread has left the engine, where it answers requests itself
        pass
    try:
        batcher.close()
    except HopelessError as e:
        if batcher.later is not None:  # the engine's own error says more
            raise batcher.later from e
        if isinstance(batcher, Batcher):  # another one leaves requests in the engine
            e.finish = finish
        raise
    clock.check()
    if isinstance(config, ServerConfig):
        _check_schedule(folder / _DETAIL, settings.schedule_rng_seed, config.target_qps)
    return Driven(batcher, {}, []) if accuracy else Driven(batcher, *_figures(folder / _SUMMARY, _queries(config)))


def growth_of(config: ServerConfig, latency_limit_ms: float) -> Growth:
    """Return the test of whether the queue grows without end, for as many requests as the scenario will have."""
    requests = max(config.queries, math.ceil(config.min_duration_s * config.target_qps))
    return Growth(latency_limit_ms, requests, config.target_qps)


def _watch(loop: RequestLoop, clock: WallClock, growth: Growth | None) -> None:
    """Wait until the test has ended. The loop fails if the clock moves, or if the queue grows without end."""
    while not loop.stopped.wait(PERIOD_S if growth else CHECK_CLOCK_S):
        try:
            clock.check()
            if growth:
                growth.see(perf_counter(), loop.submitted, loop.answered)
        except (ClockMovedError, HopelessError) as e:  # `close` raises it, once no thread is in the engine any more
            loop.fail(e)


def _empty(keys: Iterable[int]) -> list[lg.QuerySampleResponse]:
    return [lg.QuerySampleResponse(key, 0, 0) for key in keys]


def scheduled_s(seed: int, rate: float) -> Iterator[float]:
    """Yield when LoadGen's server scenario schedules each query, in seconds from the start of the test.

    LoadGen takes std::exponential_distribution over std::mt19937, two words for a double (ScheduleDistribution in its
    loadgen.cc). NumPy's RandomState is the same generator, and its bytes are those words.
    """
    words, end_ns = np.random.RandomState(seed), 0.0
    yield 0.0
    while True:
        uniform = np.frombuffer(words.bytes(8 * 1024), "<u8") / 2.0**64
        ends_ns = end_ns + np.cumsum(np.trunc(-np.log(1.0 - uniform) / rate * 1e9))
        end_ns = ends_ns[-1]
        yield from (ends_ns / 1e9).tolist()


_ANOTHER = "install a version that pyproject.toml allows"


def _check_schedule(log: Path, seed: int, rate: float) -> None:
    """Raise RuntimeError where LoadGen's log has another schedule than `scheduled_s`, OSError if a full disk cut it."""
    values = re.findall(r'"generated_query_(count|duration)", "value": (\d+)', log.read_text())
    found = dict(reversed(values))  # the first of each
    if len(found) < 2 and full(log.parent):
        raise OSError(errno.ENOSPC, "LoadGen could not write the whole of its log", str(log))  # it says nothing itself
    if len(found) < 2:
        raise RuntimeError(f"LoadGen {version('mlcommons-loadgen')} wrote no schedule into {log}; {_ANOTHER}")
    count, duration_ns = int(found["count"]), int(found["duration"])
    ours_ns = next(itertools.islice(scheduled_s(seed, rate), count, None)) * 1e9
    if abs(ours_ns - duration_ns) > 1000 + count:  # a logarithm may be rounded another way
        raise RuntimeError(
            f"LoadGen {version('mlcommons-loadgen')} scheduled {count} queries within {duration_ns / 1e9} s, where "
            f"grbench expects {ours_ns / 1e9} s: latencies would count from wrong times; {_ANOTHER}"
        )


def _queries(config: LoadGenConfig) -> int:
    """Return the number of LoadGen's queries. In multi stream each has several requests."""
    return -(-config.queries // config.samples_per_query) if isinstance(config, MultiStreamConfig) else config.queries


def _settings(config: LoadGenConfig, latency_limit_ms: float, seed: int) -> lg.TestSettings:
    s = lg.TestSettings()
    s.mode = lg.TestMode.AccuracyOnly if config.mode == "accuracy" else lg.TestMode.PerformanceOnly
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
    `grbench.execution.measure` compares them.
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
