"""Calls of HSTU attention, and the check that every variant must pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grengines.numerics import relative_error
from grkernels.hstu_attention.reference import hstu_attention as reference
from grkernels.pages import EIGHT_BITS, quantised
from grkernels.rounding import rounded

SMALL_TILES = {"m": 16, "n": 16, "warps": 4, "stages": 2}
SUMMATION = 2e-6  # fp32 sums in another order


@dataclass
class Case:
    """Sequences and sizes of one call. `queries`: rows per sequence of an append, None for a prefill."""

    lengths: list[int]
    targets: list[int] | None = None
    queries: list[int] | None = None
    heads: int = 2
    qk_dim: int = 16
    v_dim: int = 16
    contextual: int = 0
    window: int = 0
    page: int = 0  # tokens per page; the tokens before the queries then lie in pages
    stored: str = ""  # int8 or fp8: pages are in 8 bits
    past: int = 3  # rows after the last sequence
    options: dict[str, Any] = field(init=False)

    def build(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Case:
        """Fill `options`: the arguments of a call, with q, k and v as views of one projection."""
        g = torch.Generator(device).manual_seed(seed)
        H, dqk, dv = self.heads, self.qk_dim, self.v_dim
        n = torch.tensor(self.lengths)
        queries = n if self.queries is None else torch.tensor(self.queries)
        kept = queries if self.page else n  # of a sequence's keys, those in the stream

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device, dtype=torch.float32).to(dtype)

        def offsets(counts: Tensor) -> Tensor:
            return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device)

        def views(rows: int) -> list[Tensor]:
            fused = random(rows, H * (dv + dqk + dqk) + 16)  # rows are strided, and 16-byte aligned for these sizes
            v, k, q, _ = fused.split([H * dv, H * dqk, H * dqk, 16], dim=1)
            return [q.unflatten(1, (H, dqk)), k.unflatten(1, (H, dqk)), v.unflatten(1, (H, dv))]

        q, k, v = views(int(kept.sum()) + self.past)
        kv_offsets = q_offsets = offsets(kept)
        if self.queries is not None and not self.page:
            q, q_offsets = views(int(queries.sum()) + self.past)[0], offsets(queries)
        self.options = {
            "q": q,
            "k": k,
            "v": v,
            "q_offsets": q_offsets,
            "kv_offsets": kv_offsets,
            "num_targets": None if self.targets is None else torch.tensor(self.targets, device=device),
            "max_q_len": int(queries.max()),
            "max_kv_len": int(n.max()),
            "scaling_seqlen": 64,
            "alpha": dqk**-0.5,
            "contextual_seq_len": self.contextual,
            "max_attn_len": self.window,
        }
        if self.page:
            cached = n - queries
            slots = -(-cached // self.page)
            pages = int(slots.sum()) + 2
            order = torch.randperm(pages, generator=g, device=device).to(torch.int32)
            table = torch.zeros(len(n), int(slots.max()) + 1, dtype=torch.int32, device=device)
            at = 0
            for b, count in enumerate(slots.tolist()):
                table[b, :count] = order[at : at + count]
                at += count
            self.options |= {
                "k_pages": random(pages, self.page, H, dqk),
                "v_pages": random(pages, self.page, H, dv),
                "page_table": table,
                "paged_lengths": cached.to(device),
            }
            if self.stored:
                for x in "kv":
                    numbers, scales = quantised(self.options[f"{x}_pages"], EIGHT_BITS[self.stored])
                    self.options |= {f"{x}_pages": numbers, f"{x}_scales": scales}
        return self


def check(fn: Any, case: Case) -> None:
    """The family's rule: at most twice the error of the rounded reference; rows past the end are zeros."""
    expected = reference(**case.options)
    rounding_error = relative_error(rounded(reference, case.options["v"].dtype)(**case.options), expected)
    out = fn(**case.options)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    error = relative_error(out, expected)
    assert error <= max(2 * rounding_error, SUMMATION), f"{error:.2e}, rounding {rounding_error:.2e}"
    assert not out[int(case.options["q_offsets"][-1]) :].any()
