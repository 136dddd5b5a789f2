"""Time of the fuzz tests: `make fuzz` gives minutes to share, and `make test` only a few fixed examples."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Seconds of this test: an equal share of FUZZ_MINUTES, or 0."""
    here = [item for item in request.session.items if "tests/fuzz" in item.path.as_posix()]
    return 60 * float(os.environ.get("FUZZ_MINUTES", 0)) / len(here)
