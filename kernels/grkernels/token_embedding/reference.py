"""Reference of token_embedding, in fp32."""

from __future__ import annotations

from torch import Tensor


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
    """Return the sum of each token's embeddings. The family's signature.

    token_rows, positions, time_buckets int64 [L]: rows of token_table, position_table, time_table [.., E].
    actions int64 [L]: bit masks; bit i stands for row i of action_table [A, E]; bits from A on are ignored.
    weights float64 [L], times weight_vector [E]. Tables contiguous, of one dtype. Returns [L, E] in that
    dtype, computed in fp32.
    """
    x = token_table[token_rows].float() + position_table[positions].float() + time_table[time_buckets].float()
    x += weights.float()[:, None] * weight_vector.float()
    for bit, row in enumerate(action_table.float()):
        x += ((actions >> bit) & 1).float()[:, None] * row
    return x.to(token_table.dtype)
