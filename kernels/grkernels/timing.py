"""Times of a family's variants for a batch of a model, where no order of them is measured and checked in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grkernels import registry, tuning
from grkernels.families import Sizes
from grkernels.fp8 import Scaled
from grkernels.rounding import rounded
from grkernels.variant import KernelVariant

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDS = 6  # of all variants in turn; the least time counts, since other work only adds
CALLS = 4  # of a round, queued one behind another: they take the longer of the host's time and the device's
ENOUGH_S = 0.3  # for the rounds; the first is always taken
# Sums in fp32 in another order differ by some tens of the last bit, 6e-8. A wrong mask differs by 1e-3 and more.
LEAST_ALLOWED = 2e-5

Times = dict[str, float | str]  # milliseconds of a call by variant, or the error of one that fails
_known: dict[tuple[Any, ...], Times] = {}


def times(
    family: str, variants: tuple[str, ...], device: str, dtype: str, sizes: Sizes, *, known: bool = False
) -> Times:
    """Return the milliseconds of a call of each variant, or the error of one that fails or answers wrongly.

    A process times a family once. device: cuda or cpu. dtype: fp32, fp16 or bf16. known: time nothing, and return
    nothing if this process has no times.
    """
    asked = family, variants, device, dtype, sizes
    if asked not in _known and not known:
        with torch.inference_mode(), tuning.unlisted():
            _known[asked] = _interleaved(*asked)
        if device == "cuda":
            torch.cuda.empty_cache()  # vLLM counts what is free
    return _known.get(asked, {})


def _interleaved(family: str, variants: tuple[str, ...], device: str, dtype: str, sizes: Sizes) -> Times:
    arguments = registry.bench(family).of_model(sizes, dtype=DTYPES[dtype], device=device)
    ms: Times = {}
    for name in variants:  # compiles it
        ms[name] = _wrong(registry.get(family, name), arguments, DTYPES[dtype]) or math.inf
    begun = time.perf_counter()
    for done in range(ROUNDS):
        if done and time.perf_counter() - begun > ENOUGH_S:
            break
        for name, least in ms.items():
            if isinstance(least, float):
                ms[name] = _least(least, partial(registry.get(family, name).fn, **arguments), device)
    return ms


def _wrong(variant: KernelVariant, arguments: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Return None if the variant's answer is within its tolerance of the fp32 reference's, else its error."""
    exact = {k: x.float() if isinstance(x, Tensor) and x.dtype == dtype else x for k, x in arguments.items()}
    writes = registry.family(variant.family).writes
    try:
        out = _answer(variant.fn, arguments, writes, dtype)
        right = _answer(variant.reference, exact, writes, dtype)
        near = _answer(variant.yardstick or rounded(variant.reference, dtype), arguments, writes, dtype)
        for x, reference, yardstick in zip(out, right, near, strict=True):
            allowed = max(variant.max_error_ratio * _error(yardstick, reference), LEAST_ALLOWED)
            if not (error := _error(x, reference)) <= allowed:
                return f"differs from the fp32 reference by {error:.2g} (relative), allowed is {allowed:.2g}"
    except Exception as e:
        return _line(e)
    return None


def _answer(
    fn: Callable[..., Any], arguments: dict[str, Any], writes: tuple[str, ...], dtype: torch.dtype
) -> list[Any]:
    """Return the outputs, those in fp8 as the numbers that they stand for. The arguments stay as they are."""
    given = {k: x.clone() if k in writes else x for k, x in arguments.items()}
    result = fn(**given)
    if isinstance(result, Scaled):
        return [result.numbers(dtype)]
    return [given[name] for name in writes] or list(result if isinstance(result, tuple) else (result,))


def _error(x: Tensor, reference: Tensor) -> float:
    """Return ||x - reference|| / ||reference||. Rows in fp8 have zeros behind them."""
    a, b = x.double()[..., : reference.shape[-1]], reference.double()
    return float((a - b).norm() / b.norm())


def _line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0]


def _least(least: float, call: Callable[[], Any], device: str) -> float | str:
    """Return the milliseconds of a call, at most `least`, or its error."""
    begun = time.perf_counter()
    try:
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as e:
        return _line(e)
    return min(least, 1e3 * (time.perf_counter() - begun) / CALLS)
