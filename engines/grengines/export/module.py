"""The exported form of the model: tensors to logits, every length dynamic, attention as one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from grengines.api import Request
from grengines.export.attention import hstu_attention
from grengines.models.hstu.model import HSTULayer, HSTURanker
from grengines.runtime.batch import Encoding, JaggedBatch
from grkernels.operators import Operators

# Names in the order of `forward`, element types and dimensions: L tokens, B sequences, M candidates, T tiles of R rows,
# N columns.
INPUTS = {
    "token_rows": (torch.int64, ("L",)),
    "actions": (torch.int64, ("L",)),
    "weights": (torch.float32, ("L",)),
    "positions": (torch.int64, ("L",)),
    "time_buckets": (torch.int64, ("L",)),
    "offsets": (torch.int64, ("B + 1",)),
    "num_targets": (torch.int64, ("B",)),
    "candidate_rows": (torch.int64, ("M",)),
    "tiles": (torch.int64, ("T", "R")),
    "columns": (torch.int64, ("N",)),
}
OUTPUT = "logits"


def inputs_of(batch: JaggedBatch, longest_history: int, tile_rows: int) -> dict[str, Tensor]:
    """Return the exported model's inputs, by name and in the order of INPUTS, on the batch's device.

    batch: packed without cached tokens. longest_history: at least the contextual tokens and events of any sequence.
    tile_rows: most query rows that attention processes at a time. Tiles are about equal.
    """
    device = batch.token_rows.device
    tiles = max(-(-batch.max_q_len // tile_rows), 1)
    rows = max(-(-batch.max_q_len // tiles), 1)
    return {
        "token_rows": batch.token_rows,
        "actions": batch.actions,
        "weights": batch.weights.float(),
        "positions": batch.positions,
        "time_buckets": batch.time_buckets,
        "offsets": batch.q_offsets,
        "num_targets": batch.num_targets,
        "candidate_rows": batch.candidate_rows,
        "tiles": torch.arange(tiles * rows, device=device).view(tiles, rows),
        "columns": torch.arange(max(longest_history, 1), device=device),
    }


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
        self.ranker, self.attention = ranker, attention
        ranker.kernels = kernels or Operators.eager().replace(token_embedding=token_embedding)

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
        tiles: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Return logits fp32 [M, tasks], for L tokens, B sequences and M candidates.

        token_rows, actions, positions, time_buckets int64 [L], weights fp32 [L], candidate_rows int64 [M]: as in
        JaggedBatch. offsets int64 [B + 1], num_targets int64 [B], tiles and columns: as in `hstu_attention`.
        """
        ranker, config = self.ranker, self.ranker.config
        longest = tiles.numel()
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
            candidate_offsets=offsets,  # nothing reads these two, nor the lengths
            kept_offsets=offsets,
            max_q_len=longest,
            max_kv_len=longest,
            max_candidates=longest,
        )
        x = ranker.embed(batch)
        for i, layer in enumerate(ranker.layers):
            assert isinstance(layer, HSTULayer)
            u, q, k, v = layer.project(x, ranker.kernels)
            a = self.attention(
                q,
                k,
                v,
                offsets,
                num_targets,
                tiles,
                columns,
                ranker.alpha,
                config.scaling_seqlen,
                config.contextual_seq_len,
                config.max_attn_len,
            )
            if i == len(ranker.layers) - 1:  # the head reads candidates alone; attention takes whole sequences
                x, u, a = x[candidate_rows], u[candidate_rows], a[candidate_rows]
            x = layer.combine(x, u, a, ranker.kernels)
        return ranker.score(x, batch)


def trace(module: ExportedRanker) -> ExportedProgram:
    """Export the module as a torch.export program of dynamic lengths. Its inputs are INPUTS, by name."""
    L, B, M, T, R, N = (Dim(name, min=1) for name in ("L", "B", "M", "T", "R", "N"))
    dims = {"L": L, "B": B, "B + 1": B + 1, "M": M, "T": T, "R": R, "N": N}
    sizes = {"L": 7, "B": 3, "B + 1": 4, "M": 5, "T": 2, "R": 6, "N": 9}  # any different sizes above 1
    device = module.ranker.token_table.device
    inputs = {n: torch.zeros([sizes[d] for d in shape], dtype=t, device=device) for n, (t, shape) in INPUTS.items()}
    shapes = {n: {i: dims[d] for i, d in enumerate(shape)} for n, (_, shape) in INPUTS.items()}
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(module, (), inputs, dynamic_shapes=shapes)
