"""Settings of property tests: a few fixed examples, or many random ones with HYPOTHESIS_PROFILE=long."""

from __future__ import annotations

import os

from hypothesis import settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
if PROFILE not in ("quick", "long"):
    raise ValueError(f"HYPOTHESIS_PROFILE={PROFILE}: allowed is quick or long")


def examples(count: int, at_least: int = 10) -> settings:
    """Return settings for `count` random examples; in the quick profile for a fourth of them, but `at_least`."""
    if PROFILE == "long":
        return settings(max_examples=count, deadline=None)
    return settings(max_examples=max(at_least, count // 4), deadline=None, derandomize=True)
