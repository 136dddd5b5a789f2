"""Shapes that beam_terms is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Rows of a step, of which every fourth has no terms, and the sizes of a head."""

    rows: int
    heads: int
    dim: int
    terms: int
    page: int = 64

    @property
    def counted(self) -> int:
        """Rows that have terms."""
        return self.rows - self.rows // 4


SHAPES = {
    "8192_12x64_terms2": Shape(8192, 12, 64, 2),
    "1024_12x64_terms1": Shape(1024, 12, 64, 1),
    "256_2x32_terms2": Shape(256, 2, 32, 2),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions: terms as large as what they are added to."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    total = shape.rows * shape.terms
    pages = random(-(-total // shape.page), shape.page, shape.heads, 2 * shape.dim)
    slots = torch.randperm(total, generator=generator, device=device).view(shape.rows, shape.terms)
    slots[::4] = -1
    return {
        "out": random(shape.rows, shape.heads, shape.dim),
        "q": random(shape.rows, 2 * shape.heads, shape.dim)[:, : shape.heads],
        "k_pages": pages[..., : shape.dim],
        "v_pages": pages[..., shape.dim :],
        "slots": slots,
        "alpha": shape.dim**-0.5,
        "scaling_seqlen": 1,
    }


def cost(shape: Shape, dtype: str) -> Cost:
    """Count q, out twice, and a key and a value a term of rows with terms; all slots. dtype: fp32, fp16 or bf16."""
    values = shape.counted * shape.heads * shape.dim
    flops = shape.counted * shape.terms * shape.heads * (4 * shape.dim + 4)
    return Cost(flops, (3 + 2 * shape.terms) * values * BYTES[dtype] + 8 * shape.rows * shape.terms)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"captured": False}
