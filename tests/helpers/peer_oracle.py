"""The models of other projects in fp64 NumPy, from their own state dicts by their formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from grengines.api import Request
from helpers.hstu_oracle import Array, Peculiar, attend, layer_norm, minutes_bucket, silu, swish_norm

Weights = Mapping[str, Array]


def affine(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def swish_mlp(w: Weights, name: str, x: Array) -> Array:
    hidden = swish_norm(affine(w, f"{name}.0", x), w[f"{name}.1.weight"], w[f"{name}.1.bias"], 1e-5)
    return layer_norm(affine(w, f"{name}.2", hidden), w[f"{name}.3.weight"], w[f"{name}.3.bias"], 1e-5)


def relu_mlp(w: Weights, name: str, x: Array) -> Array:
    return affine(w, f"{name}.2", np.maximum(affine(w, f"{name}.0", x), 0)) if f"{name}.0.weight" in w else x


def dlrm_v3(w: Weights, tables: Weights, r: Request, *, heads: int, N: int) -> Array:
    """Logits [candidates, tasks] of Meta's DLRM-v3 (modules/dlrm_hstu.py)."""
    t, p = "_hstu_transducer.", "_hstu_transducer._input_preprocessor."
    E, T, n = w["_hstu_transducer._positional_encoder._position_embeddings_weight"].shape[1], len(r.candidates), 0
    n = len(r.history_items)
    items = np.concatenate([r.history_items, r.candidates])
    content = tables["items"][items]
    category = tables["categories"][tables["item_category"][items].astype(int)]
    x = swish_mlp(w, p + "_content_embedding_mlp", content) + swish_mlp(w, p + "_additional_embedding_mlp", category)
    table, bits = w[p + "_action_encoder._action_embedding_table"], w[p + "_action_encoder._combined_action_weights"]
    actions = [
        np.concatenate([table[b] * (int(mask) & int(weight) > 0) for b, weight in enumerate(bits)])
        for mask in r.history_actions
    ]
    actions += [w[p + "_action_encoder._target_action_embedding_table"][0]] * T
    x = x + swish_mlp(w, p + "_action_embedding_mlp", np.array(actions))
    weight, bias = w[p + "_batched_contextual_linear_weights"], w[p + "_batched_contextual_linear_bias"]
    C = len(weight)
    user = tables["users"][r.user_id * C : (r.user_id + 1) * C] * (n + T >= 20)
    x = np.concatenate([np.stack([user[c] @ weight[c] + bias[c] for c in range(C)]), x]) * math.sqrt(E)
    places, times = (w[f"{t}_positional_encoder._{k}_embeddings_weight"] for k in ("position", "timestamp"))
    when = [0] * C + [int(s) for s in r.history_timestamps] + [r.timestamp] * T
    for i in range(len(x)):
        place = i if i < C else min(C + max(C + n - i, 0), len(places) - 1)
        x[i] += places[place] + times[minutes_bucket(r.timestamp - when[i], len(times))]
    layer = 0
    while f"{t}_stu_module._stu_layers.{layer}._uvqk_weight" in w:
        own = {k: w[f"{t}_stu_module._stu_layers.{layer}._{k}"] for k in STU}
        values = len(own["output_weight"]) // 3
        y = layer_norm(x, own["input_norm_weight"], own["input_norm_bias"]) @ own["uvqk_weight"] + own["uvqk_beta"]
        queries = y.shape[1] // 2 - values
        u, v, q, k = np.split(y, np.cumsum([values, values, queries]), axis=1)
        q, k, v = (a.reshape(len(x), heads, -1) for a in (q, k, v))
        a = attend(q, k, v, T, 0, 0, 1 / math.sqrt(queries // heads), N).reshape(len(x), -1)
        u = silu(u)
        normed = layer_norm(a, own["output_norm_weight"], own["output_norm_bias"])
        x = x + np.concatenate([u, a, u * normed], axis=1) @ own["output_weight"]
        layer += 1
    o = t + "_output_postprocessor."
    angles = [r.timestamp // 3600 % 24 / 24 * 2 * 3.14, r.timestamp // 86400 % 7 / 7 * 2 * 3.14]
    clock = np.tile([math.cos(angles[0]), math.sin(angles[0]), math.cos(angles[1]), math.sin(angles[1])], (T, 1))
    user_rows = affine(w, o + "_time_feature_combiner", np.concatenate([x[len(x) - T :], clock], axis=1))
    user_rows = layer_norm(user_rows, w[o + "_layer_norm.weight"], w[o + "_layer_norm.bias"], 1e-5)
    tower = swish_mlp(w, "_item_embedding_mlp", np.concatenate([content[n:], category[n:]], axis=1))
    head = "_multitask_module._prediction_module"
    hidden = affine(w, f"{head}.0", user_rows * tower)
    hidden = swish_norm(hidden, w[f"{head}.1.weight"], w[f"{head}.1.bias"], 1e-5)
    return affine(w, f"{head}.2", hidden)


STU = ("uvqk_weight", "uvqk_beta", "input_norm_weight", "input_norm_bias", "output_weight", "output_norm_weight",
       "output_norm_bias")  # fmt: skip


def research(w: Weights, r: Request, *, heads: int, temperature: float) -> Array:
    """Logits [items] of the next item, of the research HSTU: item i is their id i + 1."""
    emb, place = w["_embedding_module._item_emb.weight"], w["_input_features_preproc._pos_emb.weight"]
    N, E = place.shape
    ids = [int(i) + 1 for i in r.history_items]
    x = emb[ids] * math.sqrt(E) + place[: len(ids)]
    times = [int(s) for s in r.history_timestamps]
    following = [*times[1:], r.timestamp]
    layer = 0
    while f"_hstu._attention_layers.{layer}._uvqk" in w:
        at = f"_hstu._attention_layers.{layer}."
        values = w[at + "_o.weight"].shape[1]
        y = silu(layer_norm(x, 1.0, 0.0) @ w[at + "_uvqk"])
        u, v, q, k = np.split(y, np.cumsum([values, values, y.shape[1] // 2 - values]), axis=1)
        q, k, v = (a.reshape(len(x), heads, -1) for a in (q, k, v))
        pos, ts = w[at + "_rel_attn_bias._pos_w"], w[at + "_rel_attn_bias._ts_w"]
        by_distance = np.array([pos[N - 1 - d] for d in range(N)])
        p = Peculiar(position_bias=by_distance, time_bias=ts, row_times=following, column_times=times)
        a = attend(q, k, v, 0, 0, 0, 1.0, N, p).reshape(len(x), -1)
        x = x + affine(w, at + "_o", u * layer_norm(a, 1.0, 0.0))
        layer += 1
    user = x[-1] / np.linalg.norm(x[-1])
    items = emb[1:] / np.linalg.norm(emb[1:], axis=1, keepdims=True)
    return items @ user / temperature


def nvidia(w: Weights, tables: Weights, r: Request, *, heads: int, N: int) -> Array:
    """Logits [candidates, tasks] of NVIDIA's ranking model without action tokens: native or fused layers."""
    b = "_hstu_block."
    place = w[b + "_preprocessor._positional_encoder._position_embeddings_weight"]
    E, T = place.shape[1], len(r.candidates)
    items = np.concatenate([r.history_items, r.candidates])
    x = relu_mlp(w, b + "_preprocessor._item_mlp._mlp", tables["items"][items])
    user = relu_mlp(w, b + "_preprocessor._contextual_mlp._mlp", tables["users"][r.user_id])
    C = len(user)
    x = np.concatenate([user, x]) * math.sqrt(E)
    last = min(C + len(r.history_items), len(place) - 1)
    x = x + place[[min(i, last) for i in range(len(x))]]
    layer = 0
    while any(name.startswith(f"{b}_attention_layers.{layer}.") for name in w):
        at = f"{b}_attention_layers.{layer}."
        y = layer_norm(x, w[at + "_input_layernorm_weight"], w[at + "_input_layernorm_bias"], 1e-5)
        if at + "_linear_uvqk_weight" in w:  # fused: all heads' u, then v, q and k
            y = silu(y @ w[at + "_linear_uvqk_weight"] + w[at + "_linear_uvqk_bias"])
            u, v, q, k = (part.reshape(len(x), heads, -1) for part in np.split(y, 4, axis=1))
            out, norm = w[at + "_linear_proj_weight"], "_output_layernorm_"
        else:  # native: u, v, q and k of each head
            y = silu(affine(w, at + "_linear_uvqk", y)).reshape(len(x), heads, -1)
            u, v, q, k = np.split(y, 4, axis=2)
            out, norm = w[at + "_linear_proj.weight"].T, "_output_ln_dropout_mul."
        a = attend(q, k, v, T, C, 0, 1 / math.sqrt(q.shape[2]), N).reshape(len(x), -1)
        normed = layer_norm(a, w[at + norm + "weight"], w[at + norm + "bias"], 1e-5)
        x = x + (u.reshape(len(x), -1) * normed) @ out
        layer += 1
    return relu_mlp(w, "_mlp._mlp", x[len(x) - T :])
