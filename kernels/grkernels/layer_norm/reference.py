"""Reference of layer_norm, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, to: str = "") -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias for each row. The family's signature.

    x [L, E], rows possibly strided; weight, bias [E]. Returns [L, E] in x's dtype, computed in fp32.

    to: with "fp8" a variant returns grkernels.fp8.Scaled, E a multiple of its STEP: each row rounded to e4m3. The
    reference returns the numbers that are to be rounded.
    """
    x32 = x.float()
    centred = x32 - x32.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    return (centred / torch.sqrt(variance + eps) * weight.float() + bias.float()).to(x.dtype)
