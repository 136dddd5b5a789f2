"""Decoders over semantic IDs: their weights, the folder that vLLM loads, and the reference search."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.tools import sizing
from grengines.api import Request, Retrieval, UnavailableError
from grengines.last_layer import LastLayer
from grengines.models.decoder import model as decoder_model
from grengines.models.decoder import reference as reference_module
from grengines.models.decoder import weights
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.model import Decoder, level_logits, log_normaliser
from grengines.models.decoder.reference import DecoderReference, search
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.semantic.ids import SemanticIds
from grengines.semantic.search import Beams, explore
from grengines.semantic.trie import Trie
from grkernels.operators import Operators

CONFIG = DecoderConfig(embedding_dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, max_positions=30)
SIZES = (4, 5, 6)


def catalogue(items: int, seed: int = 0) -> SemanticIds:
    rng = np.random.default_rng(seed)
    every = np.array(list(itertools.product(*map(range, SIZES))), dtype=np.int32)
    return SemanticIds(every[rng.permutation(len(every))[:items]], SIZES)


def decoder_of(seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    config = dataclasses.replace(CONFIG, **changes)
    return Decoder.build(config, SIZES, seed=seed, device="cpu", dtype=dtype)


def request_of(items: list[int] | np.ndarray, number: int = 0) -> Request:
    n = len(items)
    none = np.zeros(n, np.int64)
    history = np.asarray(items, np.int64)
    return Request(number, number, history, none, none.astype(np.float32), none, 0, none[:0], 0, 0.0, 1000.0)


REQUEST, PROMPT = request_of([1, 5, 69]), np.array([0, 5, 10])


def anew(decoder: Decoder, trie: Any, prompt: np.ndarray, width: int, k: int) -> Beams:
    """Search by encoding every beam alone, from its whole sequence."""
    beams = [prompt]

    def advance(level: int, parents: Any, codes: Any) -> torch.Tensor:
        nonlocal beams
        if parents is not None:
            chosen = zip(parents[0].tolist(), codes[0].tolist(), strict=True)
            beams = [np.append(beams[parent], decoder.offsets[level - 1] + code) for parent, code in chosen]
        last = [decoder.layers(input_ids=torch.from_numpy(b)[None]).last_hidden_state[0, -1] for b in beams]
        return decoder.log_probabilities(torch.stack(last), level)

    return Beams(*(x.numpy() for x in explore(advance, trie, 1, width=width, k=k)))


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3, 20, 200])
@pytest.mark.parametrize("items", [120, 3])
def test_a_tree_in_the_mask_is_every_beam_anew(width: int, items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "CHUNK", 7)  # the prompt is read in several chunks, the last one shorter
    ids, decoder = catalogue(items), decoder_of()
    trie, rng = Trie.of(ids).on("cpu"), np.random.default_rng(0)
    for n in (5, 0, 25):  # 0: no history; 25: a history that is truncated
        tokens = ids.tokens(rng.integers(0, items, n)).reshape(-1)
        k = min(width, 10)
        found = search(decoder, trie, tokens, width=width, k=k)
        expected = anew(decoder, trie, decoder.prompt(tokens), width, k)
        assert found.items.tolist() == expected.items.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.cuts, expected.cuts, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", [None, 16, 90])
def test_the_reference_scores_every_item(vocabulary: int | None) -> None:
    """A vocabulary of 16 tokens has the codes and the begin token alone."""
    ids, config = catalogue(70), dataclasses.replace(CONFIG, vocabulary=vocabulary)
    retrieval = Retrieval(ids, k=70, beam_width=120)
    reference, decoder = DecoderReference(config, 2, retrieval, "cpu"), decoder_of(seed=2, vocabulary=vocabulary)
    request = request_of([1, 5, 69])
    prompt, scores = ids.tokens(request.history_items).reshape(-1), np.zeros((70, 3))
    for item, tokens in enumerate(ids.tokens(np.arange(70))):
        for level in range(3):
            whole = torch.from_numpy(np.concatenate([prompt, tokens[:level]]))[None]
            hidden = decoder.layers(input_ids=whole).last_hidden_state[0, -1:]
            first, end = (0, vocabulary) if vocabulary else decoder.offsets[level : level + 2]
            logits = hidden.double() @ decoder.token_table[first:end].double().T
            scores[item, level] = torch.log_softmax(logits, -1)[0, tokens[level] - first].item()
    found, prefixes = reference.search([request]), reference.prefix_scores(request, np.arange(70))
    np.testing.assert_allclose(prefixes, scores.cumsum(1), atol=1e-5)
    assert found.items[0].tolist() == np.argsort(-scores.sum(1)).tolist()
    few = reference.search([request], width=3, k=2)
    assert few.items.shape == (1, 2) and (few.cuts > -np.inf).all()


@torch.inference_mode()
def test_history_and_attention_matter() -> None:
    """Stale histories and missing attention change scores, as the gate needs, and do not change the reference."""
    ids = catalogue(120)
    reference = DecoderReference(CONFIG, 3, Retrieval(ids, 10, 30), "cpu")
    one, other = request_of([1, 2, 3, 4]), request_of([4, 2, 3, 9])
    expected, stale, blind = reference.search([one]), reference.search([other]), reference.search([one], blind=True)
    exact = reference.prefix_scores(one, expected.items[0])[:, -1]
    np.testing.assert_allclose(expected.scores[0], exact, atol=1e-5)
    half = reference.search([one], "bf16")
    error = np.abs(half.scores[0] - reference.prefix_scores(one, half.items[0])[:, -1]).max()
    for wrong in (stale, blind):
        assert np.abs(wrong.scores[0] - reference.prefix_scores(one, wrong.items[0])[:, -1]).max() > 5 * error
    assert reference.search([one]).scores.tolist() == expected.scores.tolist()


@torch.inference_mode()
def test_the_folder_is_a_model_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights.write(CONFIG, SIZES, tmp_path / "new", seed=4, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert type(loaded).__name__ == "Qwen3ForCausalLM" and loaded.dtype == torch.float32
    assert loaded.config.vocab_size == 64 and loaded.config.max_position_embeddings == 33
    tokens, decoder = torch.tensor([[3, 5, 9, 15]]), decoder_of(seed=4)
    logits = loaded(input_ids=tokens).logits[0, -1:]
    hidden = decoder.layers(input_ids=tokens).last_hidden_state[0, -1:]
    table = load_file(tmp_path / "new" / "model.safetensors")[weights.EMBEDDING]
    for level, (begin, end) in enumerate(itertools.pairwise(decoder.offsets)):
        np.testing.assert_allclose(logits[:, begin:end], decoder.logits(hidden, level), atol=1e-5)
        torch.testing.assert_close(level_logits(hidden, table, SIZES, level), decoder.logits(hidden, level))
    assert (loaded.config.rope_parameters["rope_theta"], loaded.config.rms_norm_eps) == (1e6, 1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_normaliser_is_the_sum_of_all_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 64 tokens, the last one shorter, and one part, are log-sum-exp over all logits in fp64."""
    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(n, 32, generator=generator).to(dtype) for n in (7, 1000))
    expected = torch.logsumexp(x.double() @ table.double().T, dim=1)
    whole = log_normaliser(x, table)
    monkeypatch.setattr(decoder_model, "TOGETHER", 7 * 100)
    for found in (whole, log_normaliser(x, table)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_a_normaliser_of_no_rows_is_empty() -> None:
    assert log_normaliser(torch.empty(0, 32), torch.ones(1000, 32)).shape == (0,)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_a_normaliser_on_a_gpu(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 bits are summed in fp32, and none is rounded."""
    monkeypatch.setattr(decoder_model, "TOGETHER", 1 << 16)
    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(n, 256, generator=generator).to("cuda", dtype) for n in (rows, 5000))
    expected = torch.logsumexp(x.double() @ table.double().T, dim=1)
    torch.testing.assert_close(log_normaliser(x, table).double(), expected, atol=2e-4, rtol=0)


@torch.inference_mode()
def test_a_vocabulary_changes_scores_and_not_which_codes_may_follow(tmp_path: Path) -> None:
    """Other tokens take a part of the probability. The items are those that exist, also where a level has one child."""
    ids = catalogue(70)
    config = dataclasses.replace(CONFIG, vocabulary=90)
    weights.write(config, SIZES, tmp_path, seed=2, dtype=torch.float32)
    path = tmp_path / "model.safetensors"
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 90
    named = load_file(path)
    named[weights.EMBEDDING] = named[weights.EMBEDDING][:64].contiguous()
    save_file(named, tmp_path / "codes.safetensors")
    found = [
        DecoderReference(c, 0, Retrieval(ids, k=70, beam_width=120, weights=str(file)), "cpu").search([REQUEST])
        for c, file in ((config, path), (CONFIG, tmp_path / "codes.safetensors"))
    ]
    assert all(sorted(beams.items[0].tolist()) == list(range(70)) for beams in found)
    whole, codes = (dict(zip(b.items[0].tolist(), b.scores[0].tolist(), strict=True)) for b in found)
    assert all(whole[item] < codes[item] - 0.1 for item in range(70))
    narrow = [
        search(decoder_of(vocabulary=v), Trie.of(catalogue(3)).on("cpu"), PROMPT, width=20, k=5) for v in (None, 90)
    ]
    assert [sorted(beams.items[0].tolist()) for beams in narrow] == [[-1, -1, 0, 1, 2]] * 2


def test_a_vocabulary_that_is_too_small() -> None:
    words = r"model.vocabulary=15: 15 codes and the token of an empty prompt need at least 16; set model.vocabulary"
    for refuses in (weights.shape, weights.shapes):
        with pytest.raises(ValueError, match=words):
            refuses(dataclasses.replace(CONFIG, vocabulary=15), SIZES)
    small = ["model=decoder_tiny", "engine=hf", "retrieval.levels=3", "retrieval.codes=64"]
    with pytest.raises(ConfigError, match=r"model.vocabulary=192: 192 codes .* at least 193"):
        compose_spec([*small, "workload=synthetic", "workload.items=500", "model.vocabulary=192"])
    with pytest.raises(ConfigError, match=r"model.vocabulary=16: .* need at least"):
        sizing.main(["model=decoder_tiny", "engine=hf", "model.vocabulary=16", "workload=synthetic"])
    with pytest.raises(ConfigError, match=r"model.vocabulary=1: allowed is int or null >= 2"):
        compose_spec(["model=decoder_tiny", "engine=hf", "model.vocabulary=1"])


def test_a_seed_is_a_model(tmp_path: Path) -> None:
    one, again, other = decoder_of(), decoder_of(), decoder_of(seed=2)
    half, rounded = decoder_of(dtype=torch.bfloat16), one.to(torch.bfloat16)
    weights.write(CONFIG, SIZES, tmp_path, seed=1, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")
    tokens = torch.arange(12)[None]
    for name, p in one.layers.state_dict().items():
        assert torch.equal(p, again.layers.state_dict()[name])
        assert not torch.equal(p, other.layers.state_dict()[name])
        assert torch.equal(half.layers.state_dict()[name], p.bfloat16())
        assert torch.equal(stored[f"model.{name}"], p.bfloat16())
    with torch.inference_mode():  # positions are not rounded with the weights
        exact, copied = (d.layers(input_ids=tokens).last_hidden_state for d in (half, rounded))
    assert torch.equal(exact, copied) and rounded.layers.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_of_a_file(tmp_path: Path) -> None:
    weights.write(CONFIG, SIZES, tmp_path, seed=5, dtype=torch.float32)
    path = tmp_path / "model.safetensors"
    found = weights.tensors(CONFIG, SIZES, seed=0, dtype=torch.float16, weights=str(path))
    drawn = weights.tensors(CONFIG, SIZES, seed=5, dtype=torch.float16)
    assert found.keys() == drawn.keys() and all(torch.equal(found[n], drawn[n]) for n in found)

    good, norm = load_file(path), "model.norm.weight"
    bad: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": ({n: t for n, t in good.items() if n != norm}, "tensor model.norm.weight is missing"),
        "more": ({**good, "lm_head.weight": torch.ones(2)}, "unexpected tensor lm_head.weight"),
        "shape": ({**good, weights.EMBEDDING: torch.ones(3, 3)}, r"is F32 \[3, 3\].*rows follow the semantic IDs"),
        "kind": ({**good, norm: torch.ones(32, dtype=torch.int32)}, "is I32"),
        "eight bits": ({**good, norm: torch.ones(32).to(torch.float8_e4m3fn)}, "is F8_E4M3"),
        "no number": ({**good, norm: torch.full((32,), torch.nan)}, "tensor model.norm.weight has NaN or infinity"),
    }
    for name, (content, expected) in bad.items():
        save_file(content, tmp_path / name)
        with pytest.raises(ValueError, match=expected):
            weights.tensors(CONFIG, SIZES, seed=0, dtype=torch.float32, weights=str(tmp_path / name))
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        weights.tensors(CONFIG, SIZES, seed=0, dtype=torch.float32, weights=str(tmp_path / "pickle"))
    with pytest.raises(ValueError, match=r"retrieval.weights: no file .*nowhere"):
        weights.tensors(CONFIG, SIZES, seed=0, dtype=torch.float32, weights=str(tmp_path / "nowhere"))


def test_shapes_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.kv_heads=3: must divide model.heads=4"):
        decoder_of(kv_heads=3)
    with pytest.raises(ValueError, match=r"model.head_dim=7: must be even"):
        decoder_of(head_dim=7)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match=r"decoders need transformers .*; pip install 'grbench\[hf\]'"):
        decoder_of()


def test_the_shapes_that_are_compared() -> None:
    names = ("hstu_0p2b", "decoder_0p2b", "decoder_1p7b")
    models = [compose_spec([f"model={name}", "engine=hf"])[0].model for name in names]
    hstu, same, large = (sizing.generator_parameters(m, (256,) * 3)["layers"] for m in models)
    assert (hstu, same, large) == (88_178_688, 88_108_032, 1_409_408_000)  # as their YAML files say
    whole = sizing.generator_parameters(dataclasses.replace(models[2], vocabulary=151_936), (256,) * 3)
    assert whole == {"tables": 151_936 * 2048, "layers": large, "head": 2048}
    assert sizing.kv_bytes(models[0], 1000, "bf16") == sizing.kv_bytes(models[1], 1000, "bf16")


@pytest.mark.parametrize(
    "model",
    [
        CONFIG,
        dataclasses.replace(CONFIG, vocabulary=90),
        HSTUConfig(layers=2, embedding_dim=24, qk_dim=8, v_dim=12, max_positions=30),
    ],
)
def test_flops_of_a_search_are_counted_one_by_one(model: DecoderConfig | HSTUConfig) -> None:
    """Count FLOPs from the model's matrices and from the keys that each token sees."""
    if isinstance(model, DecoderConfig):
        matrices = [s for name, s in weights.shapes(model, SIZES).items() if "layers." in name and len(s) == 2]
        each = model.heads * 2 * (model.head_dim + model.head_dim)
    else:
        layers = HSTUGenerator(model, SIZES, Operators.eager()).layers
        matrices = [p.shape for p in layers.parameters() if p.ndim == 2]
        each = model.heads * 2 * (model.qk_dim + model.v_dim)
    for history, width, cached in ((0, 1, 0), (4, 3, 0), (4, 100, 5), (25, 7, 30)):
        prompt = min(3 * history, 30) or 1
        rows = [i + 1 for i in range(cached, prompt)]  # number of keys that each token sees
        first, second = min(width, 4), min(width, min(width, 4) * 5)
        rows += [prompt + 1] * first + [prompt + 2] * second
        expected = len(rows) * sum(2 * m * n for m, n in matrices) + model.layers * each * sum(rows)
        scored = (4, 5, 6) if isinstance(model, HSTUConfig) or model.vocabulary is None else (90, 90, 90)
        expected += 2 * model.embedding_dim * sum(n * m for n, m in zip((1, first, second), scored, strict=True))
        assert sizing.search_flops(model, history, SIZES, width, cached) == expected
        if isinstance(model, HSTUConfig) and cached < prompt:  # keys and values of all tokens; else the last one's
            unread, keys = rows[: prompt - cached - 1], 24 * model.heads * (model.qk_dim + model.v_dim)
            expected -= sum(each * n + sum(2 * a * b for a, b in matrices) // 2 - 2 * keys for n in unread)
        assert sizing.search_flops(model, history, SIZES, width, cached, LastLayer.READ) == expected
