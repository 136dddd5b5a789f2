"""engine.precision=fp8: the native engine's products in fp8, its gate, and wrong weights and scales that must fail."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fp8_attention import attended, emulated, operands
from helpers.gated import built, run_cell
from helpers.hstu_oracle import make_requests
from safetensors import safe_open
from safetensors.torch import save_file

from grbench import workloads
from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.execution.records import Outcome
from grengines.api import Catalogue, Setup, UnavailableError
from grengines.cache.config import CacheConfig, PagedCacheConfig
from grengines.hstu.config import FP8_STEP, HSTUEngineConfig
from grengines.hstu.engine import HSTUEngine
from grengines.models.hstu import calibration
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.fp8 import Product, use_fp8
from grengines.models.hstu.model import HSTURanker, build_model
from grengines.models.hstu.reference import RankingReference
from grengines.models.hstu.weights import save_weights
from grengines.numerics import IncorrectError, relative_error
from grkernels import fp8
from grkernels.choice import requested
from grkernels.fp8 import Scaled
from grkernels.hstu_attention.fp8_operands import Operands
from grkernels.hstu_attention.fp8_projection import blocks_of, project
from grkernels.rounding import through_pages
from grkernels.variant import Projected

BASE = [
    "model=hstu_tiny",
    "engine=hstu",
    "engine.precision=fp8",
    "workload=synthetic",
    "workload.max_requests=96",
    "workload.max_history=200",
    "workload.history_median=100",
    "workload.revisit_rate=0.8",
    "workload.num_candidates=8",
    "scenario=closed_loop",
    "scenario.clients=1",
    "scenario.max_batch=8",
    "scenario.queries=96",
    "gate.measured=32",
    "warmup_batches=0",
]
ON_CPU = [*BASE, "engine.device=cpu", "engine.cpu_threads=1"]
CATALOGUE = Catalogue(num_users=30, num_items=400, num_actions=4)
MODEL = HSTUConfig(embedding_dim=32, layers=2, heads=2, qk_dim=16, v_dim=8, head_dim=16, scaling_seqlen=128)
REQUESTS = [
    dataclasses.replace(r, user_id=i)
    for i, r in enumerate(make_requests(np.random.default_rng(0), CATALOGUE, [60, 3, 25], [6, 9, 2]))
]


@pytest.fixture
def cell(tmp_path: Path) -> Callable[[list[str]], Outcome]:
    return partial(run_cell, tmp_path)


CACHES = {"none": ["cache=none"], "lru": ["cache=lru"], "int8": ["cache=lru", "cache.precision=int8"]}


def expect_right(outcome: Outcome, cache: str) -> None:
    gate = outcome.gate
    errors = [gate[name] for name in ("error", "error_after", "error_again", "error_from_host") if name in gate]
    assert len(errors) == (2 if cache == "none" else 4) and 0 < max(errors) <= gate["tolerance"]
    assert gate["tolerance"] <= 2 * gate["rounding_error"] and gate["measured"]["passed"]
    assert min(gate["zero_attention_error"], gate["stale_error"]) > 2 * gate["tolerance"]
    assert outcome.metrics.get("engine/cache_faults", 0) == 0


@pytest.mark.parametrize("cache", CACHES)
def test_a_cell_passes_its_gate(cell: Callable[[list[str]], Outcome], cache: str) -> None:
    outcome = cell([*ON_CPU, *CACHES[cache]])
    expect_right(outcome, cache)
    actual = outcome.actual
    assert (actual["precision"], actual["fp8_products"]) == ("fp8", "emulated by PyTorch in fp32")
    assert any(note.startswith("engine.precision=fp8 is emulated") for note in outcome.notes)


def test_a_pipeline_ranks_in_fp8_and_says_so(cell: Callable[[list[str]], Outcome]) -> None:
    words = [word for word in ON_CPU if not word.startswith(("engine", "workload.num", "model"))]
    stages = ["engine=pipeline", "engine@engine.retrieve=hstu", "engine.rank.precision=fp8", "retrieval.levels=2"]
    sizes = ["retrieval.k=4", "retrieval.beam_width=8", "scenario.queries=8", "gate.measured=8"]
    outcome = cell([*words, *stages, *sizes])
    assert outcome.gate["passed"] and outcome.actual["rank"]["precision"] == "fp8"
    assert any(note.startswith("engine.precision=fp8 is emulated") for note in outcome.notes)


def engine_of(
    model: HSTUConfig = MODEL, kernel: str = "torch", cache: Any = None, microbatch: int = 0, precision: str = "fp8"
) -> HSTUEngine:
    options = HSTUEngineConfig(device="cpu", precision=precision, candidate_microbatch=microbatch)
    names = requested("torch", dict.fromkeys(("layer_norm", "norm_gate", "quantise"), kernel))
    engine = HSTUEngine(options, Setup(model, names, CATALOGUE, 5, cache or CacheConfig()))
    engine.prepare(REQUESTS, len(REQUESTS))
    return engine


MODELS = {
    "grbench": {},
    "interaction": {"interaction": True},  # 38 numbers for the head, which is no multiple of 16
    "contextual": {"contextual_seq_len": 3, "max_attn_len": 20},
    "nvidia": {"variant": "nvidia", "group_norm": True},
    "research": {"variant": "research"},
    "tower": {"variant": "stu", "interaction": False},
}


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_error_is_at_most_twice_that_of_the_emulation(kind: str, kernel: str) -> None:
    model = dataclasses.replace(MODEL, **MODELS[kind])
    reference = RankingReference(model, CATALOGUE, 5, "cpu")
    expected, emulated = (np.concatenate(reference.scores(REQUESTS, p)) for p in ("fp32", "fp8"))
    rounding = relative_error(emulated, expected)
    engine = engine_of(model, kernel)
    error = relative_error(np.concatenate(engine.rank(REQUESTS).scores), expected)
    assert 0 < error <= 2 * rounding
    half = engine_of(model, kernel, precision="bf16")
    assert relative_error(np.concatenate(half.rank(REQUESTS).scores), expected) < error / 2  # fp8 really ran
    engine.close()
    half.close()


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_caches_and_slices_give_the_same_answers(kernel: str) -> None:
    """A row's operand depends on nothing but the row, so what is cached is what would be computed."""
    whole = engine_of(kernel=kernel)
    expected = np.concatenate(whole.rank(REQUESTS).scores)
    reference = np.concatenate(RankingReference(MODEL, CATALOGUE, 5, "cpu").scores(REQUESTS))
    pages = PagedCacheConfig("lru", "lru", page=16, memory_gb=0.001)
    for cache, microbatch in ((None, 4), (pages, 0), (pages, 4)):
        engine = engine_of(kernel=kernel, cache=cache, microbatch=microbatch)
        for _ in range(2):  # the second time from pages
            scores = np.concatenate(engine.rank(REQUESTS).scores)
            # Only bf16 sums in another order differ: far less than fp8 loses.
            assert relative_error(scores, expected) < relative_error(expected, reference) / 2
        engine.close()
    whole.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """The products of every engine that is prepared in the test."""
    found: list[Product] = []

    def keep(model: HSTURanker) -> None:
        use_fp8(model)
        found.extend(m for m in model.modules() if isinstance(m, Product))

    monkeypatch.setattr("grengines.hstu.engine.use_fp8", keep)
    return found


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """The option with weights whose output channels differ in size, as those of trained weights do.

    Random weights are uniform: channels' scales differ by 1 or 2%, so another one's costs no more than rounding.
    """
    spec = compose_spec(ON_CPU)[0]
    catalogue = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms).catalogue
    model = build_model(spec.model, catalogue, spec.seed, "cpu", torch.float32)
    for linear in (model.head_hidden, *(p for layer in model.layers for p in (layer.uvqk, layer.out))):
        linear.weight.mul_(2.0 ** (torch.arange(len(linear.weight)) % 3 - 1)[:, None])
    save_weights(model, tmp_path / "uneven.safetensors")
    return f"model.weights={tmp_path / 'uneven.safetensors'}"


def rolled(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.view(torch.uint8).roll(1, axis).view(x.dtype) if x.itemsize == 1 else x.roll(1, axis)


# Faults of weights. Those of the last layer's u, v, q and k are views of the same memory.
WRONG_WEIGHTS: dict[str, Callable[[Product], Any]] = {
    "zeros": lambda p: p.weight.view(torch.uint8).zero_(),
    "another channel's": lambda p: p.weight.copy_(rolled(p.weight, 0)),
    "twice the scale": lambda p: p.scales.mul_(2),
    "another channel's scale": lambda p: p.scales.copy_(rolled(p.scales, 1)),
    "no scale": lambda p: p.scales.fill_(1.0),
}
# Faults of operands.
WRONG_ROWS: dict[str, Callable[[Scaled], Scaled]] = {
    "zeros": lambda x: Scaled(x.values, torch.zeros_like(x.scales)),
    "another row's": lambda x: Scaled(rolled(x.values, 0), rolled(x.scales, 0)),
    "another row's scale": lambda x: Scaled(x.values, rolled(x.scales, 0)),
    "no scale": lambda x: Scaled(x.values, torch.ones_like(x.scales)),
}


def expect_failure(gate: Any, engine: Any, name: str) -> None:
    """Ask for an error beyond twice the tolerance, as that of zeros and of stale answers must be."""
    with pytest.raises(IncorrectError, match="differ from the fp32 reference") as caught:
        gate.check(engine, 8)
        pytest.fail(name)
    assert caught.value.result is not None and caught.value.result.error > 2 * gate.tolerance, name


def expect_wrong_weights_to_fail(made: list[Product], engine: Any, gate: Any) -> None:
    """Plant each fault in one product at a time."""
    gate.check(engine, 8)
    for (i, p), (name, change) in itertools.product(enumerate(made), WRONG_WEIGHTS.items()):
        before = p.weight.clone(), p.scales.clone()
        with torch.inference_mode():
            change(p)
        engine.reset_cache()
        expect_failure(gate, engine, f"{name} of product {i}")
        with torch.inference_mode():
            p.weight.copy_(before[0])
            p.scales.copy_(before[1])
    engine.reset_cache()
    gate.check(engine, 8)


def expect_wrong_rows_to_fail(
    wrong: Callable[[Scaled], Scaled], spared: list[torch.Tensor], engine: Any, gate: Any, name: str
) -> None:
    """Plant a fault in the operands of all products but those with the spared weights."""
    right = fp8.product

    def faulty(x: Scaled, weight: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        return right(x if any(weight is w for w in spared) else wrong(x), weight, *others, **options)

    engine.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "product", faulty)
        expect_failure(gate, engine, name)


@pytest.mark.parametrize("cache", ["none", "lru"])
def test_wrong_weights_and_scales_fail_the_gate(cache: str, uneven: str, made: list[Product]) -> None:
    spec, engine, gate = built([*ON_CPU, uneven, f"cache={cache}"])
    assert len(made) == 2 * spec.model.layers + 1
    expect_wrong_weights_to_fail(made, engine, gate)
    wholes = [p.weight for p in made]
    for name, wrong in WRONG_ROWS.items():
        expect_wrong_rows_to_fail(wrong, [], engine, gate, name)
        if name != "another row's scale":  # behind a LayerNorm rows are about equally large, and so are their scales
            expect_wrong_rows_to_fail(wrong, wholes, engine, gate, f"{name} of u, v, q and k in the last layer")
    engine.close()


def test_stale_operands_fail_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product of a batch gets what the one before it of its size got."""
    _, engine, gate = built([*ON_CPU, "cache=none"])
    right, kept = fp8.product, {}

    def stale(x: Scaled, *args: Any, **options: Any) -> torch.Tensor:
        before = kept.get(x.values.shape, x)
        kept[x.values.shape] = x
        return right(before, *args, **options)

    monkeypatch.setattr(fp8, "product", stale)
    with pytest.raises(IncorrectError, match="differ from the fp32 reference"):
        gate.check(engine, 8)
    engine.close()


def test_weights_take_half_of_the_bytes_and_count_as_parameters() -> None:
    models = [build_model(MODEL, CATALOGUE, 5, "cpu", torch.bfloat16) for _ in range(2)]
    use_fp8(models[1])
    sizes, counts = (
        [sum(f(p) for name, p in m.named_parameters() if ".norm" not in name and p.dim() == 2) for m in models]
        for f in (lambda p: p.nbytes, lambda p: p.numel())
    )
    products = sum(m.weight.numel() for m in models[1].modules() if isinstance(m, Product))
    assert sizes[0] - sizes[1] == products > 0 and counts[0] == counts[1]
    assert "fp8_products" not in engine_of(precision="bf16").actual()


# Weights in e4m3 in a file.


def scores_of(weights: Path, precision: str) -> np.ndarray:
    engine = engine_of(dataclasses.replace(MODEL, weights=str(weights)), precision=precision)
    scores = np.concatenate(engine.rank(REQUESTS).scores)
    engine.close()
    return scores


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file of weights and the same in e4m3."""
    model = build_model(MODEL, CATALOGUE, 5, "cpu", torch.float32)
    model.layers[0].uvqk.weight[3] *= 50
    paths = tmp_path / "wide.safetensors", tmp_path / "e4m3.safetensors"
    save_weights(model, paths[0], facts={"kept": "yes"})
    calibration.write(*paths)
    return paths


def test_a_file_in_e4m3_gives_the_answers_of_the_one_that_it_was_made_of(files: tuple[Path, Path]) -> None:
    """Bit by bit: rounding what is rounded already changes nothing, though the loader's bf16 stands between."""
    wide, small = files
    assert np.array_equal(scores_of(small, "fp8"), scores_of(wide, "fp8"))
    assert not np.array_equal(scores_of(small, "bf16"), scores_of(wide, "bf16"))
    models = [
        build_model(dataclasses.replace(MODEL, weights=str(p)), CATALOGUE, 5, "cpu", torch.bfloat16) for p in files
    ]
    for model in models:
        use_fp8(model)
    products = [[m for m in model.modules() if isinstance(m, Product)] for model in models]
    for a, b in zip(*products, strict=True):
        assert torch.equal(a.weight.view(torch.uint8), b.weight.view(torch.uint8)) and torch.equal(a.scales, b.scales)
    with safe_open(str(small), framework="pt") as f:
        assert f.metadata()["kept"] == "yes"
        assert sum(f.get_tensor(name).dtype is fp8.DTYPE for name in f.keys()) == len(products[0])  # noqa: SIM118
    with pytest.raises(ValueError, match=r"e4m3\.safetensors: tensor head_hidden\.weight is in e4m3 already"):
        calibration.write(small, wide)


SPOILED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no scales": (
        lambda t: t.pop("layers.1.out.weight_scales"),
        r"layers\.1\.out\.weight is in e4m3 without .*_scales",
    ),
    "other scales": (
        lambda t: t.update({"layers.1.out.weight_scales": torch.ones(1, 1)}),
        r"layers\.1\.out\.weight_scales \[32, 1\]; run `grbench quantise`",
    ),
    "NaN": (
        lambda t: t["layers.0.uvqk.weight_scales"].fill_(torch.nan),
        r"layers\.0\.uvqk\.weight has NaN or infinity",
    ),
    "a table": (
        lambda t: t.update({"token_table": t["token_table"].to(fp8.DTYPE)}),
        r"token_table is F8_E4M3, expected floating point",
    ),
    "scales of nothing": (lambda t: t.update({"x_scales": torch.ones(1)}), "unexpected tensor x_scales"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_spoiled_file_in_e4m3_is_refused(fault: str, files: tuple[Path, Path]) -> None:
    spoil, line = SPOILED[fault]
    with safe_open(str(files[1]), framework="pt") as f:
        metadata, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    spoil(tensors)
    save_file(tensors, str(files[1]), metadata=metadata)
    with pytest.raises(ValueError, match=line):
        build_model(dataclasses.replace(MODEL, weights=str(files[1])), CATALOGUE, 5, "cpu", torch.bfloat16)


def test_outliers_and_errors_are_those_of_the_numbers(files: tuple[Path, Path], tmp_path: Path) -> None:
    losses = calibration.write(files[0], tmp_path / "again.safetensors")
    with safe_open(str(files[0]), framework="pt") as f:
        for name, loss in losses.items():
            w = f.get_tensor(name)
            assert loss.error == pytest.approx(relative_error(through_pages(w, "fp8"), w), rel=0.05)
            one = relative_error(through_pages(w.view(1, -1), "fp8").view_as(w), w)
            assert loss.error_of_one_scale == pytest.approx(one, rel=0.05)
    assert losses["layers.0.uvqk.weight"].spread > 20 > 2 > losses["layers.1.uvqk.weight"].spread

    model = build_model(dataclasses.replace(MODEL, weights=str(files[0])), CATALOGUE, 5, "cpu", torch.float32)
    before = model.kernels, model.computed
    usual = calibration.operands(model, REQUESTS)
    assert usual.keys() == losses.keys() and (model.kernels, model.computed) == before
    assert all(0.01 < loss.error < 0.04 and loss.spread >= 1 for loss in usual.values())
    with torch.inference_mode():
        model.layers[1].norm.weight[2] *= 300  # one number of each row
    planted = calibration.operands(model, REQUESTS)
    name = "layers.1.uvqk.weight"
    assert planted[name].outlier > 1.3 * usual[name].outlier
    assert planted["layers.0.uvqk.weight"] == usual["layers.0.uvqk.weight"]


# What can't be is refused before anything runs.


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.head_dim=40"], r"engine\.precision=fp8 and model\.head_dim=40: allowed are multiples of 16"),
        (["model.v_dim=20", "model.heads=2"], r"fp8 and model\.heads x model\.v_dim=40: .*set engine\.precision=bf16"),
        (
            ["task=generate", "engine.precision=bf16", "kernel=fp8"],
            r"kernel\.hstu_attention=fp8: engines that search can't have it; use engine=hstu with task=rank",
        ),
        (["engine=aoti"], r"engine\.precision=fp8: allowed is one of auto, fp32, fp16, bf16"),
    ],
)
def test_what_products_in_fp8_can_not_have_is_named(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        compose_spec([*ON_CPU, *words])


def test_generation_refuses(grbench_here: Any) -> None:
    done = grbench_here("engine=hstu", "task=generate", "engine.precision=fp8", "workload=synthetic")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "engine.precision=fp8 is for ranking; set engine.precision=bf16, or task=rank" in done.stderr


def test_a_gpu_without_e4m3_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "refusal", lambda: "NVIDIA A100 has compute capability 8.0")
    monkeypatch.setattr("grengines.runtime.device.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("grengines.runtime.device.torch.cuda.current_device", lambda: 0)
    setup = Setup(MODEL, requested("torch"), CATALOGUE, 5, CacheConfig())
    with pytest.raises(UnavailableError, match=r"fp8: NVIDIA A100 .*; set engine\.precision=bf16"):
        HSTUEngine(HSTUEngineConfig(precision="fp8"), setup)


def test_the_step_is_that_of_the_kernels() -> None:
    assert FP8_STEP == fp8.STEP


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kernel", ["auto", "torch", "triton"])
@pytest.mark.parametrize("graphs", ["true", "false"])
def test_on_a_gpu(cell: Callable[[list[str]], Outcome], graphs: str, kernel: str, cache: str) -> None:
    if kernel == "torch" and graphs == "true" and cache != "none":
        pytest.skip("eager writes of pages wait for the device")
    words = [*BASE, f"kernel={kernel}", f"engine.cuda_graphs={graphs}", "model.qk_dim=64", "model.v_dim=64"]
    outcome = cell([*words, *CACHES[cache]])
    expect_right(outcome, cache)
    assert outcome.actual["fp8_products"] == fp8.runs_as("cuda") and not outcome.actual["notes"]
    assert outcome.actual["cuda_graphs"] == graphs


@pytest.mark.gpu
def test_wrong_weights_fail_on_a_gpu(uneven: str, made: list[Product]) -> None:
    """In captured graphs, which read the weights that are there at the time."""
    _, engine, gate = built([*BASE, uneven, "cache=none", "engine.cuda_graphs=true"])
    expect_wrong_weights_to_fail(made, engine, gate)
    engine.close()


# Attention in e4m3: kernel.hstu_attention=fp8.

WIDE = dataclasses.replace(MODEL, qk_dim=64, v_dim=64)


def attend(wrong: Callable[[Operands], Operands] = lambda made: made) -> Any:
    """The kernel's formulas, with operands that `wrong` may spoil."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        given = {"q": q, "k": k, "v": v, **options}
        return emulated(given, wrong(operands(given)))

    return attention


def test_the_gate_allows_what_attention_in_fp8_loses() -> None:
    """And no zeros, nor scales that are not applied. Every layer runs, the last one for candidates alone."""
    from grbench.gate.rank import RankGate

    spec = dataclasses.replace(compose_spec(ON_CPU)[0], model=WIDE, seed=5)
    half, fp8_attention, all_in_fp8 = (
        RankGate(spec, CATALOGUE, REQUESTS, "cpu", precision, fp8_attention=eight_bits)
        for precision, eight_bits in (("bf16", False), ("bf16", True), ("fp8", True))
    )
    assert all_in_fp8.tolerance > fp8_attention.tolerance > 2 * half.tolerance
    wrong: dict[str, Any] = {
        "right": attend(),
        "zeros": attend(lambda made: dataclasses.replace(made, rows=torch.zeros_like(made.rows))),
        "no scales": attend(lambda made: dataclasses.replace(made, rows=torch.ones_like(made.rows))),
    }
    for name, attention in wrong.items():
        engine = HSTUEngine(
            HSTUEngineConfig(device="cpu", precision="bf16"),
            Setup(WIDE, requested("torch"), CATALOGUE, 5, CacheConfig()),
        )
        engine.operators = engine.operators.replace(hstu_attention=attention)
        engine.prepare(REQUESTS, len(REQUESTS))
        if name == "right":
            assert fp8_attention.check(engine, 8).error > half.tolerance / 2
        else:
            with pytest.raises(IncorrectError, match="differ from the fp32 reference"):
                fp8_attention.check(engine, 8)
        engine.close()


def projected(spoil: Callable[[Operands], Operands] = lambda made: made) -> Projected:
    """The projection in Triton's interpreter, with the kernel's formulas behind it."""

    def projected_operands(*args: Any, **options: Any) -> tuple[torch.Tensor, Operands]:
        u, made = project(*args, **options)
        return u, spoil(made)

    return Projected(blocks_of, projected_operands, attended)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_projection_writes_the_operands_of_attention(precision: str) -> None:
    """It passes the gate of attention in fp8. Operands without scales of blocks, or zeros, don't."""
    from grbench.gate.rank import RankGate

    spec = dataclasses.replace(compose_spec(ON_CPU)[0], model=WIDE, seed=5)
    gate = RankGate(spec, CATALOGUE, REQUESTS, "cpu", precision, fp8_attention=True)
    half = RankGate(spec, CATALOGUE, REQUESTS, "cpu", precision, fp8_attention=False)
    wrong: dict[str, Callable[[Operands], Operands]] = {
        "right": lambda made: made,
        "no scales": lambda made: dataclasses.replace(made, blocks=torch.ones_like(made.blocks)),
        "zeros": lambda made: dataclasses.replace(made, blocks=torch.zeros_like(made.blocks)),
    }
    for name, spoil in wrong.items():
        options = HSTUEngineConfig(device="cpu", precision=precision)
        engine = HSTUEngine(options, Setup(WIDE, requested("torch"), CATALOGUE, 5, CacheConfig()))
        engine.operators.projected_attention = projected(spoil)
        engine.prepare(REQUESTS, len(REQUESTS))
        if name == "right":
            assert gate.check(engine, 8).error > half.tolerance / 4
        else:
            with pytest.raises(IncorrectError, match="differ from the fp32 reference"):
                gate.check(engine, 8)
        engine.close()


def test_kept_keys_have_no_operands_of_the_projection() -> None:
    """A cache's pages and the parts of a split batch need keys and values in the model's dtype."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the projection wrote operands")

    engine = HSTUEngine(
        HSTUEngineConfig(device="cpu", precision="bf16", candidate_microbatch=1),
        Setup(WIDE, requested("torch"), CATALOGUE, 5, CacheConfig()),
    )
    engine.operators.projected_attention = Projected(never, never, never)
    engine.prepare(REQUESTS, len(REQUESTS))
    assert len(engine.rank(REQUESTS).scores) == len(REQUESTS)
    engine.close()
    # An attention that replaces the variant's has its operands from nobody.
    assert engine.operators.replace(hstu_attention=attend()).projected_attention is None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_cell_with_attention_in_fp8(cell: Callable[[list[str]], Outcome], precision: str) -> None:
    sizes = ["model.qk_dim=64", "model.v_dim=64", f"engine.precision={precision}"]
    outcome = cell([*BASE, *sizes, "engine.device=cuda", "kernel.hstu_attention=fp8"])
    expect_right(outcome, "none")
    assert outcome.actual["attention_precision"] == outcome.actual["kernels"]["hstu_attention"] == "fp8"
    assert outcome.actual["attention_operands"] == "projection"
