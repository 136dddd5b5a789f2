"""HSTU attention in CuTe DSL for Hopper (sm90/), compiled once for each element type, head size and tile size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import gcd

import torch
from torch import Tensor

from grkernels import capabilities, cute_common, tuning
from grkernels.cute_common import ELEMENTS
from grkernels.cute_launch import Launcher
from grkernels.hstu_attention.keys import tuning_key
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.sm90.kernel import Attention
from grkernels.hstu_attention.sm90.sizes import Tiles
from grkernels.pages import EIGHT_BITS
from grkernels.variant import KernelVariant

TILES_A_SPLIT = 4  # least tiles of a CTA that shares an item: adding up costs as much as about two tiles
NO_PAGES: tuple[int, ...] = (0,) * 14  # values of the fields k_pages to page_table of sm90.kernel.Arguments
NO_SCALES: tuple[int, ...] = (0,) * 3  # those of its field scales

CANDIDATES = [
    {"m": m, "n": n, "stages": stages, "take_turns": turns, "dynamic": dynamic}
    for m, n, stages, turns in (
        (128, 128, 2, 0),
        (128, 128, 2, 1),
        (128, 96, 3, 1),
        (128, 80, 2, 0),
        (128, 64, 3, 1),
        (128, 64, 3, 0),
        (128, 64, 2, 0),
        (192, 64, 3, 0),
        (192, 80, 2, 0),
        (64, 128, 2, 0),
        (64, 64, 3, 0),
        (64, 64, 2, 0),
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
    """Compute what reference.py specifies, in fp16 or bf16 with fp32 scores and sums.

    8-bit pages are converted to bf16. The call can be captured in a CUDA graph. Raises ValueError for q, k, v or pages
    whose rows and heads don't begin at multiples of 16 bytes, which TMA requires.
    """
    heads, batch = q.shape[1], q_offsets.shape[0] - 1
    if 0 in (q.shape[0], batch, max_q_len):
        return v.new_zeros(q.shape[0], heads, v.shape[2])
    out = v.new_empty(q.shape[0], heads, v.shape[2])
    _check_rows("q", q)
    _check_rows("k", k)
    _check_rows("v", v)
    page, stored, pages = 0, "", NO_PAGES
    if k_pages is not None and v_pages is not None and page_table is not None and paged_lengths is not None:
        _check_rows("k_pages", k_pages)
        _check_rows("v_pages", v_pages)
        page, stored = k_pages.shape[1], _stored(k_pages)
        pages = (
            *(k_pages.data_ptr(), *k_pages.stride()[:3], 0 if k_scales is None else k_scales.data_ptr()),
            *(v_pages.data_ptr(), *v_pages.stride()[:3], 0 if v_scales is None else v_scales.data_ptr()),
            k_pages.shape[0],
            *(page_table.data_ptr(), page_table.stride(0), paged_lengths.data_ptr()),
        )
    config = tuning.choose(
        "hstu_attention",
        "cutlass",
        tuning_key(
            q=q,
            v=v,
            q_offsets=q_offsets,
            num_targets=num_targets,
            max_q_len=max_q_len,
            max_kv_len=max_kv_len,
            contextual_seq_len=contextual_seq_len,
            max_attn_len=max_attn_len,
            k_pages=k_pages,
        ),
        default_config(q, v, batch, max_q_len, stored),
    )
    return attend(
        partial(compiled, q.dtype, q.shape[2], v.shape[2], page, stored),
        config,
        (q, k, v),
        out,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
        num_targets=num_targets,
        max_q_len=max_q_len,
        max_kv_len=max_kv_len,
        scaling_seqlen=scaling_seqlen,
        alpha=alpha,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len,
        pages=pages,
    )


def attend(
    kernel: Callable[..., Launcher],
    config: Mapping[str, int],
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    *,
    q_offsets: Tensor,
    kv_offsets: Tensor,
    num_targets: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    scaling_seqlen: int,
    alpha: float,
    contextual_seq_len: int,
    max_attn_len: int,
    pages: tuple[int, ...] = NO_PAGES,
    scales: tuple[int, ...] = NO_SCALES,
) -> Tensor:
    """Launch a kernel on Q, K and V, and return `out` [Lq, H, dv], which it writes.

    kernel: makes it, of the launch configuration. pages, scales: values of sm90.kernel.Arguments.
    """
    q, k, v = operands
    heads, batch, v_dim = q.shape[1], q_offsets.shape[0] - 1, out.shape[2]
    m = config["m"]
    items = heads * _tiles(q.shape[0], batch, max_q_len, m)
    processors = cute_common.processors(q.device.index)
    splits = _splits(items, -(-max_kv_len // config["n"]), processors)
    counter, partials = None, None
    if splits > 1:
        partials = torch.empty(items * splits * m * v_dim, dtype=torch.float32, device=q.device)
    if splits > 1 or config["dynamic"]:
        # One allocation, cleared once: the counter of items, and after 16 bytes the arrivals of each item's warps.
        arrivals = items * m // 16 if splits > 1 else 0
        counter = torch.zeros(4 + arrivals, dtype=torch.int32, device=q.device)
    run = kernel(**config, split=splits > 1)
    run(  # the fields of sm90.kernel.Arguments, then the stream
        *(q.data_ptr(), *q.stride()[:2]),
        *(k.data_ptr(), *k.stride()[:2]),
        *(v.data_ptr(), *v.stride()[:2]),
        k.shape[0],
        out.data_ptr(),
        1.0 / scaling_seqlen,
        q_offsets.data_ptr(),
        kv_offsets.data_ptr(),
        0 if num_targets is None else num_targets.data_ptr(),
        *(q.shape[0], heads, batch),
        *(contextual_seq_len, max_attn_len),
        int(num_targets is not None),
        *pages,
        0 if counter is None else counter.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        0 if counter is None else counter.data_ptr() + 16,
        splits,
        alpha / 2,
        min(processors, items * splits),
        *scales,
        cute_common.stream(q.device),
    )
    return out


def _check_rows(name: str, x: Tensor) -> None:
    """Raise ValueError unless rows and heads begin at multiples of 16 bytes and are contiguous."""
    *strides, last = x.stride()
    vector = 16 // x.element_size()
    if x.data_ptr() % 16 or gcd(vector, *strides) != vector or last != 1:
        raise ValueError(
            f"{name}: strides {x.stride()} and address {x.data_ptr():#x}; rows and heads must begin at multiples "
            "of 16 bytes and be contiguous; call .contiguous() or use kernel.hstu_attention=triton"
        )


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
    """Return None for Hopper, half precision, head sizes 16 to 256 in steps of 16 and no extras, else the reason."""
    if missing := capabilities.lacking(extras):
        return missing
    if stored and (dtype != "bf16" or qk_dim % 64 or v_dim % 64):
        return f"pages in {stored}: they become bf16, in heads of multiples of 64 (others: torch, triton)"
    if dtype not in ("fp16", "bf16"):
        return f"dtype {dtype} is neither fp16 nor bf16 (variants that support it: torch, triton)"
    if any(d % 16 or not 16 <= d <= 256 for d in (qk_dim, v_dim)):
        return f"head sizes {qk_dim} and {v_dim}: allowed are multiples of 16 to 256 (others: torch, triton)"
    if page and page not in (16, 32, 64, 128):
        return f"pages of {page} tokens: allowed are 16, 32, 64 and 128 (others: torch, triton)"
    if device != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs an NVIDIA GPU of compute capability 9.0 (elsewhere: torch, triton)"
    return None


def _stored(pages: Tensor) -> str:
    """Return int8 or fp8 for 8-bit pages, else ""."""
    return next((name for name, dtype in EIGHT_BITS.items() if dtype is pages.dtype), "")


def default_config(q: Tensor, v: Tensor, batch: int, max_q_len: int, stored: str) -> dict[str, int]:
    """Return the tiles for sizes that are not in the table.

    Two stages of n keys fit. Tiles have 64 rows if no CTA then gets a second item. CTAs take items from a counter if
    there are enough items to pay for clearing it.
    """
    rows, heads, widest = q.shape[0], q.shape[1], max(q.shape[2], v.shape[2])
    processors = cute_common.processors(q.device.index)
    small = heads * _tiles(rows, batch, max_q_len, 64) <= processors
    return {
        "m": 64 if small else 128,
        "n": 128 if widest <= 128 else 64,
        "stages": 2,
        "take_turns": int(not small and widest <= 128),
        "dynamic": int(not stored and heads * _tiles(rows, batch, max_q_len, 128) > 4 * processors),
    }


def _tiles(rows: int, batch: int, longest: int, m: int) -> int:
    """Return the most tiles of m rows that `batch` sequences have, with `rows` rows in all and at most `longest` each.

    The lengths themselves are on the device. In a bucket of a CUDA graph a sequence may have nearly all rows.
    """
    return min(batch * -(-longest // m), rows // m + batch)


def _splits(items: int, tiles: int, processors: int) -> int:
    """Return the number of CTAs that share a work item of `tiles` tiles.

    Items are shared if there are fewer than processors. Each CTA gets at least TILES_A_SPLIT tiles.
    """
    return max(min(processors // max(items, 1), tiles // TILES_A_SPLIT), 1)


@cache
def compiled(
    dtype: torch.dtype,
    qk_dim: int,
    v_dim: int,
    page: int,
    stored: str,
    m: int,
    n: int,
    stages: int,
    take_turns: int,
    dynamic: int,
    split: bool = False,
    chunk: int = 0,
    products: str = "",
) -> Launcher:
    """Compile, or raise ValueError for tiles that don't fit in shared memory or into pages."""
    tiles = Tiles(m, n, stages, bool(take_turns), bool(dynamic), split, chunk)
    return cute_common.launcher(Attention(ELEMENTS[dtype], qk_dim, v_dim, tiles, page, stored, products))


VARIANT = KernelVariant("hstu_attention", "cutlass", hstu_attention, reference, supports)
