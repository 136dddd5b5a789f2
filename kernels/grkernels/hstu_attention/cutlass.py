"""HSTU attention in CuTe DSL for Hopper (sm90/): compiled once for each element type, head size and tile size."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_ptr
from torch import Tensor

from grkernels import tuning
from grkernels.cute_launch import Launcher
from grkernels.hstu_attention.keys import tuning_key
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.sm90.kernel import Attention, Tiles
from grkernels.variant import KernelVariant

ELEMENTS = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
SHARED_BYTES = 227 * 1024
ARGUMENTS = "PPPPPPPPPPPPPPiiiiiqqqqqqiqqqqqqqiiiffiP"  # of Attention.launch, in struct's letters
TILES_A_SPLIT = 4  # at least, of an item that several CTAs share: adding up costs about two
BARRIER_BYTES = 1024  # at most: barriers, then alignment

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
    page_table: Tensor | None = None,
    paged_lengths: Tensor | None = None,
) -> Tensor:
    """As reference.py says, in fp16 or bf16 with fp32 scores and sums; can be captured in a CUDA graph.

    Raises ValueError for q, k or v whose rows and heads don't begin at
    multiples of 16 bytes, which TMA demands.
    """
    heads, batch, (qk_dim, v_dim) = q.shape[1], q_offsets.shape[0] - 1, (q.shape[2], v.shape[2])
    if 0 in (q.shape[0], batch, max_q_len):
        return v.new_zeros(q.shape[0], heads, v_dim)
    out = v.new_empty(q.shape[0], heads, v_dim)
    page: int = 0
    pointers: tuple[int, ...] = (0,) * 4
    strides: tuple[int, ...] = (0,) * 8
    tensors = [("q", q), ("k", k), ("v", v)]
    if k_pages is not None and v_pages is not None and page_table is not None and paged_lengths is not None:
        tensors += [("k_pages", k_pages), ("v_pages", v_pages)]
        page = k_pages.shape[1]
        pointers = (k_pages.data_ptr(), v_pages.data_ptr(), page_table.data_ptr(), paged_lengths.data_ptr())
        strides = (k_pages.shape[0], page_table.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3])
    for name, x in tensors:
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:-1]) or x.stride(-1) != 1:
            raise ValueError(
                f"{name}: strides {x.stride()} and address {x.data_ptr():#x}; rows and heads must begin at multiples "
                "of 16 bytes and be contiguous; call .contiguous() or use kernel.hstu_attention=triton"
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
        _default(q, v, batch, max_q_len),
    )
    m, items = config["m"], batch * heads * -(-max_q_len // config["m"])
    processors = _processors(q.device.index)
    splits = _splits(items, -(-max_kv_len // config["n"]), processors)
    # In one allocation, cleared once: the counter of items, then who has arrived at each shared one.
    counts = splits > 1 and items * m // 16
    counter = torch.zeros(4 + counts, dtype=torch.int32, device=q.device) if config["dynamic"] or counts else None
    partials = torch.empty(items * splits * m * v_dim, dtype=torch.float32, device=q.device) if counts else None
    run = _compiled(q.dtype, qk_dim, v_dim, page, **config, split=splits > 1)
    run(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        q_offsets.data_ptr(),
        kv_offsets.data_ptr(),
        0 if num_targets is None else num_targets.data_ptr(),
        *pointers,
        0 if counter is None else counter.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        0 if counter is None else counter.data_ptr() + 16,
        splits,
        q.shape[0],
        k.shape[0],
        heads,
        batch,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *strides,
        contextual_seq_len,
        max_attn_len,
        int(num_targets is not None),
        alpha / 2,
        1.0 / scaling_seqlen,
        min(processors, items * splits),
        torch.cuda.current_stream(q.device.index).cuda_stream,
    )
    return out


def supports(*, device: str, dtype: str, qk_dim: int, v_dim: int, page: int = 0) -> str | None:
    """None, or why not: Hopper, half precision, head sizes 16 to 256 in steps of 16."""
    if dtype not in ("fp16", "bf16"):
        return f"dtype {dtype} is neither fp16 nor bf16 (variants that support it: torch, triton)"
    if any(d % 16 or not 16 <= d <= 256 for d in (qk_dim, v_dim)):
        return f"head sizes {qk_dim} and {v_dim}: allowed are multiples of 16 to 256 (others: torch, triton)"
    if page and page not in (16, 32, 64, 128):
        return f"pages of {page} tokens: allowed are 16, 32, 64 and 128 (others: torch, triton)"
    if device != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs an NVIDIA GPU of compute capability 9.0 (elsewhere: torch, triton)"
    return None


def _default(q: Tensor, v: Tensor, batch: int, max_q_len: int) -> dict[str, int]:
    """Tiles where nothing was tuned: as many keys as leave room for two stages; 64 rows where that still gives no
    CTA a second item; work handed out on demand where there is enough of it to pay for clearing the counter."""
    widest, streams = max(q.shape[2], v.shape[2]), batch * q.shape[1]
    processors = _processors(q.device.index)
    small = streams * -(-max_q_len // 64) <= processors
    return {
        "m": 64 if small else 128,
        "n": 128 if widest <= 128 else 64,
        "stages": 2,
        "take_turns": int(not small and widest <= 128),
        "dynamic": int(streams * -(-max_q_len // 128) > 4 * processors),
    }


def _splits(items: int, tiles: int, processors: int) -> int:
    """How many CTAs share a work item of so many tiles: where there are too few items, as many as there is room for,
    each with some tiles to itself."""
    return max(min(processors // max(items, 1), tiles // TILES_A_SPLIT), 1)


@cache
def _compiled(
    dtype: torch.dtype,
    qk_dim: int,
    v_dim: int,
    page: int,
    m: int,
    n: int,
    stages: int,
    take_turns: int,
    dynamic: int,
    split: bool = False,
) -> Any:
    """Raises ValueError for tiles that don't fit in shared memory, or into pages."""
    if page and n % page and page % n:
        raise ValueError(f"n={n}: tiles must be whole pages of {page} tokens, or whole parts of one")
    shared = 2 * (m * qk_dim + stages * n * (qk_dim + v_dim)) + BARRIER_BYTES
    if shared > SHARED_BYTES:
        raise ValueError(f"m={m} n={n} stages={stages} need {shared} bytes of shared memory; there are {SHARED_BYTES}")
    kernel = Attention(
        ELEMENTS[dtype], qk_dim, v_dim, Tiles(m, n, stages, bool(take_turns), bool(dynamic), split), page
    )
    tuning.note_compiled(__name__)
    return Launcher(compile_kernel(kernel), ARGUMENTS)


def compile_kernel(kernel: Attention, options: str = "") -> Any:
    """Compile for the GPU here, or without one for that of the environment variable CUTE_DSL_ARCH (sm_90a)."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own advice to its caller, such as which loops to unroll
        return _compile(kernel, options)


def _compile(kernel: Attention, options: str) -> Any:
    def pointer(dtype: Any) -> Any:
        align = 16 if dtype is kernel.dtype else dtype.width // 8
        return make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=align)

    return cute.compile(
        kernel.launch,
        *(pointer(kernel.dtype) for _ in range(4)),
        *(pointer(Int64) for _ in range(3)),
        *(pointer(kernel.dtype) for _ in range(2)),
        pointer(Int32),
        pointer(Int64),
        pointer(Int32),
        make_ptr(Float32, 0, cute.AddressSpace.gmem, assumed_align=16),
        pointer(Int32),
        *(Int32(1) for _ in range(5)),
        *(Int64(8) for _ in range(6)),
        Int32(1),
        *(Int64(8) for _ in range(7)),
        *(Int32(0) for _ in range(3)),
        Float32(1.0),
        Float32(1.0),
        Int32(1),
        cuda.CUstream(0),
        options=options,
    )


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


VARIANT = KernelVariant("hstu_attention", "cutlass", hstu_attention, reference, supports)
