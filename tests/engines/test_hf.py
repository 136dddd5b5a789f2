"""The baseline engine: padding, copied caches and static batches find what one request at a time finds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.execution.retrieval import build_retrieval
from grbench.gate import gate_for
from grengines import registry
from grengines.api import Catalogue, Request, Retrieval, Setup, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hf.config import HFEngineConfig
from grengines.hf.engine import HFEngine
from grengines.hf.models import PaddedDecoder, PaddedHSTU
from grengines.models.decoder import model as decoder_model
from grengines.models.decoder.config import DecoderConfig
from grengines.models.hstu.config import HSTUConfig
from grengines.numerics import IncorrectError
from grengines.semantic.ids import SemanticIds
from grkernels.choice import requested
from grkernels.config import KernelConfig

MODELS = {
    "hstu": HSTUConfig(embedding_dim=24, qk_dim=8, v_dim=12, scaling_seqlen=16, max_positions=30, alpha=0.2),
    "decoder": DecoderConfig(embedding_dim=32, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, max_positions=30),
}
MODELS["vocabulary"] = replace(MODELS["decoder"], vocabulary=90)
SIZES = (4, 5, 6)
LENGTHS = [5, 0, 9, 1, 25]  # numbers of items: one history is empty, and one is truncated
KERNELS = requested("torch")


def catalogue(items: int) -> SemanticIds:
    every = np.array(list(itertools.product(*map(range, SIZES))), dtype=np.int32)
    return SemanticIds(every[np.random.default_rng(0).permutation(len(every))[:items]], SIZES)


def requests_of(items: int, lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Request]:
    rng = np.random.default_rng(seed)
    made = []
    for number, n in enumerate(lengths):
        history, none = rng.integers(0, items, n), np.zeros(n, np.int64)
        floats = none.astype(np.float32)
        made.append(Request(number, number, history, none, floats, none, 0, history[:0], 0, 0.0, 1000.0))
    return made


def engine_of(model: Any, retrieval: Retrieval, requests: list[Request], **options: Any) -> HFEngine:
    config = HFEngineConfig(**{"device": "cpu", **options})
    engine = registry.build(config, model, KernelConfig(), Catalogue(1, 1, 1), 3, task="generate", retrieval=retrieval)
    assert isinstance(engine, HFEngine)
    engine.prepare(requests, len(requests))
    return engine


def lists(arrays: list[np.ndarray]) -> list[list[Any]]:
    return [a.tolist() for a in arrays]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("width, items", [(1, 120), (20, 120), (200, 120), (20, 3)])
def test_a_batch_finds_what_the_reference_finds(model: str, width: int, items: int) -> None:
    """Search with ragged, empty and truncated prompts, and with fewer items than beams."""
    retrieval, requests = Retrieval(catalogue(items), min(width, 10), width), requests_of(items)
    result = engine_of(MODELS[model], retrieval, requests).generate(requests)
    expected = registry.reference(MODELS[model], 3, retrieval, "cpu").search(requests)
    for ours, scores, theirs, exact in zip(result.items, result.scores, expected.items, expected.scores, strict=True):
        assert ours.tolist() == theirs[theirs >= 0].tolist()
        np.testing.assert_allclose(scores, exact[theirs >= 0], atol=2e-5)
        assert (np.diff(scores) <= 0).all() and len(ours) == (min(width, 10, items) if width >= 20 else len(ours))
    tokens = [min(3 * n, 30) or 1 for n in LENGTHS]
    assert (result.tokens, result.padded_tokens) == (sum(tokens), len(tokens) * max(tokens))


@pytest.mark.parametrize("model", MODELS)
def test_neither_batch_nor_padding_changes_the_answer(model: str) -> None:
    retrieval, requests = Retrieval(catalogue(120), 20, 20), requests_of(120)
    engine = engine_of(MODELS[model], retrieval, requests)
    together = engine.generate(requests)
    for chosen in ([4, 2, 0, 3, 1], [1], [3, 1], [0]):
        again = engine.generate([requests[i] for i in chosen])
        assert lists(again.items) == [together.items[i].tolist() for i in chosen]
        for ours, i in zip(again.scores, chosen, strict=True):
            np.testing.assert_allclose(ours, together.scores[i], atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gate_passes_it(model: str, precision: str) -> None:
    spec, trace, retrieval = cell(model, precision)
    engine = build(spec, trace, retrieval)
    result = gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4).to_dict()
    assert result["passed"] and engine.actual()["precision"] == precision
    if precision == "fp32":
        assert result["overlap"] == 1.0 and result["near_ties"] == 0
    engine.close()
    with pytest.raises(RuntimeError, match="not prepared, or closed"):
        engine.generate(trace.requests[:1])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("wrong", ["padding is seen", "beams keep their order", "the prompt is not seen"])
def test_the_gate_fails_a_loop_that_is_wrong(model: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    spec, trace, retrieval = cell(model, "fp32")
    engine = build(spec, trace, retrieval)
    padded: Any = PaddedHSTU if model == "hstu" else PaddedDecoder
    encode = padded.encode
    if wrong == "padding is seen":
        monkeypatch.setattr(padded, "encode", lambda m, t, real, cache: encode(m, t, torch.ones_like(real), cache))
    elif wrong == "beams keep their order":
        reorder = transformers.DynamicCache.reorder_cache
        monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", lambda c, rows: reorder(c, rows.sort()[0]))
    else:
        hide = _only_last
        monkeypatch.setattr(padded, "encode", lambda m, t, real, cache: encode(m, t, hide(real, t.shape[1]), cache))
    with pytest.raises(IncorrectError, match=r"differ from the fp32 reference|out of order|fp32 reference's is"):
        gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4)


def test_the_gate_fails_a_softmax_over_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The softmax is over the codes of a level, or misses the last 50 of 200 tokens."""
    spec, trace, retrieval = cell("vocabulary", "fp32")
    log_probabilities = decoder_model.log_probabilities
    for vocabulary in (None, 150):
        monkeypatch.setattr(decoder_model, "log_probabilities", lambda *a, v=vocabulary: log_probabilities(*a[:4], v))
        engine = build(spec, trace, retrieval)
        with pytest.raises(IncorrectError, match=r"differ from the fp32 reference|fp32 reference's is"):
            gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4)
        engine.close()


def _only_last(real: torch.Tensor, new: int) -> torch.Tensor:
    """Hide all keys but the newest once codes are generated."""
    if new > 1:
        return real
    seen = torch.zeros_like(real)
    seen[:, -1] = True
    return seen


def test_what_it_refuses() -> None:
    retrieval, model = Retrieval(catalogue(20), 5, 10), MODELS["hstu"]

    def made(retrieval: Retrieval = retrieval) -> HFEngine:
        setup = Setup(model, KERNELS, Catalogue(1, 1, 1), 0, CacheConfig(), retrieval)
        return HFEngine(HFEngineConfig(device="cpu"), setup)

    for asked, message in (
        ({"cache": PagedCacheConfig(name="lru")}, "cache=lru: the cache group serves ranking only; set cache=none"),
        (
            {"kernels": KERNELS | {"layer_norm": "triton"}},
            r"kernel\.layer_norm=triton: engine hf is eager PyTorch",
        ),
    ):
        setup = replace(Setup(model, KERNELS, Catalogue(1, 1, 1), 0, CacheConfig(), retrieval), **asked)
        with pytest.raises(ValueError, match=message):
            registry.make(HFEngineConfig(device="cpu"), setup, "generate")
    with pytest.raises(ValueError, match="k=11 items from 10 beams"):
        made(retrieval=Retrieval(catalogue(20), 11, 10))
    engine = made()
    with pytest.raises(ValueError, match="0 sample requests"):
        engine.prepare([], 1)
    with pytest.raises(RuntimeError, match="not prepared"):
        engine.generate(requests_of(20, [1]))
    engine.prepare(requests_of(20, [1, 2]), 2)
    for batch in ([], requests_of(20, [1, 1, 1])):
        with pytest.raises(ValueError, match="allowed is 1 to max_batch=2"):
            engine.generate(batch)
    with pytest.raises(ValueError, match="engine hf can't do task rank; it can generate"):
        registry.build(HFEngineConfig(), model, KernelConfig(), Catalogue(1, 1, 1), 0)
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match=r"engine\.device=cuda: .*; use engine\.device=cpu"):
            engine_of(model, retrieval, requests_of(20, [1]), device="cuda")


def test_bad_combinations_are_one_line(grbench_here: Any) -> None:
    cases = {
        "task=rank": "task=rank: engine hf can't; allowed: auto, generate",
        "engine.precision=fp8": "engine.precision=fp8: allowed is one of auto, fp32, fp16, bf16",
        "engine.cuda_graphs=true": "cuda_graphs",
        "model.kv_heads=3": "model.kv_heads=3: must divide model.heads=2",
    }
    for override, expected in cases.items():
        done = grbench_here("engine=hf", "model=decoder_tiny", override)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    done = grbench_here("model=decoder_tiny", "engine=hstu")
    words = "engine hstu runs hstu models only; hf, vllm, remote run decoder models"
    assert done.returncode == 2 and words in done.stderr


def test_without_transformers_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grengines.spec.find_spec", lambda name: None)
    reason = "package transformers is not installed; pip install 'grbench[hf]'"
    assert registry.availability("hf") == reason
    with pytest.raises(UnavailableError, match="engine hf: package transformers"):
        engine_of(MODELS["hstu"], Retrieval(catalogue(20), 5, 10), requests_of(20, [1]))


def cell(model: str, precision: str) -> tuple[Any, Any, Retrieval]:
    small = ["workload=synthetic", "workload.max_requests=40", "workload.max_history=48", "workload.items=500"]
    small += ["retrieval.k=5", "retrieval.beam_width=12", "engine=hf", "engine.device=cpu"]
    named = ["model=decoder_tiny", "model.vocabulary=200"] if model == "vocabulary" else [f"model={model}_tiny"]
    spec = compose_spec([*small, *named, f"engine.precision={precision}"])[0]
    trace = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)
    assert spec.retrieval is not None
    return spec, trace, build_retrieval(spec.retrieval, spec.workload, trace.events, spec.seed)


def build(spec: Any, trace: Any, retrieval: Retrieval) -> HFEngine:
    engine = registry.build(
        spec.engine, spec.model, spec.kernel, trace.catalogue, spec.seed, task=spec.task, retrieval=retrieval
    )
    assert isinstance(engine, HFEngine)
    engine.prepare(trace.requests, 4)
    return engine


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_on_a_gpu(model: str) -> None:
    spec, trace, retrieval = cell(model, "bf16")
    spec.engine.device = "cuda"
    engine = build(spec, trace, retrieval)
    result = gate_for(spec, trace, retrieval, engine.actual()).check(engine, 4).to_dict()
    assert result["passed"] and engine.actual()["device"] == "cuda"
    engine.close()
