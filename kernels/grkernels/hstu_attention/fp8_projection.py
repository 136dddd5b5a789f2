"""The input projection of a layer that writes Q, K and V in e4m3, as attention in fp8 reads them (fp8_operands.py).

One product in Triton instead of a product and a pass over its result: scales are computed of a tile's fp32 sums, so Q,
K and V are never written in half precision. U stays in half precision. A tile has BLOCK tokens and whole heads. Tiles
of K and V have the tokens of one block of a sequence, since a block has one scale, and tiles of Q and U any rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grkernels import fp8, tuning
from grkernels.fp8 import Scaled
from grkernels.hstu_attention.fp8_operands import BLOCK, LONGEST, SHORTEST, Operands, e4m3, lengths, transposed
from grkernels.pages import LARGEST, LEAST
from grkernels.triton_common import INTERPRET, rounded
from grkernels.triton_launch import INTERPRETED, launched

ROW = 128  # bytes of a row of a tile of x or of the weight in shared memory: the longest that TMA swizzles
# Launch configurations. columns: channels of a tile. programs: on each processor, as many as its memory has room for.
CANDIDATES = [
    {"columns": columns, "warps": warps, "stages": stages, "programs": programs}
    for columns, warps, stages, programs in ((256, 8, 3, 1), (256, 8, 4, 1), (128, 8, 4, 1), (128, 4, 2, 2))
]
DEFAULT = CANDIDATES[0]  # wide tiles: each number that a processor loads is in 128 or 256 products


@dataclass(frozen=True)
class Blocks:
    """The blocks of BLOCK tokens that the sequences of a batch have."""

    offsets: Tensor  # int64 [B + 1], of the sequences' tokens
    table: Tensor  # int32 [at least the blocks, 3]: first row, rows, and number of each block that has rows
    count: Tensor  # int32 [1]: of them


def blocks_of(offsets: Tensor, rows: int) -> Blocks:
    """Return the blocks of sequences without pages, of at most `rows` tokens. A CUDA graph can hold the launch."""
    batch = offsets.shape[0] - 1
    table = torch.empty(rows // BLOCK + batch, 3, dtype=torch.int32, device=offsets.device)
    count = torch.zeros(1, dtype=torch.int32, device=offsets.device)
    if batch:
        _blocks_kernel((batch, 1, 1), (table, count, offsets), (), (batch,), (BLOCK, 256), 1)
    return Blocks(offsets, table, count)


@launched(tensors=["table", "count"], indices=["offsets"], numbers=["batch"])
def _blocks_kernel(
    table: tl.tensor,
    count: tl.tensor,
    offsets: tl.tensor,
    batch: tl.tensor,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Write the entries of one sequence, behind those of the sequences before it."""
    sequence, entry = tl.program_id(0), tl.arange(0, STEP)
    before = 0
    for first in range(0, sequence, STEP):
        other = first + entry
        begin = tl.load(offsets + other, mask=other < sequence, other=0)
        length = tl.load(offsets + other + 1, mask=other < sequence, other=0) - begin
        before += tl.sum((length + (TOKENS - 1)) // TOKENS, axis=0).to(tl.int32)
    begin = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    own = (length + (TOKENS - 1)) // TOKENS
    number = (begin // TOKENS).to(tl.int32) + sequence
    for first in range(0, own, STEP):
        i = first + entry
        at = table + (before + i) * 3
        tl.store(at, begin.to(tl.int32) + i * TOKENS, mask=i < own)
        tl.store(at + 1, tl.minimum(length - i * TOKENS, TOKENS), mask=i < own)
        tl.store(at + 2, number + i, mask=i < own)
    if sequence == batch - 1:
        tl.store(count, before + own)


@launched(
    descriptors=["x", "weight"],
    tensors=["x_scales", "weight_scales", "bias", "u", "v_out", "q_out", "k_out", "rows_out", "blocks_out", "table"],
    indices=["count"],
    numbers=["L", "blocks"],
)
def _kernel(
    x: tl.tensor,
    weight: tl.tensor,
    x_scales: tl.tensor,
    weight_scales: tl.tensor,
    bias: tl.tensor,
    u: tl.tensor,
    v_out: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    rows_out: tl.tensor,
    blocks_out: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    L: tl.tensor,
    blocks: tl.tensor,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    LONGEST_ROW: tl.constexpr,
    SHORTEST_ROW: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Compute tiles of TOKENS rows and COLUMNS channels: of U and Q with ROWS, of V and K with KEYS.

    The weight has U, V, Q and K one below another. Tiles beside each other share their rows of x.
    """
    V_TILES: tl.constexpr = (HEADS * V + COLUMNS - 1) // COLUMNS
    QK_TILES: tl.constexpr = (HEADS * QK + COLUMNS - 1) // COLUMNS
    V_END: tl.constexpr = KEYS * V_TILES
    K_END: tl.constexpr = KEYS * (V_TILES + QK_TILES)
    U_END: tl.constexpr = K_END + ROWS * V_TILES
    TILES: tl.constexpr = U_END + ROWS * QK_TILES
    STEPS: tl.constexpr = max((E + STEP - 1) // STEP, 2)  # Triton 3.6 can't compile the loop with one step a tile
    listed = 0
    if KEYS:
        listed = tl.load(count)
    groups = listed
    if ROWS:
        groups = tl.maximum(listed, (L + (TOKENS - 1)) // TOKENS)
    token, column = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    program, programs = tl.program_id(0), tl.num_programs(0)
    part, row, rows, number, start, first = 0, 0, 0, 0, 0, 0
    sums = tl.zeros([TOKENS, COLUMNS], tl.float32)
    # One loop over the steps of all tiles, so that a tile's loads run while the one before it is rounded. Nested loops
    # with flatten=True would do the same, but Triton 3.6 fails to fuse them.
    for i in range(tl.cdiv(groups * TILES - program, programs) * STEPS):
        step = i % STEPS
        if step == 0:
            tile = program + i // STEPS * programs
            group, part = tile // TILES, tile % TILES
            row, rows = group * TOKENS, tl.minimum(L - group * TOKENS, TOKENS)
            number = 0
            if part < K_END:
                entry = table + group * 3
                row = tl.load(entry, mask=group < listed, other=0)
                rows = tl.load(entry + 1, mask=group < listed, other=0)
                number = tl.load(entry + 2, mask=group < listed, other=0)
            if part < V_END:
                own, start = part, HEADS * V
            elif part < K_END:
                own, start = part - V_END, HEADS * (2 * V + QK)
            elif part < U_END:
                own, start = part - K_END, 0
            else:
                own, start = part - U_END, HEADS * 2 * V
            first = own * COLUMNS  # channel of u, v, q or k
        left, right = x.load([row, step * STEP]), weight.load([start + first, step * STEP])
        if INTERPRET:  # it has no bf16 arithmetic
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right.T, sums, input_precision="ieee")
        if step == STEPS - 1:
            inside = token < rows
            channel = first + column
            width = HEADS * V
            if (part >= V_END and part < K_END) or part >= U_END:
                width = HEADS * QK
            if SCALED:
                row_scale = tl.load(x_scales + row + token, mask=inside, other=0.0)
                channel_scale = tl.load(weight_scales + start + channel, mask=channel < width, other=0.0)
                sums = sums * row_scale[:, None] * channel_scale[None, :]
            sums += tl.load(bias + start + channel, mask=channel < width, other=0.0).to(tl.float32)[None, :]
            if part < K_END:
                if rows < TOKENS:
                    sums = tl.where(inside[:, None], sums, 0.0)
                if rows > 0:
                    if part < V_END:
                        _write_v(
                            sums, v_out, blocks_out, number, first, blocks, HEADS, V, TOKENS, COLUMNS, LARGEST_NUMBER,
                            LEAST_SIZE,
                        )  # fmt: skip
                    else:
                        _write_k(
                            sums, k_out, blocks_out, number, first, blocks, HEADS, QK, TOKENS, COLUMNS, LONGEST_ROW,
                            SHORTEST_ROW,
                        )  # fmt: skip
            elif part < U_END:
                at = u + (row + token).to(tl.int64)[:, None] * width + channel[None, :]
                tl.store(at, rounded(sums, u.dtype.element_ty), mask=inside[:, None] & (channel < width)[None, :])
            else:
                _write_q(
                    sums, q_out, rows_out, row, rows, first, HEADS, QK, TOKENS, COLUMNS, LONGEST_ROW, SHORTEST_ROW
                )  # fmt: skip
            sums = tl.zeros([TOKENS, COLUMNS], tl.float32)


@triton.jit
def _write_q(
    sums: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONGEST_ROW: tl.constexpr,
    SHORTEST_ROW: tl.constexpr,
) -> None:
    """Round rows of Q [TOKENS, COLUMNS] and store them with their scales."""
    OWN: tl.constexpr = COLUMNS // D  # heads of the tile
    line = tl.arange(0, TOKENS * OWN)  # of one token and one head
    token, head = line // OWN, first // D + line % OWN
    x = tl.reshape(sums, [TOKENS * OWN, D])
    scale = lengths(x, SHORTEST_ROW) / LONGEST_ROW
    at = (row + token).to(tl.int64) * HEADS + head
    there = (token < rows) & (head < HEADS)
    tl.store(out + at[:, None] * D + tl.arange(0, D)[None, :], e4m3(x, scale[:, None]), mask=there[:, None])
    tl.store(scales + at, scale, mask=there)


@triton.jit
def _write_k(
    sums: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    number: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONGEST_ROW: tl.constexpr,
    SHORTEST_ROW: tl.constexpr,
) -> None:
    """Round a block of K [TOKENS, COLUMNS] and store it with a scale for each head."""
    OWN: tl.constexpr = COLUMNS // D
    line = tl.arange(0, TOKENS * OWN)
    token, head = line // OWN, first // D + line % OWN
    x = tl.reshape(sums, [TOKENS * OWN, D])
    longest = tl.max(tl.reshape(lengths(x, SHORTEST_ROW), [TOKENS, OWN]), axis=0, keep_dims=True)
    scale = longest / LONGEST_ROW
    each = tl.reshape(tl.broadcast_to(scale, [TOKENS, OWN]), [TOKENS * OWN])
    at = ((number.to(tl.int64) * TOKENS + token) * HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + at, e4m3(x, each[:, None]), mask=(head < HEADS)[:, None])
    own = first // D + tl.arange(0, OWN)
    tl.store(scales + (own * blocks + number) * 2, tl.reshape(scale, [OWN]), mask=own < HEADS)


@triton.jit
def _write_v(
    sums: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    number: tl.tensor,
    first: tl.tensor,
    blocks: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Round a block of V [TOKENS, COLUMNS] and store it transposed, with a scale for each head."""
    OWN: tl.constexpr = COLUMNS // D
    x = tl.reshape(sums, [TOKENS * OWN, D])
    sizes = tl.reshape(tl.max(tl.abs(x), axis=1), [TOKENS, OWN])
    scale = tl.maximum(tl.max(sizes, axis=0, keep_dims=True), LEAST_SIZE) / LARGEST_NUMBER
    each = tl.reshape(tl.broadcast_to(scale, [TOKENS, OWN]), [TOKENS * OWN])
    numbers = tl.reshape(e4m3(x, each[:, None]), [TOKENS, COLUMNS])
    channel = first + tl.arange(0, COLUMNS)
    at = (channel.to(tl.int64) * blocks + number)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(out + at, transposed(numbers, TOKENS, COLUMNS), mask=(channel < HEADS * D)[:, None])
    own = first // D + tl.arange(0, OWN)
    tl.store(scales + (own * blocks + number) * 2 + 1, tl.reshape(scale, [OWN]), mask=own < HEADS)


def project(
    x: Tensor | Scaled,
    keys: Tensor | Scaled,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor,
    *,
    heads: int,
    qk_dim: int,
    v_dim: int,
    blocks: Blocks,
) -> tuple[Tensor, Operands]:
    """Multiply rows with the weight of U, V, Q and K: U [L, H * dv] before its SiLU, and the operands of attention.

    x: rows of U and Q. keys: rows of V and K, which may be the same object. Both are [rows, E] in half precision, or in
    e4m3 as `weight` [2 H (dv + dqk), E] is then, with its `scales` fp32 [1, N]. blocks: of the sequences of `keys`.
    """
    values = x.values if isinstance(x, Scaled) else x
    rows, count, device = values.shape[0], blocks.table.shape[0], values.device

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=fp8.DTYPE, device=device)

    u = torch.empty(rows, heads * v_dim, dtype=bias.dtype, device=device)
    made = Operands(
        empty(rows, heads, qk_dim),
        empty(count * BLOCK, heads, qk_dim),
        empty(heads, v_dim, count * BLOCK),
        torch.empty(rows, heads, dtype=torch.float32, device=device),
        torch.empty(heads, count, 2, dtype=torch.float32, device=device),
        blocks.offsets,
    )
    widest = max(qk_dim, v_dim)
    config = tuning.choose("hstu_attention", "fp8_projection", _key(values, heads, qk_dim, v_dim), DEFAULT)
    columns, step = max(config["columns"], widest), ROW // values.element_size()
    outputs = u, made.v.view(torch.int8), made.q.view(torch.int8), made.k.view(torch.int8), made.rows, made.blocks
    right = TensorDescriptor.from_tensor(weight, [columns, step])
    for source, of_rows, of_keys in [(x, 1, 1)] if keys is x else [(x, 1, 0), (keys, 0, 1)]:
        left = source.values if isinstance(source, Scaled) else source
        if not left.shape[0]:
            continue
        tiles = (left.shape[0] // BLOCK + 1 + len(blocks.table)) * (-(-weight.shape[0] // columns) + 2)
        _kernel(
            (min(config["programs"] * _processors(device), tiles), 1, 1),
            (
                source.scales if isinstance(source, Scaled) else bias,
                bias if scales is None else scales,
                *(bias, *outputs, blocks.table, blocks.count),
            ),
            (),
            (left.shape[0], count),
            (
                *(left.shape[1], heads, qk_dim, v_dim, of_rows, of_keys, int(scales is not None)),
                *(BLOCK, columns, step, LONGEST, SHORTEST, LARGEST[fp8.DTYPE], LEAST),
            ),
            config["warps"],
            config["stages"],
            descriptors=(TensorDescriptor.from_tensor(left, [BLOCK, step]), right),
        )
    return u, made


def _key(values: Tensor, heads: int, qk_dim: int, v_dim: int) -> str:
    """Return all that the best launch configuration depends on, except the number of rows, which is large."""
    return tuning.key(bits=8 * values.element_size(), width=values.shape[1], heads=heads, qk=qk_dim, v=v_dim)


@cache
def _processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; two in the interpreter."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
