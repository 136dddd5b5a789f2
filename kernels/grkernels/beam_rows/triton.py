"""Token, row, level and position of each token of a step in one launch; eager PyTorch needs some twenty."""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels import triton_common
from grkernels.beam_rows.reference import beam_rows as reference
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

BLOCK = 128  # tokens of a program


@triton.jit
def token_row_level(
    ids: tl.tensor, V: tl.constexpr, MAX_ROWS: tl.constexpr, ENDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the token, the row (-1 for prompts) and the level of each id. ENDS: first tokens of the further levels."""
    token, row = ids % V, ids // V - 1
    row = tl.where(row >= MAX_ROWS, 0, row)
    level = tl.zeros_like(row)
    for i in tl.static_range(len(ENDS)):
        level += (token >= ENDS[i]).to(level.dtype)
    return token, row, tl.where(row >= 0, level, 0)


@launched(tensors=[], indices=["ids", "places", "made"], numbers=["n"])
def _kernel(
    ids: tl.tensor,
    places: tl.tensor,
    made: tl.tensor,
    n: tl.tensor,
    V: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    token, row, level = token_row_level(tl.load(ids + i, mask=inside, other=0), V, MAX_ROWS, ENDS)
    place = tl.load(places + i, mask=inside, other=0)
    made += i.to(tl.int64)
    tl.store(made, token, mask=inside)
    tl.store(made + n, row, mask=inside)
    tl.store(made + 2 * n, level, mask=inside)
    tl.store(made + 3 * n, tl.where(row >= 0, place - row + level, place), mask=inside)


def constants(sizes: tuple[int, ...], max_rows: int) -> tuple[int, int, tuple[int, ...]]:
    """Return V, MAX_ROWS and ENDS of `token_row_level`."""
    return sum(sizes) + 1, max_rows, tuple(accumulate(sizes))[:-1]


def beam_rows(
    ids: Tensor, places: Tensor, *, sizes: tuple[int, ...], max_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what reference.py defines."""
    n = len(ids)
    made = torch.empty(4, n, dtype=torch.int64, device=ids.device)
    if n:
        _kernel(
            (-(-n // BLOCK), 1, 1), (ids, places, made), (), (n,), (*constants(sizes, max_rows), BLOCK), num_warps=4
        )
    tokens, rows, levels, positions = made
    return tokens, rows, levels, positions


VARIANT = KernelVariant("beam_rows", "triton", beam_rows, reference, triton_common.supports)
