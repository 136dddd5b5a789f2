"""A Qwen3 folder (config.json and safetensors) whose vocabulary has the codes of semantic IDs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from grbench.importing.parts import Flags, Imported
from grbench.importing.source import Source, read_safetensors
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.weights import EMBEDDING, shapes
from grengines.options import violations

OPTIONS = {
    "layers": "num_hidden_layers",
    "embedding_dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "max_positions": "max_position_embeddings",
}
FIXED = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}


def read(folder: Path) -> Source:
    """Read every safetensors file of the folder. Raises ValueError for a folder without one."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no folder with config.json and *.safetensors; files of torch.save are not read")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    return Source(folder, tensors)


def load(source: Source, flags: Flags) -> Imported:
    """Take the layers as they are, and from the vocabulary the rows of the codes, or all rows with the codes first."""
    described = _described(source.path)
    if not flags.sizes or flags.first_token is None:
        raise ValueError(
            "--sizes and --first-token: say which tokens of the vocabulary are codes, such as --sizes 256,256,256 "
            "--first-token 151669; the codes of a level, and the levels, follow each other"
        )
    options: dict[str, Any] = {ours: int(described[theirs]) for ours, theirs in OPTIONS.items()}
    options["max_positions"] -= len(flags.sizes)
    options["rope_theta"] = _rope_theta(source.path / "config.json", described)
    if wrong := list(violations(DecoderConfig(**options))):
        raise ValueError(f"{source.path}/config.json: as options of model=decoder, {wrong[0]}")
    needed = shapes(DecoderConfig(**options), flags.sizes)
    tensors = {name: source.take(name, *shape, to=name) for name, shape in needed.items() if name != EMBEDDING}
    table = source.take(EMBEDDING, -1, options["embedding_dim"], to=EMBEDDING, folded=True)
    first, codes = flags.first_token, sum(flags.sizes)
    begin = flags.begin_token if flags.begin_token is not None else described.get("bos_token_id")
    if begin is None:
        raise ValueError(
            f"{source.path}/config.json: no bos_token_id; give the token of an empty prompt: --begin-token"
        )
    if not isinstance(begin, int):
        raise ValueError(f"{source.path}/config.json: bos_token_id={begin}; allowed is one token; give --begin-token")
    if first < 0 or first + codes > len(table) or not 0 <= begin < len(table):
        raise ValueError(
            f"{source.path}: tensor {EMBEDDING} has {len(table)} rows; --first-token {first} with {codes} codes and "
            f"--begin-token {begin} are outside"
        )
    if flags.whole_vocabulary:
        ours = _codes_first(table, first, codes, begin)
        options["vocabulary"] = len(ours)
        notes = ["scores are the softmax over the whole vocabulary"]
    else:
        ours = torch.zeros(needed[EMBEDDING])
        ours[:codes], ours[codes] = table[first : first + codes], table[begin]
        notes = ["scores are the softmax over a level's codes, not over the whole vocabulary; see --whole-vocabulary"]
    if source.has("lm_head.weight"):
        if not torch.equal(source.tensors["lm_head.weight"].float(), table):
            raise ValueError(
                f"{source.path}: tensor lm_head.weight differs from {EMBEDDING}; allowed is a model with "
                "tie_word_embeddings=true, because grbench has one table"
            )
        source.leave("lm_head.weight", f"equal to {EMBEDDING}")
    source.finish()
    return Imported(
        tensors | {EMBEDDING: ours}, options, "task=generate", "decoder", weights_key="retrieval.weights", notes=notes
    )


def _codes_first(table: torch.Tensor, first: int, codes: int, begin: int) -> torch.Tensor:
    """Return all rows of the table [V, E]: those of the codes, that of an empty prompt, and the others in their order.

    Raises ValueError if an empty prompt begins with a code: its row can't be in two places.
    """
    if first <= begin < first + codes:
        raise ValueError(
            f"--begin-token {begin}: with --whole-vocabulary allowed is a token that is no code; codes are {first} to "
            f"{first + codes - 1}"
        )
    other = torch.ones(len(table), dtype=torch.bool)
    other[first : first + codes] = other[begin] = False
    return torch.cat([table[first : first + codes], table[begin : begin + 1], table[other]])


def _described(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises ValueError for another kind of model, or a key that is missing."""
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path}: not a JSON object")
    if missing := [key for key in OPTIONS.values() if not isinstance(described.get(key), int)]:
        raise ValueError(f"{path}: {missing[0]} is missing or no integer")
    for key, expected in FIXED.items():
        if described.get(key, expected) != expected:
            raise ValueError(f"{path}: {key}={described[key]}; allowed is {expected}")
    kinds = described.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{path}: layer_types={kinds}; allowed is full_attention in every layer")
    return described


def _rope_theta(path: Path, described: dict[str, Any]) -> float:
    """Return the base of the rotary positions. Raises ValueError for positions that are scaled."""
    theta = described.get("rope_theta", 1e6)
    for key in ("rope_scaling", "rope_parameters"):  # older and newer versions of transformers
        rope = described.get(key) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {key}={rope!r}; allowed is an object")
        for kind in ("rope_type", "type"):
            if rope.get(kind, "default") != "default":
                raise ValueError(f"{path}: {key}.{kind}={rope[kind]}; allowed is default")
        theta = rope.get("rope_theta", theta)
    if not isinstance(theta, int | float):
        raise ValueError(f"{path}: rope_theta={theta!r}; allowed is a number")
    return float(theta)
