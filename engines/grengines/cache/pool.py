"""Memory of the KV cache: pages of a fixed number of tokens in all layers, and one free list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class PoolFullError(RuntimeError):
    """Fewer pages are free than requested; the message shows the number."""


class PagePool:
    """Pages of the KV cache of every layer, and a free list. A page id means the same page in each layer.

    A state grows by taking more pages: cached data is never copied or moved. Counting is exact: `used + available ==
    pages` at any time. Not thread-safe; UserStates holds its lock around it.

    Pages start as zeros and are not cleared when freed. Kernels multiply the values of masked tokens by zero, so the
    contents of a page must be finite: they are, as long as only finite keys and values are written.

    dtype: of keys and values. Pages of int8 or float8_e4m3fn have a scale for each token and head (grkernels.pages).

    device "meta" makes a pool that counts pages and holds no data: for simulations. Raises ValueError for a size below
    1, torch.OutOfMemoryError if the device has no room.
    """

    def __init__(
        self,
        *,
        layers: int,
        pages: int,
        page: int,
        heads: int,
        qk_dim: int,
        v_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        sizes = {"layers": layers, "pages": pages, "page": page, "heads": heads, "qk_dim": qk_dim, "v_dim": v_dim}
        if min(sizes.values()) < 1:
            raise ValueError(f"every size of a page pool must be at least 1, got {sizes}")
        self.pages = pages
        self.page = page  # tokens per page
        self.page_bytes = page_bytes(  # of all layers together
            layers=layers, page=page, heads=heads, qk_dim=qk_dim, v_dim=v_dim, dtype=dtype
        )
        self.all_k = torch.zeros(layers, pages, page, heads, qk_dim, dtype=dtype, device=device)
        self.all_v = torch.zeros(layers, pages, page, heads, v_dim, dtype=dtype, device=device)
        self.all_scales: list[Tensor] = []  # fp32 [layers, pages, page, heads] of keys and of values, of 8-bit pages
        if dtype.itemsize == 1:
            self.all_scales = [torch.zeros(layers, pages, page, heads, device=device) for _ in range(2)]
        self.k, self.v = list(self.all_k.unbind()), list(self.all_v.unbind())  # of each layer
        self.high_water = 0  # most pages in use at once so far
        self._free = list(range(pages))[::-1]  # a stack: the page freed last is taken first
        self._taken = bytearray(pages)
        self._slots = np.arange(pages * page).reshape(pages, page)  # of each page

    @classmethod
    def within(cls, budget_bytes: int, *, device: torch.device | str, **sizes: Any) -> PagePool:
        """Make a pool of as many pages as fit in `budget_bytes`. sizes: arguments of `page_bytes`.

        Raises ValueError if not one page fits.
        """
        one = page_bytes(**sizes)
        if budget_bytes < one:
            raise ValueError(f"a page of {sizes['page']} tokens takes {one} bytes; the pool may have {budget_bytes}")
        return cls(pages=budget_bytes // one, device=device, **sizes)

    def layer(self, i: int) -> dict[str, Tensor]:
        """Return the pages of layer i as arguments of paged_write and hstu_attention."""
        pages = {"k_pages": self.k[i], "v_pages": self.v[i]}
        return pages | {f"{x}_scales": scales[i] for x, scales in zip("kv", self.all_scales, strict=False)}

    @property
    def available(self) -> int:
        """Return the number of free pages."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Return the number of pages in use."""
        return self.pages - len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that `tokens` tokens of one user take."""
        return -(-tokens // self.page)

    def slots(self, pages: Sequence[int], begin: int, end: int) -> npt.NDArray[np.int64]:
        """Return the slots of tokens begin to end - 1 of the user with these pages: page id * page + place in it."""
        first = begin // self.page
        places = self._slots.take(np.array(pages[first : self.pages_for(end)], np.int64), axis=0).reshape(-1)
        return places[begin - first * self.page : end - first * self.page]

    def allocate(self, n: int) -> list[int]:
        """Take n pages. Raises PoolFullError, taking none, if fewer are free, ValueError for n < 0."""
        if n < 0:
            raise ValueError(f"{n} pages asked for")
        if n > len(self._free):
            raise PoolFullError(f"{n} pages asked for; {len(self._free)} of {self.pages} are free")
        ids = [self._free.pop() for _ in range(n)]
        for i in ids:
            self._taken[i] = 1
        self.high_water = max(self.high_water, self.used)
        return ids

    def free(self, ids: Sequence[int]) -> None:
        """Give pages back. Raises ValueError, freeing none, for a page that isn't taken or is named twice."""
        wrong = [i for i in ids if not (0 <= i < self.pages and self._taken[i])]
        if wrong or len(set(ids)) < len(ids):
            raise ValueError(f"pages {list(ids)} can't be freed: not taken are {wrong}, the others must differ")
        for i in ids:
            self._taken[i] = 0
        self._free.extend(reversed(ids))


def page_bytes(*, layers: int, page: int, heads: int, qk_dim: int, v_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of one page of `page` tokens: keys and values of every layer, and the scales of 8-bit ones."""
    scales = 2 * torch.float32.itemsize if dtype.itemsize == 1 else 0
    return layers * page * heads * ((qk_dim + v_dim) * dtype.itemsize + scales)
