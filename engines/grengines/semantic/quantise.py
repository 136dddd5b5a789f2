"""Residual k-means with limited room: each level quantises the residual of the levels before it.

A node is a prefix of codes. With K codes per level, it has room for K ** (levels below it) items. If more items are
nearest to it, the nearest ones stay and the others move to the nearest sibling with room. On the last level a node has
room for one item, so tuples are unique. On the levels above, a crowded region can't get more items than tuples. The
next level takes residuals after the moves, so it also describes the displacement of a moved item.

The codebooks are those of residual quantisation by k-means (TIGER, Rajput et al., NeurIPS 2023, compares it with its
RQ-VAE). The limited room is grbench's. TIGER appends a code to colliding tuples, which grow with the collisions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from grengines.api import Float32Array, Int32Array, Int64Array

Progress = Callable[[int, int], None]

SAMPLE = 200_000  # rows for k-means
BATCH = 4096  # rows of one step of k-means
STEPS, EPOCHS = 100, 10  # least steps of k-means, and passes over the sample
NEAR = 16  # codes that an item without room tries before distances are computed again
DISTANCES = 1 << 20  # numbers in one block of distances, about the size of a core's cache
CROWDED = 1 << 24  # numbers in a table of room, unless a single node's children have more items


def residual_kmeans(
    vectors: Float32Array, sizes: Sequence[int], seed: int, progress: Progress | None = None
) -> tuple[Int32Array, list[Float32Array]]:
    """Return unique code tuples of vectors [items, d], and their codebooks.

    sizes: codes of each level; their product is at least the number of items.
    progress: called now and then with (assigned rows, all rows), counted over all levels.

    Codes are int32 [items, levels]. A codebook is float32 [at most the level's size, d], and a vector is about the sum
    of its codes' rows. The same input gives the same output on the same machine. Memory is a copy of the vectors, about
    90 bytes an item, and 100 MB. Raises ValueError for vectors that are not finite.
    """
    items = len(vectors)
    with np.errstate(all="ignore"):  # an overflow is refused below
        mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        residual = np.subtract(vectors, mean, dtype=np.float32)
    # Distances are computed as |x|^2 - 2xc + |c|^2, which cancels for vectors far from 0 and overflows for long ones.
    scale = np.maximum(residual.max(), -residual.min())
    if not np.isfinite(scale):
        raise ValueError("item vectors must be finite float32 numbers")
    if scale > 0:
        residual /= scale
    rng = np.random.default_rng(seed)
    rows = min(items, max(SAMPLE, 2 * max(sizes)))
    sample = np.sort(rng.choice(items, rows, replace=False, shuffle=False)) if rows < items else slice(None)

    codes = np.empty((items, len(sizes)), np.int32)
    books: list[Float32Array] = []
    prefix = np.zeros(items, np.int64)
    room = int(np.prod(sizes, dtype=object))
    # BLAS and OpenMP get one thread, because their threads wait for each other after every block, and longer if another
    # process has a core. Blocks run on threads of this module instead.
    with threadpool_limits(1):
        for level, size in enumerate(sizes):
            room //= size
            book = _centres(residual[sample], size, int(rng.integers(1 << 31)))
            done = level * items
            tick = None if progress is None else lambda n, done=done: progress(done + n, items * len(sizes))
            codes[:, level] = code = _assign(residual, book, prefix, room, tick)
            for part in _blocks(items, residual.shape[1]):
                residual[part] -= book[code[part]]
            prefix = prefix * size + code
            books.append(book * scale if scale > 0 else book)
    books[0] = books[0] + mean
    return codes, books


def _centres(rows: Float32Array, size: int, seed: int) -> Float32Array:
    """Return the centres [min(size, rows), d] of mini-batch k-means with a fixed number of steps.

    Otherwise sums over threads, whose order varies, would decide when to stop, and in scikit-learn's full k-means also
    the centres.
    """
    batch = min(BATCH, len(rows))
    kmeans = MiniBatchKMeans(
        min(size, len(rows)),
        batch_size=batch,
        max_iter=max(EPOCHS, STEPS * batch // len(rows)),
        n_init=1,
        init_size=min(len(rows), max(3 * size, BATCH)),
        max_no_improvement=None,
        compute_labels=False,
        random_state=seed,
    )
    centres: Float32Array = kmeans.fit(rows).cluster_centers_.astype(np.float32)
    return centres


def _assign(
    residual: Float32Array, book: Float32Array, prefix: Int64Array, room: int, tick: Callable[[int], None] | None
) -> Int32Array:
    """Return each item's nearest row of `book`, int32 [items], with at most `room` items for one prefix and code."""
    items, size = len(residual), len(book)
    code, gap = np.empty(items, np.int32), np.empty(items, np.float32)

    def nearest(part: slice) -> None:
        distances, squares = _distances(residual[part], book)
        best = distances.argmin(axis=1)
        code[part] = best
        gap[part] = np.take_along_axis(distances, best[:, None], axis=1)[:, 0] + squares

    for done in _in_threads(nearest, items, size):
        if tick is not None:
            tick(done)
    if room >= items:
        return code

    # Only prefixes with a crowded code need moves: all their items, sorted by prefix, code and distance.
    node = prefix * size + code
    order = np.lexsort((gap, node))
    rank = _ranks(node[order])
    begin, length = _runs(prefix[order])
    crowded = np.maximum.reduceat(rank, begin) >= room
    among = np.repeat(crowded, length)
    order, rank, length = order[among], rank[among], length[crowded]
    del node, among
    ends, first = np.cumsum(length), 0
    while first < len(ends):  # some whole prefixes at a time, which bounds memory
        start = int(ends[first] - length[first])
        stop = max(int(np.searchsorted(ends, start + CROWDED // size, "right")), first + 1)
        rows = slice(start, int(ends[stop - 1]))
        parent = np.repeat(np.arange(stop - first), length[first:stop])
        _settle(code, residual, book, order[rows], parent, rank[rows] >= room, room)
        first = stop
    return code


def _settle(
    code: Int32Array,
    residual: Float32Array,
    book: Float32Array,
    items: Int64Array,
    parent: Int64Array,
    homeless: npt.NDArray[np.bool_],
    room: int,
) -> None:
    """Write new codes for the items without room: the nearest codes with room under their parent.

    All try their nearest code, and the nearer items get it. The others try their next code, and so on. This ends,
    because an item that tried NEAR codes has NEAR fewer codes left, and a parent has room for all its items.
    """
    size = len(book)
    stay = ~homeless
    parents = int(parent[-1]) + 1
    used = np.bincount(parent[stay] * size + code[items[stay]], minlength=parents * size)
    free = (room - used).astype(np.int32)  # [parents * size]
    items, parent = items[homeless], parent[homeless]
    while items.size:
        near, gap = _nearest_open(residual, book, items, parent, free.reshape(-1, size))
        waiting = np.arange(len(items))
        for i in range(near.shape[1]):
            node = parent[waiting] * size + near[waiting, i]
            trying = np.flatnonzero(free[node] > 0)
            trying = trying[np.lexsort((gap[waiting[trying], i], node[trying]))]
            node = node[trying]
            wins = _ranks(node) < free[node]
            won = waiting[trying[wins]]
            code[items[won]] = near[won, i]
            np.subtract.at(free, node[wins], 1)
            waiting = np.delete(waiting, trying[wins])
            if not waiting.size:
                break
        items, parent = items[waiting], parent[waiting]


def _nearest_open(
    residual: Float32Array, book: Float32Array, items: Int64Array, parent: Int64Array, free: Int32Array
) -> tuple[Int32Array, Float32Array]:
    """Return codes and distances [items, at most NEAR], nearest first. Codes without room are infinitely far."""
    size = len(book)
    count = min(NEAR, size)
    near, gap = np.empty((len(items), count), np.int32), np.empty((len(items), count), np.float32)

    def search(part: slice) -> None:
        distances, squares = _distances(residual[items[part]], book)
        distances[free[parent[part]] <= 0] = np.inf
        best = np.argpartition(distances, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(distances, best, axis=1)
        by_distance = np.lexsort((best, values), axis=1)  # ties in the order of codes, however partition ordered them
        near[part] = np.take_along_axis(best, by_distance, axis=1)
        gap[part] = np.take_along_axis(values, by_distance, axis=1) + squares[:, None]

    for _ in _in_threads(search, len(items), size):
        pass
    return near, gap


def _distances(rows: Float32Array, book: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Return squared distances [rows, size] without the rows' squares, and these squares [rows].

    So a block takes one product and no second pass.
    """
    weights = np.concatenate([-2 * book.T, np.einsum("kd,kd->k", book, book)[None]])
    ones = np.ones((len(rows), 1), np.float32)
    return np.concatenate([rows, ones], axis=1) @ weights, np.einsum("nd,nd->n", rows, rows)


def _in_threads(work: Callable[[slice], None], rows: int, width: int) -> Iterator[int]:
    """Call `work` for blocks of rows, one thread for each core. Yields the number of finished rows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, 32)) as pool:
        parts = list(_blocks(rows, width))
        for part, _ in zip(parts, pool.map(work, parts), strict=True):
            yield part.stop


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(DISTANCES // width, 1)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def _runs(ordered: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the begin of each run of equal values, and its length."""
    changes = np.ones(len(ordered), np.bool_)
    changes[1:] = ordered[1:] != ordered[:-1]
    begin = np.flatnonzero(changes)
    return begin, np.diff(begin, append=len(ordered))


def _ranks(ordered: Int64Array) -> Int64Array:
    """Return the place of each element in its run of equal values."""
    begin, length = _runs(ordered)
    ranks: Int64Array = np.arange(len(ordered)) - np.repeat(begin, length)
    return ranks
