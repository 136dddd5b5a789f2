"""The fp32 reference of decoders: one request at a time, its prompt encoded once, nothing padded or copied.

All beams are one sequence after the prompt. A mask lets every code see the prompt, the earlier codes of its own beam,
and itself. A row's softmax is then the same as without the other beams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from grengines.api import Request, Retrieval
from grengines.models.decoder.config import DecoderConfig
from grengines.models.decoder.model import Decoder
from grengines.models.reference import GenerationReference
from grengines.runtime.device import DTYPES
from grengines.semantic.search import Beams, check_width, explore
from grengines.semantic.trie import TensorTrie

CHUNK = 1024  # tokens of a prompt encoded at once, which bounds the memory of scores


class Tree:
    """A prompt and the beams after it, in one cache."""

    def __init__(self, decoder: Decoder, prompt: np.ndarray) -> None:
        from transformers import DynamicCache

        self._decoder, self._length = decoder, len(prompt)
        self._cache = DynamicCache(config=decoder.layers.config)
        device = decoder.token_table.device
        tokens = torch.from_numpy(prompt).to(device)[None]
        for begin in range(0, len(prompt), CHUNK):
            chunk = tokens[:, begin : begin + CHUNK]
            out = decoder.layers(input_ids=chunk, past_key_values=self._cache, use_cache=True)
        self.hidden = out.last_hidden_state[:, -1]  # [beams, E]: one beam, the prompt
        self._seen = torch.zeros(1, 0, dtype=torch.bool, device=device)  # [beams, codes]: the own ones

    def grow(self, parents: Tensor, codes: Tensor, level: int) -> None:
        """Append a code: beam i becomes beam parents[i] followed by codes[i] of the level, int64 [W]."""
        W, decoder = len(codes), self._decoder
        self._seen = torch.cat([self._seen[parents], torch.eye(W, dtype=torch.bool, device=codes.device)], dim=1)
        visible = torch.nn.functional.pad(self._seen, (self._length, 0), value=True)
        out = decoder.layers(
            input_ids=(codes + decoder.offsets[level])[None],
            position_ids=torch.full((1, W), self._length + level, device=codes.device),
            attention_mask={"full_attention": visible[None, None]},
            past_key_values=self._cache,
            use_cache=True,
        )
        self.hidden = out.last_hidden_state[0]


class DecoderReference(GenerationReference[Decoder]):
    """Items that a decoder should find, by PyTorch in any precision."""

    def __init__(self, model: DecoderConfig, seed: int, retrieval: Retrieval, device: torch.device | str) -> None:
        super().__init__(retrieval, device)
        sizes, weights = retrieval.ids.sizes, retrieval.weights
        self._exact = Decoder.build(model, sizes, seed=seed, device=device, dtype=torch.float32, weights=weights)

    @torch.inference_mode()
    def prefix_scores(self, request: Request, items: np.ndarray) -> np.ndarray:
        decoder, ids = self._exact, self._retrieval.ids
        codes = torch.from_numpy(ids.codes[items].astype(np.int64)).to(self._device)
        tree = Tree(decoder, decoder.prompt(self._retrieval.prompt(request)))
        parents = torch.zeros(len(items), dtype=torch.int64, device=self._device)
        columns = []
        for level in range(ids.levels):
            logs = _log_probabilities(decoder, tree.hidden, level)[parents]
            columns.append(logs.gather(1, codes[:, level, None])[:, 0])
            if level + 1 < ids.levels:
                tree.grow(parents, codes[:, level], level)
                parents = torch.arange(len(items), device=self._device)
        scores: np.ndarray = torch.stack(columns, dim=1).cumsum(1).cpu().numpy()
        return scores

    @contextmanager
    def _variant(self, precision: str, stored: str, blind: bool) -> Iterator[Decoder]:
        assert not stored, "no engine keeps a decoder's keys and values in 8 bits"
        decoder = self._exact if precision == "fp32" else self._exact.to(DTYPES[precision])
        with zero_attention(decoder) if blind else nullcontext():
            yield decoder

    def _search(self, model: Decoder, prompts: Sequence[np.ndarray], width: int, k: int) -> Iterable[Beams]:
        return (search(model, self._trie, tokens, width=width, k=k) for tokens in prompts)


@contextmanager
def zero_attention(decoder: Decoder) -> Iterator[None]:
    """Make attention return zeros: its output goes to `o_proj` only."""
    outputs = [layer.self_attn.o_proj for layer in decoder.layers.layers]
    hooks = [o.register_forward_pre_hook(lambda _, given: (torch.zeros_like(given[0]),)) for o in outputs]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def search(decoder: Decoder, trie: TensorTrie, tokens: np.ndarray, *, width: int, k: int) -> Beams:
    """Return the k most likely items after one prompt (int64 [tokens])."""
    check_width(width, k)
    tree = Tree(decoder, decoder.prompt(tokens))

    def advance(level: int, parents: Tensor | None, codes: Tensor | None) -> Tensor:
        if parents is not None and codes is not None:
            tree.grow(parents[0], codes[0], level - 1)
        return _log_probabilities(decoder, tree.hidden, level)

    return Beams(*(x.cpu().numpy() for x in explore(advance, trie, 1, width=width, k=k)))


def _log_probabilities(decoder: Decoder, x: Tensor, level: int) -> Tensor:
    """Return what Decoder.log_probabilities returns, by one softmax over all logits in fp32."""
    if decoder.vocabulary is None:
        return torch.log_softmax(decoder.logits(x, level), dim=-1)
    logits = torch.nn.functional.linear(x.float(), decoder.token_table[: decoder.vocabulary].float())
    return torch.log_softmax(logits, dim=-1)[:, decoder.offsets[level] : decoder.offsets[level + 1]]
