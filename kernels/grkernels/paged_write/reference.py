"""Reference of paged_write: one indexed assignment per tensor."""

from __future__ import annotations

from torch import Tensor


def paged_write(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Store row i of k and v in slot slots[i], in place; leave out rows whose slot is negative. The family's signature.

    k [n, H, dqk] and v [n, H, dv]: rows any distance apart, a row's heads adjacent. slots int64 [n]: page * page size +
    place in the page, no slot twice. k_pages [pages, page, H, dqk] and v_pages [pages, page, H, dv]: slots equally far
    apart. Pages may hold keys and values side by side.
    """
    stored = slots >= 0
    page, place = slots[stored] // k_pages.shape[1], slots[stored] % k_pages.shape[1]
    k_pages[page, place] = k[stored]
    v_pages[page, place] = v[stored]
