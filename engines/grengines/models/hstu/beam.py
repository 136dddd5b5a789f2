"""Beam search over semantic IDs with HSTU. Each level reads the prompt once for all beams of a request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from grengines.cache.pool import PagePool
from grengines.models.hstu.generator import Codes, HSTUGenerator, Pages, PromptKeys, Prompts, pack_prompts
from grengines.semantic.search import Beams, check_width, explore
from grengines.semantic.trie import TensorTrie

PAGE = 64  # tokens


def pool_for(model: HSTUGenerator, tokens: int, batch: int) -> PagePool:
    """Make pages for `batch` prompts of at most `tokens` tokens each."""
    config = model.config
    return PagePool(
        layers=config.layers,
        pages=batch * -(-tokens // PAGE),
        page=PAGE,
        heads=config.heads,
        qk_dim=config.qk_dim,
        v_dim=config.v_dim,
        dtype=model.token_table.dtype,
        device=model.token_table.device,
    )


def search(
    model: HSTUGenerator, trie: TensorTrie, prompts: Sequence[np.ndarray], pool: PagePool, *, width: int, k: int
) -> Beams:
    """Return the k most likely items of each prompt (int64 [tokens]) by a beam search of this width.

    A code's probability is the softmax over all codes of its level. Codes that lead to no item are then dropped. The
    result is exact if the width is at least the number of prefixes of every level. Raises PoolFullError if the
    prompts don't fit the pool, and ValueError for k above the width.
    """
    check_width(width, k)
    kept = [model.prompt(p) for p in prompts]
    with borrowed(pool, [len(p) for p in kept]) as pages:
        batch = pack_prompts(kept, pages, pool, timed=model.timed).to(model.token_table.device)
        found = run(model, trie, batch, pool, width=width, k=k)
    return Beams(*(x.cpu().numpy() for x in found))


@contextmanager
def borrowed(pool: PagePool, lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Borrow pages for prompts of these lengths in tokens. Raises PoolFullError, and then takes none."""
    need = [pool.pages_for(n) for n in lengths]
    taken = pool.allocate(sum(need))
    try:
        yield [taken[end - n : end] for n, end in zip(need, accumulate(need), strict=True)]
    finally:
        pool.free(taken)


def run(
    model: HSTUGenerator, trie: TensorTrie, prompts: Prompts, pool: PagePool, *, width: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Search on the device: returns the fields of Beams. Nothing waits for the device, so a CUDA graph can hold it."""
    last = model.prefill(prompts, pool)
    return levels(model, trie, last, prompts, pool, width=width, k=k)


def levels(
    model: HSTUGenerator, trie: TensorTrie, last: Tensor, prompts: PromptKeys, pages: Pages, *, width: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Search as `run` does, after the prompts. last: [B, E], the encoded last token of each prompt."""
    B, beams = len(last), 1
    before: list[list[Codes]] = []

    def advance(level: int, parents: Tensor | None, codes: Tensor | None) -> Tensor:
        nonlocal before, beams
        if parents is None or codes is None:
            return model.log_probabilities(last, level)
        rows = (torch.arange(B, device=parents.device)[:, None] * beams + parents).reshape(-1)
        before = [[(keys[rows], values[rows]) for keys, values in layers] for layers in before]
        hidden, own = model.step(prompts, pages, level - 1, codes, before)
        before.append(own)
        beams = codes.shape[1]
        return model.log_probabilities(hidden, level)

    return explore(advance, trie, B, width=width, k=k)


def prefix_scores(model: HSTUGenerator, prompt: np.ndarray, codes: np.ndarray, pool: PagePool) -> np.ndarray:
    """Return the log-probability of each prefix of these tuples (codes int [n, levels]) after a prompt.

    The result is float32 [n, levels]. Its last column has the scores of `search`. Raises PoolFullError.
    """
    device = model.token_table.device
    kept = model.prompt(prompt)
    chosen = torch.from_numpy(codes.astype(np.int64)).to(device)
    with borrowed(pool, [len(kept)]) as pages:
        prompts = pack_prompts([kept], pages, pool, timed=model.timed).to(device)
        hidden = model.prefill(prompts, pool).expand(len(codes), -1)
        before: list[list[Codes]] = []
        columns = []
        for level in range(codes.shape[1]):
            logs = model.log_probabilities(hidden, level)
            columns.append(logs.gather(1, chosen[:, level, None])[:, 0])
            if level + 1 < codes.shape[1]:
                hidden, own = model.step(prompts, pool, level, chosen[None, :, level], before)
                before.append(own)
    found: np.ndarray = torch.stack(columns, dim=1).cumsum(1).cpu().numpy()
    return found


def reference(model: HSTUGenerator, trie: TensorTrie, prompts: Sequence[np.ndarray], *, width: int, k: int) -> Beams:
    """Search as `search` does, but encode every beam of every request on its own, from its whole sequence."""

    def one(tokens: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        beams = [model.prompt(tokens)]

        def advance(level: int, parents: Tensor | None, codes: Tensor | None) -> Tensor:
            nonlocal beams
            if parents is not None and codes is not None:
                chosen = zip(parents[0].tolist(), codes[0].tolist(), strict=True)
                beams = [np.append(beams[parent], model.offsets[level - 1] + code) for parent, code in chosen]
            device = model.token_table.device
            last = torch.stack([model.full(pack_prompts([beam], timed=model.timed).to(device))[-1] for beam in beams])
            return model.log_probabilities(last, level)

        return explore(advance, trie, 1, width=width, k=k)

    return Beams(*(torch.cat(parts).cpu().numpy() for parts in zip(*map(one, prompts), strict=True)))
