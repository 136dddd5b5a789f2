"""The networks that can learn to generate: HSTU, and a decoder-only Transformer to compare it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from grbench.training.config import TrainConfig
from grengines.models.decoder.model import Decoder
from grengines.models.hstu import autograd
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.weights import save_weights
from grengines.runtime import atomic_io
from grengines.semantic.ids import SemanticIds
from grkernels.operators import Operators


class Network(Protocol):
    """A model over the tokens of semantic IDs, for autograd."""

    @property
    def module(self) -> nn.Module:
        """The parameters."""

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Return the part of a history's tokens that the model reads."""

    @property
    def timed(self) -> bool:
        """True if `hidden` needs times."""

    def hidden(
        self, tokens: Tensor, dropout: float = 0.0, times: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Return the row of each token, [B, n, E], of prompts padded on the right (int64 [B, n]).

        times and kept: as of `autograd.generator_hidden`.
        """

    def features(self, hidden: Tensor) -> Tensor:
        """Return the fp32 vectors [rows, E] whose products with token vectors are logits."""

    def table(self, level: int) -> Tensor:
        """Return the token vectors of a level [codes, E]."""

    def save(self, path: Path, ids: SemanticIds) -> None:
        """Write the weights file that engines load. Raises OSError."""


def product(y: Tensor, table: Tensor) -> Tensor:
    """Return y [rows, E] times the vectors of a table [n, E], in fp32 also where the layers compute in bf16."""
    with torch.autocast(y.device.type, enabled=False):
        return F.linear(y.float(), table.float())


def network(config: TrainConfig, ids: SemanticIds, device: torch.device) -> Network:
    """Return the network of `config.model`, from `retrieval.weights` or with weights to train from."""
    if isinstance(config.model, HSTUConfig):
        return HSTUNetwork(config, ids, device)
    return TransformerNetwork(config, ids, device)


class HSTUNetwork:
    """HSTUGenerator."""

    def __init__(self, config: TrainConfig, ids: SemanticIds, device: torch.device) -> None:
        self.module = HSTUGenerator.build(
            config.model, ids.sizes, Operators.eager(), seed=config.seed, device=device, dtype=torch.float32,
            weights=config.retrieval.weights,
        )  # fmt: skip
        if config.retrieval.weights is None:
            autograd.start(self.module, config.seed)
        self.module.requires_grad_()

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        return self.module.prompt(tokens)

    @property
    def timed(self) -> bool:
        return self.module.timed

    def hidden(
        self, tokens: Tensor, dropout: float = 0.0, times: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        return autograd.generator_hidden(self.module, tokens, dropout, times, kept)

    def features(self, hidden: Tensor) -> Tensor:
        return autograd.generator_features(self.module, hidden)

    def table(self, level: int) -> Tensor:
        return autograd.generator_table(self.module, level)

    def save(self, path: Path, ids: SemanticIds) -> None:
        save_weights(self.module, path, ids)


class TransformerNetwork:
    """A decoder-only Transformer, which with one level of codes is like SASRec: Qwen3's layers over item vectors."""

    def __init__(self, config: TrainConfig, ids: SemanticIds, device: torch.device) -> None:
        self._decoder = Decoder.build(
            config.model, ids.sizes, seed=config.seed, device=device, dtype=torch.float32,
            weights=config.retrieval.weights,
        )  # fmt: skip
        self.module: Any = self._decoder.layers
        if config.retrieval.weights is None:
            _start(self.module, config.seed)
        self.module.requires_grad_()

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        return self._decoder.prompt(tokens)

    timed = False

    def hidden(
        self, tokens: Tensor, dropout: float = 0.0, times: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        x = F.embedding(tokens, self._decoder.token_table)
        x = F.dropout(x if kept is None else x * kept[:, :, None], dropout)
        self.module.train(dropout > 0)
        for layer in self.module.layers:
            layer.self_attn.attention_dropout = dropout
        found: Tensor = self.module(inputs_embeds=x, use_cache=False).last_hidden_state
        return found

    def features(self, hidden: Tensor) -> Tensor:
        return hidden.float()  # the last norm is a part of the layers

    def table(self, level: int) -> Tensor:
        first = self._decoder.offsets[level]
        return self._decoder.token_table[first : self._decoder.offsets[level + 1]]

    def save(self, path: Path, ids: SemanticIds) -> None:
        named = {f"model.{name}": p.detach().cpu().contiguous() for name, p in self.module.state_dict().items()}
        with atomic_io.replacing(path) as made:
            save_file(named, str(made), metadata={"format": "pt", "semantic_ids": ids.digest})


def _start(module: nn.Module, seed: int) -> None:
    """Draw weights to train from, as `autograd.start` does for HSTU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                std = autograd.START if "embed_tokens" in name else p.shape[1] ** -0.5
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))
