"""The yardstick of every comparison: a reference's own maths, in which each result is rounded to half precision.

It shares no code with the variants, so a variant that is wrong can't widen what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")
_BITS = {torch.bfloat16: 8, torch.float16: 11}  # of the significand


class Rounding(TorchFunctionMode):
    """A context in which PyTorch rounds every fp32 result to the significand of `dtype`.

    The exponents stay those of fp32: implementations choose their scales so that nothing over- or underflows.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        last = 24 - _BITS[dtype]  # the bit of an fp32 number that is rounded to
        self._half, self._kept = 1 << (last - 1), -(1 << last)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return self._rounded(result) if isinstance(result, Tensor) and result.dtype == torch.float32 else result

    def _rounded(self, x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + self._half) & self._kept).view(torch.float32)


def rounded(reference: Callable[..., Result], dtype: torch.dtype) -> Callable[..., Result]:
    """Return `reference` with every result rounded to `dtype`; itself for fp32."""
    if dtype not in _BITS:
        return reference

    def yardstick(*args: Any, **options: Any) -> Result:
        with Rounding(dtype):
            return reference(*args, **options)

    return yardstick
