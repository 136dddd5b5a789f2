"""HSTU attention of torch.py, compiled by torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from grkernels import capabilities
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.torch import hstu_attention as eager
from grkernels.hstu_attention.torch import tiles_needed
from grkernels.variant import KernelVariant


def hstu_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_offsets: Tensor, max_q_len: int, max_kv_len: int, **options: Any
) -> Tensor:
    """Compute what reference.py specifies, as torch.py does.

    A graph is for a number of tiles, a power of two, and not for lengths: a loop over rows would give each max_q_len a
    graph of its own. PyTorch compiles a size of 1 as a constant, so bounds and page tables have at least two.
    """
    batch, heads, pages = q_offsets.shape[0] - 1, q.shape[1], options.get("page_table")
    if 0 in (q.shape[0], batch, max_q_len, max_kv_len) or (pages is None and k.shape[0] == 0):
        return eager(q, k, v, q_offsets=q_offsets, max_q_len=max_q_len, max_kv_len=max_kv_len, **options)
    tiles = 1 << (tiles_needed(batch, heads, max_q_len, max_kv_len) - 1).bit_length()
    rows = max(-(-max_q_len // tiles) * tiles, 2)
    options |= {"max_q_len": rows, "max_kv_len": max(max_kv_len, 2), "tiles": tiles}
    if pages is not None:  # the stream has new tokens only, so a copy of it is small
        k, v = k.contiguous(), v.contiguous()
        options["page_table"] = pages.repeat(1, 2) if pages.shape[1] == 1 else pages
    return compiled(tiles, pages is not None, options["kv_offsets"] is q_offsets)(
        q, k, v, q_offsets=q_offsets, **options
    )


@functools.cache
def compiled(tiles: int, paged: bool, prefill: bool) -> Callable[..., Tensor]:
    """Return the eager variant, compiled, for a number of tiles, with pages or not, of a prefill or an append.

    Each is a copy with a code object of its own, since PyTorch limits the graphs of a code object to eight. They are
    for keys that are a view or not, for one sequence or more, and for one key or more; the first one has fixed lengths.
    fullgraph: more of them raise an error instead of running the eager version silently.
    """
    code = eager.__code__.replace(co_name=f"{eager.__name__}_{tiles}_{paged}_{prefill}")
    copy = FunctionType(code, eager.__globals__, code.co_name, eager.__defaults__, eager.__closure__)
    copy.__kwdefaults__ = eager.__kwdefaults__
    return torch.compile(copy, fullgraph=True)


VARIANT = KernelVariant("hstu_attention", "compile", hstu_attention, reference, capabilities.compiled)
