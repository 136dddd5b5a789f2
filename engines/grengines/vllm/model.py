"""The models that vLLM loads: HSTU over semantic IDs, and Qwen3 as a decoder over them. Both return hidden rows."""

from __future__ import annotations

from collections.abc import Iterable, Set
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from grengines.models.decoder.model import log_probabilities
from grengines.models.hstu import beam
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator, PromptKeys
from grengines.models.hstu.model import HSTULayer
from grengines.runtime.timing import Mark
from grengines.semantic.search import explore
from grengines.semantic.trie import TensorTrie
from grengines.vllm import compat
from grengines.vllm.attention import BeamKeys, PagedAttention, StepMetadata
from grengines.vllm.hstu_attention import HSTUAttentionBackend
from grengines.vllm.levels import Levels
from grengines.vllm.softmax_attention import SoftmaxAttentionBackend
from grkernels.operators import Operators


class _Found(NamedTuple):
    """Items and scores of one search, on the host once `copied` is reached."""

    rows: Tensor  # float64 [k, 2]
    copied: Mark


class SearchPooler(compat.Pooler):
    """A pooler that runs all levels of the searches whose prompts end in a step. It returns nothing to vLLM.

    first_layer: the model's first attention, which keeps the step's metadata.
    """

    def __init__(self, first_layer: Any) -> None:
        super().__init__()
        self._attention: PagedAttention = first_layer.impl
        self.levels: Levels | None = None  # from the engine's start on
        self.steps = 0  # of vLLM's scheduler with tokens, since then
        self._found: dict[str, _Found] = {}  # by request

    def get_supported_tasks(self) -> Set[Any]:
        return {"plugin"}

    def forward(self, hidden_states: Tensor, pooling_metadata: compat.PoolingMetadata) -> list[Tensor]:
        """Search from the last rows of prompts. hidden_states: [n, E]. A chunk may end before its prompt does."""
        requests = [params.extra_kwargs for params in pooling_metadata.pooling_params]
        nothing = [hidden_states.new_empty(0)] * len(requests)
        cursor, step = pooling_metadata.get_pooling_cursor(), self._attention.step
        ended = (cursor.prompt_lens_cpu == cursor.seq_lens_cpu).nonzero()[:, 0]
        if self.levels is None or step is None:
            return nothing
        self.steps += 1
        if not len(ended):
            return nothing
        last, lengths = hidden_states[cursor.last_token_indices_gpu.long()], step.lengths[: len(requests)].long()
        table = step.block_table[: len(requests)]
        if len(ended) < len(requests):
            some = ended.to(last.device, non_blocking=True)
            last, lengths, table = last[some], lengths[some], table[some]
        prompts = PromptKeys(lengths, table, int(cursor.seq_lens_cpu.max()))
        found = self.levels(last, prompts)
        on_host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        on_host.copy_(found, non_blocking=True)
        copied = Mark(found.device)
        for row, i in zip(on_host, ended.tolist(), strict=True):
            self._found[requests[i]["name"]] = _Found(row, copied)
        return nothing

    def take(self, name: str) -> np.ndarray:
        """Return what a request that finished found, float64 [k, 2]: items and scores. Waits for its step alone."""
        found = self._found.pop(name)
        found.copied.synchronize()
        rows: np.ndarray = found.rows.numpy()
        return rows


class LayerPages:
    """The pages of each layer, views of vLLM's. Satisfies grengines.models.hstu.generator.Pages."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers

    def layer(self, i: int) -> dict[str, Tensor]:
        """Return what Pages.layer does; keys and values have one width d = dqk = dv."""
        layer: Any = self._layers[i]
        return compat.PageBackend.split(compat.pages_of(layer), layer.impl.head_size, layer.impl.stored)


class HSTUForRetrieval(nn.Module):
    """The model of grengines.models.hstu.generator, with vLLM's paged attention in its layers.

    A search reads the last token of each prompt alone. So for a pooler the last layer only writes keys and values
    within vLLM's step, whose sizes CUDA graphs fix, and the search begins with the rest of it, for the last tokens.

    The folder's config.json holds HSTUConfig (`hstu`), the codes of each level (`sizes`), the variant of each operator
    family (`kernels`), and int8 or fp8 for pages in 8 bits (`stored`); its safetensors are HSTUGenerator's. Serves
    ordinary generation too.
    """

    is_pooling_model: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: compat.VllmConfig, prefix: str = "") -> None:
        super().__init__()
        described = vllm_config.model_config.hf_config
        config = HSTUConfig(**described.hstu)
        sizes = tuple(described.sizes)
        self.beam_tokens = described.beam_tokens
        self.operators = Operators.of(described.kernels)
        self.kernels = dict(described.kernels)  # for records
        self.generator = HSTUGenerator(config, sizes, self.operators).requires_grad_(False)
        self.finishes_later = compat.pools(vllm_config)
        layer = compat.EightBitAttention if described.stored else compat.Attention
        self.attention = nn.ModuleList(
            layer(
                config.heads,
                config.qk_dim,
                self.generator.alpha,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{i}.attention" if prefix else f"layers.{i}.attention",
                attn_backend=HSTUAttentionBackend,
                kernels=self.operators,
                stored=described.stored,
                scaling_seqlen=config.scaling_seqlen,
                attends=not (self.finishes_later and i == config.layers - 1),
            )
            for i in range(config.layers)
        )
        self.first_layer = str(self.attention[0].layer_name)
        self.pooler = SearchPooler(self.attention[0])

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return [n, E], the vectors of tokens alone; `forward` adds the positions."""
        return self.generator.token_table[input_ids.long()]

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Encode every token from those before it. Return [n, E], for a pooler what the last layer takes."""
        self._find_keys()
        generator = self.generator
        # While vLLM measures memory positions go up to its own limit.
        place = positions.clamp(max=generator.position_table.shape[0] - 1)
        x = self.embed_input_ids(input_ids) + generator.position_table[place]
        for i, (layer, attention) in enumerate(zip(generator.layers, self.attention, strict=True)):
            assert isinstance(layer, HSTULayer)
            if self.finishes_later and i == len(generator.layers) - 1:
                _, _, k, v = layer.project_rows(x, x.new_empty(0, dtype=torch.int64), generator.kernels)
                attention(k, k, v)
                return x
            u, q, k, v = layer.project(x, generator.kernels)
            a = attention(q, k, v).unflatten(1, (layer.heads, -1))
            x = layer.combine(x, u, a, generator.kernels)
        return x

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of every token, fp32 [rows, V]."""
        generator = self.generator
        y = generator.norm(hidden_states, generator.kernels)
        return nn.functional.linear(y.float(), generator.token_table.float())

    def search(
        self, last: Tensor, prompts: PromptKeys, trie: TensorTrie, *, width: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search as the native engine. The prompts' keys are in vLLM's pages, and those of beams are not."""
        pages = LayerPages(self.attention)
        last = self.generator.last_layer(last.clone(), prompts, pages)  # combine overwrites its argument
        return beam.levels(self.generator, trie, last, prompts, pages, width=width, k=k)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors, and return their names. Raises ValueError for a tensor that the model lacks."""
        parameters = dict(self.generator.named_parameters())
        loaded = set()
        with torch.no_grad():
            for name, tensor in weights:
                if name not in parameters:
                    raise ValueError(f"unexpected tensor {name}; the model has {', '.join(sorted(parameters))}")
                parameters[name].copy_(tensor)
                loaded.add(f"generator.{name}")
        return loaded

    @compat.break_capture
    def _find_keys(self) -> None:
        """Add the keys that rows see to the step's metadata. Never part of a piecewise graph."""
        metadata = compat.metadata_of_step(self.first_layer)
        if metadata is not None:
            metadata.find_hstu_keys()


class DecoderForRetrieval(compat.Qwen3ForCausalLM):
    """vLLM's Qwen3 over semantic IDs.

    The folder's config.json is transformers' for Qwen3, with the codes of each level (`sizes`), DecoderConfig's
    `vocabulary`, the variant of each operator family that serves beams (`kernels`), and the places for their keys and
    values that every request has behind its prompt (`beam_tokens`).
    """

    is_pooling_model: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: compat.VllmConfig, prefix: str = "") -> None:
        described = vllm_config.model_config.hf_config
        operators = Operators.of(described.kernels)
        with compat.Qwen3Attention(SoftmaxAttentionBackend, kernels=operators):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.operators, self.beam_tokens, self.sizes = operators, described.beam_tokens, tuple(described.sizes)
        self.vocabulary: int | None = described.vocabulary
        layers = [m for m in self.modules() if isinstance(m, compat.Attention)]
        self._vllm_config, self._layers = vllm_config, [str(layer.layer_name) for layer in layers]
        self.flash = layers[0].impl.flash
        ours = dict(described.kernels)
        alone = f"FlashAttention {self.flash.keywords['fa_version']}" if self.flash else ours["beam_attention"]
        self.kernels = ours | {"attention of prompts alone": alone, "others": "vLLM's"}  # for records
        self.pooler = SearchPooler(layers[0])
        self._table: Tensor | None = None  # of all tokens, from the first search on

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Encode every token from those before it. Return [n, E] after the final norm."""
        self._find_keys(positions)
        encoded: Tensor = self.model(input_ids, positions)
        return encoded

    def search(
        self, last: Tensor, prompts: PromptKeys, trie: TensorTrie, *, width: int, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search with the keys and values of beams behind their prompts, in vLLM's pages."""
        page, table = self._vllm_config.cache_config.block_size, prompts.page_table.long()
        offsets, B, stored = [0, *accumulate(self.sizes)], len(last), 0
        slots = torch.empty(B, 1, 0, dtype=torch.int64, device=last.device)  # of each beam's codes, the last one first

        def advance(level: int, parents: Tensor | None, codes: Tensor | None) -> Tensor:
            nonlocal slots, stored
            if parents is None or codes is None:
                return self._log_probabilities(last, level)
            place = prompts.lengths[:, None] + stored + torch.arange(codes.shape[1], device=last.device)
            new = table.gather(1, place // page) * page + place % page
            new = new.masked_fill(prompts.lengths[:, None] == 0, -1)  # room for a search, in a graph
            slots = torch.cat([new[:, :, None], slots.gather(1, parents[:, :, None].expand(-1, -1, level - 1))], 2)
            stored += codes.shape[1]
            position = (prompts.lengths + level - 1).repeat_interleave(codes.shape[1])
            step = self._step(prompts, slots)
            with compat.forward_context(self._vllm_config, step, self._layers):
                hidden = self.model((codes + offsets[level - 1]).reshape(-1), position)
            return self._log_probabilities(hidden, level)

        return explore(advance, trie, B, width=width, k=k)

    def _step(self, prompts: PromptKeys, slots: Tensor) -> StepMetadata:
        """Return the metadata of one code of each beam. slots: int64 [B, W, codes so far], the new one first."""
        B, W, terms = slots.shape
        limits = prompts.lengths.clamp(min=1).int().repeat_interleave(W)
        own = slots.reshape(B * W, terms).contiguous()
        return StepMetadata(
            B * W,
            starts=torch.arange(0, B * W + 1, W, dtype=torch.int32, device=slots.device),
            lengths=prompts.lengths.int(),
            block_table=prompts.page_table,
            slots=own[:, 0].contiguous(),
            max_query_len=W,
            max_seq_len=prompts.longest + W,
            cached=True,
            beams=BeamKeys(limits, own),
        )

    def _log_probabilities(self, hidden: Tensor, level: int) -> Tensor:
        if self._table is None:
            self._table = compat.of_all_ranks(self.model.embed_tokens.weight)
        found = log_probabilities(hidden, self._table, self.sizes, level, self.vocabulary)
        return compat.from_first_rank(found)  # one rank decides which beams go on

    @compat.break_capture
    def _find_keys(self, positions: Tensor) -> None:
        """Add the keys that rows see to the step's metadata. FlashAttention does not need them."""
        metadata = compat.metadata_of_step(self._layers[0])
        if metadata is not None and (self.flash is None or torch.cuda.is_current_stream_capturing()):  # flash: on a GPU
            metadata.find_beam_keys(positions)
