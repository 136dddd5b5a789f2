"""Rows in e4m3 in one pass: each program holds whole rows in registers."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.fp8 import Scaled
from grkernels.layer_norm.triton import CANDIDATES as CANDIDATES
from grkernels.layer_norm.triton import default_config, tuning_key
from grkernels.quantise.reference import quantise as reference
from grkernels.triton_common import E4M3, quantised
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant


@launched(tensors=["x", "out", "scales"], numbers=["L"])
def _kernel(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    x_stride: tl.tensor,
    L: tl.tensor,
    W: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Write rows of W numbers and zeros up to WIDTH, as the bytes of e4m3."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], tl.arange(0, BLOCK_W)[None, :]
    values = tl.load(x + row * x_stride + column, mask=(row < L) & (column < W), other=0.0)
    numbers, scale = quantised(values, True, LARGEST_NUMBER, LEAST_SIZE)
    tl.store(out + row * WIDTH + column, numbers, mask=(row < L) & (column < WIDTH))
    tl.store(scales + rows, scale, mask=rows < L)


def quantise(x: Tensor, *, to: str) -> Scaled:
    """Compute what reference.py defines."""
    L, W = x.shape
    out = Scaled.empty(L, W, x.device)
    if L:
        x = x if x.stride(1) == 1 else x.contiguous()
        width = out.values.shape[1]
        block = tuning.bucket(width)
        config = tuning.choose("quantise", "triton", tuning_key(W), default_config(block))
        rows = config["rows"]
        tensors = x, out.values.view(torch.int8), out.scales
        constants = W, width, rows, block, *E4M3
        _kernel((-(-L // rows), 1, 1), tensors, (x.stride(0),), (L,), constants, config["warps"])
    return out


VARIANT = KernelVariant("quantise", "triton", quantise, reference, triton_common.supports)
