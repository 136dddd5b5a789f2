"""HSTU for autograd: the maths of model.py and generator.py over padded sequences, without a change in place.

Training runs it, and no engine does. A test holds it to the models' own forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.model import HSTULayer, HSTURanker
from grengines.runtime.batch import JaggedBatch

START = 0.05  # standard deviation of the tables at the start of training


def start(model: HSTURanker | HSTUGenerator, seed: int) -> None:
    """Draw weights to train from: small tables, norms of 1, no biases.

    Random tables of unit size, as a benchmark has them (`model.initialise`), would take long to forget.
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


def generator_hidden(model: HSTUGenerator, tokens: Tensor, dropout: float = 0.0) -> Tensor:
    """Return the row of each token after the last layer, [B, n, E], of prompts padded on the right (int64 [B, n])."""
    n = tokens.shape[1]
    x = F.embedding(tokens, model.token_table) + model.position_table[:n]
    mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril_()
    return _layers(model.layers, x, mask, model.config, model.alpha, dropout)


def generator_features(model: HSTUGenerator, hidden: Tensor) -> Tensor:
    """Return the fp32 vectors [rows, E] of hidden rows, whose products with token vectors are the model's logits."""
    return F.layer_norm(
        hidden.float(), model.norm.weight.shape, model.norm.weight, model.norm.bias, model.norm.eps
    ).float()


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


def _layers(
    layers: Iterable[nn.Module], x: Tensor, mask: Tensor, config: HSTUConfig, alpha: float, dropout: float
) -> Tensor:
    """Run the layers over x [B, n, E]. mask: bool, [n, n] or [B, 1, n, n]. dropout: of the input and each output."""
    x = F.dropout(x, dropout)
    for layer in layers:
        assert isinstance(layer, HSTULayer)
        y = F.layer_norm(x, layer.norm.weight.shape, layer.norm.weight, layer.norm.bias, layer.eps)
        u, v, q, k = layer.uvqk(y).split(layer.widths, dim=-1)
        v, q, k = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2) for t in (v, q, k))  # [B, H, n, d]
        weights = F.silu(alpha * q @ k.transpose(2, 3)) * mask / config.scaling_seqlen
        a = (weights @ v).transpose(1, 2).flatten(2)
        u, norm = F.silu(u), layer.attention_norm
        gated = torch.cat([u, a, u * F.layer_norm(a, norm.weight.shape, norm.weight, norm.bias, layer.eps)], dim=-1)
        x = x + F.dropout(F.linear(gated, layer.out.weight), dropout)
    return x
