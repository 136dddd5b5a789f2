"""HSTU attention as a backend of vLLM: keys and values in its pages, chunks and mixed batches in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grengines.vllm import compat
from grengines.vllm.attention import MISSING, HSTUKeys, PagedAttention, StepMetadata, StepMetadataBuilder


class HSTUAttention(PagedAttention):
    """SiLU attention of one layer. scaling_seqlen: the model's. attends: False only writes keys and values."""

    def __init__(self, *args: Any, scaling_seqlen: int, attends: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self._scaling_seqlen, self._attends = scaling_seqlen, attends

    def attend(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, pages: dict[str, Tensor], step: StepMetadata
    ) -> None:
        """Attend to the tokens before each row and to itself."""
        if not self._attends:
            return
        if step.hstu is None:
            raise RuntimeError(MISSING)
        attend = self.one_by_one if q.device.type == "cpu" else self.together
        out.copy_(attend(q, k, v, step, step.hstu, pages))

    def together(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepMetadata, keys: HSTUKeys, pages: dict[str, Tensor]
    ) -> Tensor:
        """Attend to all requests in one call."""
        before = {}
        if step.cached or (q.is_cuda and torch.cuda.is_current_stream_capturing()):  # a captured step serves both cases
            before = pages | {"page_table": step.block_table, "paged_lengths": keys.paged_lengths}
        return self._attend(q, k, v, keys.offsets, step.max_query_len, step.max_seq_len, **before)

    def one_by_one(
        self, q: Tensor, k: Tensor, v: Tensor, step: StepMetadata, keys: HSTUKeys, pages: dict[str, Tensor]
    ) -> Tensor:
        """Attend to one request per call, on a CPU. Its eager kernels pad to the longest, and lengths need no wait."""
        starts, paged = keys.offsets.tolist(), keys.paged_lengths.tolist()
        parts = []
        for b, n in enumerate(keys.offsets.diff().tolist()):
            rows, one, before = slice(starts[b], starts[b] + n), slice(b, b + 1), {}
            if paged[b]:
                before = pages | {"page_table": step.block_table[one], "paged_lengths": keys.paged_lengths[one]}
            offsets = torch.tensor([0, n])
            parts.append(self._attend(q[rows], k[rows], v[rows], offsets, n, n + paged[b], **before))
        return torch.cat(parts)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        max_q_len: int,
        max_kv_len: int,
        **pages: Tensor,
    ) -> Tensor:
        attended: Tensor = self.kernels.hstu_attention(
            q,
            k,
            v,
            q_offsets=offsets,
            kv_offsets=offsets,
            num_targets=None,
            max_q_len=max_q_len,
            max_kv_len=max_kv_len,
            scaling_seqlen=self._scaling_seqlen,
            alpha=self.scale,
            contextual_seq_len=0,
            max_attn_len=0,
            **pages,
        )
        return attended


class HSTUAttentionBackend(compat.PageBackend):
    """The backend of HSTUAttention."""

    @staticmethod
    def get_impl_cls() -> type[HSTUAttention]:
        return HSTUAttention

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder
