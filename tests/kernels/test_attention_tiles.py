"""Tiles of the Hopper attention kernel against its mask: the kernel's own functions, run in plain Python."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

SM90 = Path(importlib.util.find_spec("grkernels").submodule_search_locations[0], "hstu_attention", "sm90")  # type: ignore


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> Any:
    """sm90/visible.py with Python's numbers instead of the device's."""
    stub = ModuleType("cutlass")
    subscript = type("Subscript", (), {"__class_getitem__": classmethod(lambda cls, _: Any)})
    stub.__dict__.update(Int32=int, Boolean=bool, cute=SimpleNamespace(jit=lambda f: f), Constexpr=subscript)
    stub.__dict__.update(const_expr=bool, range_constexpr=range, min=min, max=max)
    monkeypatch.setitem(sys.modules, "cutlass", stub)
    spec = importlib.util.spec_from_file_location("visible_in_python", SM90 / "visible.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("n", [64, 128])
def test_tiles_have_all_that_rows_see_once(visible: Any, n: int, aligned: bool) -> None:
    """Appends and whole histories: the mask's pairs are in the tiles, and tiles without a mask have no others."""
    rng = np.random.default_rng(n + aligned)
    for _ in range(300):
        tokens = int(rng.integers(1, 700))
        history = tokens - int(rng.choice([0, 0, 1, tokens, rng.integers(0, tokens + 1)]))
        queries = int(rng.integers(1, tokens + 1)) if rng.random() < 0.5 else tokens
        row = tokens - queries + int(rng.integers(0, -(-queries // 128))) * 128
        rows = min(128, tokens - row)
        limits = visible.Limits(int(rng.choice([0, 0, 5, 70])), int(rng.choice([0, 0, 1, 300])))
        ranges = visible.ranges_of(n, row, rows, history, limits, 0, aligned)
        columns = [ranges.column(n, i) for i in range(ranges.total())]
        assert len({*columns}) == len(columns) and not (aligned and any(column % n for column in columns))
        seen = [(visible.interval(i, history, limits), i) for i in range(row, row + rows)]
        needed = {j for (_, low, high), i in seen for j in (*range(low, high), i)}
        tiles = [range(column, column + n) for column in columns]
        assert all(sum(j in tile for tile in tiles) == 1 for j in needed)
        for tile in tiles[: ranges.unmasked()]:
            assert all((low <= tile[0] and tile[-1] < high) or {*tile} <= {i} for (_, low, high), i in seen)
