"""What int8 products cost, in plain PyTorch: operands rounded as int8 holds them, products in fp32.

The same matrices that the compiled engines quantise: a layer's two projections and the head's hidden one. Weights are
rounded symmetrically with a scale for each output channel, inputs with one scale and zero point for the tensor, found
at run time (dynamic quantisation). Tables, norms, attention and the last product keep fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grengines.hstu.model import HSTULayer, HSTURanker


def quantise(model: HSTURanker) -> None:
    """Round the model's weights in place, and its inputs from now on."""
    layers = [layer for layer in model.layers if isinstance(layer, HSTULayer)]
    for linear in [model.head_hidden, *(layer.uvqk for layer in layers)]:
        linear.register_forward_pre_hook(_round_inputs)
    norm_gate = model.kernels.norm_gate
    model.kernels = model.kernels._replace(norm_gate=lambda *args, **options: round_input(norm_gate(*args, **options)))
    for linear in [model.head_hidden, *(layer.uvqk for layer in layers), *(layer.out for layer in layers)]:
        linear.weight.data = round_weight(linear.weight.data)


def round_weight(weight: Tensor) -> Tensor:
    """[out, in] -> the same, each row rounded to 127 steps of its largest value."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


def round_input(x: Tensor) -> Tensor:
    """Rounded to the 256 steps between its least and largest value, 0 among them."""
    if not x.numel():
        return x
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def _round_inputs(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_input(args[0]), *args[1:])
