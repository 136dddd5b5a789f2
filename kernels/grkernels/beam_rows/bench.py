"""Shapes that beam_rows is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.variant import Cost

SIZES = (256, 256, 256)  # codes of each level
MAX_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """`batch` requests in one step: up to `chunk` last tokens of a prompt, and rows of at least `beams` beams."""

    batch: int
    chunk: int
    beams: int
    page: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * (self.chunk + self.beams)


SHAPES = {"b32_0+32": Shape(32, 0, 32), "b32_224+32": Shape(32, 224, 32), "b4_0+256": Shape(4, 0, 256)}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions; they have no numbers of `dtype`."""
    generator = torch.Generator(device).manual_seed(seed)

    def integers(most: int, *size: int) -> torch.Tensor:
        return torch.randint(most, size, generator=generator, device=device)

    places = torch.arange(shape.chunk + shape.beams, device=device)
    rows = places - shape.chunk + integers(shape.beams // 2, shape.batch, 1)  # requests are cut at different rows
    tokens = integers(SIZES[0], *rows.shape)
    levels = rows % (len(SIZES) - 1)
    beams = (sum(SIZES) + 1) * (1 + rows) + SIZES[0] * levels + tokens
    begin = 64 + shape.beams + integers(512, shape.batch, 1)
    return {
        "ids": torch.where(rows >= 0, beams, tokens).reshape(-1).int(),
        "places": (begin + places).reshape(-1),
        "sizes": SIZES,
        "max_rows": MAX_ROWS,
    }


def cost(shape: Shape, dtype: str) -> Cost:
    """Count an id and a place read and four integers written a token."""
    return Cost(0, (4 + 8 + 4 * 8) * shape.tokens)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"captured": False}
