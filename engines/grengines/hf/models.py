"""Models as transformers runs them: padded batches of tokens, a mask, and a cache that every call appends to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from grengines.models.decoder.model import Decoder
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.model import HSTULayer

if TYPE_CHECKING:
    from transformers import Cache


class PaddedModel(ABC):
    """A model as the generate loop uses it."""

    def __init__(self, model: Decoder | HSTUGenerator) -> None:
        self.offsets, self.prompt, self.log_probabilities = model.offsets, model.prompt, model.log_probabilities

    @abstractmethod
    def encode(self, tokens: Tensor, real: Tensor, cache: Cache) -> Tensor:
        """Return the vector of each row's last token [rows, E].

        tokens: int64 [rows, n], appended to the cache. real: bool [rows, cached + n], False for padding.
        """


class PaddedDecoder(PaddedModel):
    """Qwen3Model with its own cache and attention, PyTorch's SDPA."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self._layers = decoder.layers

    def encode(self, tokens: Tensor, real: Tensor, cache: Cache) -> Tensor:
        out = self._layers(
            input_ids=tokens,
            attention_mask=real.long(),
            position_ids=_positions(real, tokens.shape[1]),
            past_key_values=cache,
            use_cache=True,
        )
        last: Tensor = out.last_hidden_state[:, -1]
        return last


class PaddedHSTU(PaddedModel):
    """HSTU's layers with dense attention over [rows, heads, n, cached + n] in eager PyTorch."""

    def __init__(self, generator: HSTUGenerator) -> None:
        super().__init__(generator)
        self._generator = generator

    def encode(self, tokens: Tensor, real: Tensor, cache: Cache) -> Tensor:
        model = self._generator
        rows, n = tokens.shape
        x = model.token_table[tokens] + model.position_table[_positions(real, n)]
        x = x.flatten(0, 1)
        keys = real.shape[1]
        causal = torch.ones(n, keys, dtype=torch.bool, device=real.device).tril(keys - n)
        hidden = ~(causal & real[:, None, None])  # [rows, 1, n, keys]
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, HSTULayer)
            u, q, k, v = layer.project(x, model.kernels)
            q, k, v = (t.unflatten(0, (rows, n)).transpose(1, 2) for t in (q, k, v))
            k, v = cache.update(k, v, i)
            a = _silu_attention(q, k, v, hidden, model.alpha, model.config.scaling_seqlen)
            x = layer.combine(x, u, a.transpose(1, 2).flatten(0, 1), model.kernels)
        last: Tensor = x.unflatten(0, (rows, n))[:, -1]
        return last


def _silu_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, alpha: float, scaling_seqlen: int) -> Tensor:
    """Return (SiLU(alpha q k^T) / N) v [rows, H, n, dv], where a score is zero if `hidden` is set.

    SiLU is computed in fp32. One factor of N, a power of two of half its bits, divides before the sum. The rest divides
    after it, in fp32. So neither overflows fp16.
    """
    before = 2.0 ** -(scaling_seqlen.bit_length() // 2)
    scores = (q @ k.transpose(2, 3)).float() * alpha
    weights = (F.silu(scores) * before).masked_fill(hidden, 0.0).to(v.dtype)
    return ((weights @ v).float() / (scaling_seqlen * before)).to(v.dtype)


def _positions(real: Tensor, n: int) -> Tensor:
    """Return the positions of the last n tokens, counted from each row's first real token: int64 [rows, n]."""
    return (real.cumsum(1) - 1).clamp(min=0)[:, -n:]
