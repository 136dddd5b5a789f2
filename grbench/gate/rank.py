"""The correctness gate: no cell is measured before its engine agrees with the fp32 reference.

The error is ||scores - reference|| / ||reference|| over a few requests of the trace, the shortest and
the longest history among them. Allowed is a small multiple of the error that plain PyTorch makes in
the same precision (what rounding costs), never less than a floor for summation order. And the gate
must be able to fail: the scores of a model whose attention returns zeros, and stale scores (another
request's), must both lie outside the tolerance, on these very requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from grbench.config.schema import RunSpec
from grengines.api import Catalogue, Float32Array, IncorrectError, Ranker, Request
from grengines.numerics import SUMMATION_FLOOR, relative_error


class GateFigures(Protocol):
    """What a check found: its error, and all figures for the record."""

    @property
    def error(self) -> float: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass
class GateResult:
    """Relative errors against the fp32 reference. `passed` compares `error` with `tolerance`."""

    passed: bool
    error: float
    tolerance: float
    plain_error: float  # plain torch in the engine's precision, one request at a time
    zero_attention_error: float  # the same model with attention returning zeros
    stale_error: float  # each request answered with its neighbour's scores
    requests: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Gate:
    """Holds the reference for a sample of a trace, so that an engine can be checked more than once."""

    def __init__(self, spec: RunSpec, catalogue: Catalogue, requests: Sequence[Request], device: str, precision: str):
        from grengines.hstu.engine import Reference
        from grengines.models.hstu.model import zero_attention

        self.sample = pick(requests, spec.gate.requests, spec.seed)
        if len(self.sample) < 2:
            raise ValueError("the workload has one request; the gate needs two to tell stale scores from right ones")
        model = Reference(spec.model, catalogue, spec.seed, device)
        self._reference = np.concatenate(model.scores(self.sample))
        plain = np.concatenate(model.scores(self.sample, precision))
        blind = np.concatenate(model.scores(self.sample, attention=zero_attention))
        self._plain_error = relative_error(plain, self._reference)
        self._zero_error = relative_error(blind, self._reference)
        self._tolerance = max(spec.gate.max_error_ratio * self._plain_error, SUMMATION_FLOOR)

    def check(self, engine: Ranker, max_batch: int) -> GateResult:
        """Compare the engine with the reference. Raises IncorrectError when it, or the gate itself, is no good."""
        answers: list[Float32Array] = []
        for start in range(0, len(self.sample), max_batch):
            answers += engine.rank(self.sample[start : start + max_batch]).scores
        stale = np.concatenate(answers[1:] + answers[:1])
        error = relative_error(np.concatenate(answers), self._reference)
        result = GateResult(
            passed=error <= self._tolerance,
            error=error,
            tolerance=self._tolerance,
            plain_error=self._plain_error,
            zero_attention_error=self._zero_error,
            stale_error=relative_error(stale, self._reference),
            requests=len(self.sample),
        )
        if not result.passed:
            raise GateError(
                f"scores differ from the fp32 reference by {error:.2e} (relative), allowed is {self._tolerance:.2e}",
                result,
            )
        if min(result.zero_attention_error, result.stale_error) <= 2 * self._tolerance:
            raise GateError(
                f"the gate can't tell right from wrong here: without attention the error is "
                f"{result.zero_attention_error:.2e}, with stale scores {result.stale_error:.2e}, "
                f"allowed is {self._tolerance:.2e}; use a higher precision or other requests",
                result,
            )
        return result


class GateError(IncorrectError):
    """The gate failed; `result` has the figures."""

    def __init__(self, message: str, result: GateFigures) -> None:
        super().__init__(message)
        self.result = result


def pick(requests: Sequence[Request], count: int, seed: int) -> list[Request]:
    """`count` requests with as many candidates each: the shortest and the longest history, then a seeded choice."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].history_items))
    chosen = [order[0], order[-1]]
    others = np.random.default_rng(seed).permutation(order[1:-1])
    chosen += [int(i) for i in others[: max(count - 2, 0)]]
    return [requests[i] for i in dict.fromkeys(chosen)]
