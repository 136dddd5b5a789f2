"""The final norm, and the parts of other owners' ranking heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grengines.models.hstu.config import HSTUConfig
from grkernels.operators import Operators

HOUR, DAY = 3600, 86400  # seconds
TURN = 2 * 3.14  # DLRM-v3's, with this many digits


class FinalNorm(nn.Module):
    """The norm after the last layer: LayerNorm, x / |x| times the weight plus the bias, or none."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        if kind != "none":
            self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, kernels: Operators) -> Tensor:
        """Return x [rows, E] normalised, in its dtype."""
        if self.kind == "none":
            return x
        if self.kind == "l2":
            return (F.normalize(x.float(), eps=self.eps) * self.weight + self.bias).to(x.dtype)
        normed: Tensor = kernels.layer_norm(x, self.weight, self.bias, eps=self.eps)
        return normed


class SwishNorm(nn.LayerNorm):
    """x sigmoid(LayerNorm(x)), DLRM-v3's activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of x [rows, width], computed in fp32."""
        wide = x.float()
        normed = F.layer_norm(wide, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return (wide * normed.sigmoid()).to(x.dtype)


class Clock(nn.Linear):
    """A projection of [x | hour | weekday]: each time as cosine and sine of its part of a turn."""

    def __init__(self, width: int) -> None:
        super().__init__(width + 4, width)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:  # type: ignore[override]
        """Project x [rows, E]. times: int64 [rows], seconds."""
        parts = [(times // HOUR % 24).double() / 24, (times // DAY % 7).double() / 7]
        circles = [f(part * TURN) for part in parts for f in (torch.cos, torch.sin)]
        return super().forward(torch.cat([x, torch.stack(circles, dim=1).to(x.dtype)], dim=1))


class ItemMLP(nn.Module):
    """An item tower: Linear, SwishNorm, Linear, LayerNorm of the item's vector."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        E, eps = config.embedding_dim, config.choices.head_eps
        self.hidden, self.hidden_norm = nn.Linear(E, config.head_dim), SwishNorm(config.head_dim, eps)
        self.last, self.last_norm = nn.Linear(config.head_dim, E), nn.LayerNorm(E, eps)

    def forward(self, rows: Tensor, token_table: Tensor, kernels: Operators) -> Tensor:
        """Return the vectors [M, E] that candidates of token rows int64 [M] are multiplied by."""
        x = self.last(self.hidden_norm(self.hidden(F.embedding(rows, token_table))))
        tower: Tensor = kernels.layer_norm(x, self.last_norm.weight, self.last_norm.bias, eps=self.last_norm.eps)
        return tower


def activation(config: HSTUConfig) -> nn.Module:
    """Return the activation of the head's hidden layer. Only swish_norm has parameters."""
    kind = config.choices.head
    if kind == "swish_norm":
        return SwishNorm(config.head_dim, config.choices.head_eps)
    simple: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}
    return simple[kind]()
