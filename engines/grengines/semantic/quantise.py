"""Residual k-means with room for everyone: each level quantises what the levels before it left over.

A node is a prefix of codes. With K codes a level it has room for K ** (levels below it) items, and no more items than
that ever go there: those nearest to its centre stay, the others go to the nearest sibling with room. On the last level
a node has room for one, which is what makes the tuples unique; above it, this is what keeps a crowded region from
having more items than tuples. A level knows where its items ended up before the next one takes the residual, so an
item that had to move is described again from where it is.

The codebooks are those of residual quantisation by k-means (TIGER, Rajput et al., NeurIPS 2023, compares it with its
RQ-VAE); the room is ours. TIGER appends a code to tuples that collide instead: its tuples grow with the collisions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from sklearn.cluster import MiniBatchKMeans  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

SAMPLE = 200_000  # rows that k-means sees
BATCH = 4096  # rows of one of its steps
STEPS, EPOCHS = 100, 10  # it takes at least so many steps, and passes over the sample
NEAR = 16  # codes that an item without room tries before distances are taken again
DISTANCES = 1 << 20  # numbers in one block of distances: about what a core's cache holds
CROWDED = 1 << 24  # numbers in a table of room, unless a single node's children have more items


def residual_kmeans(
    vectors: Float32Array, sizes: Sequence[int], seed: int, progress: Progress | None = None
) -> tuple[Int32Array, list[Float32Array]]:
    """Unique code tuples of vectors [items, d], and the codebooks that they point into.

    sizes: codes of each level; their product is at least the number of items.
    progress: called now and then with (rows assigned, rows in all), counted over all levels.

    Returns codes int32 [items, levels] and a float32 [at most the level's size, d] for each level: a vector is about
    the sum of its codes' rows. The same input gives the same output on the same machine. Beside the vectors this takes
    one copy of them, about 90 bytes an item and 100 MB. Raises ValueError for vectors that are not finite.
    """
    items = len(vectors)
    with np.errstate(all="ignore"):  # what overflows here is refused below
        mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        residual = np.subtract(vectors, mean, dtype=np.float32)
    # Distances are taken as |x|^2 - 2xc + |c|^2, which cancels for vectors far from 0, and overflows for long ones.
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
    # BLAS and OpenMP get one thread: theirs wait for each other after every block, and for long where other work has a
    # core. Blocks go to threads of our own instead.
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
    """[min(size, rows), d]. Mini-batches of a fixed number of steps: sums over threads, whose order varies, would
    otherwise decide when to stop (and, in scikit-learn's full k-means, where a centre is)."""
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
    """int32 [items]: the nearest row of `book` for each item, with at most `room` items for one prefix and code."""
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

    # Only prefixes with a crowded code need a second look: all their items, sorted by prefix, code and distance.
    node = prefix * size + code
    order = np.lexsort((gap, node))
    rank = _ranks(node[order])
    begin, length = _runs(prefix[order])
    crowded = np.maximum.reduceat(rank, begin) >= room
    among = np.repeat(crowded, length)
    order, rank, length = order[among], rank[among], length[crowded]
    del node, among
    ends, first = np.cumsum(length), 0
    while first < len(ends):  # whole prefixes at a time, so that memory is bounded
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
    """Write new codes for the homeless ones of these items: the nearest that have room under their parent.

    All of them try their nearest code, then those who lost it their next one, and so on: whoever is nearer gets it.
    An item that tried NEAR codes has NEAR fewer open ones left, and a parent has room for all its items, so it ends.
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
    """Codes and distances [items, at most NEAR], the nearest first; those without room at an infinite distance."""
    size = len(book)
    count = min(NEAR, size)
    near, gap = np.empty((len(items), count), np.int32), np.empty((len(items), count), np.float32)

    def search(part: slice) -> None:
        distances, squares = _distances(residual[items[part]], book)
        distances[free[parent[part]] <= 0] = np.inf
        best = np.argpartition(distances, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(distances, best, axis=1)
        by_distance = np.lexsort((best, values), axis=1)  # ties in the order of codes, however they were partitioned
        near[part] = np.take_along_axis(best, by_distance, axis=1)
        gap[part] = np.take_along_axis(values, by_distance, axis=1) + squares[:, None]

    for _ in _in_threads(search, len(items), size):
        pass
    return near, gap


def _distances(rows: Float32Array, book: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Squared distances [rows, size] but for the rows' own squares, and those [rows]: one product, and no second pass
    over a block of that size."""
    weights = np.concatenate([-2 * book.T, np.einsum("kd,kd->k", book, book)[None]])
    ones = np.ones((len(rows), 1), np.float32)
    return np.concatenate([rows, ones], axis=1) @ weights, np.einsum("nd,nd->n", rows, rows)


def _in_threads(work: Callable[[slice], None], rows: int, width: int) -> Iterator[int]:
    """Call it for blocks of rows, one thread a core; yields how many rows are done."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, 32)) as pool:
        parts = list(_blocks(rows, width))
        for part, _ in zip(parts, pool.map(work, parts), strict=True):
            yield part.stop


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(DISTANCES // width, 1)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def _runs(ordered: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Where each run of equal values begins, and its length."""
    changes = np.ones(len(ordered), np.bool_)
    changes[1:] = ordered[1:] != ordered[:-1]
    begin = np.flatnonzero(changes)
    return begin, np.diff(begin, append=len(ordered))


def _ranks(ordered: Int64Array) -> Int64Array:
    """The place of each element in its run of equal values."""
    begin, length = _runs(ordered)
    ranks: Int64Array = np.arange(len(ordered)) - np.repeat(begin, length)
    return ranks
