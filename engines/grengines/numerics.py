"""Comparison with the fp32 reference: the error, what is allowed, and proof that the comparison can fail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    Array = Tensor | npt.NDArray[np.floating[Any]]

# fp32 sums in another order differ by some tens of ulp (6e-8) over a dozen layers. A wrong mask or a
# stale row differs by 1e-3 and more.
SUMMATION_FLOOR = 2e-5

# The last bit of 1.0, by precision. A layer rounds several times: its error is a few of these.
UNIT = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-6, "fp8": 2.0**-3}
PLAUSIBLE = 6.0


@dataclass(kw_only=True)
class Comparison:
    """Figures of one comparison with the reference. Each gate adds its own."""

    passed: bool
    error: float
    tolerance: float  # the largest error that passes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class IncorrectError(RuntimeError):
    """An answer is wrong, or a comparison could not have failed. `result` has the figures if there are any."""

    def __init__(self, message: str, result: Comparison | None = None) -> None:
        super().__init__(message)
        self.result = result


def relative_error(out: Array, reference: Array) -> float:
    """Return ||out - reference|| / ||reference||.

    It is 0 for equal zeros and empty arrays, and infinite for NaN, for different shapes, and if only the reference
    is zero.
    """
    import torch  # takes seconds, and a server that imports this module listens before that

    a, b = torch.as_tensor(out), torch.as_tensor(reference)
    if a.shape != b.shape:
        return float("inf")
    # Half precision is compared in fp32. fp64 copies of a kernel's outputs might not fit beside them on a device.
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    norm = torch.linalg.vector_norm
    difference = float(norm(a.to(dtype) - b.to(dtype), dtype=torch.float64))
    size = float(norm(b, dtype=torch.float64))
    if difference == 0:
        return 0.0
    return difference / size if size and math.isfinite(difference / size) else float("inf")


def allowed_error(rounding_error: float, ratio: float, floor: float = SUMMATION_FLOOR) -> float:
    """Return `ratio` times what the reference's own maths loses in the same precision, at least `floor`."""
    return max(ratio * rounding_error, floor)


def require_plausible(rounding_error: float, precision: str, depth: int, result: Comparison | None = None) -> None:
    """Raise IncorrectError for a rounding error that rounding alone can't explain.

    Errors of `depth` layers are about independent, so that they grow with its square root. A yardstick beyond the bound
    would allow wrong answers.
    """
    bound = PLAUSIBLE * UNIT[precision] * math.sqrt(max(depth, 1))
    if not rounding_error <= bound:
        raise IncorrectError(
            f"rounding the fp32 reference to {precision} changes its answers by {rounding_error:.2g} (relative), "
            f"plausible for {depth} layers is at most {bound:.2g}; check the weights, or use a higher precision",
            result,
        )


def require_contrast(
    wrong: Mapping[str, float],
    tolerance: float,
    result: Comparison | None = None,
    *,
    subject: str = "the gate",
    advice: str = "use a higher precision or other requests",
) -> None:
    """Raise IncorrectError unless every wrong answer's error is more than twice the tolerance.

    wrong: the errors of answers that are known to be wrong, by what they are. A comparison that would pass one of them
    proves nothing.
    """
    for name, error in wrong.items():
        if not error > 2 * tolerance:
            raise IncorrectError(
                f"{subject} can't tell right from wrong here: the error of {name} is {error:.2g}, "
                f"allowed is {tolerance:.2g}; {advice}",
                result,
            )
