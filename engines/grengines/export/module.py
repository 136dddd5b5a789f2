"""The exported form of the model: tensors to logits, every length dynamic, attention as one operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from grengines.api import Request
from grengines.export.attention import as_kernel, hstu_attention
from grengines.last_layer import LastLayer
from grengines.models.hstu.model import HSTULayer, HSTURanker
from grengines.runtime.batch import Encoding, JaggedBatch
from grkernels.operators import Operators

# Names in the order of `forward`, element types and dimensions: L tokens, B sequences, M candidates, T tiles of R rows,
# TC tiles of RC candidates, N columns.
INPUTS = {
    "token_rows": (torch.int64, ("L",)),
    "actions": (torch.int64, ("L",)),
    "weights": (torch.float32, ("L",)),
    "positions": (torch.int64, ("L",)),
    "time_buckets": (torch.int64, ("L",)),
    "offsets": (torch.int64, ("B + 1",)),
    "num_targets": (torch.int64, ("B",)),
    "candidate_rows": (torch.int64, ("M",)),
    "candidate_offsets": (torch.int64, ("B + 1",)),
    "tiles": (torch.int64, ("T", "R")),
    "candidate_tiles": (torch.int64, ("TC", "RC")),
    "columns": (torch.int64, ("N",)),
}
OUTPUT = "logits"


def inputs_of(batch: JaggedBatch, longest_history: int, tile_rows: int) -> dict[str, Tensor]:
    """Return the exported model's inputs, by name and in the order of INPUTS, on the batch's device.

    batch: packed without cached tokens. longest_history: at least the contextual tokens and events of any sequence.
    tile_rows: most query rows that attention processes at a time.
    """
    device = batch.token_rows.device
    shapes = [tiled(n, tile_rows) for n in (batch.max_q_len, batch.max_candidates)]
    tiles, candidate_tiles = (torch.arange(math.prod(shape), device=device).view(shape) for shape in shapes)
    return {
        "token_rows": batch.token_rows,
        "actions": batch.actions,
        "weights": batch.weights.float(),
        "positions": batch.positions,
        "time_buckets": batch.time_buckets,
        "offsets": batch.q_offsets,
        "num_targets": batch.num_targets,
        "candidate_rows": batch.candidate_rows,
        "candidate_offsets": batch.candidate_offsets,
        "tiles": tiles,
        "candidate_tiles": candidate_tiles,
        "columns": torch.arange(max(longest_history, 1), device=device),
    }


def tiled(rows: int, most: int) -> tuple[int, int]:
    """Return the number of tiles, and the rows of each: at most `most`, about equal."""
    tiles = max(-(-rows // most), 1)
    return tiles, max(-(-rows // tiles), 1)


def gpu_tile_rows(batch: int, heads: int, columns: int) -> int:
    """Return the query rows that attention processes at a time on a GPU: a tile of 256 MiB, which fills the GPU.

    A tile has three fp32 numbers for each score (score, gate, weight) and a copy in the operands' type.
    """
    return max(256 * 2**20 // (batch * heads * max(columns, 1) * 14), 1)


def longest_history(requests: Sequence[Request], encoding: Encoding) -> int:
    """Return the most contextual tokens and events of one request."""
    return encoding.contextual_seq_len + max(len(r.history_items) for r in requests)


def token_embedding(
    token_rows: Tensor,
    actions: Tensor,
    weights: Tensor,
    positions: Tensor,
    time_buckets: Tensor,
    *,
    token_table: Tensor,
    action_table: Tensor,
    weight_vector: Tensor,
    position_table: Tensor,
    time_table: Tensor,
) -> Tensor:
    """Embed tokens as grkernels/token_embedding/torch.py, without shifts of signed integers, which ONNX lacks."""
    dtype = token_table.dtype
    bits = 1 << torch.arange(action_table.shape[0], device=action_table.device)
    taken = actions[:, None] % (2 * bits) >= bits
    x = F.embedding(token_rows, token_table) + taken.to(dtype) @ action_table
    x = x + weights.to(dtype)[:, None] * weight_vector
    x = x + F.embedding(positions, position_table)
    return x + F.embedding(time_buckets, time_table)


def separated(layer: HSTULayer) -> nn.ModuleList:
    """Return a layer's projections to u, v, q and k with weights of their own: quantisers skip a part of a weight."""
    parts = nn.ModuleList()
    for weight, bias in zip(layer.uvqk.weight.split(layer.widths), layer.uvqk.bias.split(layer.widths), strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        part.weight, part.bias = (nn.Parameter(x.clone(), requires_grad=False) for x in (weight, bias))
        parts.append(part)
    return parts


class ExportedRanker(nn.Module):
    """A built HSTURanker without a cache, as a function of the tensors of INPUTS. Weights and maths are the same.

    attention: by default `grbench::hstu_attention`; another operator must have its signature. kernels: the other
    operators, by default eager PyTorch that every exporter can translate.
    """

    def __init__(
        self,
        ranker: HSTURanker,
        attention: Callable[..., Tensor] = hstu_attention,
        kernels: Operators | None = None,
    ) -> None:
        super().__init__()
        self.ranker = ranker
        kernels = kernels or Operators.eager().replace(token_embedding=token_embedding)
        ranker.kernels = kernels.replace(hstu_attention=as_kernel(attention))
        ranker.computed = LastLayer.READ
        last = ranker.layers[-1]
        assert isinstance(last, HSTULayer)
        self.last_parts = separated(last)
        last.parts = list(self.last_parts)
        del last.uvqk

    def forward(
        self,
        token_rows: Tensor,
        actions: Tensor,
        weights: Tensor,
        positions: Tensor,
        time_buckets: Tensor,
        offsets: Tensor,
        num_targets: Tensor,
        candidate_rows: Tensor,
        candidate_offsets: Tensor,
        tiles: Tensor,
        candidate_tiles: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Return logits fp32 [M, tasks], for L tokens, B sequences and M candidates.

        token_rows, actions, positions, time_buckets int64 [L], weights fp32 [L], candidate_rows int64 [M],
        candidate_offsets int64 [B + 1]: as in JaggedBatch. offsets int64 [B + 1], num_targets int64 [B], tiles and
        columns: as in `hstu_attention`. candidate_tiles int64 [TC, RC]: as tiles, for the candidates of a sequence.
        """
        ranker, longest = self.ranker, tiles.numel()
        batch = JaggedBatch(
            token_rows=token_rows,
            actions=actions,
            weights=weights,
            positions=positions,
            time_buckets=time_buckets,
            q_offsets=offsets,
            kv_offsets=offsets,
            num_targets=num_targets,
            candidate_rows=candidate_rows,
            candidate_offsets=candidate_offsets,
            kept_offsets=offsets,
            max_q_len=longest,
            max_kv_len=longest,
            max_candidates=candidate_tiles.numel(),
        )
        last = len(ranker.layers) - 1

        def keys(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            return k, v, {"kv_offsets": offsets, "tiles": candidate_tiles if i == last else tiles, "columns": columns}

        return ranker.score(ranker.encode(batch, keys), batch)


def trace(module: ExportedRanker) -> ExportedProgram:
    """Export the module as a torch.export program of dynamic lengths. Its inputs are INPUTS, by name."""
    sizes = {"L": 7, "B": 3, "M": 5, "T": 2, "R": 6, "TC": 8, "RC": 10, "N": 9}  # any different sizes above 1
    dims = {name: Dim(name, min=1) for name in sizes}
    dims |= {"B + 1": dims["B"] + 1}
    sizes |= {"B + 1": sizes["B"] + 1}
    device = module.ranker.token_table.device
    inputs = {n: torch.zeros([sizes[d] for d in shape], dtype=t, device=device) for n, (t, shape) in INPUTS.items()}
    shapes = {n: {i: dims[d] for i, d in enumerate(shape)} for n, (_, shape) in INPUTS.items()}
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes)
