"""Token embedding in one pass: gathers of a few tokens' rows, summed in registers and rounded once."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.token_embedding.reference import token_embedding as reference
from grkernels.triton_common import rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

CANDIDATES = [
    {"rows": rows, "block_e": block_e, "warps": warps}
    for rows, block_e, warps in (
        (1, 512, 1),
        (1, 512, 2),
        (1, 1024, 2),
        (2, 512, 2),
        (4, 512, 4),
        (4, 1024, 8),
        (8, 256, 4),
        (8, 512, 8),
    )
]


@launched(
    tensors=["token_table", "action_table", "weight_vector", "position_table", "time_table", "out"],
    indices=["token_rows", "actions", "weights", "positions", "time_buckets"],
    numbers=["L"],
)
def _kernel(
    token_table: tl.tensor,
    action_table: tl.tensor,
    weight_vector: tl.tensor,
    position_table: tl.tensor,
    time_table: tl.tensor,
    out: tl.tensor,
    token_rows: tl.tensor,
    actions: tl.tensor,
    weights: tl.tensor,
    positions: tl.tensor,
    time_buckets: tl.tensor,
    L: tl.tensor,
    E: tl.constexpr,
    NUM_ACTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    here, inside = row < L, column < E
    mask = here[:, None] & inside
    # All indices are loaded before the first gather, so that the gathers overlap.
    token = tl.load(token_rows + row, mask=here, other=0)[:, None]
    position = tl.load(positions + row, mask=here, other=0)[:, None]
    bucket = tl.load(time_buckets + row, mask=here, other=0)[:, None]
    action = tl.load(actions + row, mask=here, other=0)[:, None]
    weight = tl.load(weights + row, mask=here, other=0.0).to(tl.float32)[:, None]
    x = tl.load(token_table + token * E + column, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(position_table + position * E + column, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(time_table + bucket * E + column, mask=mask, other=0.0).to(tl.float32)
    x += weight * tl.load(weight_vector + column, mask=inside, other=0.0).to(tl.float32)
    for bit in tl.static_range(NUM_ACTIONS):
        taken = ((action >> bit) & 1).to(tl.float32)
        x += taken * tl.load(action_table + bit * E + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * E + column, rounded(x, out.dtype.element_ty), mask=mask)


def tuning_key(width: int) -> str:
    """Return the key of a row's width. The number of tokens is large in every use and does not matter."""
    return tuning.key(width=width)


def token_embedding(
    token_rows: Tensor,
    actions: Tensor,
    weights: Tensor,
    positions: Tensor,
    time_buckets: Tensor,
    *,
    token_table: Tensor,
    action_table: Tensor,
    weight_vector: Tensor,
    position_table: Tensor,
    time_table: Tensor,
) -> Tensor:
    """Compute what reference.py defines. Raises ValueError for a strided table."""
    L, E = token_rows.shape[0], action_table.shape[1]
    tables = (token_table, action_table, weight_vector, position_table, time_table)
    if not all(t.is_contiguous() for t in tables):
        raise ValueError("token_embedding: every table must be contiguous")
    out = token_table.new_empty(L, E)
    if L:
        block = max(tuning.bucket(E), 16)
        default = {"rows": max(1024 // block, 1), "block_e": min(block, 1024), "warps": 1}
        config = tuning.choose("token_embedding", "triton", tuning_key(E), default)
        rows, block_e = config["rows"], config["block_e"]
        grid = -(-L // rows), -(-E // block_e), 1
        indices = token_rows, actions, weights, positions, time_buckets
        constants = E, action_table.shape[0], rows, block_e
        _kernel(grid, (*tables, out, *indices), (), (L,), constants, config["warps"])
    return out


def supports(*, device: str, dtype: str, width: int) -> str | None:
    """Return None if Triton runs on this device, else the reason. Any width is accepted."""
    return triton_common.supports(device=device, dtype=dtype)


VARIANT = KernelVariant("token_embedding", "triton", token_embedding, reference, supports)
