"""Norm and gate in CuTe DSL: a row of u and a in the registers of one warp, or of a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import torch
from cutlass import Float32, Int32, Int64, cute
from torch import Tensor

from grkernels import capabilities, cute_common, tuning
from grkernels.cute_common import ELEMENTS, WARP, ElementPointer, ahead, load_row, rounded, store_row, wide
from grkernels.cute_launch import Launcher
from grkernels.layer_norm.cutlass import CANDIDATES as CANDIDATES
from grkernels.layer_norm.cutlass import default_config, normed, place_of, tuning_key
from grkernels.layer_norm.cutlass import supports as supports_width
from grkernels.norm_gate.reference import norm_gate as reference
from grkernels.variant import KernelVariant

LOG2_E = 1.4426950408889634


class Arguments(NamedTuple):
    """Arguments of a launch, in order."""

    u: ElementPointer  # [L, width], as a
    a: ElementPointer
    weight: ElementPointer  # [width]
    bias: ElementPointer  # [width]
    out: ElementPointer  # [L, 3 width]
    L: Int32
    u_stride: Int64
    a_stride: Int64
    eps: Float32


@dataclass(frozen=True)
class NormGate:
    """The kernel for one element type, width and launch configuration."""

    dtype: Any
    width: int
    warps: int  # of a row
    rows: int  # of a CTA

    signature = Arguments

    @cute.jit
    def launch(self, args: Arguments, stream: cuda.CUstream) -> None:
        self._kernel(args).launch(
            grid=((args.L + self.rows - 1) // self.rows, 1, 1),
            block=(WARP * self.warps, self.rows, 1),
            stream=stream,
        )

    @cute.kernel
    def _kernel(self, args: Arguments) -> None:
        row, place = place_of(self.width, self.warps, self.rows, args.L)
        W, size = self.width, cute_common.vector(self.dtype)
        a_parts = load_row(ahead(args.a, row * args.a_stride, size), *place)
        u_parts = load_row(ahead(args.u, row * args.u_stride, size), *place)
        to = ahead(args.out, row * (3 * W), 8)
        store_row(a_parts, to + W, *place)
        gate = [_silu(x) for x in wide(u_parts)]
        store_row(rounded(gate, self.dtype), to, *place)
        y = normed(wide(a_parts), args.weight, args.bias, args.eps, *place)
        store_row(rounded([g * n for g, n in zip(gate, y, strict=True)], self.dtype), to + 2 * W, *place)


def _silu(x: Any) -> Any:
    """x sigmoid(x) by the special function units: exact to a few bits of fp32."""
    return x * cute.math.rcp(1.0 + cute.math.exp2(x * -LOG2_E, fastmath=True), approx=True, ftz=True)


def norm_gate(u: Tensor, a: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Compute what reference.py defines. A CUDA graph can capture it."""
    L, W = u.shape
    out = a.new_empty(L, 3 * W)
    if L:
        u, a = cute_common.vector_rows(u), cute_common.vector_rows(a)
        config = tuning.choose("norm_gate", "cutlass", tuning_key(W), default_config(W))
        _launcher(u.dtype, W, **config)(
            u.data_ptr(),
            a.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            L,
            u.stride(0),
            a.stride(0),
            eps,
            cute_common.stream(u.device),
        )
    return out


def supports(*, device: str, dtype: str, width: int, extras: Sequence[str] = (), products: str = "") -> str | None:
    """Return None, or why these arguments are not supported."""
    return capabilities.lacking(extras) or supports_width(device=device, dtype=dtype, width=width, products=products)


@cache
def _launcher(dtype: torch.dtype, width: int, warps: int, rows: int) -> Launcher:
    return cute_common.launcher(NormGate(ELEMENTS[dtype], width, warps, rows))


VARIANT = KernelVariant("norm_gate", "cutlass", norm_gate, reference, supports)
