"""8-bit pages (grkernels.pages) in Triton: a tile of keys or values times their scales."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grkernels.triton_common import INTERPRET

INT8, E4M3 = tl.constexpr(1), tl.constexpr(2)


def kind_of(pages: Tensor) -> int:
    """Return the kind of 8-bit numbers, which kernels take as a constant. They take the pages as bytes."""
    return int((E4M3 if pages.dtype.is_floating_point else INT8).value)


@triton.jit
def dequantised(
    rows: tl.tensor,
    scales: tl.tensor,
    cached: tl.tensor,
    dims: tl.tensor,
    D: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Return the numbers of a head of N tokens, [N, dims]; zeros where they are not cached or past D.

    rows and scales: where each token's are, [N, 1] as `cached`. dims [1, dims].
    """
    x = tl.load(rows + dims, mask=cached & (dims < D), other=0)
    if KIND == E4M3:
        x = x.to(tl.float8e4nv, bitcast=True)
    x = x.to(tl.float32) * tl.load(scales, mask=cached, other=0.0)
    return x if INTERPRET else x.to(DTYPE)
