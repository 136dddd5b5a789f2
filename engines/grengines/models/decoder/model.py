"""A decoder over semantic IDs: transformers' Qwen3Model, its tokens, and probabilities of the next code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grengines.api import UnavailableError
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.weights import shape, tensors
from grengines.semantic.ids import prompt_of

if TYPE_CHECKING:
    from transformers import Qwen3Model


# Logits that are computed at once, of all rows together. In fp32 they take 34 MB, less than the L2 cache of an H100.
TOGETHER = 1 << 23


class Decoder:
    """A decoder with HSTUGenerator's tokens: level offset + code, and a last one that begins an empty prompt.

    `layers`, called with tokens, returns vectors after the final norm. The output layer's weights are the token table.
    """

    def __init__(
        self, layers: Qwen3Model, sizes: Sequence[int], max_positions: int, vocabulary: int | None = None
    ) -> None:
        self.layers, self.sizes, self.max_positions, self.vocabulary = layers, tuple(sizes), max_positions, vocabulary
        self.offsets = [0, *accumulate(sizes)]

    @classmethod
    def build(
        cls,
        config: DecoderConfig,
        sizes: Sequence[int],
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype,
        weights: str | None = None,
    ) -> Decoder:
        """Build a decoder with the weights of a safetensors file, or random ones from the seed (decoder/weights.py).

        Raises UnavailableError without transformers, ValueError for weights or sizes that don't fit.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
        try:
            from transformers import Qwen3Config, Qwen3Model
        except ImportError as e:
            raise UnavailableError(f"decoders need transformers ({e}); pip install 'grbench[hf]'") from None
        described = Qwen3Config.from_dict(shape(config, sizes), attn_implementation="sdpa")
        named = tensors(config, sizes, seed=seed, dtype=dtype, weights=weights)
        layers = _assembled(Qwen3Model, described, {n.removeprefix("model."): t.to(device) for n, t in named.items()})
        layers.rotary_emb = type(layers.rotary_emb)(described).to(device)
        return cls(layers, sizes, config.max_positions, config.vocabulary)

    def to(self, dtype: torch.dtype) -> Decoder:
        """Return a copy in this precision."""
        named = {name: tensor.to(dtype) for name, tensor in self.layers.state_dict().items()}
        layers = _assembled(type(self.layers), self.layers.config, named)
        layers.rotary_emb = self.layers.rotary_emb
        return Decoder(layers, self.sizes, self.max_positions, self.vocabulary)

    @property
    def token_table(self) -> Tensor:
        """Vectors of all tokens [rows, E]."""
        table: Tensor = self.layers.embed_tokens.weight
        return table

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Return the last whole items within max_positions tokens int64 [n], or the begin token if there are none."""
        return prompt_of(tokens, self.sizes, self.max_positions)

    def logits(self, x: Tensor, level: int) -> Tensor:
        """Return fp32 logits [rows, codes of the level] of vectors [rows, E] after the final norm."""
        return level_logits(x, self.token_table, self.sizes, level)

    def log_probabilities(self, x: Tensor, level: int) -> Tensor:
        """Return fp32 log-probabilities [rows, codes of the level] of vectors [rows, E], as the function does."""
        return log_probabilities(x, self.token_table, self.sizes, level, self.vocabulary)


def _assembled(kind: Any, described: Any, named: dict[str, Tensor]) -> Qwen3Model:
    """Return a Qwen3Model of these tensors. Its rotary positions are no parameters and stay in fp32."""
    with torch.device("meta"):  # no initialisation
        layers = kind(described)
    layers.load_state_dict(named, assign=True)
    return layers.requires_grad_(False).eval()


def level_logits(x: Tensor, token_table: Tensor, sizes: Sequence[int], level: int) -> Tensor:
    """Return fp32 logits [rows, codes of the level].

    x: [rows, E], after the final norm. token_table: [at least the codes of all levels, E].
    """
    first = sum(sizes[:level])
    return F.linear(x.float(), token_table[first : first + sizes[level]].float())


def log_probabilities(
    x: Tensor, token_table: Tensor, sizes: Sequence[int], level: int, vocabulary: int | None
) -> Tensor:
    """Return fp32 log-probabilities [rows, codes of the level] of the next token.

    x, token_table: as of `level_logits`. vocabulary: the softmax is over this number of first rows of the table; None:
    over the codes of the level.
    """
    logits = level_logits(x, token_table, sizes, level)
    if vocabulary is None:
        return torch.log_softmax(logits, dim=-1)
    return logits - log_normaliser(x, token_table[:vocabulary])[:, None]


def log_normaliser(x: Tensor, table: Tensor) -> Tensor:
    """Return log sum exp(table x) of each row of x, fp32 [rows]. x: [rows, E]. table: [V, E].

    The logits [rows, V] are computed in parts of TOGETHER. Nothing waits for the device, so a CUDA graph can hold it.
    """
    tokens = max(TOGETHER // max(len(x), 1) // 64 * 64, 64)  # 64: tiles of a matrix product
    parts = []
    for some in table.split(tokens):
        logits = _products(x, some)
        # log_softmax is one pass; logsumexp writes the exponentials and reads them again.
        parts.append(logits[:, 0] - torch.log_softmax(logits, dim=-1)[:, 0])
    return torch.logsumexp(torch.stack(parts), dim=0)


def _products(x: Tensor, table: Tensor) -> Tensor:
    """Return x table^T [rows, V] in fp32. On a GPU the tensor cores take 16 bits as they are and sum in fp32."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, table.T, out_dtype=torch.float32)
    return F.linear(x.float(), table.float())
