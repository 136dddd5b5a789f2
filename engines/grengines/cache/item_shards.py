"""The item table over several GPUs: each has an equal part of the rows, whole or its hot rows with the host behind.

The engine's GPU reads the rows of a batch from the others by loads (grkernels.parts). The others compute
nothing. With the host behind them, each fetches the missing rows of its part over a PCIe link of its own. The copies
run beside the computation of the batch before. Only their last step, from a buffer on the device into the table, waits
until that batch has read its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grengines.api import UnavailableError
from grengines.cache.items import HotRows, Int64Array, RowCounters
from grkernels.parts import Parts, let_read


class ItemShards:
    """Rows of a table on several devices, of which the first one reads them.

    host: as of HotRows. memory_bytes: of each device for hot rows, of which `place` copies the missing ones; 0: each
    device has its whole part, and the host table is not needed any more. dtype: of the devices' rows.

    Raises UnavailableError where the first device can't read the others, ValueError for too little memory.
    """

    def __init__(self, host: Tensor, devices: Sequence[torch.device], dtype: torch.dtype, memory_bytes: int) -> None:
        for other in devices[1:]:
            if why := let_read(devices[0], other):
                raise UnavailableError(f"engine.item_shards={len(devices)}: {why}")
        self._rows, self._length = len(host), -(-len(host) // len(devices))
        pieces = list(zip(host.split(self._length), devices, strict=False))  # fewer for a handful of rows
        self._hot = [HotRows.within(memory_bytes, p, device=d, dtype=dtype) for p, d in pieces if memory_bytes]
        held = [hot.table for hot in self._hot] or [piece.to(device=d, dtype=dtype) for piece, d in pieces]
        for part in held:
            if part.is_cuda:
                torch.cuda.synchronize(part.device)  # rows may still be rounded there, and no stream waits for another
        self.table = Parts(held, len(held[0]), devices[0])
        self.slots = sum(hot.slots for hot in self._hot)
        self._fetches = [torch.cuda.Stream(hot.table.device) for hot in self._hot if devices[0].type == "cuda"]
        self._pool = ThreadPoolExecutor(len(self._hot), "item-shard") if self._hot else None

    @property
    def counters(self) -> RowCounters:
        """Sums over all devices."""
        each = [asdict(hot.counters) for hot in self._hot]
        return RowCounters(**{name: sum(counts[name] for counts in each) for name in asdict(RowCounters())})

    def place(self, parts: Sequence[Int64Array]) -> None:
        """Replace the table rows in `parts`, int64 arrays, by rows of `table`, as HotRows.place does.

        Work that is queued on the first device's current stream from now on can gather them. The devices' lookups run
        side by side. After an error of one, `parts` are as they were.
        """
        if self._pool is None:
            return
        rows = np.concatenate(parts)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a table of {self._rows} rows")
        stream = torch.cuda.current_stream(self.table.device) if self._fetches else None
        before = stream.record_event() if stream else None
        placed, owner = np.empty_like(rows), rows // self._length

        def fetch(i: int) -> Any:
            mine = np.flatnonzero(owner == i)
            with torch.inference_mode(), self._stream(i):
                slots = self._hot[i].lookup(rows[mine] - i * self._length, before)
                placed[mine] = slots + i * self.table.length
                return self._fetches[i].record_event() if stream else None

        lookups = [self._pool.submit(fetch, i) for i in range(len(self._hot))]
        wait(lookups)
        for lookup in lookups:
            copied = lookup.result()
            if stream:
                stream.wait_event(copied)
        for part, its in zip(parts, np.split(placed, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
            part[:] = its

    def close(self) -> None:
        """End the threads of the lookups. The table stays."""
        if self._pool is not None:
            self._pool.shutdown()

    def _stream(self, i: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._fetches[i]) if self._fetches else nullcontext()

    def actual(self) -> dict[str, Any]:
        """Return the entries of a record: devices, and the bytes of rows that each one has."""
        held = self.table.parts
        return {"item_shards": len(held), "item_shard_bytes": [part.nbytes for part in held]}
