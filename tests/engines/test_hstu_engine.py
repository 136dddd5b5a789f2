"""The native engine: its answers, its bookkeeping, its refusals, its options' files; graphs on a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hstu_oracle import make_requests, scores
from helpers.replays import Replays

from grbench.execution.records import Status
from grbench.execution.worker import classify
from grengines import registry
from grengines.api import Catalogue, Engine, RankResult, Request, Setup, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hstu.config import HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.last_layer import WHOLE
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import build_model
from grengines.models.hstu.reference import RankingReference, zero_attention
from grengines.numerics import relative_error
from grengines.runtime.graph_costs import Graphs, capture
from grengines.runtime.native import native
from grkernels.choice import requested
from grkernels.config import KernelConfig

CATALOGUE = Catalogue(num_users=20, num_items=300, num_actions=4)
KERNELS = requested("torch")
MODEL = HSTUConfig(embedding_dim=32, heads=2, qk_dim=16, v_dim=8, scaling_seqlen=128)
SETUP = Setup(MODEL, KERNELS, CATALOGUE, 0, CacheConfig())
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def sample(count: int = 4, longest: int = 40, candidates: int = 6, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return make_requests(rng, CATALOGUE, [*rng.integers(1, longest, count - 1), longest], [candidates] * count)


@contextmanager
def engine(
    requests: list[Request],
    model: HSTUConfig = MODEL,
    kernel: str = "torch",
    cache: PagedCacheConfig | None = None,
    *,
    max_batch: int = 4,
    **options: Any,
) -> Iterator[Engine]:
    config = HSTUEngineConfig(**{"device": "cpu", **options})
    made = registry.build(config, model, KernelConfig(kernel), CATALOGUE, 5, cache)
    try:
        made.prepare(requests, max_batch)
        yield made
    finally:
        made.close()


def error(result: RankResult, expected: list[Any]) -> float:
    return relative_error(np.concatenate(result.scores), np.concatenate(expected))


def test_answers_equal_the_second_implementation_and_the_reference() -> None:
    requests = sample()
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu").scores(requests)
    model = build_model(MODEL, CATALOGUE, 5, "cpu", torch.float32)
    weights = {name: p.double().numpy() for name, p in model.named_parameters()}
    with engine(requests) as e:
        result = e.rank(requests)
    assert error(result, [scores(weights, MODEL, CATALOGUE, r) for r in requests]) < 1e-5
    assert error(result, reference) < 1e-5
    assert [s.shape for s in result.scores] == [(6, 3)] * 4
    assert all(s.dtype == np.float32 for s in result.scores)
    assert result.tokens == result.padded_tokens == sum(len(r.history_items) + 6 for r in requests)
    assert min(result.batch_ms, result.compute_ms) > 0 and result.transfer_ms >= 0
    assert result.details == {}


def test_a_batch_of_candidates_says_that_its_last_layer_computed_every_row() -> None:
    long, short = (make_requests(np.random.default_rng(0), CATALOGUE, [n, n], [6, 6]) for n in (6, 5))
    with engine(long) as e:
        assert e.rank(long).details == {} and e.rank(short).details == {WHOLE: 1.0}
        assert e.rank([long[0], short[0]]).details == {WHOLE: 1.0}  # 12 of 23 rows
    with engine(long, candidate_microbatch=4) as e:  # the history comes first, and nothing of its last layer is read
        assert e.rank(short).details == {}


@pytest.mark.parametrize("microbatch", [1, 4, 100])
@pytest.mark.parametrize("C", [0, 2])
def test_candidates_in_microbatches_score_the_same(microbatch: int, C: int) -> None:
    """Rank requests with different numbers of candidates, or none, in microbatches."""
    model = dataclasses.replace(MODEL, contextual_seq_len=C)
    requests = make_requests(np.random.default_rng(1), CATALOGUE, [9, 0, 30, 4], [7, 3, 0, 5])
    with engine(requests, model) as whole, engine(requests, model, candidate_microbatch=microbatch) as parts:
        expected, result = whole.rank(requests), parts.rank(requests)
        assert error(result, expected.scores) < 1e-5
        assert result.tokens == expected.tokens
        assert [s.shape for s in result.scores] == [(7, 3), (3, 3), (0, 3), (5, 3)]
        nothing = parts.rank(requests[2:3])
        assert nothing.scores[0].shape == (0, 3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_within_twice_eager_torch(precision: str) -> None:
    requests = sample()
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    exact, eager = reference.scores(requests), reference.scores(requests, precision)
    with engine(requests, precision=precision) as e:
        result = e.rank(requests)
        assert e.actual()["precision"] == precision
    allowed = 2 * relative_error(np.concatenate(eager), np.concatenate(exact))
    assert 1e-5 < allowed < 0.1
    assert error(result, exact) <= allowed
    without = reference.scores(requests, attention=zero_attention)
    assert relative_error(np.concatenate(without), np.concatenate(exact)) > 2 * allowed
    again = reference.scores(requests)  # the calls above did not change the reference
    assert all((a == b).all() for a, b in zip(again, exact, strict=True))


def test_actual_says_what_runs_and_close_gives_it_back() -> None:
    threads = torch.get_num_threads()
    requests = sample()
    with engine(requests, cpu_threads=2) as e:
        ran = json.loads(json.dumps(e.actual()))
        assert ran["device"] == "cpu" and ran["precision"] == "fp32" and ran["cpu_threads"] == 2
        assert ran["kernels"] == dict.fromkeys(KERNELS, "torch")
        assert ran["fp32_products"] == "highest" and ran["weights"] == "random, seed 5"
        assert ran["parameters"] > 300 * 32
        assert ran["host_loops"] == native().actual()["host_loops"]
    assert torch.get_num_threads() == threads
    with pytest.raises(RuntimeError, match="not prepared, or closed"):
        e.rank(requests)
    e.close()


def test_wrong_use_is_refused() -> None:
    requests = sample()
    with engine(requests, max_batch=3) as e:
        for wrong in (requests, []):
            with pytest.raises(ValueError, match=rf"{len(wrong)} requests in one batch; allowed is 1 to max_batch=3"):
                e.rank(wrong)
        with pytest.raises(ValueError, match="0 sample requests"):
            e.prepare([], 3)
    with pytest.raises(ValueError, match=r"cuda_graphs=true and engine\.candidate_microbatch=8"):
        registry.make(HSTUEngineConfig(cuda_graphs=True, candidate_microbatch=8), SETUP, "rank")
    with pytest.raises(ValueError, match="unknown variant 'best' of hstu_attention; known: torch"):
        HSTUEngine(HSTUEngineConfig(), dataclasses.replace(SETUP, kernels={**KERNELS, "hstu_attention": "best"}))
    with (
        pytest.raises(ValueError, match=r"no file .*absent\.safetensors"),
        engine(requests, dataclasses.replace(MODEL, weights="absent.safetensors")),
    ):
        pass


def test_graphs_on_a_cpu_are_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"a CPU has no CUDA graphs; set engine\.cuda_graphs=false"):
        HSTUEngine(HSTUEngineConfig(device="cpu", cuda_graphs=True), SETUP)


@NO_GPU
def test_cuda_without_a_gpu_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"engine\.device=cuda: .*; use engine\.device=cpu"):
        HSTUEngine(HSTUEngineConfig(device="cuda"), SETUP)


def test_registry() -> None:
    assert {"hstu", "hf"} <= set(registry.names())
    assert registry.availability("hstu") is None
    with pytest.raises(ValueError, match="unknown engine 'hst'; nearest: hstu; known: hstu"):
        registry.availability("hst")


def test_no_graphs_on_a_cpu_unless_they_are_asked_for() -> None:
    with engine(sample()) as e:
        assert e.actual()["cuda_graphs"] == "false" and "eager_batches" not in e.rank(sample()).details


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("C", [0, 2])
def test_batches_in_buckets_answer_alike(kernel: str, C: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay on the CPU batches that are padded as for graphs: evenly for torch, packed for Triton."""
    monkeypatch.setattr("grengines.hstu.engine.GraphRunner", Replays)
    measured = []

    def captured(asked: str, *rest: Any) -> Graphs:
        if kernel == "torch":  # Triton's interpreter takes long
            measured.append(capture("auto", *rest).costs)
        return capture("true", *rest)

    monkeypatch.setattr("grengines.hstu.engine.capture", captured)
    model = dataclasses.replace(MODEL, contextual_seq_len=C, layers=1)
    requests = sample(6, longest=30)
    reference = RankingReference(model, CATALOGUE, 5, "cpu")
    with engine(requests, model, kernel) as e:
        for batch in (requests[:3], requests[5:], requests[2:]):
            result = e.rank(batch)
            assert error(result, reference.scores(batch)) < 1e-5
            assert result.details == {"graph_batches": 1.0, "eager_batches": 0.0}
        assert result.padded_tokens >= result.tokens
        assert kernel == "triton" or len(measured[0]) == len(e.actual()["graph_buckets"])
        assert kernel == "torch" or result.padded_tokens <= 128


def visits(users: int, rounds: int, longest: int, seed: int = 0) -> list[list[Request]]:
    """Return rounds of requests by the same users, whose histories grow; some users come twice in a round."""
    rng = np.random.default_rng(seed)
    last = make_requests(rng, CATALOGUE, list(rng.integers(longest // 2, longest, users)), [6] * users)
    names = [f for f in Request.__dataclass_fields__ if f.startswith("history_")]
    made = []
    for round_ in range(rounds):
        requests = []
        for user in [*range(users), 0]:
            events = len(last[user].history_items) * (round_ + 1) // rounds
            history = {f: getattr(last[user], f)[:events] for f in names}
            requests.append(dataclasses.replace(last[user], user_id=user, request_id=len(requests), **history))
        made.append(requests)
    return made


@pytest.mark.parametrize("policy", ["lru", "lfu", "gdsf"])
@pytest.mark.parametrize(("microbatch", "pages"), [(0, 400), (4, 400), (0, 9), (4, 9)])
def test_answers_through_the_cache_equal_the_reference(policy: str, microbatch: int, pages: int) -> None:
    """Rank returning users with growing histories, some twice in a batch, from a pool that holds few of them."""
    rounds = visits(users=5, rounds=4, longest=60)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cpu")
    page_bytes = MODEL.layers * 16 * MODEL.heads * (MODEL.qk_dim + MODEL.v_dim) * 4
    cache = PagedCacheConfig(policy, policy, page=16, memory_gb=pages * page_bytes / 1e9)
    found: dict[str, float] = {}
    with engine(rounds[-1], cache=cache, max_batch=6, candidate_microbatch=microbatch) as e:
        for requests in rounds:
            result = e.rank(requests)
            assert error(result, reference.scores(requests)) < 1e-5
            for name, value in result.details.items():
                found[name] = found.get(name, 0.0) + value
        assert e.actual()["cache"] == dataclasses.asdict(cache)
        again = e.rank(rounds[-1])
        e.reset_cache()
        anew = e.rank(rounds[-1])
        assert error(again, anew.scores) < 1e-5
        assert anew.details["cache_hits"] == 1  # of the user who comes twice
    assert found["cache_bypassed"] == 0  # two requests of one user in a batch run one after the other
    assert found["cache_policy_errors"] == 0
    if pages == 400:
        assert found["cache_hits"] == 15 + 4 and found["cache_misses"] == 5 and found["cache_evictions"] == 0
    else:
        assert found["cache_evictions"] + found["cache_refused"] + found["cache_unstored"] > 0


def test_what_does_not_fit_the_cache_is_refused_before_anything_runs() -> None:
    requests = visits(users=2, rounds=1, longest=60)[0]
    cache = PagedCacheConfig("lru", "lru", page=16, memory_gb=2e-5)
    with (
        pytest.raises(ValueError, match=r"cache\.memory_gb=2e-05: the longest history, \d+ tokens, alone takes"),
        engine(requests, cache=cache),
    ):
        pass


def test_a_cache_without_room_on_the_device_is_named_in_the_error() -> None:
    requests = visits(users=2, rounds=1, longest=60)[0]
    with pytest.raises(RuntimeError) as caught, engine(requests, cache=PagedCacheConfig("lru", "lru", memory_gb=1e9)):
        pass
    status, why = classify(caught.value)
    assert status is Status.OOM and why.startswith(
        "memory ran out: cache.memory_gb=1e+09: no room for its pages, lower"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels themselves are tested below")
def test_triton_kernels_in_the_interpreter_answer_alike() -> None:
    model = dataclasses.replace(MODEL, interaction=True, layers=1)
    requests = sample(2, longest=12, candidates=3)
    expected = RankingReference(model, CATALOGUE, 5, "cpu").scores(requests)
    for options in ({}, {"candidate_microbatch": 2}):
        with engine(requests, model, "triton", max_batch=2, **options) as e:
            assert error(e.rank(requests), expected) < 1e-5
            assert {entry["source"] for entry in e.actual()["kernel_configs"]} == {"default"}


def test_kernels_that_cannot_run_are_unavailable_with_those_that_can() -> None:
    with (
        pytest.raises(UnavailableError, match=r"kernel\.hstu_attention=cutlass: .*supported here: torch, compile"),
        engine(sample(), kernel="cutlass"),
    ):
        pass


# On a GPU.


EAGER: dict[str, Any] = {"cuda_graphs": "false"}
# Each kernel in each precision, and each option in one precision: kernels are compiled for seconds in each.
ON_A_GPU: list[tuple[str, str, dict[str, Any]]] = [
    *((kernel, "fp32", EAGER) for kernel in ("torch", "triton")),  # tensor cores take half precision
    *((kernel, "fp16", EAGER) for kernel in ("torch", "triton", "cutlass")),
    *(
        (kernel, "bf16", options)
        for kernel in ("torch", "triton", "cutlass")
        for options in (EAGER, {}, {"cuda_graphs": "true"}, {"candidate_microbatch": 4})
    ),
    ("compile", "bf16", {}),  # compiling takes long
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "precision", "options"), ON_A_GPU, ids=str)
def test_on_a_gpu(kernel: str, precision: str, options: dict[str, Any]) -> None:
    model = dataclasses.replace(MODEL, qk_dim=32, v_dim=16, interaction=True)
    requests = sample(8)
    reference = RankingReference(model, CATALOGUE, 5, "cuda")
    exact = np.concatenate(reference.scores(requests))
    on_cpu = np.concatenate(RankingReference(model, CATALOGUE, 5, "cpu").scores(requests))
    assert relative_error(exact, on_cpu) < 1e-5
    eager = relative_error(np.concatenate(reference.scores(requests, precision)), exact)
    with engine(requests, model, kernel, device="cuda", precision=precision, max_batch=8, **options) as e:
        result = e.rank(requests)
        assert e.actual()["device"] == "cuda" and e.actual()["kernels"]["layer_norm"] in (kernel, "triton")
        assert result.compute_ms > 0 and result.transfer_ms > 0
    allowed = max(2 * eager, 2e-5)
    assert error(result, [exact]) <= allowed
    without = np.concatenate(reference.scores(requests, attention=zero_attention))
    assert relative_error(without, exact) > 2 * allowed


@pytest.mark.gpu
def test_auto_is_bf16_on_a_gpu() -> None:
    with engine(sample(), device="auto") as e:
        assert e.actual()["device"] == "cuda" and e.actual()["precision"] == "bf16"


@pytest.mark.gpu
@pytest.mark.parametrize("C", [0, 2])
@pytest.mark.parametrize(("kernel", "precision"), [("torch", "fp32"), ("triton", "fp32"), ("cutlass", "bf16")])
def test_graphs_equal_eager_batch_after_batch(C: int, kernel: str, precision: str) -> None:
    """Replay batches of different sizes and contents: no batch leaves data in the next."""
    model = dataclasses.replace(MODEL, contextual_seq_len=C, qk_dim=32, v_dim=16)
    requests = sample(40, longest=100, seed=3)
    options = {"device": "cuda", "precision": precision, "max_batch": 8}
    with (
        engine(requests, model, kernel, **options, cuda_graphs=False) as eager,
        engine(requests, model, kernel, **options, cuda_graphs=True) as graphs,
    ):
        for begin, end in [(0, 8), (8, 9), (9, 12), (12, 20), (20, 25), (39, 40), (0, 8)]:
            expected, result = eager.rank(requests[begin:end]), graphs.rank(requests[begin:end])
            assert error(result, expected.scores) < (1e-5 if precision == "fp32" else 1e-2)
            assert result.details == {"graph_batches": 1.0, "eager_batches": 0.0}
            assert result.tokens == expected.tokens <= result.padded_tokens
        assert len(graphs.actual()["graph_buckets"]) >= 4


@pytest.mark.gpu
def test_what_fits_no_bucket_runs_eagerly_and_is_counted() -> None:
    requests = sorted(sample(4, longest=60), key=lambda r: len(r.history_items))
    with engine(requests, device="cuda", precision="fp32", cuda_graphs=True, graph_lengths=[48]) as e:
        long, short = e.rank(requests[-1:]), e.rank(requests[:1])
    expected = RankingReference(MODEL, CATALOGUE, 5, "cuda").scores([requests[-1], requests[0]])
    assert long.details["eager_batches"] == 1.0 and short.details["eager_batches"] == 0.0
    assert long.padded_tokens == long.tokens == 66 and short.padded_tokens == 48
    assert error(long, expected[:1]) < 1e-5 and error(short, expected[1:]) < 1e-5


@pytest.mark.gpu
def test_auto_replays_small_batches_and_records_what_it_measured() -> None:
    requests = sample(8, longest=60)
    reference = RankingReference(MODEL, CATALOGUE, 5, "cuda").scores(requests)
    with engine(requests, kernel="triton", device="cuda", precision="fp32", max_batch=8) as e:
        result, actual = e.rank(requests), json.loads(json.dumps(e.actual()))
    assert error(result, reference) < 1e-5
    assert result.details == {"graph_batches": 1.0, "eager_batches": 0.0}  # so small a model waits for launches
    assert actual["cuda_graphs"] == "true" and actual["graph_buckets"]
    assert all(0 < cost["replay"] < cost["launches"] for cost in actual["graph_costs_ms"][:3])
