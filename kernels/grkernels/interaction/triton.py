"""Feature interaction in one pass: tensor cores make the products, and only the triangle leaves the chip.

Memory bounds this operator: it needs many bytes in flight. A few programs an SM process all blocks of samples. They
fetch the next block (Triton's pipelining) while they multiply and store the current one. Samples of few features are
stacked to fill a tile, and products of features of different samples are dropped. Triton stores a tile of products a
row a warp, so the ragged rows of the triangle cost few memory transactions although they begin anywhere. Gathering
them into one contiguous store first (tl.gather) took more instructions.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.interaction.reference import interaction as reference
from grkernels.triton_common import INTERPRET, rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

WHOLE = 128  # the most features whose products fit the registers of one program
BLOCK = 64  # rows of the tiles of samples with more features

# rows: of a tile of products; a sample of more features takes them all. programs: of an SM.
CANDIDATES = [
    {"rows": rows, "warps": warps, "stages": stages, "programs": programs}
    for rows, warps, stages, programs in (
        (32, 1, 3, 8),
        (32, 1, 3, 9),
        (32, 1, 2, 13),
        (32, 2, 3, 8),
        (32, 2, 3, 9),
        (32, 2, 2, 13),
        (32, 4, 3, 9),
        (64, 2, 3, 4),
        (64, 4, 3, 4),
        (64, 4, 2, 6),
        (64, 8, 3, 4),
        (128, 8, 3, 2),
    )
]


@launched(tensors=["x", "out"], numbers=["B"])
def _kernel(
    x: tl.tensor,
    out: tl.tensor,
    sample_stride: tl.tensor,
    feature_stride: tl.tensor,
    B: tl.tensor,
    F: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Row r of a block of ROWS is feature r % BLOCK_F of sample r // BLOCK_F."""
    WIDTH: tl.constexpr = D + F * (F - 1) // 2
    SAMPLES: tl.constexpr = ROWS // BLOCK_F
    row = tl.arange(0, ROWS)
    i = (row % BLOCK_F)[:, None]
    j = (row % BLOCK_F)[None, :]
    wanted = (i < j) & (j < F) & ((row // BLOCK_F)[:, None] == (row // BLOCK_F)[None, :])
    place = D + i * (2 * F - 3 - i) // 2 - 1 + j  # row i of the triangle begins at i (2 F - 1 - i) / 2, with j = i + 1
    column = tl.arange(0, BLOCK_D)[None, :]
    dense_row = tl.arange(0, SAMPLES)[:, None]
    for block in tl.range(tl.program_id(0), tl.cdiv(B, SAMPLES), tl.num_programs(0)):
        sample = (block * SAMPLES + row[:, None] // BLOCK_F).to(tl.int64)
        dense_sample = (block * SAMPLES + dense_row).to(tl.int64)
        products = tl.zeros([ROWS, ROWS], tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            inside = d + column < D
            features = x + sample * sample_stride + i * feature_stride + d + column
            part = tl.load(features, mask=(sample < B) & (i < F) & inside, other=0.0)
            # The dense part, feature 0, goes through as it is.
            mask = (dense_sample < B) & inside
            dense = tl.load(x + dense_sample * sample_stride + d + column, mask=mask, other=0.0)
            tl.store(out + dense_sample * WIDTH + d + column, dense, mask=mask)
            if INTERPRET:  # the interpreter has no bf16 arithmetic
                part = part.to(tl.float32)
            products = tl.dot(part, tl.trans(part), products, input_precision="ieee")
        values = rounded(products, out.dtype.element_ty)
        tl.store(out + sample * WIDTH + place, values, mask=wanted & (sample < B))


@launched(tensors=["x", "out"])
def _tiled_kernel(
    x: tl.tensor,
    out: tl.tensor,
    sample_stride: tl.tensor,
    feature_stride: tl.tensor,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One tile of a sample's products; tiles below the diagonal return at once."""
    sample, row_block, column_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if column_block < row_block:
        return
    out += sample * (D + F * (F - 1) // 2)
    x += sample * sample_stride
    row, column = row_block * BLOCK_F + tl.arange(0, BLOCK_F), column_block * BLOCK_F + tl.arange(0, BLOCK_F)
    products = tl.zeros([BLOCK_F, BLOCK_F], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        left = tl.load(x + row[:, None] * feature_stride + d, mask=(row < F)[:, None] & (d < D), other=0.0)
        right = tl.load(x + column[:, None] * feature_stride + d, mask=(column < F)[:, None] & (d < D), other=0.0)
        if (row_block == 0) & (column_block == 0):
            tl.store(out + d + row[:, None] * 0, left, mask=(row == 0)[:, None] & (d < D))
        if INTERPRET:  # the interpreter has no bf16 arithmetic
            left, right = left.to(tl.float32), right.to(tl.float32)
        products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
    i, j = row[:, None], column[None, :]
    place = D + i * (2 * F - 3 - i) // 2 - 1 + j
    tl.store(out + place, rounded(products, out.dtype.element_ty), mask=(i < j) & (j < F))


def tuning_key(features: int, dim: int) -> str:
    """Return the key of a sample's size. The number of samples is large in every use and does not matter."""
    return tuning.key(features=features, dim=dim)


def interaction(x: Tensor) -> Tensor:
    """Compute what reference.py defines."""
    B, F, D = x.shape
    out = x.new_empty(B, D + F * (F - 1) // 2)
    if B:
        x = x if x.stride(2) == 1 else x.contiguous()
        block_d = min(max(tuning.bucket(D), 16), 256 // x.element_size())
        if F > WHOLE:
            blocks = -(-F // BLOCK)
            _tiled_kernel((B, blocks, blocks), (x, out), x.stride()[:2], (), (F, D, BLOCK, block_d), 4)
            return out
        block_f = max(tuning.bucket(F), 16)  # 16: the least that tl.dot takes
        default = {"rows": 32, "warps": 1, "stages": 3, "programs": 8}
        if block_f > 32:
            default = {"rows": block_f, "warps": block_f // 16, "stages": 3, "programs": 192 // block_f}
        config = tuning.choose("interaction", "triton", tuning_key(F, D), default)
        rows = max(config["rows"], block_f)
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        programs = config["programs"] * processors
        grid = torch.sym_min(programs, -(-B // (rows // block_f))), 1, 1
        constants = F, D, rows, block_f, block_d
        _kernel(grid, (x, out), x.stride()[:2], (B,), constants, config["warps"], config["stages"])
    return out


VARIANT = KernelVariant("interaction", "triton", interaction, reference, triton_common.supports)
