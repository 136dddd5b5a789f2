"""Shapes that layer_norm is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Tokens and the embedding width E."""

    rows: int
    width: int


SHAPES = {
    "99328x512": Shape(99328, 512),
    "1280x512": Shape(1280, 512),
    "34816x1024": Shape(34816, 1024),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions; x of unit scale."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    return {
        "x": random(shape.rows, shape.width),
        "weight": 1 + 0.1 * random(shape.width),
        "bias": 0.1 * random(shape.width),
        "eps": 1e-6,
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    arguments = inputs(Shape(sizes.tokens, sizes.embedding_dim), dtype=dtype, device=device, seed=0)
    return arguments | ({"to": sizes.products} if sizes.products else {})


def cost(shape: Shape, dtype: str) -> Cost:
    """Count 8 operations a value. Memory bounds this operator. dtype: fp32, fp16 or bf16."""
    values = shape.rows * shape.width
    return Cost(8 * values, (2 * values + 2 * shape.width) * BYTES[dtype])


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"width": shape.width}
