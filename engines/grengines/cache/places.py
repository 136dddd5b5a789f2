"""Page table, lengths and slots of a batch: the places of its keys and values in the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from grengines.api import Int64Array
from grengines.cache.index import Plan
from grengines.cache.pool import PagePool
from grengines.runtime import staging
from grengines.runtime.native import native
from grengines.runtime.slots import Slot
from grengines.runtime.staging import Buffer


@dataclass
class PagedBatch:
    """Places of the keys and values of a batch, on its device: B sequences, L tokens to encode."""

    page_table: Tensor  # int32 [B, most pages], at least one column; 0 past a request's last page
    paged_lengths: Tensor  # int64 [B]: tokens in pages before the batch
    stored_lengths: Tensor  # int64 [B]: the same once its new tokens are written
    slots: Tensor  # int64 [L]: the slot of each token's keys and values, for PagePool.write; -1: not stored


@dataclass
class HostPlaces:
    """A PagedBatch on the host, in one int64 buffer."""

    buffer: Tensor  # int64 [total], pinned if it is to be copied to a GPU
    sizes: list[int]  # of paged_lengths, stored_lengths, slots and page_table
    pages: int  # columns of the page table

    @classmethod
    def of(
        cls,
        pool: PagePool,
        plans: Sequence[Plan],
        first_rows: Sequence[int],
        rows: int,
        *,
        sequences: int = 0,
        pages: int = 0,
        slot: Slot | None = None,
        pin: bool = False,
    ) -> HostPlaces:
        """Lay out the places of a batch of `rows` tokens.

        first_rows: for each plan, the row of the batch's keys that holds its first token that is not cached; its
        further ones follow. sequences: least rows of the page table. pages: its columns, which a CUDA graph has fixed;
        0: as many as are needed. slot: to take the buffer from; without it, `pin` asks for page-locked memory.
        """
        B, width = max(len(plans), sequences), pages or max([1, *(len(plan.pages) for plan in plans)])
        sizes = cls._sizes(B, rows, width)
        total = sum(sizes)
        buffer, packed = slot.take(total) if slot else Buffer.of(staging.empty(total, pin))
        if (functions := native().functions) is not None:
            functions.write_places(packed, list(plans), list(first_rows), rows, B, width, pool.page)
        else:
            _write_places(packed, sizes, width, pool, plans, first_rows)
        return cls(buffer, sizes, width)

    @classmethod
    def length(cls, sequences: int, rows: int, pages: int) -> int:
        """Return the length of the buffer for a batch of these sizes."""
        return sum(cls._sizes(sequences, rows, pages))

    @staticmethod
    def _sizes(sequences: int, rows: int, pages: int) -> list[int]:
        return [sequences, sequences, rows, -(-sequences * pages // 2)]  # two numbers of pages share a place

    def to(self, device: torch.device, out: Tensor | None = None) -> PagedBatch:
        """Copy to the device in one go, without waiting; into `out` (int64 [total]) if it is given."""
        buffer = self.buffer.to(device, non_blocking=True) if out is None else out.copy_(self.buffer, non_blocking=True)
        cached, stored, slots, table = buffer.split(self.sizes)
        B = len(cached)
        return PagedBatch(table.view(torch.int32)[: B * self.pages].view(B, self.pages), cached, stored, slots)


def _write_places(
    packed: Int64Array,
    sizes: Sequence[int],
    width: int,
    pool: PagePool,
    plans: Sequence[Plan],
    first_rows: Sequence[int],
) -> None:
    """Write the arrays of HostPlaces, as write_places of native.c."""
    ends = list(accumulate(sizes))
    packed.fill(0)
    cached, stored, slots, pairs = (packed[end - n : end] for n, end in zip(sizes, ends, strict=True))
    slots.fill(-1)
    table = pairs.view(np.int32)[: len(cached) * width].reshape(len(cached), width)
    for b, plan in enumerate(plans):
        table[b, : len(plan.pages)] = plan.pages
        cached[b], stored[b] = plan.cached, plan.stored
        if new := plan.stored - plan.cached:
            first = first_rows[b]
            slots[first : first + new] = pool.slots(plan.pages, plan.cached, plan.stored)
