"""HSTU for retrieval: it reads a user's items as semantic IDs and predicts the next item's codes one by one.

The prompt is the codes of the items of the history, level by level, oldest item first (Rajput et al., TIGER, NeurIPS
2023, with HSTU layers). The codes of a search relate to each other as candidates do in ranking: each sees the prompt
and itself. SiLU attention has no normaliser, so a beam's own earlier codes add one more term to its attention. The
prompt's keys and values are therefore read once for all beams.

A bias by the distance counts a beam's codes on from the prompt: that of level l is l further from each token of the
prompt than that of level 0, and l - m from the beam's own code of level m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grengines.api import Request, Retrieval
from grengines.cache.pool import PagePool
from grengines.last_layer import LastLayer
from grengines.models.hstu.config import HSTUConfig, not_read, one_level_only
from grengines.models.hstu.head import FinalNorm
from grengines.models.hstu.model import HSTULayer
from grengines.models.hstu.weights import fill
from grengines.runtime import staging
from grengines.runtime.batch import Bucket
from grengines.runtime.group import Group
from grengines.semantic.ids import prompt_of
from grkernels.hstu_attention.extras import Extras
from grkernels.operators import Operators

Codes = tuple[Tensor, Tensor]  # keys [rows, H, dqk] and values [rows, H, dv] of one level's codes in one layer


class Pages(Protocol):
    """Pages of keys and values, as PagePool has them."""

    def layer(self, i: int) -> dict[str, Tensor]:
        """Return the pages of layer i as arguments of paged_write and hstu_attention.

        k_pages [pages, tokens, H, dqk] and v_pages [pages, tokens, H, dv], in the precision that keys and values are
        stored in: the engine's, int8 or float8_e4m3fn. Those in 8 bits also have k_scales and v_scales, fp32
        [pages, tokens, H].
        """


@dataclass
class PromptKeys:
    """Places of the keys and values of B prompts."""

    lengths: Tensor  # int64 [B]
    page_table: Tensor  # int32 [B, most pages]
    longest: int  # tokens


@dataclass
class Prompts(PromptKeys):
    """Prompts of B sequences on the device, one after another, and the slots of their keys and values.

    Padding: rows past offsets[B] are encoded but not stored, and no row sees them. Further sequences are empty.
    """

    tokens: Tensor  # int64 [L]
    positions: Tensor  # int64 [L]
    slots: Tensor  # int64 [L]: slots of the pool; -1 for padding
    offsets: Tensor  # int64 [B + 1]
    last_rows: Tensor  # int64 [B]: row of each prompt's last token; padding: 0
    last_offsets: Tensor  # int64 [B + 1]: of last_rows
    times: Tensor | None = None  # int64 [L], seconds: if the prompts have them, as the next
    until: Tensor | None = None  # int64 [L]


@dataclass
class HostPrompts:
    """Packed prompts on the host: all arrays of Prompts in one int64 buffer, for one copy to the device.

    On the device the arrays are views of the copy, so a CUDA graph reads any later copy.
    """

    buffer: Tensor
    sizes: dict[str, int]  # of each array by its name in Prompts, in the buffer's order
    width: int  # of the page table, whose int32 numbers share a place in pairs
    longest: int
    tokens: int  # without padding

    @property
    def padded_tokens(self) -> int:
        return self.sizes["tokens"]

    def to(self, device: torch.device | str, out: Tensor | None = None) -> Prompts:
        """Queue the copy to the device, into `out` (int64 [total]) if it is given."""
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
    timed: bool = False,
) -> HostPrompts:
    """Pack prompts (int64 [tokens], or [tokens, 3] as `timed_prompt` makes them; none empty).

    pages: the pages of each prompt's keys and values in the pool; without a pool they are not stored. bucket: pad to
    its sizes. timed: with the times of [tokens, 3]. Raises ValueError for prompts that don't fit the bucket.
    """
    lengths = [len(p) for p in prompts]
    B, L, longest = len(prompts), sum(lengths), max(lengths, default=1)
    if bucket is not None:
        if bucket.batch < B or longest > bucket.length:
            raise ValueError(f"{B} prompts of at most {longest} tokens don't fit {bucket}; pack them without it")
        B, L, longest = bucket.batch, bucket.batch * bucket.length, bucket.length
    width = pool.pages_for(longest) if pool is not None else 0
    sizes = {"tokens": L, "positions": L, "slots": L, "offsets": B + 1, "lengths": B, "last_rows": B}
    sizes["last_offsets"] = B + 1
    sizes |= {"times": L, "until": L} if timed else {}
    sizes["page_table"] = -(-B * width // 2)
    buffer = staging.zeros(sum(sizes.values()), pin)
    values, ends = buffer.numpy(), accumulate(sizes.values())
    arrays = {name: values[end - n : end] for (name, n), end in zip(sizes.items(), ends, strict=True)}
    arrays["slots"][:] = -1
    arrays["lengths"][: len(lengths)] = lengths
    np.cumsum(arrays["lengths"], out=arrays["offsets"][1:])
    arrays["last_offsets"][:] = np.minimum(np.arange(B + 1), len(lengths))
    table = arrays["page_table"].view(np.int32)[: B * width].reshape(B, width)
    for b, prompt in enumerate(prompts):
        begin, end = arrays["offsets"][b : b + 2]
        arrays["tokens"][begin:end] = prompt if prompt.ndim == 1 else prompt[:, 0]
        if timed and prompt.ndim == 2:
            arrays["times"][begin:end], arrays["until"][begin:end] = prompt[:, 1], prompt[:, 2]
        arrays["positions"][begin:end] = np.arange(len(prompt))
        arrays["last_rows"][b] = end - 1
        if pool is not None:
            arrays["slots"][begin:end] = pool.slots(pages[b], 0, len(prompt))
            table[b, : len(pages[b])] = pages[b]
    return HostPrompts(buffer, sizes, width, longest, sum(lengths))


def timed_prompt(retrieval: Retrieval, request: Request) -> np.ndarray:
    """Return the codes of a history, the time of each, and that of what follows it: int64 [tokens, 3]."""
    times = request.history_timestamps
    until = np.append(times[1:], request.timestamp)[: len(times)]
    columns = [retrieval.prompt(request), *(np.repeat(t, retrieval.ids.levels) for t in (times, until))]
    return np.stack(columns, axis=1)


class HSTUGenerator(nn.Module):
    """The model that gives logits of the next code.

    sizes: codes of each level. Tokens are level offset + code, and a last one begins an empty prompt. The output
    layer's weights are the token table. max_positions counts tokens.

    A search reads the last token of each prompt alone. So the last layer computes u, q, attention and its output for
    these only; it still makes keys and values of every token. `computed` says so; the reference computes every row.
    """

    computed = LastLayer.READ

    not_used: ClassVar[tuple[str, ...]] = not_read("generate")

    def __init__(self, config: HSTUConfig, sizes: Sequence[int], kernels: Operators) -> None:
        super().__init__()
        self.timed, self.item_norm = config.choices.time_bias > 0, config.choices.item_norm
        if problem := one_level_only(config, len(sizes)):
            raise ValueError(problem)
        self.config, self.sizes, self.kernels = config, tuple(sizes), kernels
        self.group: Group | None = None  # as of HSTULayer
        self.offsets = [0, *accumulate(sizes)]
        self.alpha = config.score_scale
        E = config.embedding_dim
        self.token_table = nn.Parameter(torch.empty(self.offsets[-1] + 1, E))
        self.position_table = nn.Parameter(torch.empty(config.max_positions + len(self.sizes), E))
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.layers))
        self.norm = FinalNorm(E, config.choices.final_norm, config.choices.head_eps)

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
        """Build a model for inference with the weights of a safetensors file, or random ones from `seed`.

        Random weights are drawn in fp32 on the CPU, then rounded: they are the same on every device. Raises ValueError
        for a file that doesn't fit.
        """
        with torch.device("meta"):
            model = cls(config, sizes, kernels)
        fill(model, weights, seed)
        return model.to(device=device, dtype=dtype)

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Return the last whole items within max_positions tokens, or the begin token if there are none.

        tokens: int64 [n], or [n, 3] with times.
        """
        return prompt_of(tokens, self.sizes, self.config.max_positions)

    def prompt_of(self, retrieval: Retrieval, request: Request) -> np.ndarray:
        """Return the prompt of a request, with times if the layers read them."""
        return self.prompt(timed_prompt(retrieval, request) if self.timed else retrieval.prompt(request))

    def full(self, prompts: Prompts, pool: PagePool | None = None) -> Tensor:
        """Encode every token from those before it, [L, E]. pool: also store keys and values there."""
        return self._encode(prompts, pool, pruned=-1)

    def prefill(self, prompts: Prompts, pool: PagePool | None = None) -> Tensor:
        """Encode the prompts as `full`, but return the last token of each, [B, E]."""
        if self.computed is LastLayer.EVERY:
            return self.full(prompts, pool)[prompts.last_rows]
        return self._encode(prompts, pool, pruned=len(self.layers) - 1)

    def _encode(self, prompts: Prompts, pool: PagePool | None, pruned: int) -> Tensor:
        """Encode the prompts. pruned: the layer that computes their last tokens alone, or -1."""
        x = self._embed(prompts.tokens, prompts.positions)
        offsets, longest, until = prompts.offsets, prompts.longest, prompts.until
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HSTULayer)
            if i == pruned:
                rows, offsets, longest = prompts.last_rows, prompts.last_offsets, 1
                u, q, k, v = layer.project_rows(x, rows, self.kernels)
                x, until = x[rows], None if until is None else until[rows]
            else:
                u, q, k, v = layer.project(x, self.kernels)
            if pool is not None:
                self.kernels.paged_write(k, v, prompts.slots, **pool.layer(i))
            biased = _biased(layer, 0, until, prompts.times)
            a = self._attend(q, k, v, offsets, None, longest, prompts.longest, kv_offsets=prompts.offsets, **biased)
            x = layer.combine(x, u, a, self.kernels)
        return x

    def last_layer(self, x: Tensor, prompts: PromptKeys, pages: Pages) -> Tensor:
        """Finish a prefill: return the output [B, E] of the last layer for each prompt's last token, its input x.

        The layer's keys and values of the tokens before are in pages. The model has no biases, which engine vllm
        refuses. A prompt of no tokens is room in a CUDA graph.
        """
        layer = self.layers[-1]
        assert isinstance(layer, HSTULayer) and not _biased(layer)
        u, q, k, v = layer.project(x, self.kernels)
        offsets = torch.arange(len(x) + 1, device=x.device)
        a = self._attend(
            q,
            k,
            v,
            offsets,
            None,
            1,
            prompts.longest,
            kv_offsets=offsets,
            **pages.layer(len(self.layers) - 1),
            page_table=prompts.page_table,
            paged_lengths=(prompts.lengths - 1).clamp(min=0),
        )
        return layer.combine(x, u, a, self.kernels)

    def step(
        self, prompts: PromptKeys, pages: Pages, level: int, codes: Tensor, before: Sequence[Sequence[Codes]]
    ) -> tuple[Tensor, list[Codes]]:
        """Decode: encode one more code of each beam, with the prompts' keys and values in pages.

        codes: int64 [B, W], of `level`. before: the keys and values of the beams' earlier codes, for each earlier level
        and each layer, in the order of these beams. Returns [B * W, E] and this level's keys and values.
        """
        B, W = codes.shape
        position = (prompts.lengths + level).repeat_interleave(W)
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
                kv_offsets=offsets,
                **pages.layer(i),
                page_table=prompts.page_table,
                paged_lengths=prompts.lengths,
                **_biased(layer, level),
            )
            for m, earlier in enumerate(before):
                a = a + self.own_term(q, *earlier[i], _bias_at(layer, level - m))
            own.append((k.contiguous(), v.contiguous()))
            x = layer.combine(x, u, a, self.kernels)
        return x, own

    def logits(self, x: Tensor, level: int) -> Tensor:
        """Return fp32 logits [rows, codes of the level] of vectors [rows, E]."""
        y = self.norm(x, self.kernels)
        table = self.token_table[self.offsets[level] : self.offsets[level + 1]].float()
        found = F.linear(y.float(), F.normalize(table) if self.item_norm else table)
        return found if self.group is None else self.group.first_(found)  # one rank decides which beams go on

    def log_probabilities(self, x: Tensor, level: int) -> Tensor:
        """Return fp32 log-probabilities [rows, codes of the level] of vectors [rows, E]."""
        return torch.log_softmax(self.logits(x, level), dim=-1)

    def own_term(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float) -> Tensor:
        """Return the term of an earlier code in each beam's attention, SiLU(alpha q k + bias) v / N, in fp32."""
        score = (q.float() * k.float()).sum(-1, keepdim=True) * self.alpha + bias
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
        **keys: Any,
    ) -> Tensor:
        """Compute attention. keys: kv_offsets, and what is about the keys of this call alone."""
        attended: Tensor = self.kernels.hstu_attention(
            q,
            k,
            v,
            q_offsets=offsets,
            num_targets=targets,
            max_q_len=max_q_len,
            max_kv_len=max_kv_len,
            scaling_seqlen=self.config.scaling_seqlen,
            alpha=self.alpha,
            contextual_seq_len=0,
            max_attn_len=0,
            **keys,
        )
        return attended


def _biased(
    layer: HSTULayer, level: int = 0, row_times: Tensor | None = None, column_times: Tensor | None = None
) -> dict[str, Any]:
    """Return the option of attention that has a layer's biases, if it has any.

    level: of a search's codes, or 0 for a prompt. Attention places the codes of a level together at the prompt's end,
    that is at the distance of level 0. So the table of a further level is shifted, except for a code and itself.
    """
    table: Tensor | None = layer.position_bias
    if table is None and layer.time_bias is None:
        return {}
    if table is not None and level:
        table = torch.cat([table[:1], table[min(level + 1, len(table) - 1) :]])
    return {
        "extras": Extras(position_bias=table, time_bias=layer.time_bias, row_times=row_times, column_times=column_times)
    }


def _bias_at(layer: HSTULayer, distance: int) -> Tensor | float:
    """Return the bias of a score at a distance, fp32 without dimensions, or 0 without a table."""
    table = layer.position_bias
    return 0.0 if table is None else table[min(distance, len(table) - 1)].float()
