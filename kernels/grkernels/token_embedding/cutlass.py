"""Token embedding in CuTe DSL: warps gather a few tokens' rows, sum in registers and round once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, cute
from torch import Tensor

from grkernels import cute_common, tuning
from grkernels.cute_common import (
    ELEMENTS,
    WARP,
    ElementPointer,
    Float64Pointer,
    Int64Pointer,
    ahead,
    load_row,
    rounded,
    store_row,
    wide,
)
from grkernels.cute_launch import Launcher
from grkernels.token_embedding.reference import token_embedding as reference
from grkernels.variant import KernelVariant

MAX_WIDTH = 8192  # a row must fit the registers of the warps that share it

# warps: that share a token; tokens: of a warp, all under way at once; groups: of such warps in a CTA.
CANDIDATES = [
    {"warps": warps, "tokens": tokens, "groups": groups}
    for warps, tokens, groups in (
        (1, 1, 4),
        (1, 2, 4),
        (2, 1, 2),
        (2, 2, 1),
        (2, 2, 2),
        (2, 2, 4),
        (2, 4, 2),
        (4, 1, 1),
        (4, 1, 2),
        (4, 2, 1),
        (4, 2, 2),
        (4, 4, 1),
    )
]


class Arguments(NamedTuple):
    """Arguments of a launch, in order."""

    token_rows: Int64Pointer  # [L], as the next four
    actions: Int64Pointer
    weights: Float64Pointer
    positions: Int64Pointer
    time_buckets: Int64Pointer
    token_table: ElementPointer  # [rows, width], as the other tables
    action_table: ElementPointer
    weight_vector: ElementPointer  # [width]
    position_table: ElementPointer
    time_table: ElementPointer
    out: ElementPointer  # [L, width]
    L: Int32


@dataclass(frozen=True)
class TokenEmbedding:
    """The kernel for one element type, width, number of actions and launch configuration."""

    dtype: Any
    width: int
    num_actions: int
    warps: int
    tokens: int
    groups: int

    signature = Arguments

    @cute.jit
    def launch(self, args: Arguments, stream: cuda.CUstream) -> None:
        own = self.tokens * self.groups
        self._kernel(args).launch(
            grid=((args.L + own - 1) // own, 1, 1), block=(WARP * self.warps, self.groups, 1), stream=stream
        )

    @cute.kernel
    def _kernel(self, args: Arguments) -> None:
        thread, group, _ = cute.arch.thread_idx()
        begin = (cute.arch.block_idx()[0] * self.groups + group) * self.tokens
        indices = (args.token_rows, args.positions, args.time_buckets)
        tables = (args.token_table, args.position_table, args.time_table)
        E, place = self.width, (self.width, thread, WARP * self.warps)
        # Every index before the first gather, so that the gathers are under way together. Tokens that a warp has too
        # many are the last one again.
        tokens = [cutlass.min(begin + i, args.L - 1) for i in range(self.tokens)]
        rows = [[index[token] for index in indices] for token in tokens]
        bits, scales = ([x[token] for token in tokens] for x in (args.actions, args.weights))
        gathered = [
            [wide(load_row(ahead(table, row * E, 8), *place)) for table, row in zip(tables, own_rows, strict=True)]
            for own_rows in rows
        ]
        sums = [[sum(parts[1:], parts[0]) for parts in zip(*x, strict=True)] for x in gathered]
        vector = wide(load_row(args.weight_vector, *place))
        sums = [_added(x, vector, scale.to(Float32)) for x, scale in zip(sums, scales, strict=True)]
        for bit in cutlass.range_constexpr(self.num_actions):
            vector = wide(load_row(ahead(args.action_table, bit * E, 8), *place))
            sums = [_added(x, vector, Float32(Int32(b >> bit) & 1)) for x, b in zip(sums, bits, strict=True)]
        for token, x in zip(tokens, sums, strict=True):
            store_row(rounded(x, self.dtype), ahead(args.out, Int64(token) * E, 8), *place)


def _added(x: list[Any], vector: list[Any], scale: Float32) -> list[Any]:
    """x + scale * vector, part by part."""
    return [a + scale * b for a, b in zip(x, vector, strict=True)]


def tuning_key(width: int) -> str:
    """Tokens are many in every use that matters; only the width of a row decides."""
    return tuning.key(width=width)


def _default(width: int) -> tuning.Config:
    """A thread has one vector of a row: with more, the compiler puts some of the gathers off."""
    warps = min(-(-width // 256), 8)
    return {"warps": warps, "tokens": 2, "groups": max(4 // warps, 1)}


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
    """Compute what reference.py defines. A CUDA graph can capture it. Raises ValueError for a strided table."""
    L, E = token_rows.shape[0], action_table.shape[1]
    indices = [x.contiguous() for x in (token_rows, actions, weights, positions, time_buckets)]
    tables = (token_table, action_table, weight_vector, position_table, time_table)
    if not all(t.is_contiguous() for t in tables):
        raise ValueError("token_embedding: every table must be contiguous")
    out = token_table.new_empty(L, E)
    if L:
        config = tuning.choose("token_embedding", "cutlass", tuning_key(E), _default(E))
        _launcher(token_table.dtype, E, action_table.shape[0], **config)(
            *(x.data_ptr() for x in indices),
            *(x.data_ptr() for x in tables),
            out.data_ptr(),
            L,
            cute_common.stream(out.device),
        )
    return out


@cache
def _launcher(dtype: torch.dtype, width: int, num_actions: int, warps: int, tokens: int, groups: int) -> Launcher:
    return cute_common.launcher(TokenEmbedding(ELEMENTS[dtype], width, num_actions, warps, tokens, groups))


def supports(*, device: str, dtype: str, width: int) -> str | None:
    """Return None, or why these arguments are not supported."""
    if width > MAX_WIDTH:
        return f"width {width} is over {MAX_WIDTH} (others: torch, compile, triton)"
    return cute_common.supports(device=device, dtype=dtype, width=width)


VARIANT = KernelVariant("token_embedding", "cutlass", token_embedding, reference, supports)
