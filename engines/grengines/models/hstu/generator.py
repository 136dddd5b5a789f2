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
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.model import EPS, HSTULayer, initialise
from grengines.models.hstu.weights import load_weights
from grengines.runtime import staging
from grengines.runtime.batch import Bucket
from grengines.semantic.ids import prompt_of
from grkernels.operators import Operators

Codes = tuple[Tensor, Tensor]  # keys [rows, H, dqk] and values [rows, H, dv] of one step's codes in one layer


@dataclass
class Prompts:
    """Prompts of B sequences on the device, one after another, and where their keys and values go.

    Padding: rows past offsets[B] are encoded, stored nowhere and seen by nobody; further sequences are empty.
    """

    tokens: Tensor  # int64 [L]
    positions: Tensor  # int64 [L]
    slots: Tensor  # int64 [L]: of the pool; -1 for padding
    offsets: Tensor  # int64 [B + 1]
    lengths: Tensor  # int64 [B]
    last_rows: Tensor  # int64 [B]: each one's last token
    page_table: Tensor  # int32 [B, most pages]
    longest: int  # tokens


@dataclass
class HostPrompts:
    """Packed prompts on the host: every array of Prompts in one int64 buffer, one copy to the device. Of the copy every
    array is a view, so that a CUDA graph reads what is copied there later."""

    buffer: Tensor
    sizes: dict[str, int]  # of each array, by its name in Prompts, in the buffer's order
    width: int  # of the page table, whose int32 numbers lie two in a place
    longest: int
    tokens: int  # real ones

    @property
    def padded_tokens(self) -> int:
        return self.sizes["tokens"]

    def to(self, device: torch.device | str, out: Tensor | None = None) -> Prompts:
        """Copy to the device without waiting; into `out` (int64 [total]) where it is given."""
        buffer = self.buffer.to(device, non_blocking=True) if out is None else out.copy_(self.buffer, non_blocking=True)
        parts = dict(zip(self.sizes, buffer.split(list(self.sizes.values())), strict=True))
        B = len(parts["lengths"])
        table = parts.pop("page_table").view(torch.int32)[: B * self.width].view(B, self.width)
        return Prompts(**parts, page_table=table, longest=self.longest)


def pack_prompts(
    prompts: Sequence[np.ndarray],
    pages: Sequence[Sequence[int]] = (),
    pool: PagePool | None = None,
    *,
    bucket: Bucket | None = None,
    pin: bool = False,
) -> HostPrompts:
    """Lay out prompts (int64 [tokens], none empty). pages: of the pool, for the keys and values of each; without a
    pool they are not kept. bucket: pad to its sizes. Raises ValueError for prompts that don't fit it."""
    lengths = [len(p) for p in prompts]
    B, L, longest = len(prompts), sum(lengths), max(lengths, default=1)
    if bucket is not None:
        if bucket.batch < B or longest > bucket.length:
            raise ValueError(f"{B} prompts of at most {longest} tokens don't fit {bucket}; pack them without it")
        B, L, longest = bucket.batch, bucket.batch * bucket.length, bucket.length
    width = pool.pages_for(longest) if pool is not None else 0
    sizes = {"tokens": L, "positions": L, "slots": L, "offsets": B + 1, "lengths": B, "last_rows": B}
    sizes["page_table"] = -(-B * width // 2)
    buffer = staging.zeros(sum(sizes.values()), pin)
    values, ends = buffer.numpy(), accumulate(sizes.values())
    arrays = {name: values[end - n : end] for (name, n), end in zip(sizes.items(), ends, strict=True)}
    arrays["slots"][:] = -1
    arrays["lengths"][: len(lengths)] = lengths
    np.cumsum(arrays["lengths"], out=arrays["offsets"][1:])
    table = arrays["page_table"].view(np.int32)[: B * width].reshape(B, width)
    for b, prompt in enumerate(prompts):
        begin, end = arrays["offsets"][b : b + 2]
        arrays["tokens"][begin:end] = prompt
        arrays["positions"][begin:end] = np.arange(len(prompt))
        arrays["last_rows"][b] = end - 1
        if pool is not None:
            arrays["slots"][begin:end] = pool.slots(pages[b], 0, len(prompt))
            table[b, : len(pages[b])] = pages[b]
    return HostPrompts(buffer, sizes, width, longest, sum(lengths))


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
        weights: str | None = None,
    ) -> HSTUGenerator:
        """A model for inference with the weights of a safetensors file, or random ones from `seed`, the same on every
        device: drawn in fp32 on the CPU, then rounded. Raises ValueError for a file that doesn't fit."""
        with torch.device("meta"):
            model = cls(config, sizes, kernels)
        model.to_empty(device="cpu").requires_grad_(False).eval()
        if weights is None:
            initialise(model, seed)
        else:
            load_weights(model, weights)
        return model.to(device=device, dtype=dtype)

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """The last max_positions tokens int64 [n], whole items; the begin token where there are none."""
        return prompt_of(tokens, self.sizes, self.config.max_positions)

    def full(self, prompts: Prompts, pool: PagePool | None = None) -> Tensor:
        """[L, E], every token encoded from those before it. pool: where keys and values are kept as well."""
        x = self._embed(prompts.tokens, prompts.positions)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HSTULayer)
            u, q, k, v = layer.project(x, self.kernels)
            if pool is not None:
                self.kernels.paged_write(k, v, prompts.slots, pool.k[i], pool.v[i])
            a = self._attend(q, k, v, prompts.offsets, None, prompts.longest, prompts.longest)
            x = layer.combine(x, u, a, self.kernels)
        return x

    def step(
        self, prompts: Prompts, pool: PagePool, level: int, codes: Tensor, before: Sequence[Sequence[Codes]]
    ) -> tuple[Tensor, list[Codes]]:
        """Encode one more code of each beam, the prompts' keys and values in the pool.

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
