"""Keys and values into their pages in eager PyTorch: one gather and one indexed copy per tensor."""

from __future__ import annotations

from torch import Tensor

from grkernels import capabilities
from grkernels.paged_write.reference import paged_write as reference
from grkernels.pages import slotted
from grkernels.variant import KernelVariant


def paged_write(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Compute what reference.py defines. Waits for the device."""
    rows = (slots >= 0).nonzero()[:, 0]
    for x, pages in (k, k_pages), (v, v_pages):
        slotted(pages).index_copy_(0, slots[rows], x[rows])


VARIANT = KernelVariant("paged_write", "torch", paged_write, reference, capabilities.eager_waiting)
