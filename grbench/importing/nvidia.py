"""NVIDIA's ranking model of recsys-examples, `examples/hstu`: native, debug and fused layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grbench.importing.parts import Flags, Imported, by_part, head_sizes, linear, positions_after, scaling, tables
from grbench.importing.source import Source, count, drop_prefix

LAYER = "_hstu_block._attention_layers.{}."
ENCODER = "_hstu_block._preprocessor._positional_encoder."
ITEM_MLP = "_hstu_block._preprocessor._item_mlp._mlp"
CONTEXT_MLP = "_hstu_block._preprocessor._contextual_mlp._mlp"
HEAD = "_mlp._mlp"


def load(source: Source, flags: Flags) -> Imported:
    """Map the layers, the positions and a head of two layers. Item vectors come from --tables."""
    drop_prefix(source, LAYER.format(0))
    vectors = tables(flags.tables, "item vectors of its own")
    fused = source.has(LAYER.format(0) + "_linear_uvqk_weight")
    layers = count(source, LAYER.format("{}") + ("_linear_uvqk_weight" if fused else "_linear_uvqk.weight"))
    if not layers:
        raise ValueError(f"{source.path}: tensor {LAYER.format(0)}_linear_uvqk.weight is missing")
    ours: dict[str, Tensor] = {}
    sizes = (0, 0, 0)
    for i in range(layers):
        sizes = _layer(source, i, fused, flags, ours)
    heads, qk_dim, v_dim = sizes
    E = ours["layers.0.out.weight"].shape[0]
    scale, contextual = math.sqrt(E), 0
    items = vectors.take("items", -1, -1, to="token_table", folded=True).double()
    rows = [_mlp(source, ITEM_MLP, items, "token_table") * scale]
    if rows[0].shape[1] != E:
        raise ValueError(f"{vectors.path}: tensor items is {list(items.shape)}, expected [any, {E}]")
    if vectors.has("users"):  # [users, contextual tokens, width]
        users = vectors.take("users", -1, -1, -1, to="token_table", folded=True).double()
        contextual = users.shape[1]
        rows.append(_mlp(source, CONTEXT_MLP, users.flatten(0, 1), "token_table") * scale)
    for name in [name for name in source.tensors if name.endswith("_extra_state")]:
        source.leave(name, "state of Transformer Engine's recipes")
    source.leave("_embedding_collection", "embedding tables come from --tables; action tokens are not run")
    ours["token_table"] = torch.cat(rows)
    ours["action_table"], ours["weight_vector"] = torch.zeros(0, E), torch.zeros(E)
    places = source.take(ENCODER + "_position_embeddings_weight", -1, E, to="position_table")
    ours["position_table"] = positions_after(places, contextual)
    if source.has(ENCODER + "_timestamp_embeddings_weight"):
        raise ValueError(
            f"{source.path}: tensor {ENCODER}_timestamp_embeddings_weight: use_time_encoding=True counts from the end "
            "without contextual rows, which grbench lacks; allowed is a model with use_time_encoding=False"
        )
    ours["time_table"] = torch.zeros(2, E)
    _head(source, ours, E)
    source.finish()
    vectors.finish()
    source.fates += vectors.fates
    users_rows = len(rows[1]) if contextual else 0
    options = {
        "variant": "nvidia",
        "contextual_from": 0,
        "contextual_seq_len": contextual,
        "scaling_seqlen": scaling(flags),
        "layers": layers,
        "embedding_dim": E,
        "heads": heads,
        "qk_dim": qk_dim,
        "v_dim": v_dim,
        "head_dim": len(ours["head_hidden.weight"]),
        "max_positions": len(places) - contextual,
        "time_buckets": 2,
        "embedding_rows": max(len(items), users_rows),
        "tasks": [f"task{i}" for i in range(len(ours["head_out.weight"]))],
    }
    notes = [
        f"the workload must have {len(items)} items",
        "a history is its items alone: the layout's action tokens are not run, so a model trained with them differs",
        "set model.head=gelu for prediction_head_act_type=gelu, and model.eps for another layernorm_epsilon",
    ]
    return Imported(ours, options, notes=notes)


def _layer(source: Source, i: int, fused: bool, flags: Flags, ours: dict[str, Tensor]) -> tuple[int, int, int]:
    """Map one layer into `ours`. Return heads, qk_dim and v_dim."""
    theirs, to = LAYER.format(i), f"layers.{i}."
    dot = "_" if fused else "."
    uvqk = source.take(f"{theirs}_linear_uvqk{dot}weight", -1, -1, to=to + "uvqk.weight")
    out = source.take(f"{theirs}_linear_proj{dot}weight", -1, -1, to=to + "out.weight")
    if fused:
        uvqk, out = uvqk.T, out.T
    (projected, E), values = uvqk.shape, out.shape[1]
    heads, qk_dim, v_dim = head_sizes(source, projected, values, flags.heads)
    has_bias = source.has(f"{theirs}_linear_uvqk{dot}bias")
    bias = torch.zeros(projected)
    if has_bias:
        bias = source.take(f"{theirs}_linear_uvqk{dot}bias", projected, to=to + "uvqk.bias")
    if not fused:  # a head's u, v, q and k lie together
        uvqk, bias = by_part(uvqk, heads, qk_dim, v_dim), by_part(bias, heads, qk_dim, v_dim)
    ours[to + "uvqk.weight"], ours[to + "uvqk.bias"], ours[to + "out.weight"] = uvqk, bias, out
    own = [p for p in ("_output_layernorm_", "_output_ln_dropout_mul.") if source.has(f"{theirs}{p}weight")]
    for name, prefix, width in (("norm", "_input_layernorm_", E), ("attention_norm", (own or [""])[0], values)):
        for leaf, missing in (("weight", torch.ones), ("bias", torch.zeros)):  # without weights: not learned
            known = bool(prefix) and source.has(f"{theirs}{prefix}{leaf}")
            target = f"{to}{name}.{leaf}"
            ours[target] = source.take(f"{theirs}{prefix}{leaf}", width, to=target) if known else missing(width)
    return heads, qk_dim, v_dim


def _head(source: Source, ours: dict[str, Tensor], E: int) -> None:
    """Map the head's two layers into `ours`."""
    hidden = ours["head_hidden.weight"] = source.take(f"{HEAD}.0.weight", -1, E, to="head_hidden.weight")
    ours["head_out.weight"] = source.take(f"{HEAD}.2.weight", -1, len(hidden), to="head_out.weight")
    for name, at in (("head_hidden", 0), ("head_out", 2)):
        width = len(ours[f"{name}.weight"])
        given = source.has(f"{HEAD}.{at}.bias")
        ours[f"{name}.bias"] = (
            source.take(f"{HEAD}.{at}.bias", width, to=f"{name}.bias") if given else torch.zeros(width)
        )


def _mlp(source: Source, name: str, x: Tensor, to: str) -> Tensor:
    """Apply an MLP of two layers with ReLU if the checkpoint has it."""
    if not source.has(f"{name}.0.weight"):
        return x
    return linear(source, f"{name}.2", linear(source, f"{name}.0", x, to).relu(), to)
