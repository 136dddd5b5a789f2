"""The append form of the model for a package: new tokens over pages of the KV cache, to logits, keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grengines.last_layer import LastLayer
from grengines.models.hstu.model import HSTURanker
from grengines.runtime.batch import JaggedBatch
from grkernels.operators import Operators


class PagedRanker(nn.Module):
    """A built HSTURanker as a function of tensors, with keys and values before the batch in pages.

    It computes what ExportedRanker does. It returns the new keys and values, and writes nothing: a package whose inputs
    change would copy the whole pool.
    tiles: as in grkernels/hstu_attention/torch.py, for eager attention; 0 for variants without tiles.
    """

    def __init__(self, ranker: HSTURanker, kernels: Operators, tiles: int = 0) -> None:
        super().__init__()
        self.ranker, self._options = ranker, {"tiles": tiles} if tiles else {}
        ranker.kernels, ranker.computed = kernels, LastLayer.READ

    def forward(
        self,
        token_rows: Tensor,
        actions: Tensor,
        weights: Tensor,
        positions: Tensor,
        time_buckets: Tensor,
        offsets: Tensor,
        num_targets: Tensor,
        candidate_rows: Tensor,
        candidate_offsets: Tensor,
        tiles: Tensor,
        candidate_tiles: Tensor,
        columns: Tensor,
        page_table: Tensor,
        paged_lengths: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
    ) -> list[Tensor]:
        """Return logits fp32 [M, tasks], then each layer's new keys [L, H, dqk], then each layer's new values.

        The first twelve arguments: as in ExportedRanker.forward, but columns int64 [N] has one for each key of the
        longest sequence, those in pages included. page_table int32 [B, P], paged_lengths int64 [B]: as in PagedBatch.
        k_pages [layers, pages, page, H, dqk], v_pages [layers, pages, page, H, dv]. k_scales, v_scales fp32 [layers,
        pages, page, H]: of pages in 8 bits.
        """
        ranker, scales = self.ranker, {"k_scales": k_scales, "v_scales": v_scales}
        pages = {"k_pages": k_pages, "v_pages": v_pages, **{n: s for n, s in scales.items() if s is not None}}
        batch = JaggedBatch(
            token_rows=token_rows,
            actions=actions,
            weights=weights,
            positions=positions,
            time_buckets=time_buckets,
            q_offsets=offsets,
            kv_offsets=offsets,
            num_targets=num_targets,
            candidate_rows=candidate_rows,
            candidate_offsets=candidate_offsets,
            kept_offsets=offsets,
            max_q_len=tiles.numel(),
            max_kv_len=columns.numel(),
            max_candidates=candidate_tiles.numel(),
        )
        made: tuple[list[Tensor], list[Tensor]] = [], []

        def keys(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            made[0].append(k)
            made[1].append(v)
            table = {"page_table": page_table, "paged_lengths": paged_lengths}
            return k, v, {"kv_offsets": offsets, **{n: p[i] for n, p in pages.items()}, **table, **self._options}

        return [ranker.score(ranker.encode(batch, keys), batch), *made[0], *made[1]]
