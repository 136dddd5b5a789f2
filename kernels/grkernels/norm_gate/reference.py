"""Reference of norm_gate, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> Tensor:
    """Return [SiLU(u) | a | SiLU(u) * LayerNorm(a)]. The family's signature.

    u [L, W], before its SiLU, and a [L, W] or [L, H, d] with H * d = W: rows may be strided, for instance
    views of a projection. weight, bias [W] of the LayerNorm over all W. Returns [L, 3 W] in a's dtype,
    computed in fp32. a is as small as 1e-5, so its variance must come from differences to the mean.

    groups: parts of a row, each normalised by its own mean and variance. concat: False returns the last third alone.
    to: as of layer_norm, with one scale for all of a row.
    """
    u32, a32 = u.float(), a.flatten(1).float()
    gate = u32 * torch.sigmoid(u32)
    parts = a32.unflatten(1, (groups, -1))
    centred = parts - parts.mean(dim=2, keepdim=True)
    variance = centred.square().mean(dim=2, keepdim=True)
    normed = (centred / torch.sqrt(variance + eps)).flatten(1) * weight.float() + bias.float()
    gated = gate * normed
    return (torch.cat([gate, a32, gated], dim=1) if concat else gated).to(a.dtype)
