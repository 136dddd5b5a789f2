"""Maths that importers share: what a peer computes for each item or action becomes a row of a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grbench.importing.source import Source, read


@dataclass(frozen=True)
class Flags:
    """Values of the command line beside the checkpoint."""

    tables: Path | None = None
    heads: int | None = None
    scaling_seqlen: int | None = None
    temperature: float = 0.05
    sizes: tuple[int, ...] = ()
    first_token: int | None = None
    begin_token: int | None = None
    whole_vocabulary: bool = False


@dataclass
class Imported:
    """Tensors and options of grbench that a checkpoint became."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]  # of the model
    run: str = ""  # further overrides of a run, such as the task
    schema: str = "hstu"
    weights_key: str = "model.weights"
    notes: list[str] = field(default_factory=list)


def tables(path: Path | None, needed: str) -> Source:
    """Read the embedding tables that a dense checkpoint lacks. Raises ValueError without a file."""
    if path is None:
        raise ValueError(
            f"--tables: the layout has no {needed}; give a safetensors file with the tensor items [items, width], in "
            "the order of the workload's items, and what docs/WEIGHTS.md lists"
        )
    return read(path)


def scaling(flags: Flags) -> int:
    """Return what attention is divided by. Raises ValueError if it is not given."""
    if flags.scaling_seqlen is None:
        raise ValueError(
            "--scaling-seqlen: give the length by which attention is divided: NVIDIA's scaling_seqlen; DLRM-v3 takes "
            "the longest sequence of a batch, so that of your requests, with candidates and contextual tokens"
        )
    return flags.scaling_seqlen


def swish_mlp(source: Source, name: str, x: Tensor, to: str) -> Tensor:
    """Apply Linear, x sigmoid(LayerNorm(x)), Linear, LayerNorm of DLRM-v3 to x [rows, in], in fp64."""
    hidden = linear(source, f"{name}.0", x, to)
    gate = norm(source, f"{name}.1", hidden, to)
    return norm(source, f"{name}.3", linear(source, f"{name}.2", hidden * gate.sigmoid(), to), to)


def linear(source: Source, name: str, x: Tensor, to: str) -> Tensor:
    """Apply a Linear of the checkpoint to x [rows, in], in fp64."""
    weight = source.take(f"{name}.weight", -1, x.shape[1], to=to, folded=True)
    bias = source.take(f"{name}.bias", weight.shape[0], to=to, folded=True) if source.has(f"{name}.bias") else None
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def norm(source: Source, name: str, x: Tensor, to: str) -> Tensor:
    """Apply a LayerNorm of the checkpoint with eps 1e-5 to x [rows, width], in fp64."""
    width = x.shape[1]
    weight, bias = (source.take(f"{name}.{leaf}", width, to=to, folded=True) for leaf in ("weight", "bias"))
    return F.layer_norm(x, [width], weight.double(), bias.double(), 1e-5)


def head_sizes(source: Source, projected: int, values: int, heads: int | None) -> tuple[int, int, int]:
    """Return heads, qk_dim and v_dim of [u | v | q | k] with `projected` columns, `values` of which are u's.

    Raises ValueError without a number of heads, or for one that does not divide them.
    """
    queries = projected // 2 - values
    if heads is None:
        raise ValueError(f"--heads: the tensors of {source.path} do not tell the number of attention heads; give it")
    if projected % 2 or queries < 1 or values % heads or queries % heads:
        raise ValueError(
            f"--heads {heads}: {source.path} has {values} values and {queries} queries of all heads together; "
            "allowed is a divisor of both"
        )
    return heads, queries // heads, values // heads


def by_part(weight: Tensor, heads: int, qk_dim: int, v_dim: int) -> Tensor:
    """Reorder rows from a head's u, v, q and k after another to all heads' u, then v, q and k."""
    parts = weight.unflatten(0, (heads, 2 * v_dim + 2 * qk_dim)).split([v_dim, v_dim, qk_dim, qk_dim], dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


def positions_after(table: Tensor, contextual: int) -> Tensor:
    """Return our position table of one that begins with the contextual tokens' rows: those come last in ours."""
    return torch.cat([table[contextual:], table[:contextual]])
