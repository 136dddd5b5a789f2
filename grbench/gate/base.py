"""The idea that every gate shares.

A gate compares answers with those of the fp32 reference. It allows a small multiple of the error that the reference's
own maths makes if every result is rounded to the engine's precision. It also proves that it can fail: on the very same
requests, answers that are known to be wrong must lie outside twice the tolerance.

`grengines.numerics` has the arithmetic, which the check of an export uses too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from grbench.gate.form import Form
from grbench.gate.measured import Answer, Verdict
from grbench.workloads.trace import history_lengths
from grengines.api import Float32Array, Request
from grengines.numerics import Comparison, IncorrectError, require_contrast

Item = TypeVar("Item")


class Gate(Protocol):
    """A reference's answers to a sample of a trace. An engine can be checked against them more than once."""

    form: Form  # of the task's answers

    def check(self, engine: Any, max_batch: int) -> Comparison:
        """Compare the answers of an engine of the gate's task. Raises IncorrectError, with figures, unless it passes.

        It is also raised if the gate could not have failed. The batches are those of `in_batches`.
        """

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Compare answers of the measurement, each on its own."""


@dataclass(kw_only=True)
class GateResult(Comparison):
    """Figures of an engine's answers, and of wrong ones that must not pass."""

    rounding_error: float  # of the reference itself, rounded to the engine's precision
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
    order = np.argsort(history_lengths(requests), kind="stable").tolist()
    others = np.random.default_rng(seed).permutation(order[1:-1])
    chosen = [order[0], order[-1], *others[: max(count - 2, 0)]]
    return [requests[i] for i in chosen]


def in_batches(
    ask: Callable[[Sequence[Request]], Any],
    form: Form,
    asked: Sequence[Request],
    trace: Sequence[Request],
    max_batch: int,
    seed: int,
) -> Iterator[tuple[int, Any, list[Float32Array]]]:
    """Yield a batch size with the items, if the task has any, and the scores of the requests `asked`, in their order.

    The sizes are 1, `max_batch` and one between. Other requests of the trace fill up the batches, and all places are
    random. Raises IncorrectError for an answer whose form is wrong.
    """
    rng = np.random.default_rng([seed, 1])
    known = {r.request_id for r in asked}
    for size in sorted({1, -(-max_batch // 2), max_batch}):
        room = -len(asked) % size
        drawn = rng.choice(len(trace), min(room + len(asked), len(trace)), replace=False)
        others = [request for i in drawn if (request := trace[int(i)]).request_id not in known]
        requests = [*asked, *others[:room]]
        items: dict[int, Any] = {}
        scores: dict[int, Float32Array] = {}
        for places in batches(rng.permutation(len(requests)).tolist(), size):
            batch = [requests[i] for i in places]
            result = ask(batch)
            form.require(batch, result)
            items |= zip(places, getattr(result, "items", ()), strict=False)
            scores |= zip(places, result.scores, strict=True)
        order = range(len(asked))
        yield size, [items.get(i) for i in order], [scores[i] for i in order]


def batches(requests: Sequence[Item], max_batch: int) -> Iterator[Sequence[Item]]:
    """Yield the requests in order, at most `max_batch` at once."""
    for start in range(0, len(requests), max_batch):
        yield requests[start : start + max_batch]
