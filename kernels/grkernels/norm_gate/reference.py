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
    moments: Tensor | None = None,
) -> Tensor:
    """Return [SiLU(u) | a | SiLU(u) * LayerNorm(a)]. The family's signature.

    u [L, W], before its SiLU, and a [L, W] or [L, H, d] with H * d = W: rows may be strided, for instance
    views of a projection. weight, bias [W] of the LayerNorm over all W. Returns [L, 3 W] in a's dtype,
    computed in fp32. a is as small as 1e-5, so its variance must come from differences to the mean.

    groups: parts of a row, each normalised by its own mean and variance. concat: False returns the last third alone.
    to: as of layer_norm, with one scale for all of a row.
    moments: fp32 [P, 2, L] where a is one of P equal parts of wider rows: the mean and the variance of each part
    (`moments_of`), of which follow those of the row (Chan et al., 1979). With groups=1 and to="" only.
    """
    u32, a32 = u.float(), a.flatten(1).float()
    gate = u32 * torch.sigmoid(u32)
    parts = a32.unflatten(1, (groups, -1))
    centred = parts - parts.mean(dim=2, keepdim=True)
    variance = centred.square().mean(dim=2, keepdim=True)
    if moments is not None:
        mean, variance = (m[:, None, None] for m in of_whole_rows(moments))
        centred = parts - mean
    normed = (centred / torch.sqrt(variance + eps)).flatten(1) * weight.float() + bias.float()
    gated = gate * normed
    return (torch.cat([gate, a32, gated], dim=1) if concat else gated).to(a.dtype)


def moments_of(a: Tensor) -> Tensor:
    """Return the mean and the variance of each row of a [L, ...], fp32 [2, L], from differences to the mean."""
    variance, mean = torch.var_mean(a.flatten(1).float(), dim=1, correction=0)
    return torch.stack([mean, variance])


def of_whole_rows(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance [L] of rows from those of their equal parts, fp32 [P, 2, L]."""
    means, variances = moments.unbind(1)
    spread, mean = torch.var_mean(means, dim=0, correction=0)
    return mean, variances.mean(dim=0) + spread
