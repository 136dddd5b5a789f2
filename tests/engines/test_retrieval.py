"""Tasks that generate, in the harness: the native engine, its gate, the pipeline, continuous batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError, RunSpec, spec_from_json, spec_to_json
from grbench.execution.retrieval import build_retrieval
from grbench.gate import gate_for, pipeline
from grbench.gate.generate import GenerateGate
from grbench.scenarios import run_scenario
from grbench.scenarios.config import ClosedLoopConfig, OfflineConfig, ServerConfig
from grbench.workloads.trace import Requests, Trace
from grengines import registry
from grengines.api import Finished, GenerateResult, Request, Retrieval, UnavailableError
from grengines.cache.pool import PagePool
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.weights import save_weights
from grengines.numerics import IncorrectError
from grengines.semantic.trie import TensorTrie
from grkernels.operators import Operators

SMALL = [
    "model=hstu_tiny",
    "workload=synthetic",
    "workload.max_requests=40",
    "workload.max_history=48",
    "workload.items=500",
    "workload.num_candidates=6",
    "retrieval.k=5",
    "retrieval.beam_width=12",
    "gate.measured=8",
]
GENERATE = [*SMALL, "engine=hstu", "engine.device=cpu", "task=generate"]
PIPELINE = [*SMALL, "engine=pipeline", "engine@engine.retrieve=hstu", "engine@engine.rank=hstu"]


def of(*overrides: str) -> tuple[RunSpec, Trace, Retrieval]:
    spec = compose_spec(overrides)[0]
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    assert spec.retrieval is not None
    return spec, trace, build_retrieval(spec.retrieval, spec.workload, trace.events, spec.seed)


def engine_of(spec: RunSpec, trace: Trace, retrieval: Retrieval, max_batch: int = 4) -> Any:
    engine = registry.build(
        spec.engine, spec.model, spec.kernel, trace.catalogue, spec.seed, task=spec.task, retrieval=retrieval
    )
    engine.prepare(trace.requests, max_batch)
    return engine


@pytest.fixture(scope="module")
def generating() -> tuple[RunSpec, Trace, Retrieval, Any]:
    found = of(*GENERATE)
    return (*found, engine_of(*found))


class Wrong:
    """Engine that returns changed answers."""

    def __init__(self, engine: Any, how: str) -> None:
        self.engine, self.how = engine, how

    def generate(self, requests: Sequence[Request]) -> GenerateResult:
        result = self.engine.generate(requests)
        items, scores = [i.copy() for i in result.items], [s.copy() for s in result.scores]
        if self.how == "stale":
            items, scores = items[1:] + items[:1], scores[1:] + scores[:1]
        elif self.how == "an item of another request":
            items[0][2] = next(i for i in items[-1] if i not in items[0]) if len(items) > 1 else items[0][2]
        elif self.how == "twice the same item":
            items[0][1] = items[0][0]
        elif self.how == "no such item":
            items[0][0] = 500
        elif self.how == "order":
            items[0], scores[0] = items[0][::-1], scores[0][::-1]
        elif self.how == "scores":
            scores[-1] += 0.01
        elif self.how == "nan":
            scores[0][0] = np.nan
        elif self.how == "fewer":
            items[0], scores[0] = items[0][:-1], scores[0][:-1]
        elif self.how == "the last item is another":
            items, scores = (list(x) for x in zip(*map(self._other, requests, items, scores), strict=True))
        return dataclasses.replace(result, items=items, scores=scores)

    def _other(self, request: Request, items: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Replace the last item by a worse one with its right score."""
        other = next(i for i in range(500) if i not in items)
        exact = self.reference.prefix_scores(request, np.array([other]))[:, -1]
        return np.append(items[:-1], other), np.append(scores[:-1], exact)

    reference: Any = None


def test_the_native_engine_finds_what_the_reference_finds(generating: tuple[RunSpec, Trace, Retrieval, Any]) -> None:
    spec, trace, retrieval, engine = generating
    result = gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4).to_dict()
    assert result["passed"] and result["overlap"] == 1.0 and result["near_ties"] == 0
    assert min(result["zero_attention_error"], result["stale_error"]) > 2 * result["tolerance"]


def test_a_bias_by_the_distance_passes_and_one_that_is_missing_fails(tmp_path: Path) -> None:
    spec, trace, retrieval = of(*GENERATE, "model.position_bias=true")
    engine = engine_of(spec, trace, retrieval)
    gate = gate_for(spec, trace, retrieval, engine.actual())
    result = gate.check(engine, 4).to_dict()
    assert result["passed"] and result["overlap"] == 1.0
    own: dict[str, Any] = {"seed": spec.seed, "device": "cpu", "dtype": torch.float32}
    model = HSTUGenerator.build(spec.model, retrieval.ids.sizes, Operators.eager(), **own)
    for name, table in model.named_parameters():
        if name.endswith("position_bias"):
            table.zero_()
    save_weights(model, tmp_path / "weights.safetensors", retrieval.ids)
    without = dataclasses.replace(retrieval, weights=str(tmp_path / "weights.safetensors"))
    with pytest.raises(IncorrectError):
        gate.check(engine_of(spec, trace, without), 4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_passes_with_its_own_tolerance(precision: str) -> None:
    spec, trace, retrieval = of(*GENERATE, f"engine.precision={precision}")
    engine = engine_of(spec, trace, retrieval)
    result = gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4).to_dict()
    assert result["passed"] and result["error"] > 0


@pytest.mark.parametrize(
    "how",
    ["stale", "an item of another request", "twice the same item", "no such item", "order", "scores", "nan", "fewer",
     "the last item is another"],
)  # fmt: skip
def test_a_wrong_answer_fails(generating: tuple[RunSpec, Trace, Retrieval, Any], how: str) -> None:
    spec, trace, retrieval, engine = generating
    gate = gate_for(spec, trace, retrieval, engine.actual())
    assert isinstance(gate, GenerateGate)
    wrong = Wrong(engine, how)
    wrong.reference = gate.reference
    with pytest.raises(IncorrectError) as caught:
        gate.check(wrong, 4)
    formal = how in ("no such item", "nan")  # noticed before anything is compared
    assert caught.value.result is None if formal else not caught.value.result.to_dict()["passed"]


def test_a_gate_that_could_not_fail_is_refused(generating: tuple[RunSpec, Trace, Retrieval, Any]) -> None:
    spec, trace, retrieval, engine = generating
    gate = gate_for(spec, trace, retrieval, engine.actual())
    gate.tolerance = 1e3
    with pytest.raises(IncorrectError, match="can't tell right from wrong"):
        gate.check(engine, 4)


def test_batches_do_not_change_answers(generating: tuple[RunSpec, Trace, Retrieval, Any]) -> None:
    _, trace, _, engine = generating
    requests = trace.requests[:8]
    alone = [engine.generate([r]) for r in requests]
    for batch in (requests[:4], requests[4:][::-1]):
        together = engine.generate(batch)
        for request, items, scores in zip(batch, together.items, together.scores, strict=True):
            one = alone[requests.index(request)]
            assert items.tolist() == one.items[0].tolist()
            np.testing.assert_allclose(scores, one.scores[0], atol=1e-4)


def test_a_closed_engine_holds_no_memory_of_the_device() -> None:
    engine = engine_of(*of(*GENERATE))
    kinds = PagePool, TensorTrie, torch.nn.Module, torch.Tensor
    assert {type(x) for x in vars(engine).values() if isinstance(x, kinds)} == {PagePool, TensorTrie, HSTUGenerator}
    engine.close()
    assert not [x for x in vars(engine).values() if isinstance(x, kinds)]


def test_what_generating_has_no_use_for_is_refused(generating: tuple[RunSpec, Trace, Retrieval, Any]) -> None:
    _, trace, _, engine = generating
    with pytest.raises(ValueError, match="max_batch=4"):
        engine.generate(trace.requests[:5])
    for override, message in (("cache=lru", "set cache=none"), ("engine.candidate_microbatch=2", "is for ranking")):
        with pytest.raises(ConfigError, match=message):
            compose_spec([*GENERATE, override])
    engine_longer = dataclasses.replace(trace.requests[0], history_items=np.zeros(400, np.int64))
    with pytest.raises(ValueError, match="prepared for up to"):
        engine.generate([engine_longer])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=hstu", "task=recommend"], "task=recommend: engine hstu can't; allowed: auto, rank, generate"),
        (["engine=pipeline", "task=rank"], "engine pipeline can't; allowed: auto, recommend"),
        (["engine=hstu", "task=generate", "retrieval.k=9", "retrieval.beam_width=8"], "allowed is >= retrieval.k=9"),
        (["engine=hstu", "task=sleep"], "task=sleep: allowed is one of auto, rank, generate, recommend"),
        (["engine=pipeline", "engine@engine.retrieve=pipeline"], "engine.retrieve=pipeline: it can't generate"),
        (["engine=pipeline", "engine.retrieve.bogus=1"], "bogus"),
        (["engine=pipeline", "engine.rank.cpu_threads=-1"], "engine.rank.cpu_threads=-1: allowed is"),
    ],
)
def test_what_can_not_be_asked_is_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        compose_spec([*SMALL[1:2], *overrides])
    assert "\n" not in str(caught.value)


def test_specs_travel_whole_to_the_worker() -> None:
    for overrides in (GENERATE, PIPELINE, [*SMALL, "engine=hstu"]):
        spec = compose_spec(overrides)[0]
        assert spec_from_json(spec_to_json(spec)) == spec
    ranking = compose_spec([*SMALL, "engine=hstu", "retrieval.k=7"])[0]
    assert ranking.retrieval is None and ranking.hash == spec.hash  # unused options do not change the hash


def test_the_pipeline_ranks_what_it_retrieves() -> None:
    spec, trace, retrieval = of(*PIPELINE)
    engine = engine_of(spec, trace, retrieval)
    result = gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4).to_dict()
    assert result["passed"] and result["retrieve"]["passed"] and result["rank"]["passed"] and result["error"] < 1
    answer = engine.recommend(trace.requests[:3])
    found = engine.retriever.generate(trace.requests[:3])
    for items, scores, retrieved in zip(answer.items, answer.scores, found.items, strict=True):
        assert sorted(items) == sorted(retrieved) and len(items) == 5
        assert (np.diff(scores[:, 0]) <= 0).all()
    assert set(answer.stages) == {"retrieve", "rank"} and min(answer.stages.values()) > 0
    engine.close()


def test_the_gate_of_a_pipeline_allows_what_attention_in_fp8_loses() -> None:
    spec, trace, retrieval = of(*PIPELINE)
    engine = engine_of(spec, trace, retrieval)

    def tolerance(attention: str) -> float:
        stage = {"device": "cpu", "precision": "bf16"}
        actual = {"retrieve": stage, "rank": {**stage, "attention_precision": attention}}
        return float(gate_for(spec, trace, retrieval, actual).check(engine, 4).to_dict()["rank"]["tolerance"])

    assert tolerance("fp8") > 1.5 * tolerance("bf16")
    engine.close()


def test_the_gate_of_a_pipeline_makes_some_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace may have millions, and each is kept once it is made."""

    def every(requests: Requests) -> Iterator[Request]:
        raise AssertionError("every request was made")

    spec, trace, retrieval = of(*PIPELINE)
    engine = engine_of(spec, trace, retrieval)
    monkeypatch.setattr(pipeline, "MOST_PREPARED", 20)
    monkeypatch.setattr(Requests, "__iter__", every)
    assert gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4).passed
    engine.close()


def test_a_pipeline_in_the_wrong_order_fails() -> None:
    spec, trace, retrieval = of(*PIPELINE)
    engine = engine_of(spec, trace, retrieval)
    honest = engine.recommend

    def reversed_order(requests: Sequence[Request]) -> Any:
        result = honest(requests)
        return dataclasses.replace(result, scores=[s[::-1] for s in result.scores])

    engine.recommend = reversed_order
    with pytest.raises(IncorrectError, match="best first"):
        gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4)


@pytest.mark.usefixtures("forked_workers")
def test_a_pipeline_run_keeps_stage_times(grbench_here: Any, tmp_path: Path) -> None:
    done = grbench_here(*PIPELINE, "scenario=offline", "scenario.queries=40", "runner.output_root=out", "tracking=none")
    assert done.returncode == 0, done.stdout + done.stderr
    import pandas as pd

    from grbench.execution import records

    ((folder, record),) = records.find(tmp_path / "out")
    samples = pd.read_parquet(folder / "samples.parquet")
    assert (samples["retrieve_ms"] > 0).all() and (samples["rank_ms"] > 0).all()
    working = samples["latency_ms"] - samples["queue_ms"]
    assert (samples["retrieve_ms"] + samples["rank_ms"] <= working + 0.001).all()
    assert (samples["retrieve_ms"] + samples["rank_ms"]).sum() > 0.9 * working.sum()
    assert record.metrics["retrieve_ms/p50"] > 0 and record.spec["task"] == "recommend"


class Steps:
    """Engine with continuous batching, whose requests take `needs` steps each."""

    def __init__(self, needs: int = 3, fail_at: int | None = None) -> None:
        self.needs, self.fail_at = needs, fail_at
        self.left: dict[int, tuple[Request, int]] = {}
        self.most = self.steps = 0
        self.admitted: list[int] = []

    prepare = reset_cache = actual = close = lambda self, *_: None

    @property
    def unfinished(self) -> int:
        return len(self.left)

    def admit(self, key: int, request: Request) -> None:
        self.left[key] = request, self.needs
        self.admitted.append(request.request_id)
        self.most = max(self.most, len(self.left))

    def step(self) -> list[Finished]:
        self.steps += 1
        if self.fail_at == self.steps:
            raise RuntimeError("the core died")
        self.left = {key: (r, n - 1) for key, (r, n) in self.left.items()}
        ended = [key for key, (_, n) in self.left.items() if not n]
        none, no_scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for key in ended:
            del self.left[key]
        return [Finished(key, none, no_scores, 7, {"steps": 1.0}) for key in ended]


@pytest.mark.parametrize(
    "config",
    [
        OfflineConfig("offline", max_batch=8, queries=60),
        ServerConfig("server", max_batch=8, queries=60, target_qps=400),
        ClosedLoopConfig("closed_loop", max_batch=8, queries=60, clients=5),
    ],
    ids=lambda c: c.name,
)
def test_requests_join_between_steps(config: Any, tmp_path: Path, generating: tuple[Any, Trace, Any, Any]) -> None:
    engine = Steps()
    requests = generating[1].requests
    m = run_scenario(config, engine, requests, task="generate", latency_limit_ms=80, seed=1, folder=tmp_path)
    assert engine.admitted == [requests[k % len(requests)].request_id for k in range(60)]
    assert sorted(m.samples["request_id"]) == sorted(engine.admitted)
    assert engine.most <= (5 if config.name == "closed_loop" else 8)
    assert m.tokens == 7 * 60 and m.details == {"steps": 60.0}
    assert 0 < m.batch_mean <= 8 and m.busy_s > 0
    assert m.samples["latency_ms"] == pytest.approx(m.samples["queue_ms"] + m.samples["compute_ms"], abs=0.01)
    if config.name == "offline":
        assert engine.steps == 3 * 8  # 60 requests, 8 at a time, 3 steps each


def test_a_failing_step_ends_the_scenario(tmp_path: Path, generating: tuple[Any, Trace, Any, Any]) -> None:
    config = ClosedLoopConfig("closed_loop", max_batch=8, queries=60, clients=5)
    with pytest.raises(RuntimeError, match="the core died"):
        run_scenario(
            config,
            Steps(fail_at=4),
            generating[1].requests,
            task="generate",
            latency_limit_ms=80,
            seed=1,
            folder=tmp_path,
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "precision", "biased", "graphs"),
    [
        ("torch", "fp32", "false", "true"),
        *(("triton", "bf16", "false", graphs) for graphs in ("false", "auto", "true")),
        *(("cutlass", "bf16", "false", graphs) for graphs in ("false", "true")),
        ("triton", "bf16", "true", "true"),
    ],
)
def test_on_a_gpu(kernel: str, precision: str, biased: str, graphs: str) -> None:
    spec, trace, retrieval = of(
        *GENERATE, "engine.device=cuda", f"engine.precision={precision}", f"kernel={kernel}", "model.qk_dim=64",
        "model.v_dim=64", f"model.position_bias={biased}", f"engine.cuda_graphs={graphs}",
    )  # fmt: skip
    engine = engine_of(spec, trace, retrieval, max_batch=5)
    gate = gate_for(spec, trace, retrieval, engine.actual())
    for max_batch in (5, 2, 1):
        assert gate.check(engine, max_batch).to_dict()["passed"]
    if graphs == "true":
        assert engine.generate(trace.requests[:3]).details == {"graph_batches": 1.0, "eager_batches": 0.0}
    engine.close()


def test_where_vllm_is_missing_the_native_engine_retrieves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    available = registry.availability
    why = "package vllm is not installed; pip install vllm"
    monkeypatch.setattr(registry, "availability", lambda name: why if name == "vllm" else available(name))
    asked = [*SMALL, "engine=pipeline", "engine@engine.retrieve=vllm"]
    spec, trace, retrieval = of(*asked)
    engine = engine_of(spec, trace, retrieval)
    actual = engine.actual()
    assert actual["retrieve"]["engine"] == "hstu"
    assert actual["notes"] == [f"engine.retrieve=vllm can't run here ({why}): hstu retrieved instead"]
    assert gate_for(spec, trace, retrieval, actual).check(engine, 4).to_dict()["passed"]
    spec, trace, retrieval = of(*asked, "engine.if_missing=null")
    with pytest.raises(UnavailableError, match="package vllm is not installed"):
        engine_of(spec, trace, retrieval)
