"""Models over ranks: answers of two processes with half of the heads each equal those of one process and the reference.

The ranks are processes with gloo on a CPU. Tests marked gpu run the same with NCCL, where there are two GPUs.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import forks
from helpers.hstu_oracle import make_requests
from helpers.replays import Replays
from helpers.serving import wait_until
from torch import Tensor

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.execution import engines
from grbench.execution.ranks import notes_of
from grbench.execution.records import Status
from grbench.execution.retrieval import build_retrieval
from grbench.execution.worker import classify
from grbench.gate import gate_for
from grengines.api import Catalogue, Request, Setup
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import HSTULayer
from grengines.numerics import IncorrectError
from grengines.runtime import graph_costs, team
from grengines.runtime.group import Group
from grkernels.choice import requested

CATALOGUE = Catalogue(num_users=30, num_items=400, num_actions=4)
MODEL = HSTUConfig(embedding_dim=32, layers=3, heads=4, qk_dim=16, v_dim=8, scaling_seqlen=128)
MODELS = {
    "own": MODEL,
    "norm by head": dataclasses.replace(MODEL, heads=2, group_norm=True),  # each rank has one head
    "nvidia": dataclasses.replace(MODEL, variant="nvidia"),
    "research": dataclasses.replace(MODEL, variant="research", time_bias=0),
}
CACHES = {"none": CacheConfig(), "lru": PagedCacheConfig(page=16, memory_gb=0.01, admit_visit=1)}
SMALL = [
    *("model=hstu_tiny", "model.heads=2", "workload=synthetic", "workload.max_requests=40", "workload.max_history=48"),
    *("workload.items=500", "workload.num_candidates=6", "retrieval.k=5", "retrieval.beam_width=12"),
    *("engine=hstu", "engine.tensor_parallel=2", "gate.measured=8"),
]
CELLS = {"rank": [], "cache": ["cache=lru", "cache.memory_gb=0.02"], "generate": ["task=generate"]}
CELLS["bias"] = [*CELLS["generate"], "model.position_bias=true"]
DECODER = ["engine=vllm", "model=decoder_tiny", "model.kv_heads=2"]


def on_two_gpus(*more: str) -> Any:
    """Return the parameters of a test with NCCL."""
    needed = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    return pytest.param("cuda", *more, marks=[pytest.mark.gpu, needed])


@pytest.fixture(autouse=True)
def ranks_are_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    if request.node.get_closest_marker("gpu") is None:  # a fork of a process that used CUDA can't use it
        forks.fork_ranks(monkeypatch)


def requests_of(count: int) -> list[Request]:
    rng = np.random.default_rng(3)
    made = make_requests(rng, CATALOGUE, list(rng.integers(20, 60, count)), [6] * count)
    return [dataclasses.replace(r, user_id=i) for i, r in enumerate(made)]


def started(ranks: int, model: HSTUConfig, cache: Any, sample: list[Request], **options: Any) -> HSTUEngine:
    config = HSTUEngineConfig(**{"device": "cpu", "precision": "fp32", "tensor_parallel": ranks, **options})
    engine = HSTUEngine(config, Setup(model, requested("torch"), CATALOGUE, 5, cache))
    engine.prepare(sample, 4)
    return engine


def scores(engine: HSTUEngine, requests: list[Request]) -> np.ndarray:
    return np.concatenate(engine.rank(requests).scores)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("model", "microbatch"), [*((model, 0) for model in MODELS), ("own", 4)])
def test_two_ranks_answer_as_one(model: str, cache: str, microbatch: int) -> None:
    """Sums of halves are rounded otherwise. The last visits find their keys and values in the pages of both ranks."""
    requests = requests_of(4)
    earlier = [r.with_events(slice(0, 15)) for r in requests]
    one, two = (
        started(ranks, MODELS[model], CACHES[cache], requests, candidate_microbatch=microbatch) for ranks in (1, 2)
    )
    for visit in (earlier, requests, requests[1:3]):
        expected = scores(one, visit)
        assert np.linalg.norm(scores(two, visit) - expected) < 1e-5 * np.linalg.norm(expected)
    if one.user_cache is not None and two.user_cache is not None:
        assert two.rank(requests).details["cache_hits"] == 4
        assert one.user_cache.states.pool.page_bytes == 2 * two.user_cache.states.pool.page_bytes
    facts = two.actual()
    assert (facts["tensor_parallel"], facts["parallel_backend"]) == (2, "gloo") and facts["rank_memory_mib"][0] > 0
    assert facts["parameters"] == one.actual()["parameters"]
    assert notes_of(one.actual()) == [] and "tensor_parallel=2 on a CPU only checks answers" in notes_of(facts)[0]
    assert notes_of({"retrieve": facts, "rank": one.actual()}) == notes_of(facts)
    one.close()
    two.close()


@pytest.mark.parametrize("cache", CACHES)
def test_graphs_of_two_ranks_answer_as_one(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay on the CPU batches that are padded as for graphs, on both ranks."""
    for module in ("hstu.engine", "hstu.cached", "runtime.shared_graphs"):
        monkeypatch.setattr(f"grengines.{module}.GraphRunner", Replays)
    for module in ("engine", "cached"):
        monkeypatch.setattr(f"grengines.hstu.{module}.capture", lambda asked, *rest: graph_costs.capture("true", *rest))
    requests = requests_of(4)
    one = started(1, MODEL, CACHES["none"], requests)
    two = started(2, MODEL, CACHES[cache], requests)
    for visit in ([r.with_events(slice(0, 15)) for r in requests], requests, requests[1:3]):
        expected, found = scores(one, visit), two.rank(visit)
        assert np.linalg.norm(np.concatenate(found.scores) - expected) < 1e-5 * np.linalg.norm(expected)
        assert found.details["graph_batches"] == 1.0
    one.close()
    two.close()


def gated(overrides: list[str], device: str) -> tuple[Any, Any]:
    """Return a prepared engine of two ranks and its gate."""
    spec = compose_spec([*SMALL, f"engine.device={device}", *overrides])[0]
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    retrieval = spec.retrieval and build_retrieval(spec.retrieval, spec.workload, trace.events, spec.seed)
    engine = engines.build(spec, trace.catalogue, retrieval)
    try:
        engine.prepare(trace.requests, 4)
        return engine, gate_for(spec, trace, retrieval, engine.actual())
    except BaseException:
        engine.close()
        raise


@pytest.mark.parametrize(("device", "graphs"), [("cpu", "auto"), on_two_gpus("false"), on_two_gpus("true")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_gate_passes(cell: str, precision: str, device: str, graphs: str) -> None:
    engine, gate = gated([*CELLS[cell], f"engine.precision={precision}", f"engine.cuda_graphs={graphs}"], device)
    assert engine.actual()["cuda_graphs"] == ("true" if graphs == "true" else "false")
    for _ in range(2):  # with a cache, the second time from pages
        result = gate.check(engine, 4).to_dict()
        assert result["passed"]
    if cell in ("generate", "bias") and precision == "fp32":
        assert result["overlap"] == 1.0
    engine.close()


def zeros(x: Tensor, before: list[Tensor]) -> Tensor:
    return x.zero_()


def of_an_earlier_batch(x: Tensor, before: list[Tensor]) -> Tensor:
    """Return what the rank sent for the same layer of the batch before; the model has two layers."""
    before.append(x.clone())
    if len(before) > 2:
        rows = min(len(x), len(before[-3]))
        x[:rows] = before[-3][:rows]
    return x


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("fault", [zeros, of_an_earlier_batch])
def test_a_wrong_rank_fails_the_gate(fault: Any, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Tensor] = []
    sum_ = Group.sum_
    monkeypatch.setattr(Group, "sum_", lambda self, x: sum_(self, fault(x, before) if self.rank else x))
    engine, gate = gated([*CELLS[cell], "engine.precision=fp32"], "cpu")
    with pytest.raises(IncorrectError):
        gate.check(engine, 4)
    engine.close()


def test_a_rank_with_the_heads_of_another_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Tensor.chunk
    monkeypatch.setattr(
        Tensor, "chunk", lambda self, n, dim=0: chunk(self, n, dim)[::-1] if dim else chunk(self, n, dim)
    )
    engine, gate = gated(["engine.precision=fp32"], "cpu")
    with pytest.raises(IncorrectError):
        gate.check(engine, 4)
    engine.close()


@pytest.mark.parametrize(("device", "graphs"), [("cpu", "auto"), on_two_gpus("false")])
@pytest.mark.parametrize("cell", ["rank", "cache"])
def test_a_rank_that_is_killed_ends_the_cell_with_the_reason(cell: str, device: str, graphs: str) -> None:
    engine, gate = gated([*CELLS[cell], f"engine.cuda_graphs={graphs}"], device)
    [pid] = engine.team.pids
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        gate.check(engine, 4)
    assert time.monotonic() - begun < 8
    status, reason = classify(caught.value)
    assert status is Status.ERROR and "rank 1 of engine.tensor_parallel=2 ended by SIGKILL" in reason
    engine.close()


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ends of the whole process that were to be, because something waits for a rank long after its loss."""
    found: list[str] = []
    monkeypatch.setattr(team.Team, "end_process", lambda self: found.append("the whole process would have ended"))
    return found


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["of a batch", "at the start"])
def test_a_rank_that_fails_says_why(
    where: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, exits: list[str]
) -> None:
    begins, project = HSTULayer.__init__, HSTULayer.project

    def failing(self: HSTULayer, *arguments: Any) -> Any:
        if self.group is not None and self.group.rank:
            raise kind("the test says so")
        return project(self, *arguments)

    def without(self: HSTULayer, config: HSTUConfig) -> None:
        if config.heads == 1 and os.getpid() != tests:
            raise kind("the test says so")
        begins(self, config)

    tests = os.getpid()
    owner = {"of a batch": ("project", failing), "at the start": ("__init__", without)}[where]
    monkeypatch.setattr(HSTULayer, *owner)
    with pytest.raises(torch.OutOfMemoryError if kind is torch.OutOfMemoryError else RuntimeError) as caught:
        gated([], "cpu")
    status, reason = classify(caught.value)
    assert status is (Status.OOM if kind is torch.OutOfMemoryError else Status.ERROR) and "rank 1" in reason
    nothing_waits()
    assert not exits


def test_an_error_of_rank_0_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait in a collective, so no later batch can be right."""
    engine, gate = gated([], "cpu")
    [pid] = engine.team.pids

    def failing(*arguments: Any) -> Any:
        raise ZeroDivisionError("the test says so")

    with monkeypatch.context() as patch:
        patch.setattr(HSTULayer, "combine", failing)
        with pytest.raises(ZeroDivisionError):
            gate.check(engine, 4)
    with pytest.raises(RuntimeError, match="rank 0 failed: ZeroDivisionError: the test says so"):
        gate.check(engine, 4)
    engine.close()
    assert not Path(f"/proc/{pid}").exists()


def nothing_waits() -> None:
    """Wait until no thread looks for something that waits for a lost rank."""
    wait_until(lambda: not any("(_watch)" in thread.name for thread in threading.enumerate()))


def waiting(group: Group, device: torch.device) -> team.Calls:
    return {"wait": lambda inputs: time.sleep(60)}


def two_ranks() -> team.Team:
    return team.Team(2, torch.device("cpu"), waiting, {}, collectives=False)


def test_a_rank_may_go_while_rank_0_waits_for_none(exits: list[str]) -> None:
    """Rank 0 may load its part, or fail to, and learns of it when it waits."""
    ranks = two_ranks()
    os.kill(ranks.pids[0], signal.SIGKILL)
    nothing_waits()
    assert not exits
    with pytest.raises(RuntimeError, match=r"rank 1 of engine\.tensor_parallel=2 ended by SIGKILL"):
        ranks.ready()
    ranks.close()


def test_a_busy_a_lost_and_a_closed_rank_have_no_memory_to_report(
    exits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team, "END_S", 0.3)  # for a busy one to say something
    known = {"tensor_parallel": 2, "parallel_backend": "gloo"}
    ranks = two_ranks()
    ranks.ready()
    with ranks.call("wait", []):
        pass
    assert ranks.actual() == known
    ranks.check()  # a rank that computes is not lost
    os.kill(ranks.pids[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="SIGKILL"):
        wait_until(ranks.check)
    assert ranks.actual() == known
    ranks.close()
    assert ranks.actual() == known


def test_a_rank_outlives_signals_and_ends_with_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal or systemd sends signals to all processes. The end of rank 0 gives NCCL's memory back, once."""
    aborted: list[int] = []
    monkeypatch.setattr(Group, "abort", lambda self: aborted.append(self.rank))
    ranks = two_ranks()
    ranks.ready()
    [pid] = ranks.pids
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert ranks.actual()["rank_memory_mib"][0] > 0
    ranks.close()
    ranks.close()
    assert aborted == [0] and not Path(f"/proc/{pid}").exists()


def test_a_process_that_nothing_frees_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is where a library has collectives of its own, which may wait for a killed rank for ever."""
    forks.fork_ranks(monkeypatch)
    monkeypatch.setattr(team, "END_S", 0.3)

    def work() -> None:
        ranks = two_ranks()
        ranks.ready()
        with ranks.call("wait", []):
            os.kill(ranks.pids[0], signal.SIGKILL)
            time.sleep(60)

    done = forks.in_fork(work, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "grbench: rank 1 of engine.tensor_parallel=2 ended by SIGKILL"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.tensor_parallel=3"], "engine.tensor_parallel=3 and model.heads=2: allowed are 1, 2"),
        (["engine.precision=fp8"], "set engine.precision=bf16"),
        (["cache=lru", "cache.host_gb=1"], "cache.host_gb=1 and engine.tensor_parallel=2"),
        (["cache.item_memory_gb=1"], "cache.item_memory_gb=1 and engine.tensor_parallel=2"),
        (["engine=vllm", "task=generate"], "engine vllm shares decoders only; set engine=hstu for this model"),
        ([*DECODER, "model.kv_heads=1"], "engine.tensor_parallel=2 and model.kv_heads=1: allowed are 1"),
        ([*DECODER, "engine.cuda_graphs=true"], "ranks launch kernels one by one; set engine.cuda_graphs=false"),
        (["engine=hf", "task=generate"], "engine.tensor_parallel"),
        (["engine=aoti"], "engine.tensor_parallel"),
        (["engine=onnxruntime"], "engine.tensor_parallel"),
        (["engine=tensorrt"], "engine.tensor_parallel"),
    ],
)
def test_what_ranks_lack_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_spec([*SMALL, *overrides])
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
