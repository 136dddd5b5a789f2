"""Weights of a decoder, random or from a safetensors file, and the folder that vLLM and transformers load."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grengines.models import header
from grengines.models.decoder.config import DecoderConfig, contradiction, too_few_rows

EPS = 1e-6
EMBEDDING = "model.embed_tokens.weight"
_PAD = 64  # a vocabulary of codes alone has a multiple of it as rows
_LOGITS = 4.0  # standard deviation of logits with random weights
_SCORES = 2.0  # standard deviation of attention's scores


def write(
    config: DecoderConfig,
    sizes: Sequence[int],
    folder: str | Path,
    *,
    seed: int,
    dtype: torch.dtype,
    weights: str | None = None,
) -> None:
    """Write config.json and model.safetensors of a Qwen3ForCausalLM with one table for input and output.

    sizes: codes of each level. Tokens are level offset + code. The token after all levels begins an empty prompt.
    dtype: of the file. weights: as in `tensors`. Raises ValueError for weights that don't fit, and OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = tensors(config, sizes, seed=seed, dtype=dtype, weights=weights)
    try:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{folder}: can't write weights: {e}") from None
    described = {**shape(config, sizes), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(described, indent=1))


def shape(config: DecoderConfig, sizes: Sequence[int]) -> dict[str, Any]:
    """Return the content of config.json, in transformers' names. Raises ValueError for sizes that don't fit."""
    if problem := contradiction(config) or too_few_rows(config, sum(sizes)):
        raise ValueError(problem)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocabulary or -(-(sum(sizes) + 1) // _PAD) * _PAD,
        "hidden_size": config.embedding_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions + len(sizes),
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }


def shapes(config: DecoderConfig, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape by its name in transformers' Qwen3ForCausalLM. Raises ValueError as `shape`."""
    E, F = config.embedding_dim, config.mlp_dim
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = {
        "input_layernorm": (E,),
        "self_attn.q_proj": (queries, E),
        "self_attn.k_proj": (keys, E),
        "self_attn.v_proj": (keys, E),
        "self_attn.q_norm": (config.head_dim,),
        "self_attn.k_norm": (config.head_dim,),
        "self_attn.o_proj": (E, queries),
        "post_attention_layernorm": (E,),
        "mlp.gate_proj": (F, E),
        "mlp.up_proj": (F, E),
        "mlp.down_proj": (E, F),
    }
    layers = {f"model.layers.{i}.{part}.weight": s for i in range(config.layers) for part, s in layer.items()}
    return {EMBEDDING: (shape(config, sizes)["vocab_size"], E), **layers, "model.norm.weight": (E,)}


def tensors(
    config: DecoderConfig, sizes: Sequence[int], *, seed: int, dtype: torch.dtype, weights: str | None = None
) -> dict[str, Tensor]:
    """Return every tensor by its name, on the CPU in `dtype`: from the safetensors file `weights`, or random.

    Random tensors are drawn in fp32 in the order of `shapes`, then rounded: they are the same for every device. Raises
    ValueError, one line with the file's name, for a file that is no safetensors file of this shape.
    """
    expected = shapes(config, sizes)
    if weights is not None:
        return {name: tensor.to(dtype) for name, tensor in _read(weights, expected).items()}
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, size in expected.items():
        mean, std = _spread(name, size, config.layers)
        bound = math.sqrt(3) * std
        drawn[name] = torch.empty(size).uniform_(mean - bound, mean + bound, generator=generator).to(dtype)
    return drawn


def _spread(name: str, size: tuple[int, ...], layers: int) -> tuple[float, float]:
    """Return a mean and a standard deviation that give attention and every layer the weight of a trained model.

    The norms of queries and keys give scores of std 2. A row then attends to about n / e^4 of n keys, so its answer
    depends on the keys. Attention's output has a length of about sqrt(e^4 / n), which the output projection scales up
    for some hundred keys. All layers together add about as much to a token's vector as it began with. Norms differ from
    1, so that a missing one is noticed.
    """
    part = name.split(".")[-2]
    if len(size) == 1:
        return (math.sqrt(_SCORES) if part in ("q_norm", "k_norm") else 1.0), 0.1
    inputs = 1.0 / math.sqrt(size[1])
    if part == "embed_tokens":
        return 0.0, _LOGITS * inputs
    if part in ("o_proj", "down_proj"):
        token = _LOGITS / math.sqrt(size[0])  # length of an embedded token, per element
        return 0.0, token * inputs * (2.0 if part == "down_proj" else 4.0) / math.sqrt(layers)
    return 0.0, inputs


def _read(path: str, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises ValueError as `tensors`."""
    if not Path(path).is_file():
        raise ValueError(f"retrieval.weights: no file {path}; give a safetensors file, or null for random weights")
    try:
        with safe_open(path, framework="pt") as f:
            found = set(f.keys())
            if missing := [name for name in expected if name not in found]:
                raise ValueError(f"{path}: tensor {missing[0]} is missing; give weights of this model")
            if unexpected := sorted(found - expected.keys()):
                raise ValueError(f"{path}: unexpected tensor {unexpected[0]}; give weights of this model")
            for name, size in expected.items():
                tensor = f.get_slice(name)
                if tuple(tensor.get_shape()) != size or not tensor.get_dtype().startswith(header.FLOATS):
                    found_kind = f"{tensor.get_dtype()} {tensor.get_shape()}, expected floating point {list(size)}"
                    hint = "; rows follow the semantic IDs and model.vocabulary" if name == EMBEDDING else ""
                    raise ValueError(f"{path}: tensor {name} is {found_kind}{hint}")
            tensors = {name: f.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as e:
        raise header.unreadable(path, e) from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor {name} has NaN or infinity; give other weights")
    return tensors
