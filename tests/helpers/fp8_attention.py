"""Attention with products in e4m3 as the kernel for Hopper computes it, in PyTorch, and the check of its results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grengines.numerics import relative_error
from grkernels.hstu_attention import fp8_operands
from grkernels.hstu_attention.fp8_operands import BLOCK, Operands
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.hstu_attention.reference import hstu_mask
from grkernels.rounding import with_fp8_products
from helpers.attention_cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = ("q_offsets", "kv_offsets", "max_q_len", "max_kv_len")
MASKS = ("q_offsets", "num_targets", "contextual_seq_len", "max_attn_len", "alpha", "scaling_seqlen")
PAGES = ("k_pages", "v_pages", "k_scales", "v_scales", "page_table", "paged_lengths")


def operands(o: dict[str, Any]) -> Operands:
    return fp8_operands.quantised(o["q"], o["k"], o["v"], **{x: o[x] for x in (*LENGTHS, *PAGES) if x in o})


@cache
def order() -> list[int]:
    """The token of a block in each place of V, as `quantised` wrote it. V has the token's bits."""
    bits = (torch.arange(BLOCK, device=DEVICE)[:, None] >> torch.arange(64, device=DEVICE) % 7) & 1
    ends = torch.tensor([0, BLOCK], device=DEVICE)
    x = bits[:, None].to(torch.bfloat16)
    made = fp8_operands.quantised(x, x, x, q_offsets=ends, kv_offsets=ends, max_q_len=BLOCK, max_kv_len=BLOCK)
    found = made.v[0, :7, :BLOCK].float().cpu() > 0
    return [int((column * 2 ** torch.arange(7)).sum()) for column in found.T]


def emulated(o: dict[str, Any], made: Operands, scale_of_p: float = 1.0) -> Tensor:
    """Attention by the kernel's formulas (sm90/fp8.py), with exact sums. scale_of_p: of P as it is rounded."""
    return attended(made, o["v"].dtype, scale_of_p=scale_of_p, **{name: o[name] for name in MASKS})


def attended(made: Operands, dtype: torch.dtype, *, scale_of_p: float = 1.0, **o: Any) -> Tensor:
    """The same with the arguments of `fp8.attend`."""
    tokens = order()
    out = torch.zeros(made.q.shape[0], *made.v.shape[:2])
    for b, (begin, end) in enumerate(itertools.pairwise(made.offsets.tolist())):
        rows, n = slice(*o["q_offsets"][b : b + 2].tolist()), end - begin
        start = begin // BLOCK + b
        targets = 0 if o["num_targets"] is None else int(o["num_targets"][b])
        mask = hstu_mask(n, targets, o.get("contextual_seq_len", 0), o.get("max_attn_len", 0))[
            n - (rows.stop - rows.start) :
        ]
        seen = torch.nn.functional.pad(mask, (0, -n % BLOCK))
        for head, i in itertools.product(range(out.shape[1]), range(-(-n // BLOCK))):
            there = slice((start + i) * BLOCK, (start + i + 1) * BLOCK)
            b_scale, c_scale = made.blocks[head, start + i].tolist()
            r = o["alpha"] / 2 * made.rows[rows, head, None]
            s = made.q[rows, head].float() @ made.k[there, head].float().T * seen[:, i * BLOCK : (i + 1) * BLOCK]
            p = ((s * torch.tanh(r * b_scale * s) + s) * scale_of_p).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            product = p[:, tokens] @ made.v[head, :, there].float().T / scale_of_p
            out[rows, head] += r * b_scale * c_scale * product / o["scaling_seqlen"]
    return out.to(dtype)


def check(fn: Callable[..., Tensor], case: Case) -> float:
    """The rule of kernels in fp8: at most twice the error of the reference with operands in e4m3. Returns the error."""
    o = case.options
    expected = reference(**o)
    rounding_error = relative_error(with_fp8_products(reference)(**o), expected)
    out = fn(**o)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    error = relative_error(out, expected)
    assert error <= 2 * rounding_error, f"{error:.2e}, rounding {rounding_error:.2e}"
    assert not out[int(o["q_offsets"][-1]) :].any()
    return error
