"""Keys that each token of a step sees in one launch; eager PyTorch needs some thirty."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from grkernels import triton_common
from grkernels.beam_keys.reference import beam_keys as reference
from grkernels.beam_rows.triton import BLOCK, constants, token_row_level
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant


@launched(
    tensors=[],
    indices=["ids", "places", "starts", "table", "limits", "slots"],
    numbers=["n", "requests", "halvings", "table_stride"],
)
def _kernel(
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
    _, row, level = token_row_level(tl.load(ids + i, mask=inside, other=0), V, MAX_ROWS, ENDS)
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


def beam_keys(
    ids: Tensor,
    places: Tensor,
    starts: Tensor,
    block_table: Tensor,
    *,
    sizes: tuple[int, ...],
    max_rows: int,
    page: int,
    first: int,
    terms: int,
) -> tuple[Tensor, Tensor]:
    """Compute what reference.py defines."""
    n, requests = len(ids), len(starts) - 1
    limits = torch.empty(n, dtype=torch.int32, device=ids.device)
    slots = torch.empty(n, terms, dtype=torch.int64, device=ids.device)
    if n:
        _kernel(
            (-(-n // BLOCK), 1, 1),
            (ids, places, starts, block_table, limits, slots),
            (),
            (n, requests, (requests - 1).bit_length(), block_table.stride(0)),
            (*constants(sizes, max_rows), first, terms, page, BLOCK),
            num_warps=4,
        )
    return limits, slots


VARIANT = KernelVariant("beam_keys", "triton", beam_keys, reference, triton_common.supports)
