"""The correctness gate of one shape: no variant is timed before it agrees with the fp32 reference.

The error is ||out - reference|| / ||reference||, of each output where there are several. Allowed is a small
multiple of the error that plain PyTorch makes in the same dtype, as in grbench/gate/rank.py. The gate proves on
the very shape that it can fail: zeros, and the right answer to other inputs, must both lie outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grengines.numerics import SUMMATION_FLOOR

Inputs = Mapping[str, Any]


class Errors(NamedTuple):
    """Relative errors; of several outputs, those of the one nearest to its limit or furthest beyond it."""

    error: float
    allowed: float
    plain: float

    def metrics(self) -> dict[str, float]:
        return {"error": self.error, "error_allowed": self.allowed, "error_plain": self.plain}


class IncorrectError(Exception):
    """The output is wrong, or the gate could not tell; `errors` has the figures where there are any."""

    def __init__(self, message: str, errors: Errors | None = None) -> None:
        super().__init__(message)
        self.errors = errors


class Gate:
    """Holds the reference's answer to `inputs`, so that any number of variants can be checked against it."""

    def __init__(
        self,
        reference: Callable[..., Any],
        plain: Callable[..., Any],
        inputs: Inputs,
        others: Inputs,
        dtype: torch.dtype,
    ) -> None:
        """`others`: inputs of the same shape from another seed."""
        self.inputs = inputs
        exact = {k: x.float() if isinstance(x, Tensor) and x.dtype == dtype else x for k, x in inputs.items()}
        self._reference = outputs(reference(**exact))
        del exact
        answer = outputs(plain(**inputs))
        self._like = [(x.shape, x.dtype) for x in answer]
        self._plain = self._errors(answer)
        self._zeros = self._errors([torch.zeros_like(x) for x in answer])
        self._stale = self._errors(outputs(plain(**others)))

    def check(self, call: Callable[[], Any], max_error_ratio: float) -> Errors:
        """Compare what `call` returns. Raises IncorrectError."""
        allowed = [max(max_error_ratio * plain, SUMMATION_FLOOR) for plain in self._plain]
        for what, wrong in (("zeros", self._zeros), ("stale outputs", self._stale)):
            for error, limit in zip(wrong, allowed, strict=True):
                if not error > 2 * limit:
                    raise IncorrectError(
                        f"the gate can't fail here: {what} have error {error:.2e}, allowed {limit:.2e}"
                    )
        self._poison()
        out = outputs(call())
        if [(x.shape, x.dtype) for x in out] != self._like:
            raise IncorrectError(f"outputs are {_described(out)}, plain torch's are {_words(self._like)}")
        rows = [Errors(*row) for row in zip(self._errors(out), allowed, self._plain, strict=True)]
        worst = max(rows, key=lambda row: row.error / row.allowed)
        if not worst.error <= worst.allowed:
            raise IncorrectError(
                f"differs from the fp32 reference by {worst.error:.2e} (relative), allowed is {worst.allowed:.2e}",
                worst,
            )
        return worst

    def _errors(self, out: list[Tensor]) -> list[float]:
        return [relative_error(x, reference) for x, reference in zip(out, self._reference, strict=True)]

    def _poison(self) -> None:
        """Fill and free memory of the outputs' sizes: an allocator hands it to the next who asks, so that what a
        kernel leaves unwritten is NaN and not, by luck, the right answer of the variant before it."""
        blocks = [torch.full(shape, torch.nan, dtype=dtype, device=x.device)
                  for (shape, dtype), x in zip(self._like, self._reference, strict=True) for _ in range(2)]  # fmt: skip
        del blocks


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; infinite for NaN, other shapes or a reference of zeros."""
    if out.shape != reference.shape:
        return float("inf")
    norm = torch.linalg.vector_norm
    difference = norm(out.float() - reference.float(), dtype=torch.float64)
    error = float(difference / norm(reference.float(), dtype=torch.float64))
    return error if error == error else float("inf")


def outputs(result: Any) -> list[Tensor]:
    """One tensor or several, as a list."""
    return list(result) if isinstance(result, tuple | list) else [result]


def _described(tensors: list[Tensor]) -> str:
    return _words([(x.shape, x.dtype) for x in tensors])


def _words(like: list[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in like)
