"""Attention over vLLM's pages, the part that HSTU and decoders share: metadata of a step, and a layer's frame."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grengines.vllm import compat
from grkernels.operators import Operators


@dataclass
class HSTUKeys:
    """Keys that the rows of a step see under SiLU attention: arguments of hstu_attention."""

    offsets: Tensor  # int64 [B + 1]
    paged_lengths: Tensor  # int64 [B]: tokens in pages from earlier steps


@dataclass
class BeamKeys:
    """Keys that the rows of a step see under softmax attention, all in pages: arguments of beam_attention."""

    limits: Tensor  # int32 [n]: the first keys of the sequence
    own_slots: Tensor  # int64 [n, levels]: slots of the beam's codes, the row's own first; -1: none


@dataclass
class StepMetadata(compat.AttentionMetadata):
    """Attention metadata of one step, for all layers."""

    tokens: int  # without padding
    starts: Tensor  # int32 [B + 1]
    lengths: Tensor  # int32 [B]: of the sequences, with this step
    block_table: Tensor  # int32 [B, most pages]
    slots: Tensor  # int64 [tokens at least]: slots of this step's keys and values
    max_query_len: int
    max_seq_len: int
    cached: bool  # whether any request has tokens in pages from earlier steps
    # Keys that each row sees. The model adds them before its first layer, so that a captured step has them.
    hstu: HSTUKeys | None = None
    beams: BeamKeys | None = None

    def find_hstu_keys(self) -> None:
        """Add the keys of prompts under SiLU attention. Nothing waits for the device."""
        offsets = self.starts.long()
        self.hstu = HSTUKeys(offsets, self.lengths.long() - offsets.diff())

    def find_beam_keys(self, places: Tensor) -> None:
        """Add the keys of prompts for beam_attention. places: integers [tokens at least], in the sequences."""
        limits = places[: self.tokens].int() + 1
        self.beams = BeamKeys(limits, limits.new_full((self.tokens, 1), -1, dtype=torch.int64))


class StepMetadataBuilder(compat.AttentionMetadataBuilder[StepMetadata]):
    """Builder that vLLM calls once a step. The first layer keeps the step's metadata for the pooler."""

    # Launches of Triton's and CUTLASS kernels depend on the number of tokens and on constants only: a graph of a whole
    # step serves any requests of as many tokens.
    _cudagraph_support = compat.AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._attention: PagedAttention = compat.layer_of(vllm_config, layer_names[0]).impl

    def build(
        self, common_prefix_len: int, common_attn_metadata: compat.CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        common = common_attn_metadata
        made = self._attention.step = StepMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            common.max_query_len,
            common.max_seq_len,
            compat.has_cached(common),
        )
        return made


class PagedAttention(compat.AttentionImpl[StepMetadata]):
    """One layer's attention with kernels of `kernels`. A subclass implements `attend`.

    stored: int8 or fp8 for pages in 8 bits. The other arguments are vLLM's, for all implementations of attention.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        kernels: Operators,
        stored: str = "",
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.kernels, self.stored = kernels, stored
        self.step: StepMetadata | None = None  # the latest

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the step's keys and values to their pages, and attend.

        query and output [n, H, d], key and value [n, Hkv, d], padded behind the step's tokens. Rows of padding become
        zeros. All rows do without metadata: then vLLM measures memory, or captures a graph.
        """
        if attn_metadata is None:
            return output.zero_()
        n = attn_metadata.tokens
        pages = compat.PageBackend.split(kv_cache, self.head_size, self.stored)
        self.kernels.paged_write(key[:n], value[:n], attn_metadata.slots[:n], **pages)
        self.attend(output[:n], query[:n], key[:n], value[:n], pages, attn_metadata)
        if n < len(output):
            output[n:].zero_()
        return output

    @abstractmethod
    def attend(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, pages: dict[str, Tensor], step: StepMetadata
    ) -> None:
        """Write the attention of a step's rows to `out`. Raises RuntimeError without the metadata that it needs.

        pages: of the layer, as PageBackend.split returns them.
        """


MISSING = "attention ran before the model added the keys that rows see to the step's metadata"
