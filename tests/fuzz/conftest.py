"""Time of the fuzz tests: `make fuzz` and `make test-all` have minutes to share, `make test` a few fixed examples."""

from __future__ import annotations

import os

import pytest
from helpers.properties import PROFILE

LONG_MINUTES = 5.0  # of `make test-all`


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Seconds of this test: an equal share of FUZZ_MINUTES, or of the long profile's; else 0."""
    minutes = float(os.environ.get("FUZZ_MINUTES", LONG_MINUTES if PROFILE == "long" else 0))
    here = [item for item in request.session.items if "tests/fuzz" in item.path.as_posix()]
    return 60 * minutes / len(here)
