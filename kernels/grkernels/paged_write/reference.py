"""Reference of paged_write: one indexed assignment per tensor."""

from __future__ import annotations

from torch import Tensor

from grkernels.pages import quantised


def paged_write(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Store row i of k and v in slot slots[i], in place; leave out rows whose slot is negative. The family's signature.

    k [n, H, dqk] and v [n, H, dv]: rows any distance apart, a row's heads adjacent. slots int64 [n]: page * page size +
    place in the page, no slot twice. k_pages [pages, page, H, dqk] and v_pages [pages, page, H, dv]: slots equally far
    apart. Pages may hold keys and values side by side.

    k_scales and v_scales, fp32 [pages, page, H], contiguous: those of int8 or float8_e4m3fn pages (grkernels.pages).
    """
    stored = slots >= 0
    page, place = slots[stored] // k_pages.shape[1], slots[stored] % k_pages.shape[1]
    for x, pages, scales in (k, k_pages, k_scales), (v, v_pages, v_scales):
        if scales is None:
            pages[page, place] = x[stored]
        else:
            pages[page, place], scales[page, place] = quantised(x[stored], pages.dtype)
