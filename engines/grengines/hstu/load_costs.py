"""Measured costs of loading and computing tokens, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grengines.api import RankResult, Request
from grengines.cache.index import Plan
from grengines.cache.states import UserStates

MOST_FIXED = 0.25  # share of a batch's time that no token adds, beyond which its time is no cost of tokens
HOST, DISK, HERE = 0, 1, 2  # links: from the host, from the disk, none


@dataclass
class LoadCosts:
    """Costs on this machine."""

    copy_bytes_s: float  # bandwidth from page-locked memory to the device
    read_bytes_s: float = 0.0  # bandwidth from the storage tier's disk to that memory
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
        """Return the share to load of the tokens that only a lower tier has, for each request.

        Prefetched states are loaded whole. For the others, loading overlaps computing the rest, c seconds per token.
        The host's tokens take t seconds each, and the disk's, on their way there at the same time, u seconds each. All
        end together after x seconds if x / t and x / u of them are loaded and x / c are computed, or all of a tier's if
        it has no more. Without a disk that is a share c / (c + t) of the tokens. With captured graphs, which can't wait
        for single copies, nothing is loaded if a graph computes all of them sooner.
        """
        pool, kinds = states.pool, [self._link(plan, states) for plan in plans]
        more = [max(plan.below - plan.on_device, 0) for plan in plans]
        there = [sum(n for n, kind in zip(more, kinds, strict=True) if kind == link) for link in (HOST, DISK)]
        free = sum(n for n, kind in zip(more, kinds, strict=True) if kind == HERE)
        token_bytes = pool.page_bytes / pool.page
        tokens = sum(p.tokens - p.on_device + len(r.candidates) for p, r in zip(plans, requests, strict=True)) - free
        rates = [self.copy_bytes_s / token_bytes, self.read_bytes_s / token_bytes]  # tokens/s
        took = together(tokens, 1 / self.compute_s, there, rates)
        longest_s = max((n / rate for n, rate in zip(there, rates, strict=True) if n), default=0.0)
        loading_s = max(min(took, longest_s), self.launch_s)
        if captured and tokens * self.compute_s < loading_s:
            took = 0.0
        shares = [min(took * rate / n, 1.0) if n else 1.0 for n, rate in zip(there, rates, strict=True)]
        return [1.0 if kind == HERE else shares[kind] for kind in kinds]

    @staticmethod
    def _link(plan: Plan, states: UserStates) -> int:
        """Return what the tokens of a plan that only a lower tier has must pass."""
        if plan.on_storage:
            return HOST if states.read_ahead(plan) else DISK
        return HERE if states.prefetched(plan) else HOST


def together(tokens: float, computed: float, there: Sequence[int], rates: Sequence[float]) -> float:
    """Return the seconds after which loading and computing end together.

    tokens: to compute if nothing is loaded, `computed` of them in a second. there: tokens that each link can load,
    `rates` of them in a second.
    """
    full: set[int] = set()  # links that have loaded all they can by then
    while True:
        left = tokens - sum(there[i] for i in full)
        took = left / (computed + sum(rate for i, rate in enumerate(rates) if i not in full and there[i]))
        more = {i for i, rate in enumerate(rates) if i not in full and there[i] and took * rate >= there[i]}
        if not more:
            return took
        full |= more
