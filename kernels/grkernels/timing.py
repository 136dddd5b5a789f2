"""Times of a family's variants for a batch of a model, where no order of them is measured and checked in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from grkernels import registry, tuning
from grkernels.families import Sizes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDS = 6  # of all variants in turn; the least time counts, since the first call compiles and other work only adds
CALLS = 4  # of a round, queued one behind another: they take the longer of the host's time and the device's
ENOUGH_S = 0.3  # for the rounds after the first; one of them is always taken


@cache
def times(family: str, variants: tuple[str, ...], device: str, dtype: str, sizes: Sizes) -> dict[str, float | str]:
    """Return the milliseconds of a call of each variant, or the error of one that fails.

    A process times a family once. device: cuda or cpu. dtype: fp32, fp16 or bf16.
    """
    with torch.inference_mode(), tuning.unlisted():
        ms = _interleaved(family, variants, device, dtype, sizes)
    if device == "cuda":
        torch.cuda.empty_cache()  # vLLM counts what is free
    return ms


def _interleaved(
    family: str, variants: tuple[str, ...], device: str, dtype: str, sizes: Sizes
) -> dict[str, float | str]:
    arguments = registry.bench(family).of_model(sizes, dtype=DTYPES[dtype], device=device)
    ms: dict[str, float | str] = dict.fromkeys(variants, math.inf)
    compiled = time.perf_counter()
    for done in range(ROUNDS):
        if done > 1 and time.perf_counter() - compiled > ENOUGH_S:
            break
        for name, least in ms.items():
            if isinstance(least, float):
                ms[name] = _least(least, partial(registry.get(family, name).fn, **arguments), device)
        if done == 0:
            compiled = time.perf_counter()
    return ms


def _least(least: float, call: Callable[[], Any], device: str) -> float | str:
    """Return the milliseconds of a call, at most `least`, or its error."""
    begun = time.perf_counter()
    try:
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return min(least, 1e3 * (time.perf_counter() - begun) / CALLS)
