"""The HSTU models of other owners: each option and each variant against the second implementation in fp64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import hstu_oracle
from helpers.command import Grbench
from helpers.hstu_oracle import error_of_order_one, make_requests
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grengines import registry
from grengines.api import Catalogue, Request, Retrieval, Setup
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.hstu.config import READ, HSTUConfig, stale_states
from grengines.models.hstu.generator import HSTUGenerator, pack_prompts
from grengines.models.hstu.model import HSTURanker
from grengines.models.hstu.reference import RankingReference, zero_attention
from grengines.models.hstu.variant import VARIANTS, Variant, differing
from grengines.models.hstu.weights import save_weights
from grengines.numerics import relative_error
from grengines.runtime.batch import Bucket, Encoding, Layout, pack, pack_slices
from grengines.semantic.ids import SemanticIds
from grkernels import registry as kernel_registry
from grkernels.config import KernelConfig
from grkernels.operators import Operators

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CATALOGUE = Catalogue(num_users=5, num_items=40, num_actions=3)
SIZES: dict[str, Any] = {
    "embedding_dim": 12,
    "heads": 2,
    "qk_dim": 4,
    "v_dim": 3,
    "scaling_seqlen": 32,
    "max_positions": 16,
    "head_dim": 6,
    "time_buckets": 300,
    "tasks": ["a", "b"],
}
PEERS = [name for name in VARIANTS if name != "grbench"]
# One value of every option that is not grbench's own.
OPTIONS: dict[str, Any] = {
    "silu": "uvqk",
    "output": "gate",
    "output_bias": True,
    "group_norm": True,
    "eps": 1e-2,
    "alpha": 0.9,
    "position_bias": True,
    "time_bias": 40,
    "target_group_size": 2,
    "min_full_attn_seq_len": 3,
    "contextual_mask": "causal",
    "contextual_from": 6,
    "contextual_missing": "blank",
    "encoder": "end",
    "actions": "combinations",
    "target_action": True,
    "clock": True,
    "final_norm": "l2",
    "item_tower": "mlp",
    "head": "swish_norm",
    "head_eps": 1e-2,
}
# Likewise of the model's sizes.
OF_SIZES: dict[str, Any] = {
    "layers": 3,
    "embedding_dim": 16,
    "heads": 3,
    "qk_dim": 5,
    "v_dim": 4,
    "scaling_seqlen": 31,
    "max_positions": 17,
    "contextual_seq_len": 2,
    "max_attn_len": 2,
    "time_buckets": 301,
    "embedding_rows": 10,
    "head_dim": 7,
    "interaction": True,
    "tasks": ["c"],
}
NEEDS: dict[str, dict[str, Any]] = {  # what else an option takes to matter
    "min_full_attn_seq_len": {"max_attn_len": 2},
    "contextual_mask": {"contextual_seq_len": 2},
    "contextual_from": {"contextual_seq_len": 2},
    "contextual_missing": {"contextual_seq_len": 2, "contextual_from": 6},
}


def build(config: HSTUConfig, variant: str = "torch", seed: int = 0) -> HSTURanker:
    kernels = Operators.reference()
    if variant != "reference":
        choice = {f: variant if variant in kernel_registry.variants(f) else "torch" for f in kernel_registry.FAMILIES}
        kernels = Operators.of(choice)
    return HSTURanker.build(config, CATALOGUE, kernels, seed=seed, device=DEVICE, dtype=torch.float32)


def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.double().cpu().numpy() for name, p in model.named_parameters()}


def requests_of(sizes: list[tuple[int, int]], seed: int = 0) -> list[Request]:
    return make_requests(np.random.default_rng(seed), CATALOGUE, [h for h, _ in sizes], [t for _, t in sizes])


def answers(model: HSTURanker, requests: list[Request], bucket: Bucket | None = None) -> np.ndarray:
    out: np.ndarray = model(pack(requests, model.encoding, bucket=bucket).to(DEVICE)).cpu().numpy()
    return out


def oracle(model: HSTURanker, requests: list[Request]) -> np.ndarray:
    return np.concatenate([hstu_oracle.scores(weights(model), model.config, CATALOGUE, r) for r in requests])


MIXED = [(11, 5), (0, 2), (4, 0), (7, 3)]


@pytest.mark.parametrize("kernel", ["reference", "torch", "triton"])
@pytest.mark.parametrize("variant", PEERS)
def test_each_variant_equals_the_second_implementation(variant: str, kernel: str) -> None:
    model = build(HSTUConfig(variant=variant, contextual_seq_len=2, **SIZES), kernel)
    requests = requests_of(MIXED)
    expected = oracle(model, requests)
    assert error_of_order_one(answers(model, requests), expected) < 2e-5
    padded = answers(model, requests, Bucket.even(5, 24, 6))
    assert error_of_order_one(padded[: len(expected)], expected) < 2e-5
    # What must be noticed: zeros, the answers of another visit, and attention that returns zeros.
    assert error_of_order_one(np.zeros_like(expected), expected) > 1e-2
    assert error_of_order_one(answers(model, requests_of(MIXED, seed=1)), expected) > 1e-2
    model.kernels = model.kernels.replace(hstu_attention=zero_attention)
    assert error_of_order_one(answers(model, requests), expected) > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_alone_matters_and_equals_the_second_implementation(option: str) -> None:
    config = HSTUConfig(**SIZES, **NEEDS.get(option, {}), **{option: OPTIONS[option]})
    [named] = differing(config.choices, (option,))
    assert named.startswith(f"model.{option}=")
    model, requests = build(config), requests_of(MIXED)
    expected = oracle(model, requests)
    assert error_of_order_one(answers(model, requests), expected) < 2e-5
    default = dataclasses.replace(config, **{option: getattr(Variant(), option)})
    if option == "alpha":
        default = dataclasses.replace(config, alpha=None)
    own = build(default)
    own.load_state_dict(model.state_dict(), strict=False) if _alike(model, own) else None
    assert error_of_order_one(answers(own, requests), expected) > 1e-5


def _alike(one: HSTURanker, other: HSTURanker) -> bool:
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (one, other)]
    return all(shapes[0].get(n) == shape for n, shape in shapes[1].items())


@examples(40)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_options_together_equal_the_second_implementation(data: st.DataObject, seed: int) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(OPTIONS))))
    options = {name: OPTIONS[name] for name in sorted(chosen)}
    config = HSTUConfig(
        **SIZES,
        **options,
        contextual_seq_len=data.draw(st.integers(0, 2)),
        max_attn_len=data.draw(st.sampled_from([0, 2])),
    )
    if config.sparse_contextual and config.choices.contextual_mask == "causal":
        config.contextual_missing = "blank"
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=3))
    model, requests = build(config, data.draw(st.sampled_from(["torch", "reference"])), seed), requests_of(sizes, seed)
    assert error_of_order_one(answers(model, requests), oracle(model, requests)) < 1e-4


@pytest.mark.parametrize("variant", PEERS)
@pytest.mark.parametrize("options", [{}, {"item_tower": "table"}])
def test_the_engine_answers_as_the_reference(variant: str, options: dict[str, str]) -> None:
    model = HSTUConfig(variant=variant, contextual_seq_len=1, **SIZES, **options)
    requests = requests_of(MIXED)
    setup = Setup(model, KernelConfig().requested(), CATALOGUE, 3, CacheConfig())
    engine: Any = registry.make(HSTUEngineConfig(device="cpu", precision="fp32"), setup, "rank")
    engine.prepare(requests, 4)
    try:
        found = np.concatenate(engine.rank(requests).scores)
    finally:
        engine.close()
    expected = np.concatenate(RankingReference(model, CATALOGUE, 3, "cpu").scores(requests))
    assert error_of_order_one(found, expected) < 2e-5
    assert np.linalg.norm(expected) > 0.1


@pytest.mark.parametrize("options", [{"variant": "stu"}, {"variant": "nvidia"}, {"target_group_size": 2}])
def test_candidates_in_microbatches_score_the_same(options: dict[str, Any]) -> None:
    model = build(HSTUConfig(contextual_seq_len=2, **SIZES, **options))
    requests = requests_of([(11, 4), (8, 2)])
    first, *rest = (host.to(DEVICE) for host in pack_slices(Layout.of(requests, model.encoding), 2))
    state = model.prefill(first)
    parts = [model.delta(batch, state, keep=False)[0].cpu().numpy() for batch in rest]
    expected = answers(model, requests)
    order = [0, 1, 4, 5, 2, 3]  # a microbatch has two candidates of each request
    assert error_of_order_one(np.concatenate(parts), expected[order]) < 2e-5


def test_the_research_model_as_a_generator() -> None:
    """The model of the paper's public experiments: the next item by the product of user and item vectors."""
    config = HSTUConfig(variant="research", **SIZES)
    ids = SemanticIds(np.arange(40, dtype=np.int32)[:, None], [40])
    setup = Setup(config, KernelConfig().requested(), CATALOGUE, 5, CacheConfig(), Retrieval(ids, k=5, beam_width=40))
    requests = requests_of([(9, 1), (1, 1), (30, 1)])
    engine: Any = registry.make(HSTUEngineConfig(device="cpu", precision="fp32"), setup, "generate")
    engine.prepare(requests, 3)
    try:
        result = engine.generate(requests)
    finally:
        engine.close()
    model = HSTUGenerator.build(config, [40], Operators.reference(), seed=5, device="cpu", dtype=torch.float32)
    stale = hstu_oracle.next_item_logits(weights(model), config, 40, requests[0])
    for r, items, found in zip(requests, result.items, result.scores, strict=True):
        logits = hstu_oracle.next_item_logits(weights(model), config, 40, r)
        logs = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logs)[:5]
        assert items.tolist() == best.tolist()
        assert error_of_order_one(found, logs[best]) < 2e-5
        assert r is requests[0] or np.argsort(-stale)[:5].tolist() != items.tolist()


@pytest.mark.parametrize("option", [*OPTIONS, *OF_SIZES, "item_norm"])
def test_a_generator_reads_the_options_that_it_says_and_no_others(option: str, tmp_path: Path) -> None:
    """An option that it reads changes its tensors or its logits; of any other, weights of another value load."""
    others = {"item_norm": True, **OF_SIZES, **OPTIONS}
    config = HSTUConfig(**SIZES, layers=1, alpha=0.5)
    changed = dataclasses.replace(config, **{option: others[option]})
    tokens = np.arange(9) % 20

    @torch.inference_mode()
    def generator(config: HSTUConfig, weights: str | None = None) -> tuple[HSTUGenerator, np.ndarray]:
        made: dict[str, Any] = {"seed": 5, "device": "cpu", "dtype": torch.float32, "weights": weights}
        model = HSTUGenerator.build(config, [20], Operators.reference(), **made)
        prompts = pack_prompts([model.prompt(tokens)], timed=model.timed).to("cpu")
        return model, model.logits(model.full(prompts), 0).numpy()

    (own, logits), (other, found) = generator(config), generator(changed)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (own, other)]
    same = shapes[0] == shapes[1] and np.array_equal(logits, found)
    assert same != (option in READ)
    file = str(tmp_path / "weights.safetensors")
    save_weights(own, file)
    if option in READ:
        with pytest.raises(ValueError, match=f"written for {option}="):
            generator(changed, file)
    else:
        assert np.array_equal(generator(changed, file)[1], logits)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.max_attn_len=4"], "model.max_attn_len=4:"),
        (["model.contextual_seq_len=2"], "model.contextual_seq_len=2:"),
        (["model.encoder=end", "model.target_group_size=2"], "model.target_group_size=2, model.encoder=end:"),
        (["model.variant=stu"], "model.encoder=end:"),
    ],
)
def test_to_generate_refuses_what_only_ranking_has(overrides: list[str], named: str, grbench_here: Grbench) -> None:
    words = f"{named} without effect where a model generates"
    with pytest.raises(ConfigError, match=words):
        compose_spec(["engine=hstu", "task=generate", *overrides])
    compose_spec(["engine=pipeline", "engine@engine.retrieve=hstu", *overrides])  # its ranker reads them
    if named.startswith("model.max_attn_len"):
        done = grbench_here("train", "task=generate", "workload=ml_100k", *overrides)
        assert done.returncode and done.stderr.startswith(f"grbench train: {words}")


def test_levels_of_codes_have_no_bias_by_time() -> None:
    with pytest.raises(
        ValueError, match=r"^model.time_bias=129.*2 levels.*set model.time_bias=0, or retrieval.levels=1"
    ):
        HSTUGenerator.build(
            HSTUConfig(variant="research"), [8, 8], Operators.eager(), seed=0, device="cpu", dtype=torch.float32
        )


@pytest.mark.parametrize("variant", PEERS)
@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt", "aoti", "vllm", "hf"])
def test_engines_without_the_options_refuse_and_name_the_one_that_has_them(engine: str, variant: str) -> None:
    model = HSTUConfig(variant=variant)
    why = registry.mismatch(engine, model)
    assert why is not None and f"engine {engine} lacks it" in why and why.endswith("set engine=hstu for this model")
    assert all(option in why for option in differing(model.choices))
    assert registry.mismatch(engine, HSTUConfig()) is None
    assert "model.position_bias=true: engine" in str(registry.mismatch(engine, HSTUConfig(position_bias=True)))
    assert registry.mismatch(engine, HSTUConfig(alpha=0.1)) is None  # every engine takes it
    assert registry.mismatch("hstu", model) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"encoder": "end"}, "model.encoder=end counts positions and times back"),
        ({"time_bias": 20}, "model.time_bias=20 looks at the event that follows"),
        ({"min_full_attn_seq_len": 2, "max_attn_len": 3}, "model.min_full_attn_seq_len=2 widens the window"),
        ({"contextual_from": 3, "contextual_seq_len": 1}, "model.contextual_from=3 changes a user's first tokens"),
    ],
)
def test_the_cache_refuses_what_the_next_visit_makes_stale(options: dict[str, Any], reason: str) -> None:
    model = HSTUConfig(**SIZES, **options)
    setup = Setup(model, KernelConfig().requested(), CATALOGUE, 3, PagedCacheConfig(memory_gb=0.01))
    with pytest.raises(ValueError, match=reason) as refused:
        registry.make(HSTUEngineConfig(device="cpu"), setup, "rank")
    assert "set cache=none" in str(refused.value)
    assert stale_states(HSTUConfig(**SIZES, position_bias=True, silu="uvqk", output="gate", clock=True)) is None


@pytest.mark.parametrize(
    "options", [{"encoder": "end"}, {"time_bias": 300}, {"min_full_attn_seq_len": 2, "max_attn_len": 2}]
)
def test_what_is_refused_would_be_wrong(options: dict[str, Any]) -> None:
    """Append an event to a kept state, which grbench's own encoding allows: only there are the answers right."""

    def appended(config: HSTUConfig) -> float:
        model = build(config)
        [now] = requests_of([(9, 3)])
        history = {f: getattr(now, f)[:8] for f in now.__dataclass_fields__ if f.startswith("history_")}
        before = dataclasses.replace(now, **history, timestamp=int(now.history_timestamps[7]) + 10)
        state = model.prefill(pack([before], model.encoding, candidates=slice(0)).to(DEVICE))
        batch = pack([now], model.encoding, cached=[8])
        if model.config.choices.time_bias:  # the keys that were kept have no times: give them the right ones
            whole = pack([now], model.encoding).to(DEVICE)
            moved = dataclasses.replace(batch.to(DEVICE), times=whole.times)
            logits = model.delta(moved, state, keep=False)[0]
        else:
            logits = model.delta(batch.to(DEVICE), state, keep=False)[0]
        return error_of_order_one(logits.cpu().numpy(), answers(model, [now]))

    assert appended(HSTUConfig(**SIZES)) < 1e-5
    assert appended(HSTUConfig(**SIZES, **options)) > 1e-5


@pytest.mark.parametrize("variant", ["nvidia", "grbench"])
def test_a_cache_of_states_answers_as_the_reference(variant: str) -> None:
    """A layer of others over the pages of the KV cache: the second visit has new events and clock features."""
    model = HSTUConfig(variant=variant, clock=True, position_bias=True, max_attn_len=3, **SIZES)
    [now] = requests_of([(14, 4)])
    history = {f: getattr(now, f)[:9] for f in now.__dataclass_fields__ if f.startswith("history_")}
    visits = [dataclasses.replace(now, request_id=1, **history), dataclasses.replace(now, request_id=2)]
    setup = Setup(model, KernelConfig().requested(), CATALOGUE, 3, PagedCacheConfig(memory_gb=0.01, page=16))
    engine: Any = registry.make(HSTUEngineConfig(device="cpu", precision="fp32"), setup, "rank")
    reference = RankingReference(model, CATALOGUE, 3, "cpu")
    engine.prepare(visits, 1)
    try:
        engine.reset_cache()
        for visit in visits:
            result = engine.rank([visit])
            assert error_of_order_one(result.scores[0], reference.scores([visit])[0]) < 2e-5
        assert result.cached[0].tokens == 9
    finally:
        engine.close()


def test_training_refuses_what_it_lacks(grbench_here: Grbench) -> None:
    done = grbench_here("train", "model.variant=nvidia")
    assert done.returncode
    assert "model.silu=uvqk" in done.stderr and "set model.variant=grbench" in done.stderr
    done = grbench_here("train", "model.alpha=0.1", "workload=synthetic")
    assert done.returncode and done.stderr.startswith("grbench train: workload=synthetic: its events are random")


def test_options_that_exclude_each_other_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"interaction": True, "encoder": "end"}, "model.interaction=true and model.encoder=end"),
        ({"interaction": True, "item_tower": "mlp"}, "model.interaction=true and model.item_tower=mlp"),
        ({"contextual_seq_len": 1, "contextual_from": 1, "contextual_mask": "causal"}, "model.contextual_missing=none"),
    ]
    [spec] = [s for s in registry.model_specs() if s.kind == "hstu"]
    for options, words in cases:
        assert (spec.contradiction(HSTUConfig(**options)) or "").startswith(words)
    for name in VARIANTS:
        assert spec.contradiction(HSTUConfig(variant=name, contextual_seq_len=1)) is None
    with pytest.raises(ValueError, match=r"7 actions; allowed are at most 5.*model.actions=bits"):
        Encoding.of(HSTUConfig(variant="stu"), Catalogue(1, 1, 7))


def test_the_default_model_calls_attention_and_the_gate_as_before() -> None:
    """No argument and no array is added where every option is grbench's own."""
    model, seen = build(HSTUConfig(contextual_seq_len=2, **SIZES)), []
    eager = model.kernels

    def watch(family: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            seen.append((family, sorted(options)))
            return getattr(eager, family)(*args, **options)

        return call

    model.kernels = eager.replace(**{f: watch(f) for f in ("hstu_attention", "norm_gate", "layer_norm")})
    host = pack(requests_of([(8, 2)]), model.encoding)
    model(host.to(DEVICE))
    assert all("extras" not in options for _, options in seen)
    assert {tuple(o) for f, o in seen if f == "norm_gate"} == {("eps",)}
    assert len(seen) == 3 * 2 + 1  # two layers and the final norm
    assert not {"times", "until", "num_contextuals"} & set(host.sizes)


def in_half_precision(variant: str, device: str, **options: Any) -> None:
    """The family's rule: at most twice the error of the rounded reference, and far from attention that is zero."""
    kernels = KernelConfig(name=options.pop("kernel", "auto")).requested()
    sizes = SIZES | {"embedding_dim": 64, "qk_dim": 32, "v_dim": 16, "head_dim": 32}
    model = HSTUConfig(variant=variant, contextual_seq_len=1, target_group_size=2, **sizes)
    requests = requests_of([(30, 5), (0, 2), (9, 4), (17, 8)])
    reference = RankingReference(model, CATALOGUE, 3, device)
    precision = options.get("precision", "bf16")
    exact = np.concatenate(reference.scores(requests))
    rounding = relative_error(np.concatenate(reference.scores(requests, precision)), exact)
    engine: Any = registry.make(
        HSTUEngineConfig(**{"device": device, "precision": precision, **options}),
        Setup(model, kernels, CATALOGUE, 3, CacheConfig()),
        "rank",
    )
    engine.prepare(requests, 4)
    try:
        found = np.concatenate(engine.rank(requests).scores)
    finally:
        engine.close()
    allowed = max(2 * rounding, 2e-5)
    assert relative_error(found, exact) <= allowed
    without = np.concatenate(reference.scores(requests, attention=zero_attention))
    assert relative_error(without, exact) > 2 * allowed


@pytest.mark.parametrize("variant", PEERS)
def test_half_precision_is_within_twice_the_rounded_reference(variant: str) -> None:
    in_half_precision(variant, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", PEERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kernel", ["auto", "torch", "triton"])
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_on_a_gpu(variant: str, precision: str, kernel: str, graphs: str) -> None:
    in_half_precision(variant, "cuda", kernel=kernel, precision=precision, cuda_graphs=graphs)
