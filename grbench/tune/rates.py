"""The ladder of rates: each step is 3% above the one below, so that two neighbours bracket a rate to 3%.

All rates of all searches are steps, so that a search finds the cells of an earlier one.
"""

from __future__ import annotations

import math

RATIO = 1.03


def rate_of(step: int) -> float:
    """Return the rate of a step in requests a second, with four digits."""
    return float(f"{RATIO**step:.4g}")


def step_below(rate: float) -> int:
    """Return the highest step that is not above a rate."""
    return math.floor(math.log(rate) / math.log(RATIO) + 1e-6)


def step_of(rate: float) -> int:
    """Return the step of a rate of the ladder, whose four digits may be below it; of another rate, the one below."""
    return step_below(rate * 1.001)


def steps(ratio: float) -> int:
    """Return the number of steps that a ratio of rates is, at least one."""
    return max(round(math.log(ratio) / math.log(RATIO)), 1)
