"""Free pages of host memory, as runs of adjacent ones: few runs make few copies."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from grengines.cache.pool import PoolFullError

Extent = tuple[int, int]  # first page, number of pages


class Extents:
    """The free pages. `allocate` takes the smallest run that is long enough, or else the longest runs."""

    def __init__(self, pages: int) -> None:
        self.available = pages
        self.free_runs: list[Extent] = [(0, pages)] if pages else []  # by their first pages; no two touch

    def allocate(self, n: int) -> list[Extent]:
        """Take n pages in as few runs as there are. Raises PoolFullError, taking none, if fewer are free."""
        if n > self.available:
            raise PoolFullError(f"{n} pages of the host asked for; {self.available} are free")
        taken = []
        self.available -= n
        while n:
            begin, length = self._best_fit(n)
            self.free_runs.remove((begin, length))
            used = min(length, n)
            if used < length:
                insort(self.free_runs, (begin + used, length - used))
            taken.append((begin, used))
            n -= used
        return taken

    def free(self, extents: Sequence[Extent]) -> None:
        """Give runs back."""
        self.available += sum(length for _, length in extents)
        self.free_runs = joined(sorted([*self.free_runs, *extents]))

    def _best_fit(self, n: int) -> Extent:
        """Return the shortest run of n pages or more, or the longest run."""
        fitting = [run for run in self.free_runs if run[1] >= n]
        if fitting:
            return min(fitting, key=lambda run: run[1])
        return max(self.free_runs, key=lambda run: run[1])


def cut(extents: Sequence[Extent], first: int, stop: int) -> Iterator[Extent]:
    """Yield the runs of pages first to stop - 1 of a state that lies in these runs."""
    at = 0
    for begin, length in extents:
        low, high = max(first, at), min(stop, at + length)
        if low < high:
            yield begin + low - at, high - low
        at += length


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Return the runs, one where several follow each other."""
    found: list[Extent] = []
    for begin, length in extents:
        if found and sum(found[-1]) == begin:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((begin, length))
    return found
