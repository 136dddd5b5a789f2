"""Shapes that jagged_split is measured at, their inputs and their cost, as for jagged_concat."""

from __future__ import annotations

from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.jagged_concat.bench import SHAPES as SHAPES
from grkernels.jagged_concat.bench import Shape, offsets
from grkernels.jagged_concat.bench import cost as cost
from grkernels.jagged_concat.bench import supports_args as supports_args


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions."""
    generator = torch.Generator(device).manual_seed(seed)
    B, rows = shape.batch, shape.batch * (shape.first + shape.second)
    return {
        "x": torch.randn(rows, shape.width, generator=generator, device=device, dtype=dtype),
        "first_offsets": offsets(B, shape.first, device),
        "second_offsets": offsets(B, shape.second, device),
        "first_rows": B * shape.first,
        "second_rows": B * shape.second,
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    return inputs(Shape.of(sizes), dtype=dtype, device=device, seed=0)
