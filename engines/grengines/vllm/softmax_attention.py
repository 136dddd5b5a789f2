"""A decoder's attention as a backend of vLLM: a softmax over the prompt and the row's own beam, all in vLLM's pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grengines.vllm import compat
from grengines.vllm.attention import MISSING, PagedAttention, StepMetadata, StepMetadataBuilder


class SoftmaxAttention(PagedAttention):
    """Softmax attention of one layer.

    Prompts go to vLLM's FlashAttention if it is available. `beam_attention` is for beams, for captured steps, whose
    lengths are not known at the capture, and for prompts without FlashAttention.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.flash = compat.flash_attention(self.head_size, torch.get_default_dtype())

    def attend(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, pages: dict[str, Tensor], step: StepMetadata
    ) -> None:
        """Attend to keys in pages, those of this step included."""
        k_pages, v_pages = pages["k_pages"], pages["v_pages"]
        if step.beams is not None:
            self.kernels.beam_attention(
                out,
                q,
                k_pages,
                v_pages,
                starts=step.starts,
                block_table=step.block_table,
                limits=step.beams.limits,
                own_slots=step.beams.own_slots,
                scale=self.scale,
            )
        elif self.flash is not None:
            self.flash(
                q,
                k_pages,
                v_pages,
                out=out,
                cu_seqlens_q=step.starts,
                max_seqlen_q=step.max_query_len,
                seqused_k=step.lengths,
                max_seqlen_k=step.max_seq_len,
                softmax_scale=self.scale,
                causal=True,
                block_table=step.block_table,
            )
        else:
            raise RuntimeError(MISSING)


class SoftmaxAttentionBackend(compat.PageBackend):
    """The backend of SoftmaxAttention."""

    @staticmethod
    def get_impl_cls() -> type[SoftmaxAttention]:
        return SoftmaxAttention

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder
