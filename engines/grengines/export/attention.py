"""HSTU attention as one operator of the exported model: `grbench::hstu_attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grkernels.hstu_attention.torch import hstu_attention as eager


def adapted(kernel: Callable[..., Tensor], **options: int) -> Callable[..., Tensor]:
    """Give a variant of the family the signature of the operator below. options: further arguments of the variant."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offsets: Tensor,
        offsets: Tensor,
        num_targets: Tensor,
        tiles: Tensor,
        columns: Tensor,
        longest: int,
        alpha: float,
        scaling_seqlen: int,
        contextual_seq_len: int,
        max_attn_len: int,
    ) -> Tensor:
        return kernel(
            q,
            k,
            v,
            q_offsets=q_offsets,
            kv_offsets=offsets,
            num_targets=num_targets,
            max_q_len=tiles.numel(),
            max_kv_len=longest,
            scaling_seqlen=scaling_seqlen,
            alpha=alpha,
            contextual_seq_len=contextual_seq_len,
            max_attn_len=max_attn_len,
            **options,
        )

    return attend


def as_kernel(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give an operator of the signature below that of the family's variants, with its tiles and columns beside."""

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offsets: Tensor,
        kv_offsets: Tensor,
        num_targets: Tensor,
        max_q_len: int,
        max_kv_len: int,
        scaling_seqlen: int,
        alpha: float,
        contextual_seq_len: int,
        max_attn_len: int,
        tiles: Tensor,
        columns: Tensor,
    ) -> Tensor:
        where = (q_offsets, kv_offsets, num_targets, tiles, columns, max_kv_len)  # tiles have the shape of max_q_len
        return attend(q, k, v, *where, alpha, scaling_seqlen, contextual_seq_len, max_attn_len)

    return kernel


_eager = adapted(eager)


@torch.library.custom_op("grbench::hstu_attention", mutates_args=())
def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    offsets: Tensor,
    num_targets: Tensor,
    tiles: Tensor,
    columns: Tensor,
    longest: int,
    alpha: float,
    scaling_seqlen: int,
    contextual_seq_len: int,
    max_attn_len: int,
) -> Tensor:
    """Compute the attention of the last tokens of each sequence to the whole sequence, in eager PyTorch.

    k [L, H, dqk], v [L, H, dv]: tokens of all sequences one after another. q [Q, H, dqk]: the last tokens of each, or
    all. q_offsets, offsets int64 [B + 1]: where each sequence begins in q, and in k and v. num_targets int64 [B]: the
    candidates at its end.

    Only the shapes of two inputs matter, so that no shape in the graph depends on a value. tiles int64 [T, R], which is
    0 .. T * R - 1, has a place for each query of the sequence with most: attention processes T tiles of R query rows,
    one after another. columns int64 [N], 0 .. N - 1, has one for each contextual token and event of the longest
    history, at least one. longest: tokens of the longest sequence. Each may be larger than needed.

    Returns [Q, H, dv] in v's dtype. Rows past q_offsets[B] hold any finite value.
    """
    shapes = scaling_seqlen, contextual_seq_len, max_attn_len
    return _eager(q, k, v, q_offsets, offsets, num_targets, tiles, columns, longest, alpha, *shapes)


@hstu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(q.shape[0], v.shape[1], v.shape[2])
