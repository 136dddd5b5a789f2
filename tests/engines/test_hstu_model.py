"""The model against a second implementation in fp64, its forms against each other, its weights files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import hstu_oracle
from helpers.hstu_oracle import error_of_order_one, make_requests
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from grengines.api import Catalogue, Request
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import HSTURanker, UserState
from grengines.models.hstu.reference import zero_attention
from grengines.models.hstu.weights import load_weights, save_weights
from grengines.numerics import relative_error
from grengines.runtime.batch import Bucket, Encoding, HostBatch, pack
from grkernels.operators import Operators

CPU = torch.device("cpu")
CATALOGUE = Catalogue(num_users=5, num_items=40, num_actions=3)
SMALL = HSTUConfig(embedding_dim=12, heads=2, qk_dim=4, v_dim=3, scaling_seqlen=32, max_positions=16, head_dim=6)


def build(config: HSTUConfig = SMALL, *, seed: int = 0, kernels: Operators | None = None, **changes: Any) -> HSTURanker:
    dtype = changes.pop("dtype", torch.float32)
    config = dataclasses.replace(config, **changes)
    return HSTURanker.build(config, CATALOGUE, kernels or Operators.eager(), seed=seed, device="cpu", dtype=dtype)


def weights(model: HSTURanker) -> dict[str, Any]:
    return {name: p.double().numpy() for name, p in model.named_parameters()}


def full(model: HSTURanker, requests: list[Request]) -> np.ndarray:
    return model(pack(requests, model.encoding).to(CPU)).numpy()


def requests_of(lengths: list[int], targets: list[int], seed: int = 0) -> list[Request]:
    return make_requests(np.random.default_rng(seed), CATALOGUE, lengths, targets)


def shorter(r: Request, events: int, **changes: Any) -> Request:
    """Return the request as it was after fewer events."""
    history = {f: getattr(r, f)[:events] for f in r.__dataclass_fields__ if f.startswith("history_")}
    return dataclasses.replace(r, **history, **changes)


configs = st.builds(
    HSTUConfig,
    layers=st.integers(1, 2),
    embedding_dim=st.sampled_from([8, 12]),
    heads=st.integers(1, 3),
    qk_dim=st.integers(1, 5),
    v_dim=st.integers(1, 5),
    contextual_seq_len=st.integers(0, 2),
    max_attn_len=st.sampled_from([0, 0, 1, 3]),
    alpha=st.sampled_from([None, 0.3]),
    scaling_seqlen=st.sampled_from([8, 500]),
    max_positions=st.sampled_from([2, 5, 64]),  # fewer than events: later ones share the last
    time_buckets=st.sampled_from([3, 32]),
    embedding_rows=st.sampled_from([7, 1000]),  # fewer than items: they share rows
    head_dim=st.just(5),
    interaction=st.booleans(),
    tasks=st.sampled_from([["a"], ["a", "b"]]),
)
visits = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=3)


@examples(60)
@given(config=configs, sizes=visits, seed=st.integers(0, 2**20), form=st.sampled_from(["torch", "reference", "bucket"]))
def test_equals_the_second_implementation(
    config: HSTUConfig, sizes: list[tuple[int, int]], seed: int, form: str
) -> None:
    requests = requests_of([h for h, _ in sizes], [t for _, t in sizes], seed)
    model = build(config, seed=seed, kernels=Operators.reference() if form == "reference" else None)
    expected = np.concatenate([hstu_oracle.scores(weights(model), config, CATALOGUE, r) for r in requests])
    bucket = Bucket.even(4, 16, 5) if form == "bucket" else None
    host = pack(requests, model.encoding, bucket=bucket)
    logits = model(host.to(CPU)).numpy()
    assert len(logits) == (4 * 5 if bucket else len(expected))
    assert host.tokens == sum(config.contextual_seq_len + h + t for h, t in sizes)
    assert host.padded_tokens == (4 * 16 if bucket else host.tokens)
    assert error_of_order_one(logits[: len(expected)], expected) < 1e-4


@examples(30)
@given(
    config=configs.filter(lambda c: c.contextual_seq_len == 0),
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_new_events_and_candidates_over_cached_ones_equal_the_full_form(
    config: HSTUConfig, sizes: list[tuple[int, int, int]], seed: int
) -> None:
    """Encode a prefill, a visit with new events, and a visit to the state that this leaves."""
    model = build(config, seed=seed)
    requests = requests_of([s + d for s, d, _ in sizes], [t for *_, t in sizes], seed)
    before = [shorter(r, s) for r, (s, _, _) in zip(requests, sizes, strict=True)]
    between = [shorter(r, s + d // 2) for r, (s, d, _) in zip(requests, sizes, strict=True)]

    def events(rs: list[Request]) -> list[int]:
        return [len(r.history_items) for r in rs]

    state: UserState | None = model.prefill(pack(before, model.encoding, candidates=slice(0)).to(CPU))
    for now, then in ((between, before), (requests, between)):
        assert state is not None
        batch = pack(now, model.encoding, cached=events(then)).to(CPU)
        logits, state = model.delta(batch, state)
        assert error_of_order_one(logits.numpy(), full(model, now)) < 1e-4
        assert state is not None
        again = model.prefill(pack(now, model.encoding, candidates=slice(0)).to(CPU))
        assert torch.equal(state.offsets, again.offsets)
        for one, other in zip(state.k + state.v, again.k + again.v, strict=True):
            assert one.is_contiguous() and other.is_contiguous()
            assert error_of_order_one(one.numpy(), other.numpy()) < 1e-4


@pytest.mark.parametrize("W", [0, 3])
def test_candidates_over_a_prefill_with_contextual_tokens_equal_the_full_form(W: int) -> None:
    model = build(contextual_seq_len=2, max_attn_len=W)
    requests = requests_of([6, 0, 3], [4, 2, 0])
    state = model.prefill(pack(requests, model.encoding, candidates=slice(0)).to(CPU))
    cached = [2 + len(r.history_items) for r in requests]
    logits, kept = model.delta(pack(requests, model.encoding, cached=cached).to(CPU), state, keep=False)
    assert kept is None
    assert relative_error(logits.numpy(), full(model, requests)) < 1e-5


def test_the_padded_forward_reads_no_value_on_the_host() -> None:
    """A read on the host would break CUDA graphs; the attention has the same test."""
    model = build(contextual_seq_len=1)
    host = pack(requests_of([6, 2], [4, 2]), model.encoding, bucket=Bucket.even(2, 16, 4))
    logits = model.to("meta")(host.to(torch.device("meta")))
    assert logits.shape == (8, 3) and logits.is_meta


def test_what_cannot_be_packed_is_refused() -> None:
    contextual = build(contextual_seq_len=2).encoding
    requests = requests_of([6], [4])
    with pytest.raises(ValueError, match="request 100: 5 tokens are cached; allowed is 0 or 8, since contextual"):
        pack(requests, contextual, cached=[5])
    with pytest.raises(ValueError, match="7 tokens are cached; allowed is 0 to 6"):
        pack(requests, build().encoding, cached=[7])
    for bucket in (Bucket.even(0, 16, 4), Bucket.even(1, 9, 4), Bucket.even(1, 16, 3)):
        with pytest.raises(ValueError, match="doesn't fit"):
            pack(requests, build().encoding, bucket=bucket)


def test_a_stale_state_is_noticed() -> None:
    model = build()
    requests, others = requests_of([6, 4], [3, 3], seed=1), requests_of([6, 4], [3, 3], seed=2)
    state = model.prefill(pack(others, model.encoding, candidates=slice(0)).to(CPU))
    logits, _ = model.delta(pack(requests, model.encoding, cached=[6, 4]).to(CPU), state)
    assert relative_error(logits.numpy(), full(model, requests)) > 0.05


def test_a_request_scores_the_same_in_any_company() -> None:
    model = build(contextual_seq_len=1)
    requests = requests_of([9, 0, 14, 1], [3, 2, 1, 4])
    alone = [full(model, [r]) for r in requests]
    assert relative_error(full(model, requests), np.concatenate(alone)) < 1e-5
    assert relative_error(full(model, requests[::-1]), np.concatenate(alone[::-1])) < 1e-5


def test_order_counts_for_events_and_not_for_candidates() -> None:
    model = build()
    [r] = requests_of([10], [5])
    scores = full(model, [r])
    order = np.array([3, 0, 4, 2, 1])
    assert relative_error(full(model, [dataclasses.replace(r, candidates=r.candidates[order])]), scores[order]) < 1e-5
    swapped = r.history_items.copy()
    swapped[[2, 7]] = swapped[[7, 2]]
    assert relative_error(full(model, [dataclasses.replace(r, history_items=swapped)]), scores) > 1e-3
    fewer = full(model, [dataclasses.replace(r, candidates=r.candidates[:2])])
    assert relative_error(fewer, scores[:2]) < 1e-5


ENCODED = ("token_rows", "actions", "weights", "positions", "time_buckets")


def encoded(host: HostBatch, name: str, tokens: int) -> np.ndarray:
    return getattr(host.to(CPU), name)[:tokens].numpy()


@pytest.mark.parametrize("C", [0, 3])
def test_encodings_of_old_events_outlive_new_ones(C: int) -> None:
    """Later events (more than there are positions), other candidates and later visits change no earlier encoding."""
    encoding = build(contextual_seq_len=C).encoding
    [later] = requests_of([30], [5])
    earlier = shorter(later, 11, timestamp=1, candidates=later.candidates[:1])
    for name in ENCODED:
        old, new = (encoded(pack([r], encoding), name, C + 11) for r in (earlier, later))
        assert (old == new).all(), name


def test_encodings() -> None:
    encoding = Encoding(
        item_rows=10, user_rows=6, num_actions=3, contextual_seq_len=2, max_positions=4, time_buckets=20
    )
    [r] = requests_of([3], [2])
    times = np.array([1000, 1000, 1007])
    items, candidates = np.array([3, 12, 39]), np.array([25, 9])
    r = dataclasses.replace(
        r, user_id=4, history_items=items, history_timestamps=times, timestamp=2**40, candidates=candidates
    )
    host = pack([r, r], encoding)
    batch = host.to(CPU)
    assert batch.token_rows.tolist()[:7] == [10 + 8 % 6, 10 + 9 % 6, 3, 2, 9, 5, 9]
    assert batch.positions.tolist()[:7] == [4, 5, 0, 1, 2, 3, 3]
    assert batch.time_buckets.tolist()[:7] == [0, 0, 0, 0, 3, 19, 19]  # gap 7: log2(8); the last bucket is 19
    assert batch.actions.tolist()[:7] == [0, 0, *r.history_actions.tolist(), 0, 0]
    assert batch.weights.tolist()[:7] == [0, 0, *r.history_weights.tolist(), 0, 0]
    assert batch.q_offsets.tolist() == [0, 7, 14]
    assert batch.num_targets.tolist() == [2, 2]
    assert batch.candidate_rows.tolist() == [5, 6, 12, 13]
    assert batch.kv_offsets is batch.q_offsets
    for name in ENCODED:
        assert (encoded(host, name, 14)[7:] == encoded(host, name, 7)).all()


@pytest.mark.parametrize("shape", [{}, {"scaling_seqlen": 18432}, {"layers": 6}, {"contextual_seq_len": 2}])
def test_attention_matters(shape: dict[str, int]) -> None:
    """Zero attention changes scores by more than the rounding of half precision, so the gate can detect it."""
    config = dataclasses.replace(HSTUConfig(), **shape)
    requests = requests_of([20, 60, 120], [8, 8, 8])
    blind = Operators.eager().replace(hstu_attention=zero_attention)
    right, wrong = (full(build(config, kernels=kernels), requests) for kernels in (Operators.eager(), blind))
    half = full(build(config, dtype=torch.bfloat16), requests)
    assert relative_error(wrong, right) > 0.1
    assert relative_error(wrong, right) > 4 * relative_error(half, right)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype: torch.dtype, most: float) -> None:
    config = dataclasses.replace(HSTUConfig(), scaling_seqlen=18432)  # the attention's outputs are about 1e-4
    requests = requests_of([20, 60], [8, 8])
    logits = full(build(config, dtype=dtype), requests)
    assert logits.dtype == np.float32
    assert 0 < relative_error(logits, full(build(config), requests)) < most


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_of_tiny_values_keeps_fp32_statistics(dtype: torch.dtype) -> None:
    """Values of 1e-4, as the attention returns: their squares are zero in fp16."""
    layer = build(dtype=dtype).layers[0]
    a = (1e-4 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = layer.attention_norm
    assert isinstance(norm, torch.nn.LayerNorm)
    exact = torch.nn.functional.layer_norm(a.double(), (6,), norm.weight.double(), norm.bias.double(), 1e-6)
    assert relative_error(norm(a).double(), exact) < 5e-3


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = weights(build(seed=3))
    torch.manual_seed(2)
    same, other = weights(build(seed=3)), weights(build(seed=4))
    assert all((one[name] == same[name]).all() for name in one)
    assert all((one[name] != other[name]).any() for name in one)
    rounded = weights(build(seed=3, dtype=torch.bfloat16))
    assert all(np.allclose(one[name], rounded[name], rtol=2**-8, atol=0) for name in one)


def test_weights_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = build(seed=3)
    save_weights(model, path)
    loaded = build(seed=4, weights=str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    save_weights(build(seed=3, dtype=torch.bfloat16), path)  # half-precision files are read too
    half = build(weights=str(path))
    assert half.token_table.dtype is torch.float32
    assert relative_error(half.token_table.numpy(), model.token_table.numpy()) < 1e-2


def test_every_bad_weights_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = build()
    tensors = {name: p.clone() for name, p in model.named_parameters()}

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            load_weights(model, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("model.weights: no file")
    path.write_bytes(b"\x80\x04not safetensors")
    refused("not a readable safetensors file")
    save_weights(model, path)
    path.write_bytes(path.read_bytes()[:-9])
    refused("not a readable safetensors file")
    save_weights(build(alpha=0.25), path)
    refused("written for alpha=0.25, the model has null; set model.alpha=0.25 or give other weights")
    save_weights(build(tasks=["rated", "liked", "shared"]), path)
    refused(r"written for tasks=\[rated,liked,shared\], .*; set 'model.tasks=\[rated,liked,shared\]' or give other")
    save_file(tensors, path, metadata={"model": "[1"})
    refused("its metadata 'model' is not a JSON object; save the weights again")
    save_file({**tensors, "norm.weight": torch.full((12,), float("nan"))}, path)
    refused("tensor norm.weight has NaN or infinity; give other weights")
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, path)
    refused(r"tensor norm.weight \[12\] is missing")
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    refused("unexpected tensor extra")
    save_file({**tensors, "token_table": torch.zeros(41, 12)}, path)
    refused(r"tensor token_table is \[41, 12\], expected \[40, 12\]; rows follow the workload's catalogue")
    save_file({**tensors, "norm.bias": torch.zeros(12, dtype=torch.int64)}, path)
    refused("tensor norm.bias is I64, expected floating point")


@pytest.mark.parametrize(("trained", "served"), [(0, [64]), (64, [3, 63])])
def test_weights_may_be_served_with_a_narrower_window_than_they_were_trained_with(
    tmp_path: Path, trained: int, served: list[int]
) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(build(max_attn_len=trained), path)
    for window in served:
        load_weights(build(max_attn_len=window), path)
    if trained:  # a wider one is a forgotten option
        for window in (0, 65):
            wrong = f"written for max_attn_len=64, the model has {window}; set model.max_attn_len=64 or give other"
            with pytest.raises(ValueError, match=wrong):
                load_weights(build(max_attn_len=window), path)


@pytest.mark.parametrize("form", ["full", "bucket", "prefill", "delta"])
def test_the_last_layer_attends_for_candidates_alone_and_keeps_every_key(form: str) -> None:
    calls: list[tuple[int, int]] = []  # queries and keys of each call

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape[0], k.shape[0]))
        return eager.hstu_attention(q, k, v, **options)

    eager = Operators.eager()
    model = build(layers=3, kernels=eager.replace(hstu_attention=attend))
    requests = requests_of([6, 9, 0], [3, 1, 2])
    tokens, candidates = 15 + 6, 6
    if form in ("full", "bucket"):
        bucket = Bucket.even(4, 16, 3) if form == "bucket" else None
        rows, places = (64, 12) if bucket else (tokens, candidates)
        logits = model(pack(requests, model.encoding, bucket=bucket).to(CPU))[:candidates]
        assert calls == [(rows, rows), (rows, rows), (places, rows)]
        model.computed = LastLayer.EVERY
        assert relative_error(logits.numpy(), full(model, requests)) < 1e-5
        assert calls[-1] == (tokens, tokens)
        return
    before = [shorter(r, 2) for r in requests]
    state = model.prefill(pack(before, model.encoding, candidates=slice(0)).to(CPU))
    assert calls == [(4, 4)] * 2 and len(state.k) == 3  # nothing reads what the last layer's attention would give
    calls.clear()
    cached = [len(r.history_items) for r in before]
    logits, extended = model.delta(pack(requests, model.encoding, cached=cached).to(CPU), state)
    assert calls == [(17, tokens), (17, tokens), (candidates, tokens)]
    assert extended is not None and [len(k) for k in extended.k] == [15] * 3
    model.computed = LastLayer.EVERY
    assert relative_error(logits.numpy(), full(model, requests)) < 1e-5


def test_batches_of_candidates_compute_all_rows_at_once() -> None:
    """Separate products would save few rows and cost more launches."""
    queries: list[int] = []
    eager = Operators.eager()

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        queries.append(q.shape[0])
        return eager.hstu_attention(q, k, v, **options)

    model = build(layers=2, kernels=eager.replace(hstu_attention=attend))
    requests = requests_of([2, 1], [5, 4])
    assert relative_error(model(pack(requests, model.encoding).to(CPU)).numpy(), full(model, requests)) < 1e-6
    assert queries == [12] * 4
