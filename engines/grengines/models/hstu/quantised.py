"""Rounding errors of int8 and fp8 products in the reference: operands are rounded to 8 bits, products are in fp32.

It rounds the matrices that engines quantise: a layer's two projections and the head's hidden one. Weights are rounded
symmetrically, with a scale for each output channel. Inputs in int8 have one scale and zero point for the tensor,
computed at run time (dynamic quantisation). Inputs in fp8 (e4m3) have a scale for each row. TensorRT has one for the
tensor instead: e4m3 is a floating-point type, so that changes the error by a few per cent only. Tables, norms,
attention and the last product stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grengines.models.hstu.model import HSTULayer, HSTURanker
from grkernels.operators import Operators
from grkernels.rounding import through_pages

KINDS = ("int8", "fp8")


def quantise(model: HSTURanker, kind: str) -> None:
    """Round the model's weights in place, and its inputs from now on. kind: one of KINDS."""
    model.kernels = quantise_layers(model.layers, model.kernels, kind)
    _quantise(model.head_hidden, kind)


def quantise_layers(layers: nn.ModuleList, kernels: Operators, kind: str) -> Operators:
    """Round the layers' weights in place. Return kernels with which the layers round the inputs of their products."""
    for layer in layers:
        assert isinstance(layer, HSTULayer)
        _quantise(layer.uvqk, kind)
        layer.out.weight.data = _ROUNDING[kind][0](layer.out.weight.data)  # norm_gate writes its inputs
    norm_gate, of_input = kernels.norm_gate, _ROUNDING[kind][1]
    return kernels.replace(norm_gate=lambda *args, **options: of_input(norm_gate(*args, **options)))


def _quantise(linear: nn.Linear, kind: str) -> None:
    of_weight, of_input = _ROUNDING[kind]
    linear.weight.data = of_weight(linear.weight.data)
    linear.register_forward_pre_hook(partial(_round_inputs, of_input))


def round_weight(weight: Tensor) -> Tensor:
    """Round each row of [out, in] to 127 steps of its largest value."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


def round_input(x: Tensor) -> Tensor:
    """Round a tensor to 256 steps between its least and largest value, with 0 among them."""
    if not x.numel():
        return x
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def round_fp8(x: Tensor) -> Tensor:
    """Round each row to e4m3, scaled to its largest value."""
    return through_pages(x, "fp8")


_ROUNDING = {"int8": (round_weight, round_input), "fp8": (round_fp8, round_fp8)}  # of weights and of inputs


def _round_inputs(of_input: Callable[[Tensor], Tensor], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (of_input(args[0]), *args[1:])
