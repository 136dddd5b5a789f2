"""What rows.py finds out of a step's ids, in two launches where PyTorch needs some fifty."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels.triton_launch import launched

if TYPE_CHECKING:
    from grengines.vllm.rows import BeamRows

BLOCK = 128


@triton.jit
def _token_row_level(
    ids: tl.tensor, V: tl.constexpr, MAX_ROWS: tl.constexpr, ENDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    token, row = ids % V, ids // V - 1
    row = tl.where(row >= MAX_ROWS, 0, row)
    level = tl.zeros_like(row)
    for i in tl.static_range(len(ENDS)):
        level += (token >= ENDS[i]).to(level.dtype)
    return token, row, tl.where(row >= 0, level, 0)


@launched(tensors=[], indices=["ids", "places", "made"], numbers=["n"])
def _step(
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
    token, row, level = _token_row_level(tl.load(ids + i, mask=inside, other=0), V, MAX_ROWS, ENDS)
    place = tl.load(places + i, mask=inside, other=0)
    made += i.to(tl.int64)
    tl.store(made, token, mask=inside)
    tl.store(made + n, row, mask=inside)
    tl.store(made + 2 * n, level, mask=inside)
    tl.store(made + 3 * n, tl.where(row >= 0, place - row + level, place), mask=inside)


@launched(
    tensors=[],
    indices=["ids", "places", "starts", "table", "limits", "slots"],
    numbers=["n", "requests", "halvings", "table_stride"],
)
def _sight(
    ids: tl.tensor,
    places: tl.tensor,
    starts: tl.tensor,
    table: tl.tensor,
    limits: tl.tensor,
    slots: tl.tensor,
    n: tl.tensor,
    requests: tl.tensor,
    halvings: tl.tensor,
    table_stride: tl.tensor,
    V: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ENDS: tl.constexpr,
    FIRST: tl.constexpr,
    TERMS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    _, row, level = _token_row_level(tl.load(ids + i, mask=inside, other=0), V, MAX_ROWS, ENDS)
    place = tl.load(places + i, mask=inside, other=0)
    tl.store(limits + i, tl.where(row >= 0, place - row, place + 1).to(tl.int32), mask=inside)
    request, beyond = tl.zeros_like(i), tl.zeros_like(i) + requests
    for _ in range(halvings):
        middle = (request + beyond) // 2
        here = tl.load(starts + middle) <= i
        request, beyond = tl.where(here, middle, request), tl.where(here, beyond, middle)
    for j in tl.static_range(TERMS):
        there = inside & (row >= 0) & (level >= FIRST + j)
        at = place - FIRST - j
        page = tl.load(table + request * table_stride + at // PAGE, mask=there, other=0).to(tl.int64)
        tl.store(slots + i.to(tl.int64) * TERMS + j, tl.where(there, page * PAGE + at % PAGE, -1), mask=inside)


def step(beams: BeamRows, ids: Tensor, places: Tensor) -> Tensor:
    """int64 [4, n]: the fields of Step."""
    n = len(ids)
    made = torch.empty(4, n, dtype=torch.int64, device=ids.device)
    if n:
        _step((-(-n // BLOCK), 1, 1), (ids, places, made), (), (n,), (*_constants(beams), BLOCK), num_warps=4)
    return made


def sight(
    beams: BeamRows, ids: Tensor, places: Tensor, starts: Tensor, block_table: Tensor, block_size: int, back: range
) -> tuple[Tensor, Tensor]:
    """As `rows.sight`."""
    n, requests = len(ids), len(starts) - 1
    limits = torch.empty(n, dtype=torch.int32, device=ids.device)
    slots = torch.empty(n, len(back), dtype=torch.int64, device=ids.device)
    if n:
        _sight(
            (-(-n // BLOCK), 1, 1),
            (ids, places, starts, block_table, limits, slots),
            (),
            (n, requests, (requests - 1).bit_length(), block_table.stride(0)),
            (*_constants(beams), back.start, len(back), block_size, BLOCK),
            num_warps=4,
        )
    return limits, slots


def _constants(beams: BeamRows) -> tuple[int, int, tuple[int, ...]]:
    return beams.vocabulary, beams.max_rows, tuple(accumulate(beams.sizes))[:-1]
