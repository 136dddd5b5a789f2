"""The gate of one shape of a kernel: its outputs are those of the fp32 reference.

The error is ||out - reference|| / ||reference||, of each output on its own. Zeros, and the right outputs for other
inputs, are the wrong answers that must not pass. The outputs that were timed are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grengines.numerics import (
    Comparison,
    IncorrectError,
    allowed_error,
    relative_error,
    require_contrast,
    require_plausible,
)
from grengines.runtime.device import DTYPES
from grkernels.fp8 import Scaled
from grkernels.rounding import rounded

PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
Inputs = Mapping[str, Any]


@dataclass(kw_only=True)
class KernelGateResult(Comparison):
    """Figures of one output: of several, the nearest to its tolerance or furthest beyond it."""

    rounding_error: float  # of the reference itself, rounded to the kernel's dtype

    def metrics(self) -> dict[str, float]:
        return {"error": self.error, "error_allowed": self.tolerance, "error_rounding": self.rounding_error}


class KernelGate:
    """The reference's outputs for `inputs`. Any number of variants can be checked against them."""

    def __init__(
        self,
        reference: Callable[..., Any],
        inputs: Inputs,
        others: Inputs,
        dtype: torch.dtype,
        writes: tuple[str, ...] = (),
        layers: int = 1,
        yardstick: Callable[..., Any] | None = None,
    ) -> None:
        """others: inputs of the same shape from another seed.

        writes: names of the inputs that the kernel writes, which are then its outputs; (): it returns its outputs.
        layers: of the operator, if it is a stack of them. yardstick: the reference with the rounding of operands in
        fp8, instead of its results rounded to the dtype. Raises IncorrectError if rounding alone costs too much.
        """
        self.inputs, self._writes, self.dtype, self._exact = inputs, writes, dtype, reference
        self._before = {name: inputs[name].clone() for name in writes}
        self._reference = self.expected(inputs)
        answer = self._answer(yardstick or rounded(reference, dtype), inputs)
        answer = [x.to(dtype) if x.is_floating_point() else x for x in answer]
        self._like = [(x.shape, x.dtype) for x in answer]
        self._rounding = self._errors(answer)
        eight_bits = yardstick is not None or inputs.get("to") == "fp8"
        require_plausible(max(self._rounding), "fp8" if eight_bits else PRECISIONS[dtype], layers)
        self._wrong = {
            "zeros": self._errors([torch.zeros_like(x) for x in answer]),
            "stale outputs": self._errors(self.expected(others)),
        }
        if writes:
            self._wrong["untouched outputs"] = self._errors(list(self._before.values()))

    def check(self, call: Callable[[], Any], max_error_ratio: float) -> KernelGateResult:
        """Compare the outputs of `call`. Raises IncorrectError."""
        allowed = [allowed_error(rounding, max_error_ratio) for rounding in self._rounding]
        for i, tolerance in enumerate(allowed):
            wrong = {name: errors[i] for name, errors in self._wrong.items()}
            require_contrast(wrong, tolerance, advice="use other inputs")
        for name, x in self._before.items():
            self.inputs[name].copy_(x)
        self._poison()
        result = call()
        out = [self.inputs[name] for name in self._writes] or outputs(result, self.dtype)
        if [(x.shape, x.dtype) for x in out] != self._like:
            raise IncorrectError(f"outputs are {_described(out)}, expected {_words(self._like)}")
        return self._judge("", self._errors(out), max_error_ratio)

    def check_timed(self, out: list[Tensor], expected: list[Tensor], max_error_ratio: float) -> KernelGateResult:
        """Compare outputs of a call that was timed, which may be of a larger shape. Raises IncorrectError.

        expected: the reference's for the same inputs.
        """
        return self._judge("the output that was timed ", _errors(out, expected), max_error_ratio)

    def expected(self, inputs: Inputs) -> list[Tensor]:
        """Return the fp32 reference's outputs."""
        exact = {k: x.float() if isinstance(x, Tensor) and x.dtype == self.dtype else x for k, x in inputs.items()}
        return self._answer(self._exact, exact)

    def _judge(self, subject: str, errors: list[float], max_error_ratio: float) -> KernelGateResult:
        results = []
        for error, rounding in zip(errors, self._rounding, strict=True):
            tolerance = allowed_error(rounding, max_error_ratio)
            results.append(
                KernelGateResult(passed=error <= tolerance, error=error, tolerance=tolerance, rounding_error=rounding)
            )
        worst = max(results, key=lambda result: result.error / result.tolerance)
        if not worst.passed:
            raise IncorrectError(
                f"{subject}differs from the fp32 reference by {worst.error:.2e} (relative), "
                f"allowed is {worst.tolerance:.2e}",
                worst,
            )
        return worst

    def _answer(self, fn: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
        """Return the outputs for inputs that stay as they are."""
        given = {**inputs, **{name: inputs[name].clone() for name in self._writes}}
        result = fn(**given)
        return [given[name] for name in self._writes] or outputs(result, self.dtype)

    def _errors(self, out: list[Tensor]) -> list[float]:
        return _errors(out, self._reference)

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


class TimedOutputs:
    """The outputs of calls on the inputs that the timing goes round. The reference answers each of these once."""

    def __init__(self, sets: Sequence[Inputs], writes: tuple[str, ...]) -> None:
        self._sets, self._writes = sets, writes
        self._before = [{name: inputs[name].clone() for name in writes} for inputs in sets]
        self._expected: dict[tuple[KernelGate, int], list[Tensor]] = {}

    def check(
        self, gate: KernelGate, turn: int, result: Any, call: Callable[[], Any], max_error_ratio: float
    ) -> KernelGateResult:
        """Compare what the last timed call returned. Raises IncorrectError.

        turn: the number of its inputs. Timed calls that write their inputs have written them many times over: `call`
        runs once more, on the inputs as they were.
        """
        inputs, before = self._sets[turn], self._before[turn]
        if self._writes:
            for name, x in before.items():
                inputs[name].copy_(x)
            call()
        if (gate, turn) not in self._expected:
            self._expected[gate, turn] = gate.expected({**inputs, **before})
        out = [inputs[name] for name in self._writes] or outputs(result, gate.dtype)
        return gate.check_timed(out, self._expected[gate, turn], max_error_ratio)


def outputs(result: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return one tensor or several as a list: of numbers in fp8 what they stand for, in `dtype`."""
    if isinstance(result, Scaled):
        return [result.numbers(dtype)]
    return list(result) if isinstance(result, tuple | list) else [result]


def _errors(out: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [relative_error(_numbers(x), _numbers(right)) for x, right in zip(out, expected, strict=True)]


def _numbers(x: Tensor) -> Tensor:
    """Return integers as floating-point numbers."""
    return x if x.is_floating_point() else x.double()


def _described(tensors: list[Tensor]) -> str:
    return _words([(x.shape, x.dtype) for x in tensors])


def _words(like: list[tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in like)
