"""A decoder's attention as a backend of vLLM: a softmax over the prompt and the row's own beam, all in vLLM's pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grengines.vllm import compat
from grengines.vllm.hstu_attention import StepMetadata, StepMetadataBuilder
from grkernels.operators import Operators


class SoftmaxAttentionImpl(compat.AttentionImpl[StepMetadata]):
    """One layer's attention. Steps without rows of beams may go to vLLM's FlashAttention, where it can be had: it is
    made for long prompts, `beam_attention` for rows of beams."""

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
        self.num_heads, self.head_size, self.scale, self.kv_cache_dtype = num_heads, head_size, scale, kv_cache_dtype
        self.num_kv_heads, self._kernels = num_kv_heads or num_heads, kernels
        self.flash = compat.flash_attention(head_size, torch.get_default_dtype())

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
        """query and output [n, H, d], key and value [n, Hkv, d], padded behind the step's tokens. Without metadata
        (vLLM measures memory) zeros."""
        if attn_metadata is None:
            return output.zero_()
        step, n = attn_metadata, attn_metadata.tokens
        k_pages, v_pages = compat.pages(kv_cache, self.head_size)
        self._kernels.paged_write(key[:n], value[:n], step.slots[:n], k_pages, v_pages)
        if step.sight is not None:
            self._kernels.beam_attention(
                output[:n],
                query[:n],
                k_pages,
                v_pages,
                starts=step.sight.starts,
                block_table=step.block_table,
                limits=step.sight.limits,
                own_slots=step.sight.own_slots,
                scale=self.scale,
            )
        elif self.flash is not None:
            self.flash(
                query[:n],
                k_pages,
                v_pages,
                out=output[:n],
                cu_seqlens_q=step.starts,
                max_seqlen_q=step.max_query_len,
                seqused_k=step.lengths,
                max_seqlen_k=step.max_seq_len,
                softmax_scale=self.scale,
                causal=True,
                block_table=step.block_table,
            )
        else:
            raise RuntimeError("attention before the model looked at the step's token ids")
        if n < len(output):
            output[n:].zero_()
        return output


class SoftmaxAttentionBackend(compat.OurBackend):
    @staticmethod
    def get_impl_cls() -> type[SoftmaxAttentionImpl]:
        return SoftmaxAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder
