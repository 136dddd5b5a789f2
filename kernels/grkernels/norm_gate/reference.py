"""Reference of norm_gate, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_gate(u: Tensor, a: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Return [SiLU(u) | a | SiLU(u) * LayerNorm(a)]. The family's signature.

    u [L, W], before its SiLU, and a [L, W] or [L, H, d] with H * d = W: rows may be strided, for instance
    views of a projection. weight, bias [W] of the LayerNorm over all W. Returns [L, 3 W] in a's dtype,
    computed in fp32. a is as small as 1e-5, so its variance must come from differences to the mean.
    """
    u32, a32 = u.float(), a.flatten(1).float()
    gate = u32 * torch.sigmoid(u32)
    centred = a32 - a32.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    normed = centred / torch.sqrt(variance + eps) * weight.float() + bias.float()
    return torch.cat([gate, a32, gate * normed], dim=1).to(a.dtype)
