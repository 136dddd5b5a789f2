"""Keys and values into their pages in eager PyTorch: one gather and one indexed copy per tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.paged_write.reference import paged_write as reference
from grkernels.pages import quantised, slotted
from grkernels.variant import KernelVariant


def paged_write(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Compute what reference.py defines. Waits for the device."""
    rows = (slots >= 0).nonzero()[:, 0]
    there = slots[rows]
    for x, pages, scales in (k, k_pages, k_scales), (v, v_pages, v_scales):
        if scales is None:
            slotted(pages).index_copy_(0, there, x[rows])
        else:
            numbers, scale = quantised(x[rows], pages.dtype)
            # As bytes: PyTorch has no index_copy of fp8.
            slotted(pages).view(torch.int8).index_copy_(0, there, numbers.view(torch.int8))
            scales.flatten(0, 1).index_copy_(0, there, scale)


VARIANT = KernelVariant("paged_write", "torch", paged_write, reference, capabilities.eager_waiting)
