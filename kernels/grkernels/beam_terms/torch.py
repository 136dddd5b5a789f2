"""Terms of a beam's earlier codes in eager PyTorch, of the rows that have any."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grkernels import capabilities
from grkernels.beam_terms.reference import beam_terms as reference
from grkernels.pages import slotted
from grkernels.variant import KernelVariant


def beam_terms(
    out: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *, alpha: float, scaling_seqlen: int
) -> None:
    """Compute what reference.py defines. Waits for the device."""
    rows = (slots >= 0).any(1).nonzero()[:, 0]
    if not len(rows):
        return
    wanted = slots[rows]
    k, v = slotted(k_pages)[wanted.clamp(min=0)], slotted(v_pages)[wanted.clamp(min=0)]  # [rows, terms, H, d]
    score = (q[rows, None].float() * k.float()).sum(-1, keepdim=True) * alpha
    weight = F.silu(score).masked_fill((wanted < 0)[:, :, None, None], 0.0) / scaling_seqlen
    out[rows] = (out[rows].float() + (weight * v.float()).sum(1)).to(out.dtype)


VARIANT = KernelVariant("beam_terms", "torch", beam_terms, reference, capabilities.eager_waiting)
