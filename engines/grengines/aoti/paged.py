"""The append form of the model for a package: new tokens over pages of the KV cache, to logits, keys and values."""

from __future__ import annotations

from torch import Tensor, nn

from grengines.models.hstu.model import HSTULayer, HSTURanker
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
        ranker.kernels = kernels

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
        ranker, config = self.ranker, self.ranker.config
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
        x = ranker.embed(batch)
        keys, values = [], []
        for i, layer in enumerate(ranker.layers):
            assert isinstance(layer, HSTULayer)
            last = i == len(ranker.layers) - 1
            if last:
                u, q, k, v = layer.project_rows(x, candidate_rows, ranker.kernels)
                x = x[candidate_rows]
            else:
                u, q, k, v = layer.project(x, ranker.kernels)
            keys.append(k)
            values.append(v)
            a = ranker.kernels.hstu_attention(
                q,
                k,
                v,
                q_offsets=candidate_offsets if last else offsets,
                kv_offsets=offsets,
                num_targets=num_targets,
                max_q_len=(candidate_tiles if last else tiles).numel(),
                max_kv_len=columns.numel(),
                scaling_seqlen=config.scaling_seqlen,
                alpha=ranker.alpha,
                contextual_seq_len=config.contextual_seq_len,
                max_attn_len=config.max_attn_len,
                k_pages=k_pages[i],
                v_pages=v_pages[i],
                page_table=page_table,
                paged_lengths=paged_lengths,
                k_scales=None if k_scales is None else k_scales[i],
                v_scales=None if v_scales is None else v_scales[i],
                **self._options,
            )
            x = layer.combine(x, u, a, ranker.kernels)
        return [ranker.score(x, batch), *keys, *values]
