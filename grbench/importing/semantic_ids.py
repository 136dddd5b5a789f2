"""Semantic IDs of others, from .npy, .csv or JSON, with TIGER's collision code where items share a tuple."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grengines.semantic.ids import SemanticIds

_CODE = re.compile(r"(\d{1,10})|<\w*?_(\d{1,10})>", re.ASCII)  # a number, or a token such as <a_12>
_LARGEST = 2**31 - 1  # of int32


def read(path: Path, sizes: Sequence[int] = ()) -> tuple[SemanticIds, int]:
    """Read the codes of every item in the order of the items, and return the items that share a tuple as well.

    CSV: a first row without a digit is a heading. JSON: a list of lists, or an object by item number. sizes: codes of
    each level; by default the largest code and one more. If items share a tuple, a last code numbers them, as in TIGER.
    Raises ValueError, one line, for other data.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    readers = {".npy": _npy, ".csv": _csv, ".json": _json}
    if path.suffix not in readers:
        raise ValueError(f"{path}: allowed are {', '.join(readers)}")
    codes = readers[path.suffix](path)
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"{path}: {list(codes.shape)} codes; allowed is [items, levels]")
    if (wrong := np.argwhere((codes < 0) | (codes > _LARGEST))).size:
        item, level = wrong[0]
        raise _wrong(path, int(item), int(codes[item, level]))
    codes = codes.astype(np.int64)
    most = codes.max(axis=0) + 1
    if sizes and (len(sizes) != codes.shape[1] or (most > sizes).any()):
        raise ValueError(f"{path}: codes up to {(most - 1).tolist()} do not fit --sizes {list(sizes)}")
    levels = list(sizes) or most.tolist()
    place = _place_among_equal(codes)
    if place.any():
        codes, levels = np.column_stack([codes, place]), [*levels, int(place.max()) + 1]
    return SemanticIds(codes.astype(np.int32), tuple(int(n) for n in levels)), int((place > 0).sum())


def _place_among_equal(codes: np.ndarray) -> np.ndarray:
    """Return of each row how many equal rows come before it."""
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    first = np.r_[0, np.flatnonzero(np.diff(group[order])) + 1]
    starts = np.repeat(first, np.diff(np.r_[first, len(order)]))
    place = np.empty(len(codes), np.int64)
    place[order] = np.arange(len(order)) - starts
    return place


def _npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as f:
            found: np.ndarray = np.lib.format.read_array(f, allow_pickle=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a .npy file of numbers ({' '.join(str(e).split())})") from None
    if found.dtype.kind not in "iu":
        raise ValueError(f"{path}: {found.dtype} codes; allowed are integers")
    return found


def _csv(path: Path) -> np.ndarray:
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if row]
    except (OSError, ValueError, csv.Error) as e:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({e})") from None
    if rows and all(re.fullmatch(r"\D+", cell.strip()) for cell in rows[0]):
        rows = rows[1:]  # a heading
    return _array(path, rows)


def _json(path: Path) -> np.ndarray:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from None
    if isinstance(found, dict):
        if wrong := [key for key in found if not re.fullmatch(r"\d{1,10}", key, re.ASCII)]:
            raise ValueError(f"{path}: key {wrong[0]!r}; allowed are item numbers")
        by_number = {int(key): row for key, row in found.items()}
        first = min(by_number, default=0)
        if sorted(by_number) != list(range(first, first + len(found))) or first > 1:
            raise ValueError(f"{path}: item numbers must be 0, 1, 2 ... or 1, 2, 3 ..., without a gap")
        found = [by_number[n] for n in sorted(by_number)]
    if not isinstance(found, list):
        raise ValueError(f"{path}: a {type(found).__name__}; allowed is a list, or an object by item number")
    return _array(path, found)


def _array(path: Path, rows: Sequence[Any]) -> np.ndarray:
    """Return rows of codes as int64 [items, levels]. A code is a whole number, or a token such as <a_12>."""
    made: list[list[int]] = []
    for i, row in enumerate(rows):
        if not isinstance(row, list) or (made and len(row) != len(made[0])):
            raise ValueError(f"{path}: item {i} has {row!r}; allowed is a list of as many codes as the first item has")
        codes = []
        for code in row:
            known = None if isinstance(code, bool | float) else _CODE.fullmatch(str(code).strip())
            if known is None or int(known[1] or known[2]) > _LARGEST:
                raise _wrong(path, i, code)
            codes.append(int(known[1] or known[2]))
        made.append(codes)
    return np.array(made, dtype=np.int64)


def _wrong(path: Path, item: int, code: object) -> ValueError:
    return ValueError(
        f"{path}: item {item} has the code {code!r}; allowed are whole numbers from 0 to {_LARGEST}, tokens such as "
        "<a_12>, and in CSV a first row of headings without digits"
    )
