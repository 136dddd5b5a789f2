"""Reference of beam_terms: every term of every row, in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grkernels.pages import slotted


def beam_terms(
    out: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *, alpha: float, scaling_seqlen: int
) -> None:
    """Add to out[i], for each head: sum over j of SiLU(alpha q[i] k[slots[i, j]]) v[slots[i, j]] / scaling_seqlen.

    In place. out [n, H, dv] and q [n, H, dqk]: rows any distance apart. k_pages [pages, page, H, dqk] and v_pages
    [pages, page, H, dv]: as for paged_write. slots int64 [n, terms], contiguous: -1 for no term, a row's -1 last.
    Computed in fp32, rounded once. The family's signature.
    """
    used = slots.clamp(min=0)
    k, v = slotted(k_pages)[used].float(), slotted(v_pages)[used].float()  # [n, terms, H, d]
    score = alpha * (q.float()[:, None] * k).sum(-1, keepdim=True)
    terms = torch.where((slots >= 0)[:, :, None, None], F.silu(score) * v / scaling_seqlen, 0.0)
    out.copy_(out.float() + terms.sum(1))
