"""HSTU with products in e4m3: a layer's two projections and the head's hidden product.

Tables, norms, attention, the residual stream and the last product stay as they are. `grkernels.fp8` has the maths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from grengines.models.hstu.model import HSTULayer, HSTURanker
from grkernels import fp8
from grkernels.fp8 import Scaled

OPERANDS = {"to": "fp8"}  # what the operators that write operands are asked for


class Product(nn.Module):
    """A linear layer with its weight in e4m3 and a scale for each output channel."""

    scales: Tensor  # fp32 [1, N]

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weight of a linear layer; its bias stays."""
        super().__init__()
        weight = Scaled.of(linear.weight)
        self.weight = nn.Parameter(weight.values, requires_grad=False)  # [N, K]
        self.register_buffer("scales", weight.scales.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Scaled) -> Tensor:
        """Return x [rows, K] W + b, in bf16 [rows, N]."""
        return fp8.product(x, self.weight, self.scales, self.bias)

    def split(self, widths: list[int]) -> list[Callable[[Scaled], Tensor]]:
        """Return a product for each group of output channels; they share this one's memory."""
        assert self.bias is not None, "the input projection has one"
        parts = zip(self.weight.split(widths), self.scales.split(widths, dim=1), self.bias.split(widths), strict=True)
        return [partial(_product, weight=weight, scales=scales, bias=bias) for weight, scales, bias in parts]


def _product(x: Scaled, weight: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """Return what `fp8.product` is at the time of the call."""
    return fp8.product(x, weight, scales, bias)


def round_layers(layers: nn.ModuleList) -> None:
    """Round the weights of the layers' products, and their operands from now on."""
    for layer in layers:
        assert isinstance(layer, HSTULayer)
        uvqk = Product(layer.uvqk)
        layer.operands, layer.parts = OPERANDS, uvqk.split(layer.widths)
        layer.uvqk, layer.out = uvqk, Product(layer.out)  # type: ignore[assignment]


def use_fp8(model: HSTURanker) -> None:
    """Round the weights of the model's products, and its operands from now on.

    The model's other numbers are in bf16, and its `kernels` write e4m3 where they are asked for it.
    """
    round_layers(model.layers)
    model.head_hidden = Product(model.head_hidden)  # type: ignore[assignment]
    model.operands = OPERANDS
