"""Reference of interaction, in fp32, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor


def interaction(x: Tensor) -> Tensor:
    """Return each sample's first feature, then the dot products of its pairs of features. The family's signature.

    x [B, F, D], possibly strided; feature 0 is the dense part. Returns [B, D + F (F - 1) / 2] in x's dtype:
    x[b, 0], then x[b, i] . x[b, j] for i < j, row by row ((0, 1), (0, 2), ..., (1, 2), ...), computed in
    fp32. Source: Naumov et al., "Deep Learning Recommendation Model", 2019. On a GPU the caller must
    make fp32 products exact (no TF32).
    """
    x32 = x.float()
    F = x.shape[1]
    pairs = [(x32[:, i] * x32[:, j]).sum(dim=1) for i in range(F) for j in range(i + 1, F)]
    return torch.cat([x32[:, 0], *(p[:, None] for p in pairs)], dim=1).to(x.dtype)
