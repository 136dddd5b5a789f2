"""Beam search over semantic IDs: only items that exist, the prompt read once a code for all beams of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grengines.cache.pool import PagePool
from grengines.hstu.generator import Codes, HSTUGenerator
from grengines.semantic.trie import TensorTrie


@dataclass
class Beams:
    """The best items of each request, best first."""

    items: np.ndarray  # int64 [B, k]; -1 where there are fewer
    scores: np.ndarray  # float32 [B, k]: sum of the codes' log-probabilities; -inf where there are fewer


def search(
    model: HSTUGenerator, trie: TensorTrie, prompts: Sequence[np.ndarray], pool: PagePool, *, width: int, k: int
) -> Beams:
    """The k most likely items of each prompt (int64 [tokens]), as a beam search of this width finds them.

    A code's probability is the softmax over all codes of its level; those that lead to no item are then left out. With
    a width of at least the number of prefixes of every level the result is exact. Raises PoolFullError where the
    prompts don't fit the pool, and ValueError for k above the width.
    """
    if not 1 <= k <= width:
        raise ValueError(f"k={k} items from {width} beams: allowed is 1 to {width}")
    state = model.prefill([model.prompt(p) for p in prompts], pool)
    try:
        B = len(prompts)
        nodes = torch.zeros(B, 1, dtype=torch.int64, device=state.last.device)  # the root
        scores = torch.zeros(B, 1, device=state.last.device)
        hidden, before = state.last, list[list[Codes]]()
        for level in range(len(model.sizes)):
            parents, codes, nodes, scores = _best(model.logits(hidden, level), trie, level, nodes, scores, width)
            if level + 1 == len(model.sizes):
                break
            rows = (torch.arange(B, device=parents.device)[:, None] * _beams(before, B) + parents).reshape(-1)
            before = [[(keys[rows], values[rows]) for keys, values in layers] for layers in before]
            hidden, own = model.step(state, level, codes, before)
            before.append(own)
        items = trie.items(nodes[:, :k].reshape(-1)).view(B, -1)
        return Beams(_padded(items, k, -1), _padded(scores[:, :k], k, float("-inf")))
    finally:
        state.free()


def _beams(before: Sequence[Sequence[Codes]], batch: int) -> int:
    """Beams a request so far."""
    return len(before[0][0][0]) // batch if before else 1


def _best(
    logits: Tensor, trie: TensorTrie, level: int, nodes: Tensor, scores: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best continuations of each request's beams: which beam, which code, the node there, the score; [B, W]."""
    B, beams = nodes.shape
    flat = nodes.reshape(-1)
    codes = trie.sizes[level]
    total = scores.reshape(-1, 1) + torch.log_softmax(logits, dim=-1)
    total = total.masked_fill(~trie.mask(level, flat), float("-inf")).view(B, beams * codes)
    scores, chosen = total.topk(min(width, beams * codes), dim=1)
    parents, code = chosen // codes, chosen % codes
    there = trie.step(level, nodes.gather(1, parents).reshape(-1), code.reshape(-1)).view_as(code)
    return parents, code, there, scores


def reference(model: HSTUGenerator, trie: TensorTrie, prompts: Sequence[np.ndarray], *, width: int, k: int) -> Beams:
    """What `search` must find: every beam of every request encoded anew, on its own, from its whole sequence."""
    items, scores = [], []
    for tokens in prompts:
        prompt = model.prompt(tokens)
        beams, best = [prompt], torch.zeros(1, 1, device=model.token_table.device)
        nodes = torch.zeros(1, 1, dtype=torch.int64, device=best.device)
        for level in range(len(model.sizes)):
            last = torch.stack([model.full([beam])[-1] for beam in beams])
            parents, codes, nodes, best = _best(model.logits(last, level), trie, level, nodes, best, width)
            chosen = zip(parents[0].tolist(), codes[0].tolist(), strict=True)
            beams = [np.append(beams[parent], model.offsets[level] + code) for parent, code in chosen]
        items.append(_padded(trie.items(nodes[0, :k])[None], k, -1)[0])
        scores.append(_padded(best[:, :k], k, float("-inf"))[0])
    return Beams(np.stack(items), np.stack(scores))


def _padded(x: Tensor, k: int, value: float) -> np.ndarray:
    found: np.ndarray = torch.nn.functional.pad(x, (0, k - x.shape[1]), value=value).cpu().numpy()
    return found
