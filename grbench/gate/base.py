"""The idea that every gate shares.

A gate compares answers with those of the fp32 reference. It allows a small multiple of the error that eager PyTorch
makes in the same precision, which is what rounding costs. It also proves that it can fail: on the very same requests,
answers that are known to be wrong must lie outside twice the tolerance.

`grengines.numerics` has the arithmetic, which the check of an export uses too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from grengines.api import Request
from grengines.numerics import Comparison, IncorrectError, require_contrast


class Gate(Protocol):
    """A reference's answers to a sample of a trace. An engine can be checked against them more than once."""

    def check(self, engine: Any, max_batch: int) -> Comparison:
        """Compare the answers of an engine of the gate's task. Raises IncorrectError, with figures, unless it passes.

        It is also raised if the gate could not have failed.
        """


@dataclass(kw_only=True)
class GateResult(Comparison):
    """Figures of an engine's answers, and of wrong ones that must not pass."""

    eager_error: float  # of eager PyTorch in the engine's precision, one request at a time
    zero_attention_error: float  # of the same model with attention that returns zeros
    stale_error: float  # of each request answered with its neighbour's answer
    requests: int

    def judge(self, problem: str | None) -> Self:
        """Return the result. Raises IncorrectError for a problem, or if a wrong answer would pass too."""
        if problem is not None:
            raise IncorrectError(problem, self)
        wrong = {"a model without attention": self.zero_attention_error, "stale answers": self.stale_error}
        require_contrast(wrong, self.tolerance, self)
        return self


def sample(requests: Sequence[Request], count: int, seed: int) -> list[Request]:
    """Return `count` requests: the shortest and the longest history, then a seeded choice.

    Raises ValueError for a single request.
    """
    if len(requests) < 2:
        raise ValueError(
            "the workload has one request, the gate needs two; set workload.max_requests=0 or use a larger workload"
        )
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].history_items))
    others = np.random.default_rng(seed).permutation(order[1:-1])
    chosen = [order[0], order[-1], *others[: max(count - 2, 0)]]
    return [requests[i] for i in chosen]


def batches(requests: Sequence[Request], max_batch: int) -> Iterator[Sequence[Request]]:
    """Yield the requests in order, at most `max_batch` at once."""
    for start in range(0, len(requests), max_batch):
        yield requests[start : start + max_batch]
