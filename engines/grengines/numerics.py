"""How an answer is compared with the reference."""

from __future__ import annotations

import numpy as np

from grengines.api import Float32Array

# fp32 sums in another order differ by some tens of ulp (6e-8) over a dozen layers; a wrong mask or a
# stale row differs by 1e-3 and more.
SUMMATION_FLOOR = 2e-5


def relative_error(out: Float32Array, reference: Float32Array) -> float:
    """||out - reference|| / ||reference||; NaN in either counts as infinite."""
    difference = np.linalg.norm(out.astype(np.float64) - reference.astype(np.float64))
    error = float(difference / np.linalg.norm(reference.astype(np.float64)))
    return error if np.isfinite(error) else float("inf")
