"""Attention over vLLM's pages, the part that HSTU and decoders share: metadata of a step, and a layer's frame."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grengines.vllm import compat
from grengines.vllm.rows import BeamAttentionMetadata, BeamRows, HSTUAttentionMetadata, StepRequests
from grkernels.operators import Operators


@dataclass
class StepMetadata(compat.AttentionMetadata):
    """Attention metadata of one step, for all layers."""

    tokens: int  # without padding
    starts: Tensor  # int32 [B + 1]
    lengths: Tensor  # int32 [B]: of the sequences, with this step
    block_table: Tensor  # int32 [B, most pages]
    block_size: int
    slots: Tensor  # int64 [tokens at least]: slots of this step's keys and values
    max_query_len: int
    max_seq_len: int
    cached: bool  # whether any request has tokens in pages from earlier steps
    # Keys that each row sees. The model adds them before its first layer: only the model gets the token ids.
    hstu: HSTUAttentionMetadata | None = None
    beams: BeamAttentionMetadata | None = None

    def find_hstu_keys(
        self, beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor, prompts_only: bool
    ) -> None:
        """Add the metadata of HSTU."""
        self.hstu = HSTUAttentionMetadata.of(beams, kernels, self._requests(ids, places), prompts_only)

    def find_beam_keys(self, beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor) -> None:
        """Add the metadata of a decoder."""
        self.beams = BeamAttentionMetadata.of(beams, kernels, self._requests(ids, places))

    def _requests(self, ids: Tensor, places: Tensor) -> StepRequests:
        n = self.tokens
        return StepRequests(ids[:n], places[:n], self.starts, self.block_table, self.block_size)


class StepMetadataBuilder(compat.AttentionMetadataBuilder[StepMetadata]):
    """Builder that vLLM calls once a step."""

    # Launches of Triton's and CUTLASS kernels depend on the number of tokens and on constants only: a graph of a whole
    # step serves any requests of as many tokens.
    _cudagraph_support = compat.AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._block_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: compat.CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        common = common_attn_metadata
        return StepMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            self._block_size,
            common.slot_mapping,
            common.max_query_len,
            common.max_seq_len,
            compat.has_cached(common),
        )


class PagedAttention(compat.AttentionImpl[StepMetadata]):
    """One layer's attention with kernels of `kernels`. A subclass implements `attend`.

    The other arguments are vLLM's, for all implementations of attention.
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
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.kernels = kernels

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
        k_pages, v_pages = compat.PageBackend.split(kv_cache, self.head_size)
        self.kernels.paged_write(key[:n], value[:n], attn_metadata.slots[:n], k_pages, v_pages)
        self.attend(output[:n], query[:n], key[:n], value[:n], k_pages, v_pages, attn_metadata)
        if n < len(output):
            output[n:].zero_()
        return output

    @abstractmethod
    def attend(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, step: StepMetadata
    ) -> None:
        """Write the attention of a step's rows to `out`. Raises RuntimeError without the metadata that it needs."""


MISSING = "attention ran before the model added the keys that rows see to the step's metadata"
