"""Shapes that jagged_concat is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """`batch` users of `first` rows and `second` rows of `width` values."""

    batch: int
    first: int
    second: int
    width: int

    @classmethod
    def of(cls, sizes: Sizes) -> Shape:
        """Return the shape of a batch of a model."""
        return cls(sizes.users, sizes.events, sizes.candidates, sizes.heads * max(sizes.qk_dim, sizes.v_dim))


SHAPES = {
    "b32_1024+2048_w1024": Shape(32, 1024, 2048, 1024),
    "b32_8192+1_w512": Shape(32, 8192, 1, 512),
    "b8_3968+384_w1024": Shape(8, 3968, 384, 1024),
}


def offsets(batch: int, length: int, device: str) -> torch.Tensor:
    """Return the offsets int64 [batch + 1] of sequences of one length."""
    return torch.arange(batch + 1, device=device, dtype=torch.int64) * length


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions. The second stream is a view of a projection, as in HSTU."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    B, W = shape.batch, shape.width
    return {
        "first": random(B * shape.first, W),
        "second": random(B * shape.second, 2 * W)[:, W:],
        "first_offsets": offsets(B, shape.first, device),
        "second_offsets": offsets(B, shape.second, device),
        "rows": B * (shape.first + shape.second),
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    return inputs(Shape.of(sizes), dtype=dtype, device=device, seed=0)


def cost(shape: Shape, dtype: str) -> Cost:
    """Count each row as read once and written once. dtype: fp32, fp16 or bf16."""
    rows = shape.batch * (shape.first + shape.second)
    return Cost(0, 2 * rows * shape.width * BYTES[dtype] + 2 * 8 * (shape.batch + 1))


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"width": shape.width}
