"""HSTU attention with products in e4m3, in CuTe DSL for Hopper (sm90/fp8.py).

A pass rounds Q, K and V (fp8_operands.py), or the projection before it writes them in e4m3 (fp8_projection.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grkernels import tuning
from grkernels.hstu_attention import cutlass
from grkernels.hstu_attention.fp8_operands import Operands, quantised
from grkernels.hstu_attention.fp8_projection import blocks_of, project
from grkernels.hstu_attention.keys import tuning_key
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.rounding import with_fp8_products
from grkernels.variant import KernelVariant, Projected

HEAD_SIZES = (64, 128, 256)
CANDIDATES = [
    {"m": m, "n": n, "stages": stages, "take_turns": turns, "dynamic": dynamic, "chunk": chunk}
    for m, n, stages, turns, chunk in (
        (128, 128, 2, 1, 64),
        (128, 128, 2, 0, 64),
        (128, 128, 2, 0, 128),
        (128, 128, 3, 0, 64),
        (128, 128, 3, 1, 64),
        (128, 64, 3, 0, 64),
        (128, 64, 3, 1, 128),
        (128, 64, 4, 0, 64),
        (128, 64, 2, 0, 64),
        (64, 128, 2, 0, 64),
        (64, 64, 3, 0, 64),
    )
    for dynamic in ((0, 1) if m >= 128 else (0,))
]


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    num_targets: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    scaling_seqlen: int,
    alpha: float,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    k_pages: Tensor | None = None,
    v_pages: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    page_table: Tensor | None = None,
    paged_lengths: Tensor | None = None,
) -> Tensor:
    """Compute what reference.py specifies, in fp16 or bf16 with e4m3 operands of both products and fp32 sums.

    The call can be captured in a CUDA graph.
    """
    if 0 in (q.shape[0], q_offsets.shape[0] - 1, max_q_len):
        return v.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lengths: dict[str, Any] = {"q_offsets": q_offsets, "max_q_len": max_q_len, "max_kv_len": max_kv_len}
    made = quantised(
        q,
        k,
        v,
        kv_offsets=kv_offsets,
        k_pages=k_pages,
        v_pages=v_pages,
        k_scales=k_scales,
        v_scales=v_scales,
        page_table=page_table,
        paged_lengths=paged_lengths,
        **lengths,
    )
    return attend(
        made,
        v.dtype,
        **lengths,
        num_targets=num_targets,
        scaling_seqlen=scaling_seqlen,
        alpha=alpha,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len,
    )


def attend(
    made: Operands,
    dtype: torch.dtype,
    *,
    q_offsets: Tensor,
    num_targets: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    scaling_seqlen: int,
    alpha: float,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
) -> Tensor:
    """Compute what reference.py specifies of operands that are in e4m3 already. dtype: of the result, fp16 or bf16."""
    q, v, batch = made.q, made.v.transpose(0, 1), q_offsets.shape[0] - 1
    size = q.shape[0], q.shape[1], v.shape[0]
    if 0 in (q.shape[0], batch, max_q_len):
        return q.new_zeros(size, dtype=dtype)
    out = torch.empty(size, dtype=dtype, device=q.device)
    lengths: dict[str, Any] = {"q_offsets": q_offsets, "max_q_len": max_q_len, "max_kv_len": max_kv_len}
    masks: dict[str, Any] = {
        "num_targets": num_targets,
        "contextual_seq_len": contextual_seq_len,
        "max_attn_len": max_attn_len,
    }
    key = tuning_key(q=q, v=out, **lengths, **masks)
    config = tuning.choose("hstu_attention", "fp8", key, _default(q, out, batch, max_q_len))
    return cutlass.attend(
        partial(cutlass.compiled, dtype, q.shape[2], out.shape[2], 0, "", products="fp8"),
        config,
        (q, made.k, v),
        out,
        kv_offsets=made.offsets,
        **lengths,
        **masks,
        scaling_seqlen=scaling_seqlen,
        alpha=alpha,
        scales=(made.rows.data_ptr(), made.blocks.data_ptr(), made.blocks.shape[1]),
    )


def _default(q: Tensor, v: Tensor, batch: int, max_q_len: int) -> dict[str, int]:
    """Return the launch for sizes that are not in the table: that of `cutlass`, with chunks, and more stages if wide.

    chunk: a tile's sums leave registers for SiLU beside them. stages: heads of 256 have tiles of 64 keys, and three of
    them fit in 8 bits. take_turns is 1 for heads of at most 128, as in `cutlass`: SiLU takes at least as long as the
    products there, so one warpgroup computes it while the other one multiplies.
    """
    # H200, commit 56ad2e8, attention alone. 4x128, with turns and without: 0.675 and 0.717 ms for 32 x 4096, 1.16 and
    # 1.25 ms for 4 x 16384. 4x256, 32 x 4096, three stages and two: 1.16 and 1.18 ms; turns gain nothing there.
    config = cutlass.default_config(q, v, batch, max_q_len, "")
    wide = max(q.shape[2], v.shape[2]) > 128
    return config | {"stages": 3 if wide else 2, "chunk": 64}


def supports(
    *,
    device: str,
    dtype: str,
    qk_dim: int,
    v_dim: int,
    page: int = 0,
    stored: str = "",
    extras: Sequence[str] = (),
) -> str | None:
    """Return None for what `cutlass` takes with head sizes of 64, 128 and 256 and any pages, else the reason."""
    if any(d not in HEAD_SIZES for d in (qk_dim, v_dim)):
        return f"head sizes {qk_dim} and {v_dim}: allowed are 64, 128 and 256 (others: cutlass, triton, torch)"
    return cutlass.supports(device=device, dtype=dtype, qk_dim=qk_dim, v_dim=v_dim, extras=extras)


VARIANT = KernelVariant(
    "hstu_attention",
    "fp8",
    hstu_attention,
    reference,
    supports,
    yardstick=with_fp8_products(reference),
    projected=Projected(blocks_of, project, attend),
)
