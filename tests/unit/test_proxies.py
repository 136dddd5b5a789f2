"""Rows of experiments/proxies.py: a way is compared with the direct way of its protocol, where that answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOUND = {
    "direct": [1.0, 2.0],
    "ray serve, http": [8.0, 9.0],
    "ray serve, handle": [4.0, 5.0],
    "direct, grpc": [3.0, 4.0],
    "ray serve, grpc": [5.0, 7.0],
}


@pytest.mark.parametrize(
    "failed, added",
    [
        (None, {"direct": 0.0, "ray serve, http": 7.0, "direct, grpc": 0.0, "ray serve, grpc": 2.0}),
        ("direct", {"direct, grpc": 0.0, "ray serve, grpc": 2.0}),
        ("direct, grpc", {"direct": 0.0, "ray serve, http": 7.0}),
    ],
)
def test_what_a_way_adds_is_to_its_own_protocol(
    failed: str | None, added: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc")
    pytest.importorskip("uvicorn")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    import proxies

    found = {way: np.array(ms) for way, ms in FOUND.items() if way != failed}
    rows: list[dict[str, Any]] = [proxies.row_of(way, found) for way in found]
    assert [(row["way"], row["p50_ms"], row["p99_ms"]) for row in rows] == [(way, *FOUND[way]) for way in found]
    assert {row["way"]: row["added_ms"] for row in rows if "added_ms" in row} == added
