"""Measured costs of loading and computing tokens, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grengines.api import RankResult, Request
from grengines.cache.index import Plan
from grengines.cache.states import UserStates

MOST_FIXED = 0.25  # share of a batch's time that no token adds, beyond which its time is no cost of tokens


@dataclass
class LoadCosts:
    """Costs on this machine."""

    copy_bytes_s: float  # bandwidth from page-locked memory to the device
    compute_s: float = 0.0  # of computing one token; 0: not measured yet
    launch_s: float = 0.0  # of the smallest batch, with its kernels launched one by one
    withheld: str = "nothing was computed"  # why `compute_s` is no cost of a token; "": it is

    def measured(self, result: RankResult, shorter: RankResult) -> None:
        """Take the cost of a token from the largest batch, and say if too few tokens stand behind it.

        shorter: the result of the same requests with shorter histories. The line through both has at no tokens the time
        that launches and other fixed work take.
        """
        self.compute_s = result.compute_ms / result.tokens / 1e3
        more_ms, more = result.compute_ms - shorter.compute_ms, result.tokens - shorter.tokens
        fixed_ms = result.compute_ms - (max(more_ms, 0.0) * result.tokens / more if more else 0.0)
        self.withheld = ""
        if fixed_ms > MOST_FIXED * result.compute_ms:
            self.withheld = (
                f"the largest batch, {result.tokens} tokens, takes {result.compute_ms:.3g} ms, of which {fixed_ms:.3g} "
                "ms do not depend on the tokens"
            )

    def actual(self) -> dict[str, Any]:
        """Return the cost of a token, or why it is not known, as JSON values."""
        if self.withheld:
            return {"cache_compute_withheld": self.withheld}
        return {"cache_compute_us_a_token": self.compute_s * 1e6}

    def shares(
        self, requests: Sequence[Request], plans: Sequence[Plan], states: UserStates, *, captured: bool
    ) -> list[float]:
        """Return the share to load of the tokens that only the host has, for each request.

        Prefetched states are loaded whole. For the others, loading takes t seconds per token and overlaps computing the
        rest, c seconds per token. Both end together if c / (c + t) of the tokens to compute without the host
        are loaded. With captured graphs, which can't wait for single copies, nothing is loaded if a graph computes
        all of them sooner.
        """
        pool = states.pool
        more = [max(plan.on_host - plan.on_device, 0) for plan in plans]
        here = [states.prefetched(plan) for plan in plans]
        there = sum(n for n, prefetched in zip(more, here, strict=True) if not prefetched)
        free = sum(more) - there
        copy_s = pool.page_bytes / pool.page / self.copy_bytes_s
        tokens = sum(p.tokens - p.on_device + len(r.candidates) for p, r in zip(plans, requests, strict=True)) - free
        share = min(tokens * self.compute_s / (self.compute_s + copy_s) / there, 1.0) if there else 1.0
        loading_s, computing_s = max(share * there * copy_s, self.launch_s), tokens * self.compute_s
        if captured and computing_s < loading_s:
            share = 0.0
        return [1.0 if prefetched else share for prefetched in here]
