"""Meta's research HSTU (generative-recommenders, `research/`), the model of the paper's public experiments."""

from __future__ import annotations

import math

import torch

from grbench.importing.parts import Flags, Imported, head_sizes
from grbench.importing.source import Source, count, drop_prefix

LAYER = "_hstu._attention_layers.{}."
ITEMS = "_embedding_module._item_emb.weight"
POSITIONS = "_input_features_preproc._pos_emb.weight"


def load(source: Source, flags: Flags) -> Imported:
    """Map the layers and tables to a generator of items by their vectors."""
    drop_prefix(source, LAYER.format(0))
    layers = count(source, LAYER.format("{}") + "_uvqk")
    E, projected = source.take(ITEMS, -1, -1, to="token_table").shape[1], 0
    ours: dict[str, torch.Tensor] = {}
    biased, buckets, heads, qk_dim, v_dim = source.has(LAYER.format(0) + "_rel_attn_bias._pos_w"), 0, 1, 1, 1
    length = source.take(POSITIONS, -1, E, to="position_table").shape[0]
    for i in range(layers):
        theirs, to = LAYER.format(i), f"layers.{i}."
        uvqk = source.take(theirs + "_uvqk", E, -1, to=to + "uvqk.weight")
        out = source.take(theirs + "_o.weight", E, -1, to=to + "out.weight")
        projected, values = uvqk.shape[1], out.shape[1]
        if 2 * values >= projected:
            raise ValueError(
                f"{source.path}: tensor {theirs}_o.weight is {list(out.shape)}: concat_ua=True, which grbench lacks; "
                "allowed is a model with concat_ua=False"
            )
        heads, qk_dim, v_dim = head_sizes(source, projected, values, flags.heads)
        ours[to + "uvqk.weight"], ours[to + "uvqk.bias"] = uvqk.T, torch.zeros(projected)
        ours[to + "out.weight"] = out
        ours[to + "out.bias"] = source.take(theirs + "_o.bias", E, to=to + "out.bias")
        for name, width in (("norm", E), ("attention_norm", values)):  # theirs have no weights
            ours[f"{to}{name}.weight"], ours[f"{to}{name}.bias"] = torch.ones(width), torch.zeros(width)
        if biased:
            # w[n - 1 + key - query] of n lengths, of which queries see the half before them.
            pos = source.take(theirs + "_rel_attn_bias._pos_w", 2 * length - 1, to=to + "position_bias")
            ours[to + "position_bias"] = pos[:length].flip(0)[: length - 1]
            ours[to + "time_bias"] = source.take(theirs + "_rel_attn_bias._ts_w", -1, to=to + "time_bias")
            buckets = len(ours[to + "time_bias"])
    source.leave("_attn_mask", "the causal mask, which the kernels compute")
    items = source.tensors[ITEMS].float()
    # Row 0 is the padding, which begins an empty prompt here: the last token.
    ours["token_table"] = torch.cat([items[1:], items[:1]]) * math.sqrt(E)
    ours["position_table"] = source.tensors[POSITIONS].float()
    ours["norm.weight"], ours["norm.bias"] = torch.full((E,), 1 / flags.temperature), torch.zeros(E)
    source.finish()
    options = {
        "variant": "research",
        "position_bias": biased,
        "time_bias": buckets,
        "scaling_seqlen": length,
        "layers": layers,
        "embedding_dim": E,
        "heads": heads,
        "qk_dim": qk_dim,
        "v_dim": v_dim,
        "max_positions": length - 1,
    }
    run = "task=generate retrieval.levels=1"
    count_of = f"the workload must have {len(items) - 1} items: item i is row i + 1 of {ITEMS}"
    return Imported(ours, options, run, weights_key="retrieval.weights", notes=[count_of])
