"""Shapes that interaction is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Samples, features of each (the dense part is one of them) and their width."""

    batch: int
    features: int
    dim: int


SHAPES = {
    "16384x32x128": Shape(16384, 32, 128),
    "2048x4x512": Shape(2048, 4, 512),
    "4096x27x64": Shape(4096, 27, 64),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions; values of unit scale."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.features, shape.dim)
    return {"x": torch.randn(*size, generator=generator, device=device, dtype=dtype)}


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    shape = Shape(sizes.users * sizes.candidates, sizes.features, sizes.embedding_dim)
    return inputs(shape, dtype=dtype, device=device, seed=0)


def cost(shape: Shape, dtype: str) -> Cost:
    """Count the products of the pairs, without the rest of the tiles. dtype: fp32, fp16 or bf16."""
    B, F, D = shape.batch, shape.features, shape.dim
    pairs = F * (F - 1) // 2
    return Cost(2 * B * pairs * D, B * (F * D + D + pairs) * BYTES[dtype])


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"features": shape.features, "dim": shape.dim}
