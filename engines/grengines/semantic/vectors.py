"""Vectors of items without features, from the users of each item, or synthetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]

from grengines.api import Float32Array, Int64Array

UNTOUCHED = 0.1  # length of the vectors of items without users; the others' is 1
_ROWS = 1 << 18  # drawn at once


def from_interactions(
    users: Int64Array,
    items: Int64Array,
    num_items: int,
    dim: int = 16,
    weights: npt.NDArray[np.floating] | None = None,
    seed: int = 0,
) -> Float32Array:
    """Return vectors float32 [num_items, dim] by truncated SVD of the item-user matrix of summed weights (default 1).

    users, items: int64 [n], pair by pair. Vectors have length 1, so that codes describe an item's users and not its
    popularity. Items without users get short random vectors.

    Raises ValueError for arrays of other forms, ids out of range, weights that are not finite, or dim below 1.
    """
    if weights is None:
        weights = np.ones(len(users), np.float32)
    if users.ndim != 1 or not users.shape == items.shape == weights.shape:
        raise ValueError(
            f"users, items and weights must be equally long, got {[x.shape for x in (users, items, weights)]}"
        )
    if num_items < 1 or dim < 1:
        raise ValueError(f"num_items and dim are at least 1, got {num_items} and {dim}")
    if len(users) and (users.min() < 0 or items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"users are 0 or more and items 0 to {num_items - 1}; some pairs are not")
    if not np.isfinite(weights).all():
        raise ValueError("weights must be finite")
    vectors = _untouched(num_items, dim, seed)
    touched, rows = np.unique(items, return_inverse=True)
    people, columns = np.unique(users, return_inverse=True)
    rank = min(dim, len(touched), len(people))
    if rank:
        shape = (len(touched), max(len(people), 2))  # scikit-learn refuses a single column
        matrix = csr_matrix((weights.astype(np.float32), (rows, columns)), shape=shape)
        with np.errstate(all="ignore"):  # scikit-learn divides by a variance of 0 for figures that are not used
            found = TruncatedSVD(rank, random_state=seed).fit_transform(matrix).astype(np.float32)
        length = np.linalg.norm(found, axis=1, keepdims=True)
        seen = length[:, 0] > 1e-5 * length.max()  # below that, the direction is rounding error
        vectors[touched[seen], :rank] = found[seen] / length[seen]
        vectors[touched[seen], rank:] = 0
    return vectors


def clustered(items: int, dim: int = 16, clusters: int = 1024, spread: float = 0.5, seed: int = 0) -> Float32Array:
    """Return vectors float32 [items, dim] of a synthetic catalogue: normal clusters around normal centres.

    Raises ValueError for counts below 1.
    """
    if min(items, dim, clusters) < 1:
        raise ValueError(f"items, dim and clusters are at least 1, got {items}, {dim} and {clusters}")
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim), np.float32)
    vectors = np.empty((items, dim), np.float32)
    for i in range(0, items, _ROWS):  # in parts, without a second array of that size
        part = vectors[i : i + _ROWS]
        rng.standard_normal(out=part, dtype=np.float32)
        part *= spread
        part += centres[rng.integers(clusters, size=len(part))]
    return vectors


def _untouched(items: int, dim: int, seed: int) -> Float32Array:
    vectors = np.random.default_rng(seed).standard_normal((items, dim), np.float32)
    vectors *= UNTOUCHED / np.sqrt(dim)
    return vectors
