"""Shapes that beam_attention is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """`batch` requests of `prompt` tokens in pages, with `beams` rows each, whose beams have `terms` codes.

    beams 0: the rows are the prompts themselves, each seeing the tokens up to itself.
    """

    batch: int
    prompt: int
    beams: int
    heads: int = 16
    kv_heads: int = 8
    dim: int = 128
    terms: int = 2
    page: int = 16

    @property
    def rows(self) -> int:
        return self.batch * (self.beams or self.prompt)

    @property
    def seen(self) -> int:
        """Keys that all rows see, added up."""
        if self.beams:
            return self.rows * (self.prompt + self.terms)
        return self.batch * self.prompt * (self.prompt + 1) // 2


SHAPES = {
    "b32_1024+32_16x128": Shape(32, 1024, 32),
    "b8_4096+32_16x128": Shape(8, 4096, 32),
    "b4_prompt2048_16x128": Shape(4, 2048, 0, terms=0),
    "b2_256+16_4x32": Shape(2, 256, 16, heads=4, kv_heads=2, dim=32),
}


def check_shape(shape: Shape) -> Shape:
    """A shape for the gate: the reference takes a row at a time."""
    return replace(shape, batch=min(shape.batch, 4), prompt=min(shape.prompt, 512))


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions: keys and values side by side in pages in random order."""
    generator = torch.Generator(device).manual_seed(seed)
    most = -(-(shape.prompt + shape.beams * shape.terms) // shape.page)
    count, rows = shape.batch * most, shape.rows // shape.batch

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    pages = random(count, shape.page, shape.kv_heads, 2 * shape.dim)
    table = torch.randperm(count, generator=generator, device=device).view(shape.batch, most)
    places = torch.arange(rows * shape.terms, device=device) + shape.prompt
    own = table[:, places // shape.page] * shape.page + places % shape.page
    each = torch.arange(rows, device=device) + 1
    limits = torch.full((rows,), shape.prompt, device=device) if shape.beams else each
    return {
        "out": random(shape.rows, shape.heads, shape.dim),
        "q": 2 * random(shape.rows, shape.heads, shape.dim),
        "k_pages": pages[..., : shape.dim],
        "v_pages": pages[..., shape.dim :],
        "starts": (torch.arange(shape.batch + 1, device=device) * rows).int(),
        "block_table": table.int(),
        "limits": limits.repeat(shape.batch).int(),
        "own_slots": own.reshape(shape.rows, shape.terms),
        "scale": shape.dim**-0.5,
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    heads = sizes.heads, sizes.kv_heads or sizes.heads
    shape = Shape(sizes.users, sizes.events, sizes.beams, *heads, sizes.qk_dim, page=sizes.page or Shape.page)
    return inputs(shape, dtype=dtype, device=device, seed=0)


def cost(shape: Shape, dtype: str) -> Cost:
    """Count exact products; q, out, and each request's keys and values once. dtype: fp32, fp16 or bf16."""
    keys = shape.batch * (shape.prompt + shape.beams * shape.terms) * shape.kv_heads
    values = (2 * shape.rows * shape.heads + 2 * keys) * shape.dim
    indices = 8 * shape.rows * shape.terms + 4 * shape.rows
    return Cost(4 * shape.seen * shape.heads * shape.dim, values * BYTES[dtype] + indices)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"captured": False}
