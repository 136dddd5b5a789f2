"""Pages of a KV cache as slots: slot s is place s % page of page s // page."""

from __future__ import annotations

from torch import Tensor


def slotted(pages: Tensor) -> Tensor:
    """Return pages [pages, page, H, d] as slots [pages * page, H, d], a view.

    Raises RuntimeError for pages whose slots don't lie equally far apart.
    """
    return pages.view(pages.shape[0] * pages.shape[1], *pages.shape[2:])
