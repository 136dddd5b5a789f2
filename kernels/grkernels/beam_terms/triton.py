"""Terms of a beam's earlier codes: one program per row, which ends immediately if the row has none."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from grkernels import triton_common, tuning
from grkernels.beam_terms.reference import beam_terms as reference
from grkernels.pages import slotted
from grkernels.triton_common import rounded
from grkernels.triton_launch import launched
from grkernels.variant import KernelVariant

DEFAULT = {"warps": 4}
CANDIDATES = [{"warps": warps} for warps in (1, 2, 4, 8)]


@launched(tensors=["out", "q", "k_slots", "v_slots"], indices=["slots"], numbers=["alpha", "scale"])
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
    HEADS: tl.constexpr,
    QK: tl.constexpr,
    V: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    QK_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    # A row's terms come first. If the first slot is missing, all are.
    if tl.load(slots + row * TERMS) >= 0:
        heads = tl.arange(0, HEAD_BLOCK)[:, None]
        qk_dims, v_dims = tl.arange(0, QK_BLOCK)[None, :], tl.arange(0, V_BLOCK)[None, :]
        qk_inside, v_inside = (heads < HEADS) & (qk_dims < QK), (heads < HEADS) & (v_dims < V)
        query = tl.load(q + row * q_stride + heads * q_head_stride + qk_dims, mask=qk_inside, other=0.0)
        place = out + row * out_stride + heads * out_head_stride + v_dims
        acc = tl.load(place, mask=v_inside, other=0.0).to(tl.float32)
        for j in tl.static_range(TERMS):
            slot = tl.load(slots + row * TERMS + j)
            used = tl.maximum(slot, 0)  # slot 0 holds finite numbers, which get no weight
            key = tl.load(k_slots + used * k_stride + heads * k_head_stride + qk_dims, mask=qk_inside, other=0.0)
            value = tl.load(v_slots + used * v_stride + heads * v_head_stride + v_dims, mask=v_inside, other=0.0)
            s = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1, keep_dims=True) * alpha
            weight = tl.where(slot >= 0, s / (1.0 + tl.exp(-s)) * scale, 0.0)
            acc += weight * value.to(tl.float32)
        tl.store(place, rounded(acc, out.dtype.element_ty), mask=v_inside)


def tuning_key(width: int) -> str:
    """Return the key of a row's width, the only size that matters."""
    return tuning.key(width=width)


def beam_terms(
    out: Tensor, q: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *, alpha: float, scaling_seqlen: int
) -> None:
    """Compute what reference.py defines. Nothing waits for the device, and rows without terms cost next to nothing."""
    n, heads, qk_dim = q.shape
    if n and slots.shape[1]:
        v_dim, k_slots, v_slots = out.shape[2], slotted(k_pages), slotted(v_pages)
        config = tuning.choose("beam_terms", "triton", tuning_key(heads * max(qk_dim, v_dim)), DEFAULT)
        strides = out.stride()[:2] + q.stride()[:2] + k_slots.stride()[:2] + v_slots.stride()[:2]
        sizes = (heads, qk_dim, v_dim)
        constants = slots.shape[1], *sizes, *map(tuning.bucket, sizes)
        numbers = alpha, 1.0 / scaling_seqlen
        _kernel((n, 1, 1), (out, q, k_slots, v_slots, slots), strides, numbers, constants, config["warps"])


VARIANT = KernelVariant("beam_terms", "triton", beam_terms, reference, triton_common.supports)
