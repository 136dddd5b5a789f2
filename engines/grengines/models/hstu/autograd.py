"""HSTU for autograd: the maths of model.py and generator.py over padded sequences, without a change in place.

Training runs it, and no engine does. A test holds it to the models' own forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.model import HSTULayer, HSTURanker
from grengines.runtime.batch import JaggedBatch
from grkernels.hstu_attention.extras import Extras
from grkernels.hstu_attention.reference import score_bias

START = 0.05  # standard deviation of the tables at the start of training


def start(model: HSTURanker | HSTUGenerator, seed: int) -> None:
    """Draw weights to train from: small tables, norms of 1, no biases.

    Random tables of unit size, as a benchmark has them (`weights.fill`), would take long to forget.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            kind, _, leaf = name.rpartition(".")
            if kind.endswith("norm"):
                p.fill_(1.0 if leaf == "weight" else 0.0)
            elif leaf == "bias":
                p.zero_()
            else:
                std = START if leaf != "weight" else 1.0 / math.sqrt(p.shape[1])
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))


def generator_hidden(
    model: HSTUGenerator,
    tokens: Tensor,
    dropout: float = 0.0,
    times: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Return the row of each token after the last layer, [B, n, E], of prompts padded on the right (int64 [B, n]).

    times: int64 [B, n + 1], seconds, of each token and of what follows the last one: for a time bias. kept: bool
    [B, n], False for tokens of which only the position is read.
    """
    n = tokens.shape[1]
    x = F.embedding(tokens, model.token_table)
    x = (x if kept is None else x * kept[:, :, None]) + model.position_table[:n]
    mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril_()
    place = torch.arange(n, device=x.device)

    def bias(layer: HSTULayer) -> Tensor | float:
        tables = Extras(position_bias=layer.position_bias, time_bias=layer.time_bias)
        if times is None:
            return score_bias(place, place, None, None, tables)
        found = score_bias(place, place, times[:, 1:], times[:, :-1], tables)
        return found[:, None] if isinstance(found, Tensor) and found.dim() == 3 else found  # for all heads

    return _layers(model.layers, x, mask, model.config, model.alpha, dropout, bias)


def generator_features(model: HSTUGenerator, hidden: Tensor) -> Tensor:
    """Return the fp32 vectors [rows, E] of hidden rows, whose products with token vectors are the model's logits."""
    norm, wide = model.norm, hidden.float()
    if norm.kind == "none":
        return wide
    if norm.kind == "l2":
        return F.normalize(wide, eps=norm.eps) * norm.weight + norm.bias
    return F.layer_norm(wide, norm.weight.shape, norm.weight, norm.bias, norm.eps).float()


def generator_table(model: HSTUGenerator, level: int) -> Tensor:
    """Return the vectors [codes, E] of a level's tokens, by which the features are multiplied."""
    table = model.token_table[model.offsets[level] : model.offsets[level + 1]]
    return F.normalize(table) if model.item_norm else table


def ranker_logits(model: HSTURanker, batch: JaggedBatch, dropout: float = 0.0) -> Tensor:
    """Return logits [M, tasks] of the candidates of a full batch, as HSTURanker.forward does."""
    offsets, n = batch.q_offsets, batch.max_q_len
    columns = torch.arange(n, device=offsets.device)
    lengths = offsets.diff()[:, None]
    real = columns < lengths
    rows = (offsets[:-1, None] + columns).clamp(max=batch.token_rows.shape[0] - 1)
    config = model.config
    mask = _mask(lengths, batch.num_targets[:, None], columns, config.contextual_seq_len, config.max_attn_len)
    x = _layers(model.layers, model.embed(batch)[rows], mask[:, None], config, model.alpha, dropout)
    return model.score(x[real][batch.candidate_rows], batch)


def _mask(lengths: Tensor, targets: Tensor, columns: Tensor, contextual: int, window: int) -> Tensor:
    """Return bool [B, n, n], as grkernels.hstu_attention.reference.hstu_mask defines it for each sequence."""
    m = lengths - targets - max(contextual - 1, 0)
    i = torch.minimum((columns - max(contextual - 1, 0)).clamp(min=0)[None], m)
    row, column = i[:, :, None], i[:, None, :]
    mask = torch.eye(len(columns), dtype=torch.bool, device=columns.device) | (row > column)
    if window > 0:
        mask = mask & (row - column <= window)
    if contextual > 0:
        mask = mask | ((row == 0) & (column < m[:, :, None]))
    return mask & (columns < lengths)[:, None, :]


def _no_bias(layer: HSTULayer) -> float:
    return 0.0


def _layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    mask: Tensor,
    config: HSTUConfig,
    alpha: float,
    dropout: float,
    bias: Callable[[HSTULayer], Tensor | float] = _no_bias,
) -> Tensor:
    """Run the layers over x [B, n, E].

    mask: bool, [n, n] or [B, 1, n, n]. dropout: of the input and each output. bias: of a layer's scores.
    """
    x = F.dropout(x, dropout)
    for layer in layers:
        assert isinstance(layer, HSTULayer)
        y = F.layer_norm(x, layer.norm.weight.shape, layer.norm.weight, layer.norm.bias, layer.eps)
        projected = layer.uvqk(y)
        u, v, q, k = (F.silu(projected) if layer.silu_all else projected).split(layer.widths, dim=-1)
        v, q, k = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2) for t in (v, q, k))  # [B, H, n, d]
        weights = F.silu(alpha * q @ k.transpose(2, 3) + bias(layer)) * mask / config.scaling_seqlen
        a = (weights @ v).transpose(1, 2)
        u, normed = u if layer.silu_all else F.silu(u), _normed(layer, a)
        gated = torch.cat([u, a.flatten(2), u * normed], dim=-1) if layer.concat else u * normed
        x = x + F.dropout(layer.out(gated), dropout)
    return x


def _normed(layer: HSTULayer, a: Tensor) -> Tensor:
    """Return attention [B, n, H, d] normalised as a whole or head by head, [B, n, H * d]."""
    norm, shape = layer.attention_norm, (layer.heads, -1)
    if not layer.norm_by_head:
        return F.layer_norm(a.flatten(2), norm.weight.shape, norm.weight, norm.bias, layer.eps)
    y = F.layer_norm(a, a.shape[-1:], eps=layer.eps)
    return (y * norm.weight.view(shape) + norm.bias.view(shape)).flatten(2)
