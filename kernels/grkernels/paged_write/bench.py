"""Shapes that paged_write is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.pages import EIGHT_BITS, quantised
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Tokens whose keys and values are stored, and the sizes of a page."""

    rows: int
    heads: int
    dim: int  # of keys and of values
    page: int = 64

    @property
    def stored(self) -> int:
        """Rows that have a slot: every eighth is padding."""
        return self.rows - self.rows // 8


SHAPES = {
    "32768_4x256_page64": Shape(32768, 4, 256),
    "4096_4x128_page64": Shape(4096, 4, 128),
    "128_4x128_page16": Shape(128, 4, 128, 16),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions.

    k and v are views of a layer's projection [u|v|q|k]. The stored rows go to random slots and fill all pages but one.
    """
    generator = torch.Generator(device).manual_seed(seed)
    width = shape.heads * shape.dim
    projected = torch.randn(shape.rows, 4 * width, generator=generator, device=device, dtype=dtype)
    pages = -(-shape.stored // shape.page) + 1
    slots = torch.randperm(pages * shape.page, generator=generator, device=device)[: shape.rows]
    slots = torch.cat([slots, slots.new_full((shape.rows - len(slots),), -1)])
    slots[torch.arange(7, shape.rows, 8, device=device)] = -1

    def cached() -> torch.Tensor:
        size = pages, shape.page, shape.heads, shape.dim
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    return {
        "k": projected[:, 3 * width :].unflatten(1, (shape.heads, -1)),
        "v": projected[:, width : 2 * width].unflatten(1, (shape.heads, -1)),
        "slots": slots,
        "k_pages": cached(),
        "v_pages": cached(),
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    page = sizes.page or Shape.page
    shape = Shape(sizes.tokens, sizes.kv_heads or sizes.heads, max(sizes.qk_dim, sizes.v_dim), page)
    arguments = inputs(shape, dtype=dtype, device=device, seed=0)
    if sizes.stored:
        for x in "kv":
            numbers, scales = quantised(arguments[f"{x}_pages"], EIGHT_BITS[sizes.stored])
            arguments |= {f"{x}_pages": numbers, f"{x}_scales": scales}
    return arguments


def cost(shape: Shape, dtype: str) -> Cost:
    """Count stored rows as read and written, and a slot per row. dtype: fp32, fp16 or bf16."""
    return Cost(0, 4 * shape.stored * shape.heads * shape.dim * BYTES[dtype] + 8 * shape.rows)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"captured": False}
