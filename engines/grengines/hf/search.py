"""Beam search as a naive generate loop.

The batch is static and prompts are padded on the left. The cache is copied to every beam, and reordered after every
code. transformers' own `generate(num_beams=W)` encodes the prompt W times, once for each beam. Here it is encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grengines.hf.models import PaddedModel
from grengines.semantic.search import explore
from grengines.semantic.trie import TensorTrie


def pad(prompts: Sequence[np.ndarray], pin: bool = False) -> Tensor:
    """Pad prompts with -1 on the left: int64 [B, longest]. pin: page-locked memory, for copies to a GPU."""
    longest = max(map(len, prompts))
    padded = torch.full((len(prompts), longest), -1, dtype=torch.int64, pin_memory=pin)
    for row, prompt in zip(padded, prompts, strict=True):
        row[longest - len(prompt) :] = torch.from_numpy(prompt)
    return padded


def search(
    model: PaddedModel, trie: TensorTrie, padded: Tensor, *, width: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of grengines.semantic.search.Beams for prompts that `pad` made."""
    from transformers import DynamicCache

    batch = len(padded)
    real, cache = padded >= 0, DynamicCache()
    hidden = model.encode(padded.clamp(min=0), real, cache)
    beams = 1

    def advance(level: int, parents: Tensor | None, codes: Tensor | None) -> Tensor:
        nonlocal real, hidden, beams
        if parents is not None and codes is not None:
            first = torch.arange(batch, device=parents.device)[:, None] * beams
            rows = (first + parents).reshape(-1)
            cache.reorder_cache(rows)
            real, beams = F.pad(real[rows], (0, 1), value=True), parents.shape[1]
            hidden = model.encode(codes.reshape(-1, 1) + model.offsets[level - 1], real, cache)
        return model.log_probabilities(hidden, level)

    return explore(advance, trie, batch, width=width, k=k)
