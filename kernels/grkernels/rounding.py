"""The yardstick of every comparison: a reference's own maths, in which each result is rounded to half precision.

`through_pages` has the rounding of 8-bit pages in maths of its own. Nothing here shares code with the variants, so a
variant that is wrong can't widen what is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Result = TypeVar("Result")
_BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float8_e4m3fn: 4}  # of the significand


class Rounding(TorchFunctionMode):
    """A context in which PyTorch rounds every fp32 result to the significand of `dtype`, that of SiLU to `silu`'s.

    The exponents stay those of fp32: implementations choose their scales so that nothing over- or underflows.
    """

    def __init__(self, dtype: torch.dtype, silu: torch.dtype | None = None) -> None:
        super().__init__()
        self._dtype, self._silu = dtype, silu or dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float32:
            return result
        return _to_bits(result, _BITS[self._silu if func is torch.nn.functional.silu else self._dtype])


def _to_bits(x: Tensor, bits: int) -> Tensor:
    """Round fp32 numbers to `bits` of the significand."""
    last = 24 - bits  # the bit of an fp32 number that is rounded to
    if not last:
        return x
    return ((x.view(torch.int32) + (1 << (last - 1))) & -(1 << last)).view(torch.float32)


def rounded(reference: Callable[..., Result], dtype: torch.dtype) -> Callable[..., Result]:
    """Return `reference` with every result rounded to `dtype`; itself for fp32.

    With the option `to` ("fp8" or "int8") of an operator that writes 8 bits, rows are rounded to those in the end.
    """

    def yardstick(*args: Any, **options: Any) -> Result:
        with nullcontext() if dtype == torch.float32 else Rounding(dtype):
            result = reference(*args, **options)
        if to := options.get("to"):
            return cast(Result, through_pages(cast(Tensor, result), to))
        return result

    return yardstick


def with_fp8_products(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `attention` with results rounded to q's dtype, but q, k, v and SiLU of the scores to e4m3's bits.

    So are keys and values in pages, after the rounding that pages in 8 bits have.
    """

    def yardstick(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        bits = _BITS[torch.float8_e4m3fn]
        q, k, v = (_to_bits(x.float(), bits).to(x.dtype) for x in (q, k, v))
        for name in ("k", "v"):
            if (pages := options.get(f"{name}_pages")) is not None:
                scales = options.pop(f"{name}_scales", None)
                numbers = pages.float() if scales is None else pages.float() * scales[..., None]
                options[f"{name}_pages"] = _to_bits(numbers, bits)
        with Rounding(q.dtype, silu=torch.float8_e4m3fn):
            return attention(q, k, v, **options)

    return yardstick


def through_pages(x: Tensor, stored: str) -> Tensor:
    """Return x [..., d] as 8-bit pages keep it: each row rounded in steps that its largest number sets.

    stored: int8, 127 even steps on either side of 0; or fp8, e4m3, in which the largest number becomes 448, and steps
    are an eighth of the power of two below a number, at least 2^-9.
    """
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    if stored == "int8":
        step = largest / 127
    else:
        _, exponent = torch.frexp(x.float() * (448 / largest))  # x = m 2^exponent, m in [1/2, 1)
        step = torch.ldexp((largest / 448).expand_as(x), exponent.clamp(min=-5) - 4)
    return ((x.float() / step).round() * step).to(x.dtype)
