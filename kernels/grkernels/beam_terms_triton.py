"""The kernel of beam_terms.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grkernels.triton_common import rounded


@triton.jit
def _kernel(
    out: tl.tensor,
    q: tl.tensor,
    k_slots: tl.tensor,
    v_slots: tl.tensor,
    slots: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    alpha: tl.tensor,
    scale: tl.tensor,
    TERMS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # A row's terms come first: where the first slot is missing, all are.
    if tl.load(slots + row * TERMS) >= 0:
        qk_dims, v_dims = tl.arange(0, QK_BLOCK), tl.arange(0, V_BLOCK)
        query = tl.load(q + row * q_stride + head * q_head_stride + qk_dims, mask=qk_dims < QK, other=0.0)
        place = out + row * out_stride + head * out_head_stride + v_dims
        acc = tl.load(place, mask=v_dims < V, other=0.0).to(tl.float32)
        for j in tl.static_range(TERMS):
            slot = tl.load(slots + row * TERMS + j)
            used = tl.maximum(slot, 0)  # slot 0 holds something finite, which counts for nothing
            key = tl.load(k_slots + used * k_stride + head * k_head_stride + qk_dims, mask=qk_dims < QK, other=0.0)
            value = tl.load(v_slots + used * v_stride + head * v_head_stride + v_dims, mask=v_dims < V, other=0.0)
            s = tl.sum(query.to(tl.float32) * key.to(tl.float32)) * alpha
            weight = tl.where(slot >= 0, s / (1.0 + tl.exp(-s)) * scale, 0.0)
            acc += weight * value.to(tl.float32)
        tl.store(place, rounded(acc, out.dtype.element_ty), mask=v_dims < V)


def launch(
    out: Tensor, q: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, alpha: float, scaling_seqlen: int
) -> None:
    """As `beam_terms`, with k_slots [slots, H, dqk] and v_slots [slots, H, dv]; slots contiguous, a row's -1 last."""
    n, heads, qk_dim = q.shape
    if n and slots.shape[1]:
        strides = [s for x in (out, q, k_slots, v_slots) for s in x.stride()[:2]]
        sizes = (slots.shape[1], qk_dim, out.shape[2])
        blocks = (triton.next_power_of_2(qk_dim), triton.next_power_of_2(out.shape[2]))
        _kernel[n, heads](
            out, q, k_slots, v_slots, slots, *strides, alpha, 1.0 / scaling_seqlen, *sizes, *blocks, num_warps=1
        )  # fmt: skip
