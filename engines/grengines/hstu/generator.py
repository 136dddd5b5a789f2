"""HSTU for retrieval: a user's items as semantic IDs, and the next item's code by code.

The prompt is the codes of the items of the history, level by level, oldest item first (Rajput et al., TIGER, NeurIPS
2023, with HSTU layers). The codes that a search goes on with are to each other what candidates are in ranking: each
sees the prompt and itself. SiLU attention has no normaliser, so what a beam's own earlier codes add to its attention is
one more term of the sum: the prompt's keys and values are read once for all beams, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grengines.cache.pool import PagePool
from grengines.hstu.config import HSTUConfig
from grengines.hstu.model import EPS, HSTULayer, initialise
from grkernels.operators import Operators

Codes = tuple[Tensor, Tensor]  # keys [rows, H, dqk] and values [rows, H, dv] of one step's codes in one layer


@dataclass
class Prompts:
    """Prompts in pages: B sequences."""

    pool: PagePool
    pages: list[list[int]]
    page_table: Tensor  # int32 [B, most pages]
    lengths: Tensor  # int64 [B]: tokens
    longest: int
    last: Tensor  # [B, E]: the last token, encoded

    def free(self) -> None:
        """Give the pages back."""
        for pages in self.pages:
            self.pool.free(pages)
        self.pages = []


class HSTUGenerator(nn.Module):
    """Logits of the next code. `sizes`: codes of each level; tokens are level offset + code, the last one begins an
    empty prompt. Token vectors are the output's weights too. max_positions counts tokens."""

    def __init__(self, config: HSTUConfig, sizes: Sequence[int], kernels: Operators) -> None:
        super().__init__()
        self.config, self.sizes, self.kernels = config, tuple(sizes), kernels
        self.offsets = [0, *accumulate(sizes)]
        self.alpha = config.alpha if config.alpha is not None else 1.0 / math.sqrt(config.qk_dim)
        E = config.embedding_dim
        self.token_table = nn.Parameter(torch.empty(self.offsets[-1] + 1, E))
        self.position_table = nn.Parameter(torch.empty(config.max_positions + len(self.sizes), E))
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(E, EPS)

    @classmethod
    def build(
        cls,
        config: HSTUConfig,
        sizes: Sequence[int],
        kernels: Operators,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> HSTUGenerator:
        """Random weights from `seed`, the same on every device: drawn in fp32 on the CPU, then rounded."""
        with torch.device("meta"):
            model = cls(config, sizes, kernels)
        model.to_empty(device="cpu").requires_grad_(False).eval()
        initialise(model, seed)
        return model.to(device=device, dtype=dtype)

    @property
    def begin(self) -> int:
        """The token that stands for an empty prompt."""
        return self.offsets[-1]

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """The last max_positions tokens int64 [n], whole items; the begin token where there are none."""
        levels = len(self.sizes)
        kept = tokens[max(len(tokens) - self.config.max_positions // levels * levels, 0) :]
        return kept if len(kept) else np.array([self.begin])

    def full(self, prompts: Sequence[np.ndarray], pool: PagePool | None = None, slots: Tensor | None = None) -> Tensor:
        """[tokens of all prompts, E], every token encoded from those before it. pool, slots: where keys and values are
        kept as well."""
        device = self.token_table.device
        lengths = [len(p) for p in prompts]
        tokens = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).to(device)
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)
        offsets = torch.tensor([0, *accumulate(lengths)], device=device)
        x = self._embed(tokens, positions)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HSTULayer)
            u, q, k, v = layer.project(x, self.kernels)
            if pool is not None and slots is not None:
                pool.write(i, slots, k, v)
            a = self._attend(q, k, v, offsets, None, max(lengths), max(lengths))
            x = layer.combine(x, u, a, self.kernels)
        return x

    def prefill(self, prompts: Sequence[np.ndarray], pool: PagePool) -> Prompts:
        """Encode prompts, their keys and values into pages of `pool`. Raises PoolFullError, taking none."""
        lengths = [len(p) for p in prompts]
        need = [pool.pages_for(n) for n in lengths]
        taken = pool.allocate(sum(need))
        pages = [taken[end - n : end] for n, end in zip(need, accumulate(need), strict=True)]
        device = self.token_table.device
        table = torch.zeros(len(prompts), max(need), dtype=torch.int32)
        for b, own in enumerate(pages):
            table[b, : len(own)] = torch.tensor(own)
        slots = np.concatenate([pool.slots(own, 0, n) for own, n in zip(pages, lengths, strict=True)])
        try:
            x = self.full(prompts, pool, torch.from_numpy(slots).to(device))
        except BaseException:
            pool.free(taken)
            raise
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        return Prompts(pool, pages, table.to(device), torch.tensor(lengths, device=device), max(lengths), x[last])

    def step(
        self, prompts: Prompts, level: int, codes: Tensor, before: Sequence[Sequence[Codes]]
    ) -> tuple[Tensor, list[Codes]]:
        """Encode one more code of each beam.

        codes: int64 [B, W], of `level`. before: for each earlier step, for each layer, the keys and values of the
        beams' own codes, in the order of these beams. Returns [B * W, E] and this step's keys and values.
        """
        B, W = codes.shape
        position = (prompts.lengths + level)[:, None].expand(B, W).reshape(-1)
        x = self._embed(codes.reshape(-1) + self.offsets[level], position)
        offsets = torch.arange(0, B * W + 1, W, device=x.device)
        targets = torch.full((B,), W, device=x.device)
        own: list[Codes] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HSTULayer)
            u, q, k, v = layer.project(x, self.kernels)
            pool = prompts.pool
            a = self._attend(
                q,
                k,
                v,
                offsets,
                targets,
                W,
                prompts.longest + W,
                k_pages=pool.k[i],
                v_pages=pool.v[i],
                page_table=prompts.page_table,
                paged_lengths=prompts.lengths,
            )
            for earlier in before:
                a = a + self._own_term(q, *earlier[i])
            own.append((k.contiguous(), v.contiguous()))
            x = layer.combine(x, u, a, self.kernels)
        return x, own

    def logits(self, x: Tensor, level: int) -> Tensor:
        """fp32 [rows, codes of the level]."""
        y = self.kernels.layer_norm(x, self.norm.weight, self.norm.bias, eps=EPS)
        table = self.token_table[self.offsets[level] : self.offsets[level + 1]]
        return F.linear(y.float(), table.float())

    def _own_term(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What an earlier code of each beam adds to its attention: SiLU(alpha q k) v / N; fp32 but for the result."""
        score = (q.float() * k.float()).sum(-1, keepdim=True) * self.alpha
        return (F.silu(score) * v.float() / self.config.scaling_seqlen).to(v.dtype)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.token_table[tokens] + self.position_table[positions]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        targets: Tensor | None,
        max_q_len: int,
        max_kv_len: int,
        **pages: Tensor,
    ) -> Tensor:
        attended: Tensor = self.kernels.hstu_attention(
            q,
            k,
            v,
            q_offsets=offsets,
            kv_offsets=offsets,
            num_targets=targets,
            max_q_len=max_q_len,
            max_kv_len=max_kv_len,
            scaling_seqlen=self.config.scaling_seqlen,
            alpha=self.alpha,
            contextual_seq_len=0,
            max_attn_len=0,
            **pages,
        )
        return attended
