"""Beam search over semantic IDs, given any model's probabilities. It finds only items that exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grengines.semantic.trie import TensorTrie


@dataclass
class Beams:
    """The best items of each request, best first."""

    items: np.ndarray  # int64 [B, k]; -1 where there are fewer
    scores: np.ndarray  # float32 [B, k]: sum of the codes' log-probabilities; -inf where there are fewer
    cuts: np.ndarray  # float32 [B, levels]: the best score that each level dropped; -inf for none


# Takes a level and each beam's parent and code of the level before, both int64 [B, W]. Returns fp32 log-probabilities
# [B * W, codes of the level]. At level 0 a request has one beam, its prompt, and parents and codes are None.
Advance = Callable[[int, Tensor | None, Tensor | None], Tensor]


def check_width(width: int, k: int) -> None:
    """Raise ValueError if a beam of this width can't give k items."""
    if not 1 <= k <= width:
        raise ValueError(f"k={k} items from {width} beams: allowed is 1 to {width}")


def explore(advance: Advance, trie: TensorTrie, batch: int, *, width: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k most likely items of each request: the fields of Beams, on the trie's device.

    A code's probability is the model's, whatever may follow the prefix. Codes that lead to no item are then dropped.
    The result is exact if the width is at least the number of prefixes of every level. Nothing waits for the device.
    """
    device = trie.leaf_items.device
    nodes = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # the root
    scores = torch.zeros(batch, 1, device=device)
    parents = codes = None
    cuts = []
    for level in range(len(trie.sizes)):
        more = best(advance(level, parents, codes), trie, level, nodes, scores, width + 1)
        parents, codes, nodes, scores = (x[:, :width] for x in more)
        left_out = more[3][:, width:]
        cuts.append(F.pad(left_out, (0, 1), value=float("-inf")).amax(1))
    items = trie.items(nodes[:, :k].reshape(-1)).view(batch, -1)
    missing = (0, k - items.shape[1])
    return (
        F.pad(items, missing, value=-1),
        F.pad(scores[:, :k], missing, value=float("-inf")),
        torch.stack(cuts, dim=1),
    )


def best(
    logs: Tensor, trie: TensorTrie, level: int, nodes: Tensor, scores: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the best continuations of each request's beams [B, W]: parent, code, node and score.

    W: width, or the number of continuations if it is smaller. logs: fp32 log-probabilities
    [B * beams, codes of the level]. nodes, scores: int64 and fp32 [B, beams]; a beam without continuation has node -1
    and score -inf.
    """
    B, beams = nodes.shape
    first, codes, there = trie.children(level, nodes.reshape(-1))
    children = trie.widths[level]
    total = scores.reshape(-1, 1) + logs.gather(1, codes)
    total = total.masked_fill_(~there, float("-inf")).view(B, beams * children)
    scores, chosen = total.topk(min(width, beams * children), dim=1)
    parents, child = chosen // children, chosen % children
    nodes = (first.view(B, beams).gather(1, parents) + child).masked_fill_(scores == float("-inf"), -1)
    return parents, codes.view(B, -1).gather(1, chosen), nodes, scores
