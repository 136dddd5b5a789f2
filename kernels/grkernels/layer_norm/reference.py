"""LayerNorm, obviously right: fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over each row; the family's signature.

    x [L, E], rows possibly strided; weight, bias [E]. Returns [L, E] in x's dtype, computed in fp32.
    """
    x32 = x.float()
    centred = x32 - x32.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    return (centred / torch.sqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)
