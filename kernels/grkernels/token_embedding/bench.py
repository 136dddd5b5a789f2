"""Shapes that token_embedding is measured at, their inputs and their cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grkernels.families import Sizes
from grkernels.hstu_attention.spec import BYTES
from grkernels.variant import Cost


@dataclass(frozen=True)
class Shape:
    """Tokens, embedding width and sizes of the tables. Tokens are distinct, so no row is read twice."""

    rows: int
    width: int
    tokens: int = 1_000_000
    actions: int = 4
    positions: int = 2048
    time_buckets: int = 64


SHAPES = {
    "99328x512": Shape(99328, 512),
    "1280x512": Shape(1280, 512),
    "34816x1024": Shape(34816, 1024),
}


def inputs(shape: Shape, *, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Return keyword arguments of the family's functions."""
    generator = torch.Generator(device).manual_seed(seed)
    L, E = shape.rows, shape.width

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, (L,), generator=generator, device=device)

    return {
        "token_rows": torch.randperm(shape.tokens, generator=generator, device=device)[:L],
        "actions": integers(2**shape.actions),
        "weights": torch.rand(L, generator=generator, device=device, dtype=torch.float64),
        "positions": torch.arange(L, device=device) % shape.positions,
        "time_buckets": integers(shape.time_buckets),
        "token_table": random(shape.tokens, E),
        "action_table": random(shape.actions, E),
        "weight_vector": random(E),
        "position_table": random(shape.positions, E),
        "time_table": random(shape.time_buckets, E),
    }


def of_model(sizes: Sizes, *, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return `inputs` of a batch of a model."""
    shape = Shape(sizes.tokens, sizes.embedding_dim, tokens=sizes.tokens)
    return inputs(shape, dtype=dtype, device=device, seed=0)


def cost(shape: Shape, dtype: str) -> Cost:
    """Count indices, one table row per token, small tables once, and the result. dtype: fp32, fp16 or bf16."""
    L, A = shape.rows, shape.actions
    table_rows = L + min(L, shape.positions) + shape.time_buckets + A + 1
    return Cost(2 * L * shape.width * (A + 2), (table_rows + L) * shape.width * BYTES[dtype] + 5 * 8 * L)


def supports_args(shape: Shape) -> dict[str, int]:
    """Return keyword arguments of `KernelVariant.supports` other than device and dtype."""
    return {"width": shape.width}
