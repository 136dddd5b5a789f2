"""Scenarios against an engine whose behaviour is known, through the real LoadGen."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from helpers.forks import run_program
from helpers.gated import run_cell
from helpers.sleepy_engine import SleepyEngine, drive, make_requests

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.execution.cell import Cell
from grbench.execution.measure import _beside_loadgen as beside_loadgen
from grbench.execution.records import PARTS, Outcome, Status
from grbench.execution.worker import classify
from grbench.gate.measured import MeasuredAnswers
from grbench.scenarios import Measurement, loadgen, run_scenario
from grbench.scenarios.batcher import Batcher, ContinuousBatcher, Ticket, unwatched
from grbench.scenarios.config import (
    ClosedLoopConfig,
    MultiStreamConfig,
    OfflineConfig,
    ScenarioConfig,
    ServerConfig,
    SingleStreamConfig,
    TraceReplayConfig,
)
from grbench.scenarios.direct import schedule
from grbench.workloads.trace import Requests
from grengines import registry
from grengines.api import Engine, Finished, RankResult, Request
from grengines.last_layer import WHOLE

SCENARIOS = [
    OfflineConfig("offline", max_batch=16, queries=300),
    ServerConfig("server", max_batch=16, queries=300, target_qps=600),
    SingleStreamConfig("single_stream", max_batch=1, queries=150),
    MultiStreamConfig("multi_stream", max_batch=8, queries=160, samples_per_query=8),
    TraceReplayConfig("trace_replay", max_batch=8, queries=150, mean_qps=500),
    ClosedLoopConfig("closed_loop", max_batch=8, queries=150, clients=8),
]


@pytest.mark.parametrize("largest, prepared", [(65536, 64), (16, 16)])
def test_an_engine_is_prepared_for_no_more_requests_than_are_issued(
    tmp_path: Path, largest: int, prepared: int
) -> None:
    few = ["scenario=offline", f"scenario.max_batch={largest}", "scenario.queries=64", "warmup_batches=1"]
    outcome = run_cell(tmp_path, ["engine=hstu", "model.layers=1", "kernel=torch", "gate.requests=2", *few])
    assert outcome.metrics["batch_size/prepared"] == prepared >= outcome.metrics["batch_size/mean"]


def assert_parts_sum_to_the_latency(m: Measurement) -> None:
    """A pause of the machine between two parts is in none of them, so a few requests may lack more."""
    rest = m.samples["latency_ms"] - sum(m.samples[part] for part in PARTS)
    assert (rest > -0.01).all()
    assert np.median(rest / m.samples["latency_ms"]) < 0.1


@pytest.mark.serial
@pytest.mark.parametrize("config", SCENARIOS, ids=lambda c: c.name)
def test_every_request_is_answered_in_trace_order_and_timed(config: ScenarioConfig, tmp_path: Path) -> None:
    engine = SleepyEngine()
    m = drive(config, engine, tmp_path)
    served = [i for batch in engine.batches for i in batch]
    assert len(served) == config.queries
    assert served == [k % 100 for k in range(config.queries)]
    assert list(m.samples["request_id"]) == served
    assert max(map(len, engine.batches)) <= config.max_batch
    assert (m.samples["compute_ms"] >= 0.7).all()
    assert_parts_sum_to_the_latency(m)
    assert m.tokens == 3 * config.queries
    assert m.padded_tokens == 4 * config.queries
    assert any("times over" in note for note in m.notes)


@pytest.mark.serial
@pytest.mark.parametrize(
    "config",
    [
        ServerConfig("server", max_batch=4, queries=1200, target_qps=400),
        SingleStreamConfig("single_stream", max_batch=1, queries=300),
        MultiStreamConfig("multi_stream", max_batch=4, queries=1600, samples_per_query=8),
    ],
    ids=lambda c: c.name,
)
def test_loadgens_own_percentiles_agree_with_ours(config: ScenarioConfig, tmp_path: Path) -> None:
    m = drive(config, SleepyEngine(0.002), tmp_path)
    assert m.metrics["loadgen_latency_ms/p50"] > 2
    assert beside_loadgen(m.samples, m.metrics) == []
    late = {**m.samples, "latency_ms": m.samples["latency_ms"] * 0.5}
    notes = beside_loadgen(late, m.metrics)  # not always of p50: on a busy machine its interval is wide
    assert notes and all(note.startswith("LoadGen's own p") for note in notes)
    assert (tmp_path / "mlperf_log_summary.txt").exists()


def test_a_percentile_without_an_interval_is_set_beside_loadgens_without_one() -> None:
    """300 samples that drift are worth few: they have no interval of p90."""
    samples = {"arrival_s": np.arange(300.0), "latency_ms": np.linspace(10, 20, 300)}
    [note] = beside_loadgen(samples, {"loadgen_latency_ms/p90": 40.0})
    assert note.startswith("LoadGen's own p90 is 40 ms, grbench's 19 ms: requests waited")


STALL_S = 1.0
PR_GET_TIMERSLACK = 30  # of Linux's prctl


@pytest.mark.serial
@pytest.mark.parametrize(
    "config",
    [
        ServerConfig("server", max_batch=16, queries=1000, target_qps=250),
        TraceReplayConfig("trace_replay", max_batch=16, queries=1000, mean_qps=250),
    ],
    ids=lambda c: c.name,
)
def test_a_stall_shows_in_every_request_that_it_delays(config: ScenarioConfig, tmp_path: Path) -> None:
    """A stopped process delays all that was due meanwhile, although nothing of it could be handed over."""
    stalls = f"""
import os, subprocess
from pathlib import Path
import numpy as np
from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.execution.measure import _beside_loadgen
from grbench.scenarios.config import *
from helpers.sleepy_engine import SleepyEngine, drive
class Stopped(SleepyEngine):
    stop = f"kill -STOP {{os.getpid()}}; sleep {STALL_S}; kill -CONT {{os.getpid()}}"
    def rank(self, requests):
        if self.stop and requests[0].request_id >= 300:
            subprocess.Popen(["sh", "-c", self.stop])
            self.stop = ""
        return super().rank(requests)
m = drive({config!r}, Stopped(0.001), Path({str(tmp_path)!r}), requests=1000)
np.savez({str(tmp_path / "samples.npz")!r}, **m.samples)
print(_beside_loadgen(m.samples, m.metrics), m.metrics)
"""
    done = run_program(stalls, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] "), done.stdout  # LoadGen sees the same
    samples = np.load(tmp_path / "samples.npz")
    late = samples["latency_ms"] > 100
    assert 0.7 * STALL_S < late.sum() / 250 < 2.5 * STALL_S  # those of the stall but for its last 100 ms, of 4 s
    assert np.percentile(samples["latency_ms"], 99) > 900 * STALL_S
    assert np.diff(np.sort(samples["arrival_s"])).max() < 0.1


@pytest.mark.serial
@pytest.mark.parametrize("moved_s, in_single_stream", [(-3600, False), (3600, False), (3600, True), (0, False)])
def test_a_clock_that_is_set_ends_the_scenario_at_once(moved_s: int, in_single_stream: bool, tmp_path: Path) -> None:
    """In a process of its own, because LoadGen is left behind. It sees the real clock and would go on for a minute.

    The clock is set after ten batches.
    """
    config: ScenarioConfig = ServerConfig("server", queries=6000 if moved_s else 200, target_qps=100)
    if in_single_stream:
        config = SingleStreamConfig("single_stream", queries=600)
    code = f"""
import os, threading, time
from pathlib import Path
from grbench.execution import clock
from grbench.scenarios.config import ServerConfig, SingleStreamConfig
from helpers.sleepy_engine import SleepyEngine, drive
class Watched(SleepyEngine):
    inside = answers = 0
    def rank(self, requests):
        self.inside += 1
        self.answers += 1
        try:
            return super().rank(requests)
        finally:
            self.inside -= 1
engine = Watched({0.1 if in_single_stream else 0.001})
real = time.time
time.time = lambda: real() + ({moved_s} if engine.answers > 10 else 0)
try:
    drive({config!r}, engine, Path({str(tmp_path)!r}))
except clock.ClockMovedError as e:
    print("raised:", e, flush=True)
    if engine.inside or any(thread.name == "batcher" for thread in threading.enumerate()):
        print("still in the engine")  # which is about to be closed
os._exit(0)
"""
    done = run_program(code, tmp_path, timeout=50)
    moved = f"raised: the machine's clock moved by {moved_s:+.2f} s while LoadGen timed requests by it\n"
    assert done.stdout == (moved if moved_s else ""), done.stderr


def test_the_schedule_is_loadgens_own(tmp_path: Path) -> None:
    drive(ServerConfig("server", max_batch=16, queries=300, target_qps=2000), SleepyEngine(), tmp_path)
    log = tmp_path / "mlperf_log_detail.txt"
    loadgen._check_schedule(log, 3 + 3, 2000)  # drive's seed, as run() sets LoadGen's
    for seed, rate in ((7, 2000), (6, 1999)):
        with pytest.raises(RuntimeError, match="scheduled 300 queries within"):
            loadgen._check_schedule(log, seed, rate)


def test_a_log_that_a_full_disk_cut_short_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "mlperf_log_detail.txt"
    log.write_text(':::MLLOG {"key": "generated_query_count", "value": 300, "ti')
    with pytest.raises(RuntimeError, match=r"wrote no schedule into .*; install a version"):
        loadgen._check_schedule(log, 6, 2000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="could not write the whole of its log") as full:
        loadgen._check_schedule(log, 6, 2000)
    assert classify(full.value)[0] is Status.DISK_FULL


@pytest.mark.serial
def test_server_rate_and_batching_follow_the_load(tmp_path: Path) -> None:
    engine = SleepyEngine(0.01)  # 100 batches/s: 400 requests/s need batches of 4 and more
    m = drive(ServerConfig("server", max_batch=32, queries=400, target_qps=400), engine, tmp_path)
    rate = 400 / m.samples["arrival_s"].max()
    assert rate == pytest.approx(400, rel=0.25)
    assert 3 < np.mean([len(b) for b in engine.batches]) < 24  # a busy machine answers fewer batches in a second


def test_a_run_that_misses_the_limit_is_called_invalid(tmp_path: Path) -> None:
    m = drive(ServerConfig("server", max_batch=1, queries=200, target_qps=400), SleepyEngine(0.01), tmp_path)
    assert m.metrics["loadgen_valid"] == 0.0
    assert any("INVALID" in note for note in m.notes)


@pytest.mark.serial
def test_replay_counts_latency_from_the_scheduled_arrival(tmp_path: Path) -> None:
    # 100 requests/s against 50 answers/s: the backlog grows by 10 ms a request, and must show.
    config = TraceReplayConfig("trace_replay", max_batch=1, queries=60, mean_qps=100)
    m = drive(config, SleepyEngine(0.02), tmp_path)
    assert m.samples["latency_ms"][-1] > 400
    assert np.diff(m.samples["arrival_s"]) == pytest.approx(0.01, abs=1e-4)
    assert m.metrics["replay_speedup"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "arrivals", [[0, 100, 150, 175, 180, 181, 182, 182], [0, 5], [0, 0, 0, 9]], ids=["speeds up", "short", "tied"]
)
@pytest.mark.parametrize("queries", [2, 4, 8, 50])
def test_the_requests_that_are_replayed_have_the_rate_asked_for(arrivals: list[float], queries: int) -> None:
    config = TraceReplayConfig("trace_replay", queries=queries, mean_qps=200)
    if sum(arrivals[:queries]) == 0:  # two of the tied ones
        with pytest.raises(ValueError, match="first 2 requests of the trace arrive at one instant"):
            schedule(config, arrivals)
        return
    due, speedup = schedule(config, arrivals)
    assert len(due) == queries
    assert due[0] == 0
    assert (np.diff(due) >= 0).all()
    assert np.diff(due).mean() == pytest.approx(1 / 200)
    some = min(queries, len(arrivals))
    assert due[:some] * speedup == pytest.approx(np.array(arrivals[:some]))


def test_a_trace_of_one_instant_has_no_rate() -> None:
    config = TraceReplayConfig("trace_replay", queries=16, mean_qps=100)
    for arrivals in ([0.0], [0.0] * 20):
        with pytest.raises(
            ValueError, match=r"scenario\.mean_qps=100: .* no times to scale; set scenario\.mean_qps=null"
        ):
            schedule(config, arrivals)
    assert schedule(dataclasses.replace(config, mean_qps=None), [0.0] * 20)[0].tolist() == [0.0] * 16


TIMED = OfflineConfig("offline for 50 ms", max_batch=16, queries=20, min_duration_s=0.05, expected_qps=1000)
MADE = {"multi_stream": 56, TIMED.name: 55}  # requests where they are not 50


@pytest.mark.parametrize(
    "config", [*(dataclasses.replace(c, queries=50) for c in SCENARIOS), TIMED], ids=lambda c: c.name
)
def test_no_request_is_made_while_latencies_are_taken(
    config: ScenarioConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace is longer than what is issued.

    Multi stream issues 56: whole queries of 8. Offline for 50 ms issues 55: a tenth more than it expects to answer.
    """
    words = ["workload=synthetic", "workload.visits=200", "workload.users=20", "workload.items=300"]
    spec = dataclasses.replace(compose_spec([*words, "workload.max_history=16"])[0], task="rank", scenario=config)
    requests = workloads.build(spec.workload, 0, 80.0).requests
    made: list[int] = []
    make = Requests._make
    monkeypatch.setattr(Requests, "_make", lambda self, i: (made.append(i), make(self, i))[1])
    cell = Cell(spec, tmp_path, Outcome(actual={"device": "cpu"}), lambda message: None)
    cell._make(requests)
    ahead = list(made)
    m = cell._measure(SleepyEngine(), requests, cast(MeasuredAnswers, SimpleNamespace(watch=unwatched)))
    assert made == ahead
    assert sorted(m.samples["request_id"]) == ahead
    assert len(ahead) == MADE.get(config.name, 50)


@pytest.mark.serial
def test_closed_loop_keeps_its_clients_busy_and_no_more(tmp_path: Path) -> None:
    engine = SleepyEngine()
    drive(ClosedLoopConfig("closed_loop", max_batch=64, queries=100, clients=5), engine, tmp_path)
    assert max(map(len, engine.batches)) == 5


@pytest.mark.parametrize("largest, wait_s, sizes", [(8, 0.0, [1, 1, 1, 1]), (8, 0.05, [1, 1, 1, 1]), (4, 600.0, [4])])
def test_a_batch_waits_for_company_only_as_long_as_allowed(largest: int, wait_s: float, sizes: list[int]) -> None:
    """Requests of a batch that is to be alone come one after the other's answer."""
    engine, answered = SleepyEngine(0.0), threading.Semaphore(0)
    batcher = Batcher(engine.rank, largest, wait_s, lambda tickets: [answered.release() for _ in tickets] and None)
    alone = len(sizes) > 1
    for request in make_requests(4):
        batcher.submit([Ticket(request, time.perf_counter())])
        assert not alone or answered.acquire(timeout=60)
    assert alone or all(answered.acquire(timeout=60) for _ in range(4))
    batcher.close()
    assert list(map(len, engine.batches)) == sizes
    assert not alone or (batcher.samples()["queue_ms"] >= wait_s * 1e3).all()


class ThreadedEngine(SleepyEngine):
    """Engine that remembers the threads on which it answers, and how late their timed waits may end."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.threads: set[str] = set()
        self.slacks_ns: set[int] = set()

    def rank(self, requests: Sequence[Request]) -> RankResult:
        self.threads.add(threading.current_thread().name)
        self.slacks_ns.add(ctypes.CDLL(None).prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0))
        return super().rank(requests)


@pytest.mark.parametrize(
    "config, answers",
    [
        (SCENARIOS[1], "batcher"),
        (SCENARIOS[2], "loadgen"),
        (SCENARIOS[3], "loadgen"),
        (dataclasses.replace(SCENARIOS[3], max_batch=4), "loadgen"),
        (dataclasses.replace(SCENARIOS[3], in_flight=2), "loadgen"),  # a query is one batch
        (dataclasses.replace(SCENARIOS[3], max_batch=4, in_flight=2), "batcher"),
        (SCENARIOS[5], "batcher"),
    ],
    ids=str,
)
def test_the_thread_that_waits_for_the_answers_gives_them(config: ScenarioConfig, answers: str, tmp_path: Path) -> None:
    engine = ThreadedEngine()
    drive(config, engine, tmp_path)
    assert engine.threads == {answers}
    assert engine.slacks_ns == {1}  # by default it is 50000


def test_a_batch_of_the_callers_thread_waits_for_company_as_well(tmp_path: Path) -> None:
    m = drive(SingleStreamConfig("single_stream", max_batch=2, max_wait_ms=5, queries=20), SleepyEngine(), tmp_path)
    assert (m.samples["queue_ms"] >= 5).all() and (m.samples["batch_size"] == 1).all()


@pytest.mark.parametrize("config", SCENARIOS, ids=lambda c: c.name)
def test_a_failing_engine_ends_the_scenario_at_once(config: ScenarioConfig, tmp_path: Path) -> None:
    # In a process of its own: LoadGen is left waiting for answers, as it is when a worker fails.
    code = f"""
import os, sys
from pathlib import Path
from grbench.scenarios.config import *
from helpers.sleepy_engine import SleepyEngine, drive
try:
    drive({config!r}, SleepyEngine(fail_at=3), Path({str(tmp_path)!r}))
except RuntimeError as e:
    print("raised:", e, flush=True)
os._exit(0)
"""
    done = run_program(code, tmp_path)
    assert done.stdout == "raised: the device fell off the bus\n", done.stderr


@pytest.mark.parametrize("fault", ["in LoadGen", "in a request"])
def test_an_error_on_the_thread_of_loadgen_ends_the_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    issue = []
    monkeypatch.setattr(loadgen.lg, "ConstructSUT", lambda given, flush: issue.append(given))

    def start(*args: object) -> None:
        if fault == "in LoadGen":
            raise RuntimeError(fault)
        issue[0]([loadgen.lg.QuerySample(0, 0)])
        time.sleep(60)  # LoadGen waits for the answer

    def broken(k: int) -> Request:
        raise RuntimeError(fault)

    monkeypatch.setattr(loadgen.lg, "StartTestWithLogSettings", start)
    begin = lambda answered: Batcher(SleepyEngine().rank, 1, 0.0, answered)  # noqa: E731
    with pytest.raises(RuntimeError, match=fault):
        loadgen.run(SCENARIOS[0], begin, broken, 80.0, 0, tmp_path)


class SteppingEngine(SleepyEngine):
    """Engine that batches by itself. A request ends after two steps; `fault` is called in the third step."""

    def __init__(self, fault: Callable[[], None]) -> None:
        super().__init__()
        self.fault, self.steps = fault, 0
        self.left: dict[int, int] = {}  # steps of each request

    @property
    def unfinished(self) -> int:
        return len(self.left)

    def admit(self, key: int, request: Request) -> None:
        self.left[key] = 2

    def step(self) -> list[Finished]:
        self.steps += 1
        if self.steps == 3:
            self.fault()
        self.left = {key: steps - 1 for key, steps in self.left.items()}
        ended = [key for key, steps in self.left.items() if not steps]
        self.left = {key: steps for key, steps in self.left.items() if steps}
        return [Finished(key, np.zeros(1, np.int64), np.zeros(1, np.float32), tokens=1) for key in ended]


def test_no_step_begins_after_a_thread_of_the_scenario_has_raised() -> None:
    engine = SteppingEngine(lambda: batcher.fail(RuntimeError("no more requests")))
    batcher = ContinuousBatcher(engine, 1, lambda tickets: None)
    batcher.submit([Ticket(r, time.perf_counter()) for r in make_requests(20)])
    with pytest.raises(RuntimeError, match="no more requests"):
        batcher.close()
    assert engine.steps == 3


class QueueingEngine(SleepyEngine):
    """Engine with one batch at a time on the device, which packs a batch while the one before computes."""

    def __init__(self, packing_s: float, seconds: float, fail_at: int | None = None) -> None:
        super().__init__(seconds, fail_at)
        self.packing_s = packing_s
        self._packing, self._device = threading.Lock(), threading.Lock()
        self.most = self._under_way = 0

    def rank(self, requests: Sequence[Request]) -> RankResult:
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        begun = time.perf_counter()
        with self._packing:
            time.sleep(self.packing_s)
            self._device.acquire()
        waited_ms = (time.perf_counter() - begun - self.packing_s) * 1e3
        try:
            result = super().rank(requests)
            result.batch_ms += self.packing_s * 1e3
            result.wait_ms = waited_ms
            return result
        finally:
            self._device.release()
            self._under_way -= 1


@pytest.mark.parametrize("config", SCENARIOS, ids=lambda c: c.name)
def test_batches_in_flight_answer_every_request_once(config: ScenarioConfig, tmp_path: Path) -> None:
    engine = QueueingEngine(0.0005, 0.001)
    m = drive(dataclasses.replace(config, in_flight=3), engine, tmp_path)
    served = sorted(i for batch in engine.batches for i in batch)
    assert served == sorted(k % 100 for k in range(config.queries))
    assert sorted(m.samples["request_id"]) == served
    assert m.tokens == 3 * config.queries
    assert m.batch_mean * len(engine.batches) == pytest.approx(config.queries)
    assert engine.most <= 3
    assert_parts_sum_to_the_latency(m)


@pytest.mark.serial
@pytest.mark.parametrize("config", SCENARIOS, ids=lambda c: c.name)
def test_parts_of_a_real_engine_sum_to_the_latency(
    config: ScenarioConfig, tmp_path: Path, ranking: tuple[Engine, list[Request]]
) -> None:
    """With several batches in flight most of the latency is a wait for the engine's lock, which is queue."""
    engine, requests = ranking
    config = dataclasses.replace(config, in_flight=4)
    m = run_scenario(config, engine, requests, latency_limit_ms=80, seed=3, folder=tmp_path)
    assert_parts_sum_to_the_latency(m)


@pytest.fixture(scope="module")
def ranking() -> Iterator[tuple[Engine, list[Request]]]:
    """A native engine and requests for it."""
    spec, _ = compose_spec(["engine=hstu", "engine.device=cpu", "workload=synthetic", "workload.max_requests=100"])
    trace = workloads.build(spec.workload, 0, 80.0)
    engine = registry.build(spec.engine, spec.model, spec.kernel, trace.catalogue, 0)
    engine.prepare(trace.requests, 16)
    yield engine, trace.requests
    engine.close()


class BesideEngine(SleepyEngine):
    """Engine whose batches, but for the last one, stay on the device until the next one is being packed."""

    def __init__(self, batches: int) -> None:
        super().__init__(0.0)
        self._left, self._packed = batches, threading.Semaphore(0)
        self._packing, self._device = threading.Lock(), threading.Lock()

    def rank(self, requests: Sequence[Request]) -> RankResult:
        with self._packing:
            self._packed.release()
            self._device.acquire()
        try:
            self._left -= 1
            assert self._packed.acquire(timeout=60)  # its own
            if self._left:
                assert self._packed.acquire(timeout=60), "the next batch is not packed meanwhile"
                self._packed.release()
            return super().rank(requests)
        finally:
            self._device.release()


def test_packing_goes_on_beside_the_device(tmp_path: Path) -> None:
    engine = BesideEngine(20)
    drive(OfflineConfig("offline", max_batch=8, queries=160, in_flight=2), engine, tmp_path)
    assert len(engine.batches) == 20


def test_a_batch_behind_another_begins_only_when_it_is_full() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    sizes: list[int] = []

    def answer(requests: Sequence[Request]) -> RankResult:
        sizes.append(len(requests))
        begun.release()
        assert go_on.acquire(timeout=60)
        return SleepyEngine(0.0).rank(requests)

    batcher = Batcher(answer, 4, 0.0, lambda tickets: None, in_flight=2)
    tickets = [Ticket(request, time.perf_counter()) for request in make_requests(10)]
    batcher.submit(tickets[:1])
    assert begun.acquire(timeout=60)
    batcher.submit(tickets[1:4])
    assert not begun.acquire(timeout=0.1)  # three wait for the device, or for a fourth
    batcher.submit(tickets[4:6])
    assert begun.acquire(timeout=60)  # four of the five
    go_on.release()
    go_on.release()
    assert begun.acquire(timeout=60)  # nothing is under way: the last one need not wait
    go_on.release()
    batcher.submit(tickets[6:])
    for _ in range(2):
        go_on.release()
    batcher.close()
    assert sizes[:3] == [1, 4, 1]
    assert sum(sizes) == 10


def test_batches_that_computed_every_row_of_the_last_layer_are_known() -> None:
    def answer(requests: Sequence[Request]) -> RankResult:
        result = SleepyEngine(0.0).rank(requests)
        result.details = {WHOLE: 1.0} if len(requests) == 1 else {}
        return result

    batcher = Batcher(answer, 2, 0.0, lambda tickets: None)
    batcher.submit(Ticket(request, time.perf_counter()) for request in make_requests(5))
    batcher.close()
    assert batcher.whole == {2} and batcher.details == {WHOLE: 1.0}  # batches of 2, 2 and 1
    batcher.take_rows()
    assert not batcher.whole  # a server goes on for long


def test_one_of_two_batches_fails() -> None:
    requests = make_requests(40)
    batcher = Batcher(QueueingEngine(0.0, 0.01, fail_at=2).rank, 4, 0.0, lambda tickets: None, in_flight=2)
    batcher.submit([Ticket(r, time.perf_counter()) for r in requests])
    assert batcher.stopped.wait(60)
    with pytest.raises(RuntimeError, match="fell off the bus"):
        batcher.close()
    assert batcher.batches <= 3
