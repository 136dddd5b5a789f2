"""Memory of copies between the device and the host, which is made once: rows taken in turn, and numbers of pages."""

from __future__ import annotations

from collections import deque

import torch

from grengines.api import Int64Array
from grengines.runtime import staging
from grengines.runtime.staging import Buffer
from grengines.runtime.timing import Mark


class Ring:
    """Rows of memory that are taken in turn. Those taken first are free first: once their mark is reached.

    `take` rows, queue the work that uses them, then `hold` them until the mark behind it.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: deque[tuple[int, int, Mark]] = deque()  # first row, row behind the last, end of their use

    def room(self, n: int) -> int | None:
        """Return the first of n adjacent free rows, or None if there are none at this moment."""
        while self._held and self._held[0][2].reached():
            self._held.popleft()
        if not self._held:
            return 0 if n <= self.rows else None
        first, stop = self._held[0][0], self._held[-1][1]
        if stop <= first:  # the rows held go on at row 0
            return stop if n <= first - stop else None
        if n <= self.rows - stop:
            return stop
        return 0 if n <= first else None

    def take(self, n: int) -> int:
        """Return the first of n adjacent free rows, and wait on the host for them. Raises IndexError if n > rows."""
        while (begin := self.room(n)) is None:
            self._held.popleft()[2].synchronize()
        return begin

    def hold(self, begin: int, n: int, mark: Mark) -> None:
        """Hold n rows, the last that were taken, until a mark is reached."""
        self._held.append((begin, begin + n, mark))


class PageIds(Ring):
    """Rows for numbers of pages, int64: page-locked memory on the host, and memory of the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(rows)
        self._host = Buffer.of(staging.empty(rows, device.type == "cuda"))
        self._device = torch.empty(rows, dtype=torch.int64, device=device)

    def put(self, begin: int, pages: Int64Array) -> torch.Tensor:
        """Queue the copy of page numbers into rows from `begin` on, and return these rows of the device."""
        rows = slice(begin, begin + len(pages))
        self._host.array[rows] = pages
        return self._device[rows].copy_(self._host.tensor[rows], non_blocking=True)
