"""The append form of the model, run by a package over pages of the KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grengines.aoti.package import Inputs, Package
from grengines.cache.host import Onload
from grengines.cache.places import PagedBatch
from grengines.cache.pool import PagePool
from grengines.models.hstu.config import HSTUConfig
from grengines.runtime.batch import Encoding, JaggedBatch


class PackagedRanker:
    """A package as grengines.hstu.cached.PagedModel. paged_write: the variant that stores new keys and values."""

    def __init__(
        self,
        package: Package,
        config: HSTUConfig,
        encoding: Encoding,
        device: torch.device,
        dtype: torch.dtype,
        paged_write: Callable[..., None],
    ) -> None:
        self.config, self.encoding, self.device, self.dtype = config, encoding, device, dtype
        self._run, self._inputs, self._paged_write = package.run, Inputs(package.facts, device), paged_write

    def paged(
        self,
        batch: JaggedBatch,
        pool: PagePool,
        places: PagedBatch,
        *,
        write: bool = True,
        read: bool = True,
        onload: Onload | None = None,
    ) -> Tensor:
        """Append as HSTURanker.paged. The package takes all layers at once: after the copies, and before the writes.

        read: the package always has the pages as inputs, and reads as many tokens as `places` names.
        """
        if onload is not None:
            onload.all_layers()
        logits, *made = self._run(self._inputs.of(batch, places, pool))
        if write:
            layers = len(pool.k)
            for i, (k, v) in enumerate(zip(made[:layers], made[layers:], strict=True)):
                self._paged_write(k, v, places.slots, **pool.layer(i))
        return logits
