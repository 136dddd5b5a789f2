"""Norm and gate in eager PyTorch. Every intermediate is rounded to the inputs' dtype and passes through memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels import capabilities
from grkernels.fp8 import Scaled
from grkernels.norm_gate.reference import norm_gate as reference
from grkernels.norm_gate.reference import of_whole_rows
from grkernels.variant import KernelVariant


def norm_gate(
    u: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    groups: int = 1,
    concat: bool = True,
    to: str = "",
    moments: Tensor | None = None,
) -> Tensor | Scaled:
    """Compute what reference.py defines."""
    u, a = F.silu(u), a.flatten(1)
    if moments is not None:
        mean, variance = (m[:, None] for m in of_whole_rows(moments))
        normed = ((a - mean) * torch.rsqrt(variance + eps)).to(a.dtype) * weight + bias
    elif groups == 1:
        normed = F.layer_norm(a, weight.shape, weight, bias, eps)
    else:
        parts = a.unflatten(1, (groups, -1))
        normed = F.layer_norm(parts, parts.shape[2:], eps=eps).flatten(1) * weight + bias
    gated = torch.cat([u, a, u * normed], dim=1) if concat else u * normed
    return Scaled.of(gated) if to else gated


VARIANT = KernelVariant("norm_gate", "torch", norm_gate, reference, capabilities.eager)
