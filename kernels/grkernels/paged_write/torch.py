"""New keys and values into their pages: one pass over both, straight from the views of the layer's projection."""

from __future__ import annotations

from torch import Tensor


def paged_write(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """Store row i of k and v in slot slots[i]; rows whose slot is negative are left out.

    k [n, H, dqk] and v [n, H, dv], rows any distance apart; slots int64 [n], no slot twice: page * page size + the
    place in the page; k_pages [pages, page, H, dqk] and v_pages [pages, page, H, dv], whose slots lie equally far apart
    (pages may hold keys and values side by side). On a GPU nothing waits for it, so a CUDA graph can capture it, and
    Triton does the work; on a CPU PyTorch does.
    """
    if variant(k.device.type) == "triton":
        on_gpu(k, v, slots, k_pages, v_pages)
    else:
        rows = (slots >= 0).nonzero()[:, 0]
        for x, pages in (k, k_pages), (v, v_pages):
            slotted(pages).index_copy_(0, slots[rows], x[rows])


def variant(device: str) -> str:
    """What works on pages on a device of this type, here and in beam_attention.py; for records."""
    return "triton" if device == "cuda" else "torch"


def on_gpu(k: Tensor, v: Tensor, slots: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """`paged_write` in Triton, which on a CPU runs in its interpreter only."""
    from grkernels.paged_write.triton import launch

    launch(k, v, slots, slotted(k_pages), slotted(v_pages))


def slotted(pages: Tensor) -> Tensor:
    """[pages, page, H, d] -> [slots, H, d], a view. Raises RuntimeError where slots don't lie equally far apart."""
    return pages.view(pages.shape[0] * pages.shape[1], *pages.shape[2:])
