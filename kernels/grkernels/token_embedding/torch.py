"""Token embedding in eager PyTorch: a pass over [L, E] for every term of the sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels import capabilities
from grkernels.token_embedding.reference import token_embedding as reference
from grkernels.variant import KernelVariant


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
    """Compute what reference.py defines, rounded after every term."""
    dtype = token_table.dtype
    bits = torch.arange(action_table.shape[0], device=action_table.device)
    taken = (actions[:, None] >> bits) & 1
    x = F.embedding(token_rows, token_table) + taken.to(dtype) @ action_table
    x = x + weights.to(dtype)[:, None] * weight_vector
    x = x + F.embedding(positions, position_table)
    return x + F.embedding(time_buckets, time_table)


VARIANT = KernelVariant("token_embedding", "torch", token_embedding, reference, capabilities.eager)
