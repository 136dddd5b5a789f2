"""Norm and gate in one pass: each program holds whole rows of u and a in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.fp8 import Scaled
from grkernels.layer_norm.triton import CANDIDATES as CANDIDATES
from grkernels.layer_norm.triton import default_config, tuning_key
from grkernels.norm_gate.reference import norm_gate as reference
from grkernels.quantise.triton import quantise
from grkernels.triton_common import E4M3, eight_bits, rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

MAX_WIDTH = 32768  # a row must fit the registers of one program


@launched(tensors=["u", "a", "weight", "bias", "out"], numbers=["L", "eps"])
def _kernel(
    u: tl.tensor,
    a: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    u_stride: tl.tensor,
    a_stride: tl.tensor,
    L: tl.tensor,
    eps: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    GROUPS: tl.constexpr,
    CONCAT: tl.constexpr,
) -> None:
    """Compute L rows of W values, each of which is a group of a whole row of GROUPS * W."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_W)[None, :]
    mask = (row < L) & (column < W)
    whole, first = row, 0
    if GROUPS > 1:
        whole, first = row // GROUPS, (row % GROUPS) * W
    w = tl.load(weight + first + column, mask=column < W, other=0.0).to(tl.float32)
    b = tl.load(bias + first + column, mask=column < W, other=0.0).to(tl.float32)
    gate = tl.load(u + whole * u_stride + first + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(a + whole * a_stride + first + column, mask=mask, other=0.0)
    place = out + whole * (GROUPS * W) + first + column
    if CONCAT:
        place = out + whole * (3 * GROUPS * W) + first + column
        tl.store(place + GROUPS * W, x, mask=mask)
    gate, normed = _gate_and_norm(gate, x.to(tl.float32), w, b, eps, column, W)
    if CONCAT:
        tl.store(place, rounded(gate, out.dtype.element_ty), mask=mask)
        place += 2 * GROUPS * W
    tl.store(place, rounded(gate * normed, out.dtype.element_ty), mask=mask)


@launched(tensors=["u", "a", "weight", "bias", "out", "scales"], numbers=["L", "eps"])
def _quantising_kernel(
    u: tl.tensor,
    a: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    u_stride: tl.tensor,
    a_stride: tl.tensor,
    L: tl.tensor,
    eps: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CONCAT: tl.constexpr,
    LARGEST_NUMBER: tl.constexpr,
    LEAST_SIZE: tl.constexpr,
) -> None:
    """Write the bytes of e4m3. All parts of a row are in registers, so its scale costs no second pass."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, column = rows[:, None], tl.arange(0, BLOCK_W)[None, :]
    mask = (row < L) & (column < W)
    w = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < W, other=0.0).to(tl.float32)
    gate = tl.load(u + row * u_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(a + row * a_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate, normed = _gate_and_norm(gate, x, w, b, eps, column, W)
    gated = gate * normed
    largest = tl.max(tl.abs(gated), axis=1)
    place = out + row * W + column
    if CONCAT:
        largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(gate), axis=1), tl.max(tl.abs(x), axis=1)))
        place = out + row * (3 * W) + column
    scale = tl.maximum(largest, LEAST_SIZE) / LARGEST_NUMBER
    if CONCAT:
        tl.store(place, eight_bits(gate, scale, True), mask=mask)
        tl.store(place + W, eight_bits(x, scale, True), mask=mask)
        place += 2 * W
    tl.store(place, eight_bits(gated, scale, True), mask=mask)
    tl.store(scales + rows, scale, mask=rows < L)


@launched(tensors=["u", "a", "weight", "bias", "moments", "out"], numbers=["L", "eps"])
def _part_kernel(
    u: tl.tensor,
    a: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    moments: tl.tensor,
    out: tl.tensor,
    u_stride: tl.tensor,
    a_stride: tl.tensor,
    L: tl.tensor,
    eps: tl.tensor,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PARTS: tl.constexpr,
    CONCAT: tl.constexpr,
) -> None:
    """Compute L rows of W values, each of which is one of PARTS parts of a wider row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_W)[None, :]
    mask = (row < L) & (column < W)
    mean, variance = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    for part in tl.static_range(PARTS):
        mean += tl.load(moments + part * 2 * L + row, mask=row < L, other=0.0) / PARTS
    for part in tl.static_range(PARTS):
        away = tl.load(moments + part * 2 * L + row, mask=row < L, other=0.0) - mean
        variance += (tl.load(moments + (part * 2 + 1) * L + row, mask=row < L, other=0.0) + away * away) / PARTS
    w = tl.load(weight + column, mask=column < W, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < W, other=0.0).to(tl.float32)
    gate = tl.load(u + row * u_stride + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(a + row * a_stride + column, mask=mask, other=0.0)
    gate = gate / (1.0 + tl.exp(-gate))
    normed = (x.to(tl.float32) - mean) * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * w + b
    place = out + row * W + column
    if CONCAT:
        place = out + row * (3 * W) + column
        tl.store(place, rounded(gate, out.dtype.element_ty), mask=mask)
        tl.store(place + W, x, mask=mask)
        place += 2 * W
    tl.store(place, rounded(gate * normed, out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_and_norm(
    gate: tl.tensor, x: tl.tensor, w: tl.tensor, b: tl.tensor, eps: tl.tensor, column: tl.tensor, W: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the SiLU of gate and LayerNorm of rows x, all in fp32."""
    # The row is in registers, so the exact variance (of differences to the mean) costs no second read.
    centred = tl.where(column < W, x - tl.sum(x, axis=1, keep_dims=True) / W, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / W
    # AOTInductor passes eps in fp64.
    normed = centred * tl.rsqrt(variance + tl.cast(eps, tl.float32)) * w + b
    return gate / (1.0 + tl.exp(-gate)), normed


def norm_gate(
    u: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    groups: int = 1,
    concat: bool = True,
    to: str = "",
    moments: Tensor | None = None,
) -> Tensor | Scaled:
    """Compute what reference.py defines."""
    if to and groups > 1:  # a program has a group of a row, whose scale is that of all groups
        wide = norm_gate(u, a, weight, bias, eps=eps, groups=groups, concat=concat)
        return quantise(cast(Tensor, wide), to=to)
    (L, W), a = u.shape, a.flatten(1)
    width = 3 * W if concat else W
    out = Scaled.empty(L, width, a.device) if to else a.new_empty(L, width)
    L, W = L * groups, W // groups
    if L:
        u, a = (x if x.stride(1) == 1 else x.contiguous() for x in (u, a))
        block = tuning.bucket(W)
        config = tuning.choose("norm_gate", "triton", tuning_key(W), default_config(block))
        rows = config["rows"]
        grid, strides = (-(-L // rows), 1, 1), (u.stride(0), a.stride(0))
        inputs, constants = (u, a, weight, bias), (W, rows, block)
        if isinstance(out, Scaled):
            tensors = *inputs, out.values.view(torch.int8), out.scales
            _quantising_kernel(grid, tensors, strides, (L, eps), (*constants, concat, *E4M3), config["warps"])
        elif moments is not None:
            tensors = *inputs, moments, out
            _part_kernel(grid, tensors, strides, (L, eps), (*constants, len(moments), concat), config["warps"])
        else:
            _kernel(grid, (*inputs, out), strides, (L, eps), (*constants, groups, concat), config["warps"])
    return out


def supports(*, device: str, dtype: str, width: int, extras: Sequence[str] = (), products: str = "") -> str | None:
    """Return None if the variant can run this size, else the reason."""
    if width > MAX_WIDTH:
        return f"width {width} is over {MAX_WIDTH}"
    return triton_common.supports(device=device, dtype=dtype, products=products, width=width)


VARIANT = KernelVariant("norm_gate", "triton", norm_gate, reference, supports)
