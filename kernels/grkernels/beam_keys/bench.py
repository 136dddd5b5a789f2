"""Shapes that beam_keys is measured at, their inputs and their cost: the steps of beam_rows, and their pages."""

from __future__ import annotations

from typing import Any

import torch

from grkernels.beam_rows import bench as steps
from grkernels.beam_rows.bench import SHAPES, SIZES, Shape, supports_args
from grkernels.variant import Cost

__all__ = ["SHAPES", "cost", "inputs", "supports_args"]
TERMS = len(SIZES) - 1


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions; they have no numbers of `dtype`."""
    given = steps.inputs(shape, dtype=dtype, device=device, seed=seed)
    most = -(-(int(given["places"].max()) + 1) // shape.page)
    generator = torch.Generator(device).manual_seed(seed)
    table = torch.randperm(shape.batch * most, generator=generator, device=device).view(shape.batch, most)
    return {
        **given,
        "starts": (torch.arange(shape.batch + 1, device=device) * (shape.chunk + shape.beams)).int(),
        "block_table": table.int(),
        "page": shape.page,
        "first": 0,
        "terms": TERMS,
    }


def cost(shape: Shape, dtype: str) -> Cost:
    """Count an id, a place and page numbers read and a limit and slots written a token."""
    return Cost(0, (4 + 8 + 4 + (4 + 8) * TERMS) * shape.tokens + 4 * (shape.batch + 1))
