"""HSTU split over ranks by heads: each rank has the layers' weights of its heads, and all else whole.

A rank has the columns of the input projection to u, v, q and k of its heads, their attention and their keys and values,
and the rows of the output projection that they feed. A layer then needs two collectives:

- The norm of attention is over all heads. Each rank gathers the mean and the variance of every part of a row: fp32,
  8 bytes a row from each rank. Sums and sums of squares would be as many bytes, and would lose the variance of small
  numbers. With `model.group_norm` each head has its own norm, and this collective falls away.
- The output is the sum over all ranks: an all-reduce of [L, E] in the model's dtype. Rank 0 adds the residual and the
  bias before it, so that the sum is the layer's output.

A search adds a broadcast of each level's logits, so that all ranks follow the same beams. What is not in a layer
(embedding, head, last norm) each rank computes for itself.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.model import HSTULayer, HSTURanker
from grengines.runtime.group import Group


def shard(model: HSTURanker | HSTUGenerator, group: Group) -> None:
    """Keep the heads of this rank, in place. The number of heads is a multiple of the ranks."""
    config = dataclasses.replace(model.config, heads=model.config.heads // group.size)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, HSTULayer)
        model.layers[i] = part_of(layer, config, group)
    model.config, model.group = config, group


def part_of(layer: HSTULayer, config: HSTUConfig, group: Group) -> HSTULayer:
    """Return a rank's part of a layer. config: of the part."""
    with torch.device("meta"):
        part = HSTULayer(config)
    parts = 3 if layer.concat else 1
    mine = {
        "uvqk.weight": lambda x: _own(x, layer.widths, 0, group),
        "uvqk.bias": lambda x: _own(x, layer.widths, 0, group),
        "attention_norm.weight": lambda x: _own(x, x.shape, 0, group),
        "attention_norm.bias": lambda x: _own(x, x.shape, 0, group),
        "out.weight": lambda x: _own(x, [x.shape[1] // parts] * parts, 1, group),
    }
    tensors = {name: mine[name](x) if name in mine else x for name, x in layer.state_dict().items()}
    part.load_state_dict({name: nn.Parameter(x, requires_grad=False) for name, x in tensors.items()}, assign=True)
    part.group = group
    return part.requires_grad_(False).eval()


def _own(x: Tensor, widths: list[int] | torch.Size, dim: int, group: Group) -> Tensor:
    """Return this rank's share of each stretch of these widths along a dimension, contiguous."""
    shares = [stretch.chunk(group.size, dim)[group.rank] for stretch in x.split(list(widths), dim)]
    return torch.cat(shares, dim)
