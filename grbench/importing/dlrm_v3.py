"""The dense part of Meta's DLRM-v3 (generative-recommenders, `modules/dlrm_hstu.py`), also MLPerf's."""

from __future__ import annotations

import math
from typing import Any

import torch

from grbench.importing.parts import Flags, Imported, head_sizes, positions_after, scaling, swish_mlp, tables
from grbench.importing.source import Source, count, drop_prefix

LAYER = "_hstu_transducer._stu_module._stu_layers.{}."
INPUT = "_hstu_transducer._input_preprocessor."
OUTPUT = "_hstu_transducer._output_postprocessor."
ENCODER = "_hstu_transducer._positional_encoder."
HEAD = "_multitask_module._prediction_module"


def load(source: Source, flags: Flags) -> Imported:
    """Map the layers, the encoder and the head; fold the MLPs of items, users and actions into tables."""
    drop_prefix(source, LAYER.format(0))
    vectors = tables(flags.tables, "sparse tables")
    ours: dict[str, torch.Tensor] = {}
    layers = _layers(source, flags, ours)
    E = layers["embedding_dim"]
    items, features, contextual, embedding_rows = _tokens(source, vectors, E, ours)
    actions = _actions(source, E, ours)
    places = source.take(ENCODER + "_position_embeddings_weight", -1, E, to="position_table")
    ours["position_table"] = positions_after(places, contextual)
    ours["time_table"] = source.take(ENCODER + "_timestamp_embeddings_weight", -1, E, to="time_table")
    ours["tower_table"] = torch.zeros(len(ours["token_table"]), E, dtype=torch.float64)
    ours["tower_table"][: len(items)] = swish_mlp(source, "_item_embedding_mlp", features.double(), "tower_table")
    clock, width, tasks = _head(source, E, ours)
    source.finish()
    vectors.finish()
    source.fates += vectors.fates
    options = {
        "variant": "stu",
        "item_tower": "table",
        "group_norm": layers.pop("group_norm"),
        "clock": clock,
        "scaling_seqlen": scaling(flags),
        **layers,
        "contextual_seq_len": contextual,
        "head_dim": width,
        "embedding_rows": embedding_rows,
        "max_positions": len(places) - contextual,
        "time_buckets": len(ours["time_table"]),
        "tasks": ["rating"] if tasks == 1 else [f"task{i}" for i in range(tasks)],
    }
    return Imported(ours, options, notes=[f"the workload must have {len(items)} items and {actions} actions"])


def _layers(source: Source, flags: Flags, ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Map the layers. Returns their options: group_norm, layers and sizes."""
    layers = count(source, LAYER.format("{}") + "_uvqk_weight")
    E, projected = source.look(LAYER.format(0) + "_uvqk_weight", -1, -1).shape
    values = source.look(LAYER.format(0) + "_output_weight", -1, E).shape[0] // 3
    heads, qk_dim, v_dim = head_sizes(source, projected, values, flags.heads)
    grouped = source.look(LAYER.format(0) + "_output_norm_weight", -1).shape[0] == heads != values
    for i in range(layers):
        theirs, to = LAYER.format(i), f"layers.{i}."
        ours[to + "norm.weight"] = source.take(theirs + "_input_norm_weight", E, to=to + "norm.weight")
        ours[to + "norm.bias"] = source.take(theirs + "_input_norm_bias", E, to=to + "norm.bias")
        ours[to + "uvqk.weight"] = source.take(theirs + "_uvqk_weight", E, projected, to=to + "uvqk.weight").T
        ours[to + "uvqk.bias"] = source.take(theirs + "_uvqk_beta", projected, to=to + "uvqk.bias")
        ours[to + "out.weight"] = source.take(theirs + "_output_weight", 3 * values, E, to=to + "out.weight").T
        for leaf in ("weight", "bias"):
            name, width = f"{to}attention_norm.{leaf}", heads if grouped else values
            tensor = source.take(f"{theirs}_output_norm_{leaf}", width, to=name)
            ours[name] = tensor.repeat_interleave(v_dim) if grouped else tensor
    sizes = {"layers": layers, "embedding_dim": E, "heads": heads, "qk_dim": qk_dim, "v_dim": v_dim}
    return {"group_norm": grouped, **sizes}


def _tokens(
    source: Source, vectors: Source, E: int, ours: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Fold the MLPs of items and of users' contextual tokens into the token table.

    Returns the items' vectors, the inputs of the item tower, the number of contextual tokens, and `embedding_rows`.
    """
    items = vectors.take("items", -1, -1, to="token_table, tower_table", folded=True)
    scale, features = math.sqrt(E), items
    tokens = swish_mlp(source, INPUT + "_content_embedding_mlp", items.double(), "token_table")
    if vectors.has("categories"):
        categories = vectors.take("categories", -1, -1, to="token_table, tower_table", folded=True)
        own = categories[_categories(vectors, len(items), len(categories))]
        tokens = tokens + swish_mlp(source, INPUT + "_additional_embedding_mlp", own.double(), "token_table")
        features = torch.cat([items, own], dim=1)
    else:
        source.leave(INPUT + "_additional_embedding_mlp", "--tables has no categories, whose vectors it reads")
    rows = [tokens * scale]
    contextual = 0
    if source.has(INPUT + "_batched_contextual_linear_weights"):
        weight = source.take(
            INPUT + "_batched_contextual_linear_weights", -1, -1, E, to="token_table", folded=True
        ).double()
        contextual = weight.shape[0]
        bias = source.take(INPUT + "_batched_contextual_linear_bias", contextual, E, to="token_table", folded=True)
        users = vectors.take("users", -1, weight.shape[1], to="token_table", folded=True)
        if len(users) % contextual:
            raise ValueError(f"{vectors.path}: tensor users has {len(users)} rows, not {contextual} for each user")
        each = torch.einsum("ucd,cde->uce", users.double().unflatten(0, (-1, contextual)), weight) + bias.double()
        rows += [each.flatten(0, 1) * scale, bias.double() * scale]
    ours["token_table"] = torch.cat(rows)
    return items, features, contextual, _most(items, rows)


def _actions(source: Source, E: int, ours: dict[str, torch.Tensor]) -> int:
    """Fold the MLP of actions into a vector for each combination of them. Returns the number of actions."""
    bits = source.take(INPUT + "_action_encoder._combined_action_weights", -1, to="action_table", folded=True)
    if bits.tolist() != [1 << i for i in range(len(bits))] or len(bits) > 5:
        raise ValueError(
            f"{source.path}: tensor {INPUT}_action_encoder._combined_action_weights is {bits.tolist()}; allowed are "
            "powers of two 1, 2, 4, ... of at most 5 actions"
        )
    table = source.take(
        INPUT + "_action_encoder._action_embedding_table", len(bits), -1, to="action_table", folded=True
    )
    target = source.take(
        INPUT + "_action_encoder._target_action_embedding_table", 1, table.numel(), to="action_table", folded=True
    )
    masks = torch.arange(1 << len(bits))[:, None]
    combinations = ((masks & bits.long()) > 0)[:, :, None] * table
    encoded = torch.cat([combinations.flatten(1), target]).double()
    ours["action_table"] = swish_mlp(source, INPUT + "_action_embedding_mlp", encoded, "action_table") * math.sqrt(E)
    ours["weight_vector"] = torch.zeros(E)
    return len(bits)


def _head(source: Source, E: int, ours: dict[str, torch.Tensor]) -> tuple[bool, int, int]:
    """Map what comes after the layers. Returns whether there is a clock, the width of the head, and its outputs."""
    for leaf in ("weight", "bias"):
        ours[f"norm.{leaf}"] = source.take(f"{OUTPUT}_layer_norm.{leaf}", E, to=f"norm.{leaf}")
    clock = source.has(OUTPUT + "_time_feature_combiner.weight")
    if clock:
        ours["clock.weight"] = source.take(OUTPUT + "_time_feature_combiner.weight", E, E + 4, to="clock.weight")
        ours["clock.bias"] = source.take(OUTPUT + "_time_feature_combiner.bias", E, to="clock.bias")
        for name, expected in (("_period_units", [3600.0, 86400.0]), ("_units_per_period", [24.0, 7.0])):
            found = source.take(OUTPUT + name, 1, 2, to="clock", folded=True).flatten().tolist()
            if found != expected:
                raise ValueError(f"{source.path}: tensor {OUTPUT}{name} is {found}, expected {expected}: hour, weekday")
    hidden = source.take(f"{HEAD}.0.weight", -1, E, to="head_hidden.weight")
    width = hidden.shape[0]
    ours["head_hidden.weight"] = hidden
    ours["head_hidden.bias"] = source.take(f"{HEAD}.0.bias", width, to="head_hidden.bias")
    for leaf in ("weight", "bias"):
        ours[f"head_norm.{leaf}"] = source.take(f"{HEAD}.1.{leaf}", width, to=f"head_norm.{leaf}")
    ours["head_out.weight"] = source.take(f"{HEAD}.2.weight", -1, width, to="head_out.weight")
    tasks = ours["head_out.weight"].shape[0]
    ours["head_out.bias"] = source.take(f"{HEAD}.2.bias", tasks, to="head_out.bias")
    return clock, width, tasks


def _categories(vectors: Source, items: int, categories: int) -> torch.Tensor:
    """Return the category of each item, int64 [items]."""
    vectors.take("item_category", items, to="token_table, tower_table", folded=True)
    found = vectors.look("item_category").double()  # exact, unlike fp32
    wrong = (found != found.floor()) | (found < 0) | (found >= categories)
    if wrong.any():
        item = int(wrong.nonzero()[0])
        raise ValueError(
            f"{vectors.path}: tensor item_category has {found[item].item():g} for item {item}; allowed are whole "
            f"numbers from 0 to {categories - 1}"
        )
    return found.long()


def _most(items: torch.Tensor, rows: list[torch.Tensor]) -> int:
    """Return the least `embedding_rows` that keeps every item and every user."""
    return max(len(items), len(rows[1]) if len(rows) > 1 else 0)
