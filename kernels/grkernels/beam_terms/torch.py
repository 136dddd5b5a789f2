"""What earlier codes of a beam add to its attention: one more term of the sum for each, read from pages by slot."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grkernels.paged_write.torch import slotted


def beam_terms(
    out: Tensor,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    alpha: float,
    scaling_seqlen: int,
) -> None:
    """out[i] += sum over j of SiLU(alpha q[i] k[slots[i, j]]) v[slots[i, j]] / scaling_seqlen, in place, for each head.

    out [n, H, dv] and q [n, H, dqk], views of any row distance; k_pages [pages, page, H, dqk] and v_pages
    [pages, page, H, dv] as for `paged_write`; slots int64 [n, terms], -1 for no term. Computed in fp32, rounded once.
    A row's -1 come last. On a GPU nothing waits for it, Triton does the work, and rows without terms cost next to
    nothing; on a CPU PyTorch does.
    """
    if q.device.type == "cuda":
        on_gpu(out, q, k_pages, v_pages, slots, alpha=alpha, scaling_seqlen=scaling_seqlen)
        return
    rows = (slots >= 0).any(1).nonzero()[:, 0]
    if not len(rows):
        return
    wanted = slots[rows]
    k, v = slotted(k_pages)[wanted.clamp(min=0)], slotted(v_pages)[wanted.clamp(min=0)]  # [rows, terms, H, d]
    score = (q[rows, None].float() * k.float()).sum(-1, keepdim=True) * alpha
    weight = F.silu(score).masked_fill((wanted < 0)[:, :, None, None], 0.0) / scaling_seqlen
    out[rows] = (out[rows].float() + (weight * v.float()).sum(1)).to(out.dtype)


def on_gpu(
    out: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *, alpha: float, scaling_seqlen: int
) -> None:
    """`beam_terms` in Triton, which on a CPU runs in its interpreter only."""
    from grkernels.beam_terms.triton import launch

    launch(out, q, slotted(k_pages), slotted(v_pages), slots, alpha, scaling_seqlen)
