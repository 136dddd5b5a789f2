"""HSTU attention as a backend of vLLM: keys and values in its pages, chunks and mixed batches in one call.

What one step tells all layers, and how vLLM asks for it, is a decoder's too (grengines.vllm.softmax_attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grengines.vllm import compat
from grengines.vllm.rows import BeamRows, Reach, Sight
from grkernels.operators import Operators


@dataclass
class StepMetadata(compat.AttentionMetadata):
    """Of one step, for all layers."""

    tokens: int  # without padding
    starts: Tensor  # int32 [B + 1]
    lengths: Tensor  # int32 [B]: of the sequences, with this step
    block_table: Tensor  # int32 [B, most pages]
    block_size: int
    slots: Tensor  # int64 [tokens at least]: where keys and values of this step go
    max_query_len: int
    max_seq_len: int
    cached: bool  # whether any request has tokens in pages from before
    # What each row sees. The model finds it out before its first layer: vLLM gives the token ids to it alone.
    reach: Reach | None = None
    sight: Sight | None = None

    def find_reach(self, beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor, prompts_only: bool) -> None:
        """For HSTU."""
        n, table = self.tokens, self.block_table
        self.reach = Reach.of(beams, kernels, ids[:n], places[:n], self.starts, table, self.block_size, prompts_only)

    def find_sight(self, beams: BeamRows, kernels: Operators, ids: Tensor, places: Tensor) -> None:
        """For a decoder."""
        n = self.tokens
        self.sight = Sight.of(beams, kernels, ids[:n], places[:n], self.starts, self.block_table, self.block_size)


class StepMetadataBuilder(compat.AttentionMetadataBuilder[StepMetadata]):
    # Launches of Triton's and CUTLASS kernels follow from the step's tokens and most requests, and from limits that
    # don't change: a graph of a whole step serves any requests of as many tokens.
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


class HSTUAttentionImpl(compat.AttentionImpl[StepMetadata]):
    """One layer's attention. scaling_seqlen: as the model's."""

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
        scaling_seqlen: int,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.kv_cache_dtype = num_heads, head_size, scale, kv_cache_dtype
        self._kernels, self._scaling_seqlen = kernels, scaling_seqlen

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
        """query, key, value, output [n, H, d], padded behind the step's tokens. Without metadata (vLLM measures memory,
        or captures a graph) zeros."""
        if attn_metadata is None:
            return output.zero_()
        step, reach = attn_metadata, attn_metadata.reach
        if reach is None:
            raise RuntimeError("attention before the model looked at the step's token ids")
        n = step.tokens
        q, k, v = query[:n], key[:n], value[:n]
        k_pages, v_pages = compat.pages(kv_cache, self.head_size)
        self._kernels.paged_write(k, v, step.slots[:n], k_pages, v_pages)
        attend = self._one_by_one if q.device.type == "cpu" else self._together
        a = attend(q, k, v, step, reach, k_pages, v_pages)
        self._kernels.beam_terms(
            a, q, k_pages, v_pages, reach.own_slots, alpha=self.scale, scaling_seqlen=self._scaling_seqlen
        )
        output[:n] = a
        if n < len(output):
            output[n:].zero_()
        return output

    def _together(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepMetadata, reach: Reach, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        """All requests in one call."""
        pages = {}
        if step.cached or reach.num_targets is not None:  # with beams always: a captured step must be ready for either
            pages = {"k_pages": k_pages, "v_pages": v_pages, "page_table": step.block_table}
            pages["paged_lengths"] = reach.paged_lengths
        return self._attend(q, k, v, reach.offsets, reach.num_targets, step.max_query_len, step.max_seq_len, **pages)

    def _one_by_one(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepMetadata, reach: Reach, k_pages: Tensor, v_pages: Tensor
    ) -> Tensor:
        """A request a call, on a CPU: the plain kernels there pad all to the longest, and nothing has to be awaited."""
        starts, paged = reach.offsets.tolist(), reach.paged_lengths.tolist()
        parts = []
        for b, n in enumerate(reach.offsets.diff().tolist()):
            rows, pages = slice(starts[b], starts[b] + n), {}
            if paged[b]:
                pages = {"k_pages": k_pages, "v_pages": v_pages, "page_table": step.block_table[b : b + 1]}
                pages["paged_lengths"] = reach.paged_lengths[b : b + 1]
            beams = None if reach.num_targets is None else reach.num_targets[b : b + 1]
            offsets = torch.tensor([0, n])
            parts.append(self._attend(q[rows], k[rows], v[rows], offsets, beams, n, n + paged[b], **pages))
        return torch.cat(parts)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        num_targets: Tensor | None,
        max_q_len: int,
        max_kv_len: int,
        **pages: Tensor,
    ) -> Tensor:
        attended: Tensor = self._kernels.hstu_attention(
            q,
            k,
            v,
            q_offsets=offsets,
            kv_offsets=offsets,
            num_targets=num_targets,
            max_q_len=max_q_len,
            max_kv_len=max_kv_len,
            scaling_seqlen=self._scaling_seqlen,
            alpha=self.scale,
            contextual_seq_len=0,
            max_attn_len=0,
            **pages,
        )
        return attended


class HSTUAttentionBackend(compat.OurBackend):
    @staticmethod
    def get_impl_cls() -> type[HSTUAttentionImpl]:
        return HSTUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder
