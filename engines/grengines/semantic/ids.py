"""Semantic IDs of a catalogue: tokens of items, items of tokens, and their file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grengines.api import Float32Array, Int32Array, Int64Array
from grengines.models import header
from grengines.runtime import atomic_io

_FORMAT = "grbench-semantic-ids-1"
_DTYPE = "I32"  # safetensors' name of int32
SPARE = 8  # least tuples for each item in the proposal of `propose_codes`
MAX_TUPLES = 1 << 62  # a tuple is also one int64 number


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The tuple of codes of every item. No two items have the same tuple.

    codes: int32 [items, levels], each from 0 to its level's size - 1. sizes: codes of each level.

    In a model's vocabulary every level has its own tokens: token = offset of the level + code.
    Raises ValueError for codes of another form, outside their level, or repeated. An item takes 4 bytes per level, and
    16 bytes for the search by tokens.
    """

    codes: Int32Array
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        codes, sizes = self.codes, self.sizes
        if codes.ndim != 2 or codes.dtype != np.int32 or not codes.size:
            raise ValueError(f"codes must be int32 [items, levels], got {codes.dtype} {list(codes.shape)}")
        if len(sizes) != codes.shape[1] or min(sizes) < 1 or math.prod(sizes) > MAX_TUPLES:
            raise ValueError(f"{codes.shape[1]} levels of codes need as many sizes, of 2**62 tuples, got {list(sizes)}")
        low, high = codes.min(axis=0), codes.max(axis=0)
        for level, size in enumerate(sizes):
            if low[level] < 0 or high[level] >= size:
                raise ValueError(f"level {level} has codes 0 to {size - 1}, got {low[level]} to {high[level]}")
        same = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if same.size:
            one, other = self.order[same[0]], self.order[same[0] + 1]
            raise ValueError(f"items {one} and {other} have the same codes {codes[one].tolist()}")

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @property
    def vocabulary(self) -> int:
        """Number of tokens of all levels."""
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the codes, by which IDs are compared."""
        return _digest(np.ascontiguousarray(self.codes))

    @cached_property
    def offsets(self) -> Int64Array:
        """First token of each level, int64 [levels]."""
        return np.cumsum([0, *self.sizes[:-1]], dtype=np.int64)

    def tokens(self, items: npt.ArrayLike) -> Int64Array:
        """Return the tokens int64 [n, levels] of item ids [n]. Raises IndexError for an id outside the catalogue."""
        ids = np.asarray(items, np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.codes):
            raise IndexError(f"items must be 0 to {len(self.codes) - 1}, got {ids.min()} to {ids.max()}")
        return self.codes.take(ids, axis=0) + self.offsets  # a third of the time of an index

    def items(self, tokens: npt.ArrayLike) -> Int64Array:
        """Return the items int64 [n] of tokens [n, levels], -1 for no item. Raises ValueError for another shape."""
        codes = np.asarray(tokens, np.int64)
        if codes.ndim != 2 or codes.shape[1] != self.levels:
            raise ValueError(f"tokens must be [n, {self.levels}], got {list(codes.shape)}")
        codes = codes - self.offsets
        known: npt.NDArray[np.bool_] = np.all((codes >= 0) & (codes < np.array(self.sizes)), axis=1)
        keys = _keys(np.where(known[:, None], codes, 0), self.sizes)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self.codes) - 1)
        return np.where(known & (self._keys[place] == keys), self.order[place], -1)

    @cached_property
    def order(self) -> Int64Array:
        """Item ids in the order of their tuples, int64 [items]."""
        return np.argsort(_keys(self.codes, self.sizes), kind="stable")

    @cached_property
    def _keys(self) -> Int64Array:
        """Tuples as numbers, ascending, int64 [items]."""
        return _keys(self.codes[self.order], self.sizes)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file of `codes`, with shape and sizes as metadata. Raises OSError."""
        schema = {"items": len(self.codes), "levels": self.levels, "sizes": self.sizes, "dtype": _DTYPE}
        codes = np.ascontiguousarray(self.codes)
        metadata = {"format": _FORMAT, "schema": json.dumps(schema), "sha256": _digest(codes)}
        try:
            with atomic_io.replacing(Path(path)) as made:
                save_file({"codes": codes}, str(made), metadata=metadata)
        except SafetensorError as e:
            raise OSError(f"{path}: can't write semantic ids: {e}") from None
        except OSError as e:
            raise OSError(e.errno, f"can't write semantic ids: {e.strerror}", str(path)) from None

    @classmethod
    def load(cls, path: str | Path, items: int | None = None) -> SemanticIds:
        """Read a file of `save`. items: number of items of the catalogue, if it is known.

        Raises ValueError, one line with the file's name, for a file that is missing or not safetensors, that has other
        content, that contradicts itself, or that was written for another number of items.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; give a file of semantic ids")
        try:
            with safe_open(str(path), framework="np") as f:
                metadata = f.metadata() or {}
                if metadata.get("format") != _FORMAT or list(f.keys()) != ["codes"]:
                    raise ValueError(
                        f"not a file of semantic ids ({_FORMAT}); it has {', '.join(f.keys()) or 'nothing'}"
                    )
                tensor = f.get_slice("codes")
                sizes = _sizes(metadata, [*tensor.get_shape(), tensor.get_dtype()])
                codes = f.get_tensor("codes")
            if metadata.get("sha256", digest := _digest(codes)) != digest:
                raise ValueError("the ids are not those that were written; build the ids again")
            if items is not None and len(codes) != items:
                raise ValueError(f"written for {len(codes)} items, the catalogue has {items}; build the ids again")
            return cls(codes, sizes)
        except (SafetensorError, OSError) as e:
            raise header.unreadable(path, e, header.MAKE_IDS, "build the ids again") from None
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


def _digest(codes: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(codes.tobytes()).hexdigest()


def build(
    vectors: Float32Array,
    levels: int = 3,
    codes: int = 256,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SemanticIds:
    """Build semantic IDs by residual k-means over item vectors, float32 [items, d]. Near items share first codes.

    Where vectors would have the same tuple, the nearest keep it. The others take the nearest free tuples, on the last
    level first (quantise.py). `propose_codes` gives a suitable number of codes.

    progress: called now and then with (assigned rows, all rows), counted over all levels.
    Raises ValueError for vectors of another form or not finite, and if codes ** levels is less than the items.
    Source: Rajput et al., "Recommender Systems with Generative Retrieval" (TIGER), NeurIPS 2023.
    """
    from grengines.semantic.quantise import residual_kmeans  # imports scikit-learn, which takes seconds

    if vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.size:
        raise ValueError(f"vectors must be float32 [items, d], got {vectors.dtype} {list(vectors.shape)}")
    if problem := wrong_codes(levels, codes, len(vectors)):
        raise ValueError(problem)
    sizes = (codes,) * levels
    return SemanticIds(residual_kmeans(vectors, sizes, seed, progress)[0], sizes)


def wrong_codes(levels: int, codes: int, items: int) -> str | None:
    """Return None, or why this number of levels and codes can't name the items."""
    if levels < 1 or codes < 1 or codes**levels > MAX_TUPLES:
        return f"levels and codes are at least 1, with codes ** levels up to 2**62; got {levels} and {codes}"
    if codes**levels >= items:
        return None
    enough = f"at least {_root(items, levels)} codes"
    if codes > 1:
        deeper = next(n for n in range(levels, 64) if codes**n >= items)
        enough += f", or {deeper} levels of {codes} codes"
    return f"{levels} levels of {codes} codes are {codes**levels} tuples for {items} items; use {enough}"


def one_level(items: int) -> SemanticIds:
    """Return IDs of one code each, which is the item itself: a model's tokens are then item vectors."""
    return SemanticIds(np.arange(items, dtype=np.int32)[:, None], (items,))


def prompt_of(tokens: Int64Array, sizes: Sequence[int], most: int) -> Int64Array:
    """Return the part of a history's tokens int64 [n] that a model reads: the last whole items within `most` tokens.

    For an empty history it is the token after all levels, which begins a prompt.
    """
    levels = len(sizes)
    kept = tokens[max(len(tokens) - most // levels * levels, 0) :]
    return kept if len(kept) else np.array([sum(sizes)])


def propose_codes(items: int, levels: int = 3) -> int:
    """Return the codes of each level for a catalogue: the power of two with at least `SPARE` tuples for each item.

    Items are not spread evenly over tuples: with few spare ones many would get a distant tuple. Raises ValueError for
    counts below 1.
    """
    if items < 1 or levels < 1:
        raise ValueError(f"items and levels are at least 1, got {items} and {levels}")
    return 1 << (_root(SPARE * items, levels) - 1).bit_length()


def _root(count: int, levels: int) -> int:
    """Return the smallest number whose power `levels` is at least `count`."""
    root: int = max(round(count ** (1 / levels)) - 1, 1)
    while root**levels < count:
        root += 1
    return root


def _keys(codes: npt.NDArray[np.integer], sizes: tuple[int, ...]) -> Int64Array:
    """Return tuples [n, levels] as numbers int64 [n], in the same order."""
    keys = np.zeros(len(codes), np.int64)
    for level, size in enumerate(sizes):
        keys *= size
        keys += codes[:, level]
    return keys


def _sizes(metadata: dict[str, str], found: list[object]) -> tuple[int, ...]:
    """Return the sizes in a file's metadata. Raises ValueError if they contradict its tensor."""
    try:
        schema = json.loads(metadata.get("schema", ""))
        sizes = tuple(schema["sizes"])
        declared = [schema["items"], schema["levels"], schema["dtype"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError("its metadata has no schema of semantic ids; build the ids again") from None
    if not all(type(size) is int for size in sizes):
        raise ValueError(f"sizes must be whole numbers, got {list(sizes)}; build the ids again")
    if declared != found or found[-1] != _DTYPE or len(sizes) != schema["levels"]:
        raise ValueError(
            f"its schema says {declared} with sizes {list(sizes)}, its tensor is {found}; build the ids again"
        )
    return sizes
