"""The models that vLLM loads: HSTU over semantic IDs, and Qwen3 as a decoder over them. Both return hidden rows."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from grengines.models.decoder.model import level_logits
from grengines.models.hstu.config import HSTUConfig
from grengines.models.hstu.generator import HSTUGenerator
from grengines.models.hstu.model import EPS, HSTULayer
from grengines.vllm import compat
from grengines.vllm.hstu_attention import HSTUAttentionBackend
from grengines.vllm.rows import BeamRows, StepRows
from grengines.vllm.softmax_attention import SoftmaxAttentionBackend
from grkernels.operators import Operators


@dataclass
class OutputBuffer:
    """Hidden rows of one vLLM request: the row at place p of its sequence is copied to rows[p - first]."""

    rows: Tensor  # [wanted, E]
    first: int
    arrived: np.ndarray  # bool [wanted]


class RowPooler(compat.Pooler):
    """A pooler that copies the wanted hidden rows to the buffers that requests name. It returns nothing.

    Chunks may end anywhere, and rows come again after a preemption: the place of a row determines where it is copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, OutputBuffer] = {}

    def get_supported_tasks(self) -> Set[Any]:
        return {"plugin"}

    def forward(self, hidden_states: Tensor, pooling_metadata: compat.PoolingMetadata) -> list[Tensor]:
        """Copy the rows of one step. hidden_states: [n, E]."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        at = 0
        for params, n, end in zip(pooling_metadata.pooling_params, scheduled, ends, strict=True):
            if params.extra_kwargs is not None:  # None while vLLM measures memory
                buffer = self.buffers[params.extra_kwargs["buffer"]]
                begin = max(end - n, buffer.first)
                if begin < end:
                    place = slice(begin - buffer.first, end - buffer.first)
                    buffer.rows[place] = hidden_states[at + begin - (end - n) : at + n]
                    buffer.arrived[place] = True
            at += n
        nothing = hidden_states.new_empty(0)
        return [nothing] * len(scheduled)


class HSTUForRetrieval(nn.Module):
    """The model of grengines.models.hstu.generator, with vLLM's paged attention in its layers.

    The folder's config.json holds HSTUConfig (`hstu`), the codes of each level (`sizes`), the most rows of beams after
    a prompt (`max_rows`) and the variant of each operator family (`kernels`); its safetensors are HSTUGenerator's.
    Serves ordinary generation too: without rows of beams every token sees those before it.
    """

    is_pooling_model: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: compat.VllmConfig, prefix: str = "") -> None:
        super().__init__()
        described = vllm_config.model_config.hf_config
        config = HSTUConfig(**described.hstu)
        sizes = tuple(described.sizes)
        self.beams = BeamRows(sizes, described.max_rows)
        self.operators = Operators.of(described.kernels)
        self.kernels = dict(described.kernels)  # for records
        self.generator = HSTUGenerator(config, sizes, self.operators).requires_grad_(False)
        self.attention = nn.ModuleList(
            compat.Attention(
                config.heads,
                config.qk_dim,
                self.generator.alpha,
                cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{i}.attention" if prefix else f"layers.{i}.attention",
                attn_backend=HSTUAttentionBackend,
                kernels=self.operators,
                scaling_seqlen=config.scaling_seqlen,
            )
            for i in range(config.layers)
        )
        self.first_layer = str(self.attention[0].layer_name)
        # Requests in flight that have rows of beams, as the scheduler sets it. None: unknown, while vLLM warms up.
        self.beam_requests: int | None = None
        self.pooler = RowPooler()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return [n, E], the vectors of tokens alone; `forward` adds the positions."""
        return self.generator.token_table[input_ids.long() % self.beams.vocabulary]

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Encode every row from the keys that it sees. Return [n, E]."""
        self._find_keys(input_ids, positions)
        generator, step = self.generator, StepRows.of(self.beams, self.operators, input_ids, positions)
        # While vLLM measures memory positions go up to its own limit.
        place = step.positions.clamp(max=generator.position_table.shape[0] - 1)
        x = generator.token_table[step.tokens] + generator.position_table[place]
        for layer, attention in zip(generator.layers, self.attention, strict=True):
            assert isinstance(layer, HSTULayer)
            u, q, k, v = layer.project(x, generator.kernels)
            a = attention(q, k, v).unflatten(1, (layer.heads, -1))
            x = layer.combine(x, u, a, generator.kernels)
        return x

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of every token, fp32 [rows, V]."""
        generator = self.generator
        y = generator.kernels.layer_norm(hidden_states, generator.norm.weight, generator.norm.bias, eps=EPS)
        return nn.functional.linear(y.float(), generator.token_table.float())

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Return the logits of the codes of a level, fp32 [rows, codes]."""
        return self.generator.logits(hidden, level)

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
    def _find_keys(self, input_ids: Tensor, positions: Tensor) -> None:
        """Add the keys that rows see to the step's metadata. Never part of a captured graph."""
        metadata = compat.metadata_of_step(self.first_layer)
        if metadata is not None:
            metadata.find_hstu_keys(self.beams, self.operators, input_ids, positions, self.beam_requests == 0)


class DecoderForRetrieval(compat.Qwen3ForCausalLM):
    """vLLM's Qwen3 with attention over rows of beams.

    The folder's config.json is transformers' for Qwen3, with the codes of each level (`sizes`), the most rows of beams
    after a prompt (`max_rows`) and the variant of each operator family that serves them (`kernels`).
    """

    is_pooling_model: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: compat.VllmConfig, prefix: str = "") -> None:
        described = vllm_config.model_config.hf_config
        operators = Operators.of(described.kernels)
        with compat.Qwen3Attention(SoftmaxAttentionBackend, kernels=operators):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.operators = operators
        self.beams = BeamRows(tuple(described.sizes), described.max_rows)
        first = next(m for m in self.modules() if isinstance(m, compat.Attention))
        self.first_layer, self.flash = str(first.layer_name), first.impl.flash
        ours = dict(described.kernels)
        alone = f"FlashAttention {self.flash.keywords['fa_version']}" if self.flash else ours["beam_attention"]
        self.kernels = ours | {"attention of prompts alone": alone, "others": "vLLM's"}  # for records
        self.beam_requests: int | None = None  # as HSTUForRetrieval's
        self.pooler = RowPooler()

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
    ) -> Tensor:
        """Encode every row from the keys that it sees. Return [n, E] after the final norm."""
        self._find_keys(input_ids, positions)
        step = StepRows.of(self.beams, self.operators, input_ids, positions)
        encoded: Tensor = self.model(step.tokens, step.positions)
        return encoded

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """Return the logits of the codes of a level, fp32 [rows, codes]."""
        return level_logits(hidden, self.model.embed_tokens.weight, self.beams.sizes, level)

    @compat.break_capture
    def _find_keys(self, input_ids: Tensor, positions: Tensor) -> None:
        """Add the keys that rows see to the step's metadata. FlashAttention does not need them for prompts alone."""
        metadata = compat.metadata_of_step(self.first_layer)
        if metadata is not None and not (self.flash is not None and self.beam_requests == 0):
            metadata.find_beam_keys(self.beams, self.operators, input_ids, positions)
