"""Shapes that quantise is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Rows and their width."""

    rows: int
    width: int


SHAPES = {"99328x512": Shape(99328, 512), "16384x1536": Shape(16384, 1536)}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions; x of unit scale."""
    generator = torch.Generator(device).manual_seed(seed)
    return {"x": torch.randn(shape.rows, shape.width, generator=generator, device=device, dtype=dtype), "to": "fp8"}


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    return inputs(Shape(sizes.tokens, sizes.embedding_dim), dtype=dtype, device=device, seed=0)


def cost(shape: Shape, dtype: str) -> Cost:
    """Count 4 operations a value. Memory bounds this operator. dtype: fp32, fp16 or bf16."""
    values = shape.rows * shape.width
    return Cost(4 * values, values * (BYTES[dtype] + 1) + 4 * shape.rows)


def supports_args(shape: Shape) -> dict[str, str]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"products": "fp8"}
