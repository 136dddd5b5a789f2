"""Checkpoints of other projects: imported, run by an engine, and compared with their own formulas in fp64."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import peer_oracle
from helpers.command import Grbench
from helpers.hstu_oracle import error_of_order_one, make_requests
from safetensors.torch import save_file
from torch import Tensor

from grbench.config.arguments import CommandError
from grbench.config.compose import compose_spec
from grbench.importing.command import main
from grbench.importing.qwen3 import OPTIONS
from grengines import registry
from grengines.api import Catalogue, Request, Retrieval, Setup
from grengines.cache.config import CacheConfig
from grengines.hstu.config import HSTUEngineConfig
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.weights import shapes
from grengines.semantic.ids import SemanticIds
from grkernels.config import KernelConfig

ITEMS, USERS, E, HEADS, D, WIDTH, N = 30, 4, 8, 2, 4, 6, 64  # D: of a head; WIDTH: of the embedding tables
State = dict[str, Tensor]


class Draw:
    """Random tensors of a state dict, one by one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.state: State = {}

    def add(self, name: str, *shape: int, mean: float = 0.0, scale: float = 0.5) -> None:
        self.state[name] = mean + scale * torch.randn(*shape, generator=self._generator)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}weight", width, mean=1.0, scale=0.2)
        self.add(f"{name}bias", width, scale=0.2)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.add(f"{name}.weight", outputs, inputs)
        self.add(f"{name}.bias", outputs)

    def swish_mlp(self, name: str, inputs: int, hidden: int) -> None:
        self.linear(f"{name}.0", inputs, hidden)
        self.norm(f"{name}.1.", hidden)
        self.linear(f"{name}.2", hidden, E)
        self.norm(f"{name}.3.", E)


def dlrm_v3_state(layers: int = 2) -> tuple[State, State]:
    """The dense tensors of DLRM-v3 in small, and its sparse tables."""
    d, t = Draw(1), "_hstu_transducer."
    for i in range(layers):
        at = f"{t}_stu_module._stu_layers.{i}."
        d.add(at + "_uvqk_weight", E, 4 * HEADS * D)
        d.add(at + "_uvqk_beta", 4 * HEADS * D)
        d.norm(at + "_input_norm_", E)
        d.add(at + "_output_weight", 3 * HEADS * D, E)
        d.norm(at + "_output_norm_", HEADS * D)
    p = t + "_input_preprocessor."
    d.add(p + "_batched_contextual_linear_weights", 1, WIDTH, E)
    d.add(p + "_batched_contextual_linear_bias", 1, E)
    d.swish_mlp(p + "_content_embedding_mlp", WIDTH, 5)
    d.swish_mlp(p + "_additional_embedding_mlp", WIDTH, 5)
    d.add(p + "_action_encoder._action_embedding_table", 3, 2)
    d.add(p + "_action_encoder._target_action_embedding_table", 1, 6)
    d.state[p + "_action_encoder._combined_action_weights"] = torch.tensor([1, 2, 4])
    d.swish_mlp(p + "_action_embedding_mlp", 6, 5)
    d.norm(t + "_output_postprocessor._layer_norm.", E)
    d.state[t + "_output_postprocessor._period_units"] = torch.tensor([[3600.0, 86400.0]])
    d.state[t + "_output_postprocessor._units_per_period"] = torch.tensor([[24.0, 7.0]])
    d.linear(t + "_output_postprocessor._time_feature_combiner", E + 4, E)
    d.add(t + "_positional_encoder._position_embeddings_weight", 12, E)
    d.add(t + "_positional_encoder._timestamp_embeddings_weight", 40, E)
    d.swish_mlp("_item_embedding_mlp", 2 * WIDTH, 5)
    d.linear("_multitask_module._prediction_module.0", E, 7)
    d.norm("_multitask_module._prediction_module.1.", 7)
    d.linear("_multitask_module._prediction_module.2", 7, 1)
    tables = Draw(2)
    for name, rows in (("items", ITEMS), ("categories", 5), ("users", USERS)):
        tables.add(name, rows, WIDTH)
    tables.state["item_category"] = torch.arange(ITEMS) % 5
    return d.state, tables.state


def research_state() -> State:
    d, length = Draw(3), 13
    d.add("_embedding_module._item_emb.weight", ITEMS + 1, E)
    d.add("_input_features_preproc._pos_emb.weight", length, E)
    for i in range(2):
        at = f"_hstu._attention_layers.{i}."
        d.add(at + "_uvqk", E, 4 * HEADS * D)
        d.linear(at + "_o", HEADS * D, E)
        d.add(at + "_rel_attn_bias._ts_w", 129)
        d.add(at + "_rel_attn_bias._pos_w", 2 * length - 1)
    d.state["_attn_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)
    return d.state


def nvidia_state(fused: bool) -> tuple[State, State]:
    d = Draw(4)
    for i in range(2):
        at = f"_hstu_block._attention_layers.{i}."
        d.norm(at + "_input_layernorm_", E)
        if fused:
            d.add(at + "_linear_uvqk_weight", E, 4 * HEADS * D)
            d.add(at + "_linear_uvqk_bias", 4 * HEADS * D)
            d.add(at + "_linear_proj_weight", HEADS * D, E)
            d.norm(at + "_output_layernorm_", HEADS * D)
        else:
            d.linear(at + "_linear_uvqk", E, 4 * HEADS * D)
            d.add(at + "_linear_proj.weight", E, HEADS * D)
            d.norm(at + "_output_ln_dropout_mul.", HEADS * D)
    d.add("_hstu_block._preprocessor._positional_encoder._position_embeddings_weight", 15, E)
    for name in ("item", "contextual"):
        for at in (0, 2):
            d.linear(f"_hstu_block._preprocessor._{name}_mlp._mlp.{at}", WIDTH if at == 0 else E, E)
    d.linear("_mlp._mlp.0", E, 7)
    d.linear("_mlp._mlp.2", 7, 3)
    tables = Draw(5)
    tables.add("items", ITEMS, WIDTH)
    tables.add("users", USERS, 2, WIDTH)
    return d.state, tables.state


def array(state: State) -> dict[str, np.ndarray]:
    return {name: t.double().numpy() for name, t in state.items()}


def requests_of(actions: int = 3) -> list[Request]:
    """Short and long histories: also below DLRM-v3's 20 events, and past the position table."""
    catalogue = Catalogue(USERS, ITEMS, actions)
    return make_requests(np.random.default_rng(0), catalogue, [11, 3, 24, 0], [4, 2, 3, 2])


def imported(folder: Path, *overrides: str) -> Any:
    """Compose the model that the import wrote, as a user's command does."""
    spec, _ = compose_spec(["model=theirs", "engine=hstu", *overrides], str(folder))
    return spec


def answers(spec: Any, requests: list[Request], actions: int) -> list[np.ndarray]:
    setup = Setup(spec.model, KernelConfig().requested(), Catalogue(USERS, ITEMS, actions), 0, CacheConfig())
    engine: Any = registry.make(HSTUEngineConfig(device="cpu", precision="fp32"), setup, "rank")
    engine.prepare(requests, len(requests))
    try:
        found: list[np.ndarray] = engine.rank(requests).scores
    finally:
        engine.close()
    return found


def save(folder: Path, state: State, tables: State | None = None) -> list[str]:
    """Write a checkpoint as torch.save does. Return the words of an import."""
    torch.save(state, folder / "theirs.pt")
    words = [str(folder / "theirs.pt"), "--out", str(folder / "theirs.safetensors")]
    if tables is not None:
        save_file({n: t.contiguous() for n, t in tables.items()}, folder / "tables.safetensors")
        words += ["--tables", str(folder / "tables.safetensors")]
    return words


def check(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Each answer agrees; zeros and the answers of another request do not."""
    for mine, theirs in zip(found, expected, strict=True):
        assert error_of_order_one(mine, theirs) < 2e-5
        assert error_of_order_one(np.zeros_like(theirs), theirs) > 1e-2
    assert error_of_order_one(found[0][: len(expected[1])], expected[1]) > 1e-2


def test_dlrm_v3_runs_as_its_own_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, tables = dlrm_v3_state()
    wrapped = {"dense_dict": {f"module.{n}": t for n, t in state.items()}, "optimizer_dict": {"step": 3}}
    words = save(tmp_path, wrapped, tables)  # type: ignore[arg-type]
    assert main([*words, "--from", "dlrm_v3", "--heads", str(HEADS), "--scaling-seqlen", str(N)]) == 0
    printed = capsys.readouterr().out
    assert (
        "mapped    _hstu_transducer._stu_module._stu_layers.0._uvqk_weight [8, 32] -> layers.0.uvqk.weight" in printed
    )
    assert "folded    _item_embedding_mlp.0.weight [5, 12] -> tower_table" in printed
    listed = json.loads((tmp_path / "theirs.json").read_text())
    assert {row["tensor"] for row in listed} == {*state, *tables}
    spec, requests = imported(tmp_path), requests_of()
    expected = [peer_oracle.dlrm_v3(array(state), array(tables), r, heads=HEADS, N=N) for r in requests]
    check(answers(spec, requests, 3), expected)


def test_the_research_model_finds_the_same_items(tmp_path: Path) -> None:
    state = research_state()
    words = save(tmp_path, {"model_state_dict": state, "epoch": 3})  # type: ignore[dict-item]
    assert main([*words, "--from", "research", "--heads", str(HEADS), "--temperature", "0.1"]) == 0
    file = str(tmp_path / "theirs.safetensors")
    spec = imported(tmp_path, "task=generate", "retrieval.levels=1", f"retrieval.weights={file}")
    requests = [r for r in requests_of() if 0 < len(r.history_items) <= 12]
    ids = SemanticIds(np.arange(ITEMS, dtype=np.int32)[:, None], (ITEMS,))
    retrieval = Retrieval(ids, k=ITEMS, beam_width=ITEMS, weights=file)
    setup = Setup(spec.model, KernelConfig().requested(), Catalogue(USERS, ITEMS, 3), 0, CacheConfig(), retrieval)
    engine: Any = registry.make(HSTUEngineConfig(device="cpu", precision="fp32"), setup, "generate")
    engine.prepare(requests, 4)
    try:
        result = engine.generate(requests)
    finally:
        engine.close()
    expected = [peer_oracle.research(array(state), r, heads=HEADS, temperature=0.1) for r in requests]
    expected = [e - np.log(np.exp(e).sum()) for e in expected]
    found = [scores[np.argsort(items)] for items, scores in zip(result.items, result.scores, strict=True)]
    check(found, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_nvidias_layers_run_as_their_own_formulas(fused: bool, tmp_path: Path) -> None:
    state, tables = nvidia_state(fused)
    extra = {"_embedding_collection.act.weight": torch.ones(2, E)}
    extra["_hstu_block._attention_layers.0._linear_uvqk._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    words = save(tmp_path, {"model_state_dict": state | extra}, tables)  # type: ignore[dict-item]
    assert main([*words, "--from", "nvidia", "--heads", str(HEADS), "--scaling-seqlen", str(N)]) == 0
    listed = {row["tensor"]: row["fate"] for row in json.loads((tmp_path / "theirs.json").read_text())}
    assert listed["_embedding_collection.act.weight"] == "left out"
    spec, requests = imported(tmp_path), requests_of(0)
    expected = [peer_oracle.nvidia(array(state), array(tables), r, heads=HEADS, N=N) for r in requests]
    check(answers(spec, requests, 0), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_a_qwen3_folder_gives_the_logits_of_transformers(whole: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from grengines.hf.config import HFEngineConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen3Config(
        vocab_size=90, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=3, rms_norm_eps=1e-6, rope_theta=10000.0, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.mul_(20)
    theirs.save_pretrained(tmp_path / "qwen")
    file = str(tmp_path / "theirs.safetensors")
    words = [str(tmp_path / "qwen"), "--from", "qwen3", "--sizes", str(ITEMS), "--first-token", "7", "--out", file]
    assert main([*words, "--whole-vocabulary"] if whole else words) == 0
    spec, _ = compose_spec(["model=theirs", "engine=hf", "task=generate"], str(tmp_path))
    assert isinstance(spec.model, DecoderConfig) and spec.model.vocabulary == (90 if whole else None)
    ids = SemanticIds(np.arange(ITEMS, dtype=np.int32)[:, None], (ITEMS,))
    retrieval = Retrieval(ids, k=ITEMS, beam_width=ITEMS, weights=file)
    setup = Setup(spec.model, KernelConfig().requested(), Catalogue(USERS, ITEMS, 3), 0, CacheConfig(), retrieval)
    engine: Any = registry.make(HFEngineConfig(device="cpu", precision="fp32"), setup, "generate")
    requests = requests_of()
    engine.prepare(requests, 4)
    try:
        result = engine.generate(requests)
    finally:
        engine.close()
    expected = []
    for r, items, scores in zip(requests, result.items, result.scores, strict=True):
        tokens = torch.tensor([[7 + int(i) for i in r.history_items] or [3]])
        with torch.no_grad():
            logits = theirs(tokens).logits[0, -1].double()
        over = logits if whole else logits[7 : 7 + ITEMS]
        expected.append((logits[7 : 7 + ITEMS] - torch.logsumexp(over, 0)).numpy())
        assert error_of_order_one(scores[np.argsort(items)], expected[-1]) < 1e-4
    assert error_of_order_one(expected[0], expected[1]) > 1e-2
    if whole:
        with pytest.raises(
            CommandError, match=r"--begin-token 8: .* allowed is a token that is no code; codes are 7 to"
        ):
            main([*words, "--whole-vocabulary", "--begin-token", "8"])


def broken(change: Callable[[State], Any]) -> State:
    state = research_state()
    change(state)
    return state


def add_averages(state: State) -> None:
    """Put averages of the weights before them, as some trainings keep."""
    own = dict(state)
    state.clear()
    state.update({f"ema.{name}": tensor + 1 for name, tensor in own.items()} | own)


LAST = "_hstu._attention_layers.1."
FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (lambda s: s.pop(LAST + "_o.bias"), f"tensor {LAST}_o.bias is missing"),
    "surplus": (lambda s: s.update(more=torch.ones(2)), "unexpected tensor more [2]"),
    "shape": (lambda s: s.update({LAST + "_o.bias": torch.ones(3)}), f"tensor {LAST}_o.bias is [3], expected [8]"),
    "nan": (lambda s: s[LAST + "_o.bias"].fill_(torch.nan), f"tensor {LAST}_o.bias has NaN or infinity"),
    "concat": (lambda s: s.update({LAST + "_o.weight": torch.ones(E, 24)}), "concat_ua=True, which grbench lacks"),
    "averages": (add_averages, "save the state dict of one model alone"),
    "number": (lambda s: s.update({LAST + "_o.bias": 3}), f"{LAST}_o.bias is a int, not a tensor"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_checkpoint_is_one_line_with_the_tensor(
    fault: str, tmp_path: Path, grbench_here: Grbench
) -> None:
    change, words = FAULTS[fault]
    flags = save(tmp_path, broken(change))
    done = grbench_here("import-weights", *flags, "--from", "research", "--heads", "2")
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "theirs.safetensors").exists()


@pytest.mark.parametrize("name", ["theirs.pt", "theirs.safetensors", "junk.pt", "empty.pt", "folder"])
def test_damaged_files_are_refused(name: str, tmp_path: Path, grbench_here: Grbench) -> None:
    """Cut files, a text, an empty one, and a folder for qwen3 whose file is cut."""
    file, layout = tmp_path / name, "qwen3" if name == "folder" else "research"
    torch.save(research_state(), tmp_path / "whole")
    save_file(research_state(), tmp_path / "whole.safetensors")
    whole = (tmp_path / ("whole" if name.endswith("pt") else "whole.safetensors")).read_bytes()
    if layout == "qwen3":
        file.mkdir()
        (file / "config.json").write_text("{}")
        (file / "model.safetensors").write_bytes(whole[:300])
    else:
        file.write_bytes({"junk.pt": b"no checkpoint", "empty.pt": b""}.get(name, whole[:300]))
    done = grbench_here("import-weights", str(file), "--from", layout, "--heads", "2", "--out", "out.safetensors")
    assert done.returncode == 2
    assert str(file) in done.stderr and len(done.stderr.strip().splitlines()) == 1


class Malicious:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path, grbench_here: Grbench) -> None:
    flags = save(tmp_path, research_state() | {"x": Malicious(tmp_path / "ran")})  # type: ignore[dict-item]
    done = grbench_here("import-weights", *flags, "--from", "research", "--heads", "2")
    assert done.returncode == 2
    assert "holds other objects than tensors, which could run code" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("layout", "flags", "words"),
    [
        ("research", [], "--heads"),
        ("research", ["--heads", "3"], "allowed is a divisor of both"),
        ("dlrm_v3", ["--heads", "2"], "tensor _hstu_transducer._stu_module._stu_layers.0.... is missing"),
        ("qwen3", [], "no folder with config.json"),
    ],
)
def test_wrong_flags_and_layouts_are_refused(
    layout: str, flags: list[str], words: str, tmp_path: Path, grbench_here: Grbench
) -> None:
    done = grbench_here("import-weights", *save(tmp_path, research_state()), "--from", layout, *flags)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("temperature", ["nan", "inf", "0"])
def test_a_temperature_is_a_number_above_0(temperature: str, tmp_path: Path, grbench_here: Grbench) -> None:
    flags = [*save(tmp_path, research_state()), "--from", "research", "--heads", "2", "--temperature", temperature]
    done = grbench_here("import-weights", *flags)
    assert done.returncode == 2 and "allowed is a number above 0" in done.stderr


FIRST = "_hstu_transducer._stu_module._stu_layers.0."
DLRM_FAULTS: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "no uvqk": (lambda s, _: s.pop(FIRST + "_uvqk_weight"), f"tensor {FIRST}_uvqk_weight is missing"),
    "flat uvqk": (lambda s, _: s.update({FIRST + "_uvqk_weight": torch.ones(4)}), "is [4], expected [any, any]"),
    "no output": (lambda s, _: s.pop(FIRST + "_output_weight"), f"tensor {FIRST}_output_weight is missing"),
    "narrow output": (lambda s, _: s.update({FIRST + "_output_weight": torch.ones(24, 3)}), "expected [any, 8]"),
    "scalar norm": (lambda s, _: s.update({FIRST + "_output_norm_weight": torch.tensor(1.0)}), "is [], expected [any]"),
    "negative": (lambda _, t: t["item_category"].__setitem__(3, -1), "item_category has -1 for item 3"),
    "too large": (lambda _, t: t["item_category"].__setitem__(4, 5), "allowed are whole numbers from 0 to 4"),
    "fraction": (lambda _, t: t.update(item_category=torch.full((ITEMS,), 0.5)), "item_category has 0.5 for item 0"),
}


@pytest.mark.parametrize("fault", DLRM_FAULTS)
def test_every_fault_of_dlrm_v3_is_one_line(fault: str, tmp_path: Path, grbench_here: Grbench) -> None:
    change, words = DLRM_FAULTS[fault]
    state, tables = dlrm_v3_state()
    change(state, tables)
    flags = [*save(tmp_path, state, tables), "--from", "dlrm_v3", "--heads", "2", "--scaling-seqlen", "64"]
    done = grbench_here("import-weights", *flags)
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type=yarn; allowed is default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type=linear; allowed is default"),
        ({"rope_parameters": "x"}, "rope_parameters='x'; allowed is an object"),
        ({"rope_theta": [1]}, "rope_theta=[1]; allowed is a number"),
        ({"use_sliding_window": True}, "use_sliding_window=True; allowed is False"),
        ({"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention']; allowed is full_attention"),
        ({"bos_token_id": [3]}, "bos_token_id=[3]; allowed is one token"),
        ({"max_position_embeddings": 1}, "max_positions=0: allowed is"),
        ({}, ""),
    ],
)
def test_a_qwen3_that_grbench_lacks_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path, grbench_here: Grbench
) -> None:
    sizes = {"layers": 1, "embedding_dim": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp_dim": 8}
    described = {OPTIONS[name]: value for name, value in sizes.items()} | {
        "model_type": "qwen3", "max_position_embeddings": 64, "bos_token_id": 3, "use_sliding_window": False,
        "layer_types": ["full_attention"], "rope_scaling": None, "rope_theta": 1e6,
    }  # fmt: skip
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described | change))
    save_file(
        {n: torch.ones(s) for n, s in shapes(DecoderConfig(**sizes), (19,)).items()}, folder / "model.safetensors"
    )
    flags = ["--from", "qwen3", "--sizes", "9", "--first-token", "7", "--out", "out.safetensors"]
    done = grbench_here("import-weights", str(folder), *flags)
    assert done.returncode == (2 if words else 0)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == bool(words)


def test_a_dense_checkpoint_needs_its_tables(tmp_path: Path, grbench_here: Grbench) -> None:
    state, tables = dlrm_v3_state()
    done = grbench_here("import-weights", *save(tmp_path, state), "--from", "dlrm_v3", "--heads", "2")
    assert done.returncode == 2 and "--tables" in done.stderr
    del tables["users"]
    done = grbench_here("import-weights", *save(tmp_path, state, tables), "--from", "dlrm_v3", "--heads", "2")
    assert done.returncode == 2 and "tensor users is missing" in done.stderr


CODES = [[0, 5], [2, 1], [0, 5], [1, 0], [0, 5]]


@pytest.mark.parametrize("form", ["npy", "csv", "no heading", "tokens in csv", "bom", "json", "tokens", "texts"])
def test_semantic_ids_of_others(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Items 0, 2 and 4 share a tuple: a last code numbers them, as in TIGER."""
    path = tmp_path / f"ids.{form if form in ('npy', 'csv', 'json') else 'json' if form[-1] == 's' else 'csv'}"
    rows = "\n".join(f"{a},{b}" for a, b in CODES) + "\n"
    if form == "npy":
        np.save(path, np.array(CODES))
    elif form == "csv":
        path.write_text("a,b\n" + rows)
    elif form == "no heading":
        path.write_text(rows)
    elif form == "bom":
        path.write_text(rows, encoding="utf-8-sig")
    elif form == "tokens in csv":
        path.write_text("\n".join(f"<a_{a}>, <b_{b}>" for a, b in CODES))
    elif form == "texts":
        path.write_text(json.dumps([[str(a), str(b)] for a, b in CODES]))
    elif form == "json":
        path.write_text(json.dumps(CODES))
    else:
        path.write_text(json.dumps({str(i + 1): [f"<a_{a}>", f"<b_{b}>"] for i, (a, b) in enumerate(CODES)}))
    out = tmp_path / "ids.safetensors"
    assert main([str(path), "--from", "semantic_ids", "--out", str(out)]) == 0
    ids = SemanticIds.load(out)
    assert ids.codes.tolist() == [[0, 5, 0], [2, 1, 0], [0, 5, 1], [1, 0, 0], [0, 5, 2]]
    assert ids.sizes == (3, 6, 3)
    assert "2 items shared a tuple" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ids.json", "[[1, 2], [3]]", "item 1 has [3]"),
        ("ids.json", '{"0": [1], "2": [2]}', "without a gap"),
        ("ids.json", '[["x"]]', "item 0 has the code 'x'"),
        ("ids.csv", "1,2\n-3,4\n", "item 1 has"),
        ("ids.csv", "1.0,2.0\n3.0,4.0\n", "item 0 has the code '1.0'"),
        ("ids.csv", "code_1,code_2\n3,4\n", "item 0 has the code 'code_1'; allowed are whole numbers"),
        ("ids.csv", ",a,b\n0,3,4\n", "item 0 has the code ''"),
        ("ids.csv", "1,2147483648\n", "item 0 has the code '2147483648'"),
        ("ids.json", '[["3.0"]]', "item 0 has the code '3.0'"),
        ("ids.json", "[[1], [99999999999999999999]]", "item 1 has the code 99999999999999999999"),
        ("ids.json", "{}", "[0] codes; allowed is [items, levels]"),
        ("ids.json", '{"1": [1], "01": [2]}', "without a gap"),
        ("ids.npy", "", "not a .npy file of numbers"),
        ("ids.npy", "no", "not a .npy file of numbers"),
        ("ids.txt", "1", "allowed are .npy, .csv, .json"),
    ],
)
def test_bad_semantic_ids_are_refused(name: str, text: str, words: str, tmp_path: Path, grbench_here: Grbench) -> None:
    (tmp_path / name).write_text(text)
    done = grbench_here("import-weights", name, "--from", "semantic_ids", "--out", "ids.safetensors")
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("code", [np.int64(-1), np.int64(2**31), np.uint64(2**63 + 1)])
def test_codes_of_an_array_outside_their_range_are_refused(code: Any, tmp_path: Path, grbench_here: Grbench) -> None:
    np.save(tmp_path / "ids.npy", np.array([[0, 1], [1, code]], code.dtype))
    done = grbench_here("import-weights", "ids.npy", "--from", "semantic_ids", "--out", "ids.safetensors")
    assert done.returncode == 2 and f"item 1 has the code {code}; allowed are whole numbers" in done.stderr
