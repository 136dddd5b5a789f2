"""The gate of one shape of a kernel: its outputs are those of the fp32 reference.

The error is ||out - reference|| / ||reference||, of each output on its own. Zeros, and the right outputs for other
inputs, are the wrong answers that must not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grengines.numerics import Comparison, IncorrectError, allowed_error, relative_error, require_contrast

Inputs = Mapping[str, Any]


@dataclass(kw_only=True)
class KernelGateResult(Comparison):
    """Figures of one output: of several, the nearest to its tolerance or furthest beyond it."""

    eager_error: float

    def metrics(self) -> dict[str, float]:
        return {"error": self.error, "error_allowed": self.tolerance, "error_eager": self.eager_error}


class KernelGate:
    """The reference's outputs for `inputs`. Any number of variants can be checked against them."""

    def __init__(
        self,
        reference: Callable[..., Any],
        eager: Callable[..., Any],
        inputs: Inputs,
        others: Inputs,
        dtype: torch.dtype,
        writes: tuple[str, ...] = (),
    ) -> None:
        """others: inputs of the same shape from another seed.

        writes: names of the inputs that the kernel writes, which are then its outputs; (): it returns its outputs.
        """
        self.inputs, self._writes = inputs, writes
        self._before = {name: inputs[name].clone() for name in writes}
        exact = {k: x.float() if isinstance(x, Tensor) and x.dtype == dtype else x for k, x in inputs.items()}
        self._reference = self._answer(reference, exact)
        del exact
        answer = self._answer(eager, inputs)
        self._like = [(x.shape, x.dtype) for x in answer]
        self._eager = self._errors(answer)
        self._wrong = {
            "zeros": self._errors([torch.zeros_like(x) for x in answer]),
            "stale outputs": self._errors(self._answer(eager, others)),
        }
        if writes:
            self._wrong["untouched outputs"] = self._errors(list(self._before.values()))

    def check(self, call: Callable[[], Any], max_error_ratio: float) -> KernelGateResult:
        """Compare the outputs of `call`. Raises IncorrectError."""
        allowed = [allowed_error(eager, max_error_ratio) for eager in self._eager]
        for i, tolerance in enumerate(allowed):
            wrong = {name: errors[i] for name, errors in self._wrong.items()}
            require_contrast(wrong, tolerance, advice="use other inputs")
        for name, x in self._before.items():
            self.inputs[name].copy_(x)
        self._poison()
        result = call()
        out = [self.inputs[name] for name in self._writes] or outputs(result)
        if [(x.shape, x.dtype) for x in out] != self._like:
            raise IncorrectError(f"outputs are {_described(out)}, eager PyTorch's are {_words(self._like)}")
        results = [
            KernelGateResult(passed=error <= tolerance, error=error, tolerance=tolerance, eager_error=eager)
            for error, tolerance, eager in zip(self._errors(out), allowed, self._eager, strict=True)
        ]
        worst = max(results, key=lambda result: result.error / result.tolerance)
        if not worst.passed:
            raise IncorrectError(
                f"differs from the fp32 reference by {worst.error:.2e} (relative), allowed is {worst.tolerance:.2e}",
                worst,
            )
        return worst

    def _answer(self, fn: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
        """Return the outputs for inputs that stay as they are."""
        given = {**inputs, **{name: inputs[name].clone() for name in self._writes}}
        result = fn(**given)
        return [given[name] for name in self._writes] or outputs(result)

    def _errors(self, out: list[Tensor]) -> list[float]:
        pairs = zip(out, self._reference, strict=True)
        return [relative_error(_numbers(x), _numbers(reference)) for x, reference in pairs]

    def _poison(self) -> None:
        """Fill and free memory of the outputs' sizes.

        The allocator hands it out again next. What a kernel leaves unwritten is then NaN (of integers the largest) and
        not, by luck, the right answer of the variant before it.
        """
        blocks = []
        for (shape, dtype), x in zip(self._like, self._reference, strict=True):
            poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
            blocks += [torch.full(shape, poison, dtype=dtype, device=x.device) for _ in range(2)]
        del blocks


def outputs(result: Any) -> list[Tensor]:
    """Return one tensor or several as a list."""
    return list(result) if isinstance(result, tuple | list) else [result]


def _numbers(x: Tensor) -> Tensor:
    """Return integers as floating-point numbers."""
    return x if x.is_floating_point() else x.double()


def _described(tensors: list[Tensor]) -> str:
    return _words([(x.shape, x.dtype) for x in tensors])


def _words(like: list[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in like)
