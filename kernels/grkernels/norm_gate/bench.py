"""Shapes that norm_gate is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Tokens and the width H * dv of one of the three parts."""

    rows: int
    width: int


SHAPES = {
    "99328x512": Shape(99328, 512),
    "1280x512": Shape(1280, 512),
    "34816x1024": Shape(34816, 1024),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions.

    u is a view of the projection [u|v|q|k], as in the layer. a has the scale of attention's output.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    L, W = shape.rows, shape.width
    return {
        "u": random(L, 4 * W)[:, :W],
        "a": random(L, W) * 1e-3,
        "weight": 1 + 0.1 * random(W),
        "bias": 0.1 * random(W),
        "eps": 1e-6,
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    arguments = inputs(Shape(sizes.tokens, sizes.heads * sizes.v_dim), dtype=dtype, device=device, seed=0)
    options = dict(option.split("=") for option in sizes.gate)
    if "model.output" in options:
        arguments["concat"] = False
    if "model.group_norm" in options:
        arguments["groups"] = sizes.heads
    if ranks := int(options.get("engine.tensor_parallel", 0)):
        arguments["moments"] = torch.ones(ranks, 2, sizes.tokens, device=device)
    return arguments | ({"to": sizes.products} if sizes.products else {})


def cost(shape: Shape, dtype: str) -> Cost:
    """Count 16 operations a value, exp as one. Memory bounds this operator. dtype: fp32, fp16 or bf16."""
    L, W = shape.rows, shape.width
    return Cost(16 * L * W, (5 * L * W + 2 * W) * BYTES[dtype])


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"width": shape.width}
