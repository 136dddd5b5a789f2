"""The gate of ranking: the engine's scores are those of the fp32 reference.

The error is ||scores - reference|| / ||reference|| over a few requests of the trace, the shortest and the longest
history among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.base import GateResult, batches, sample
from grengines.api import Catalogue, Float32Array, Ranker, Request
from grengines.numerics import allowed_error, relative_error


class RankGate:
    """The reference's scores of a sample."""

    def __init__(
        self, spec: RunSpec, catalogue: Catalogue, requests: Sequence[Request], device: str, precision: str
    ) -> None:
        from grengines.models.hstu.reference import RankingReference, zero_attention

        self.sample = sample(requests, spec.gate.requests, spec.seed)
        model = RankingReference(spec.ranking_model, catalogue, spec.seed, device)
        self._reference = np.concatenate(model.scores(self.sample))
        eager = np.concatenate(model.scores(self.sample, precision))
        blind = np.concatenate(model.scores(self.sample, attention=zero_attention))
        self._eager_error = relative_error(eager, self._reference)
        self._zero_error = relative_error(blind, self._reference)
        self.tolerance = allowed_error(self._eager_error, spec.gate.max_error_ratio)

    def check(self, engine: Ranker, max_batch: int) -> GateResult:
        """Compare the engine's scores. Raises IncorrectError."""
        answers: list[Float32Array] = []
        for batch in batches(self.sample, max_batch):
            answers += engine.rank(batch).scores
        error = relative_error(np.concatenate(answers), self._reference)
        stale = np.concatenate(answers[1:] + answers[:1])
        result = GateResult(
            passed=error <= self.tolerance,
            error=error,
            tolerance=self.tolerance,
            eager_error=self._eager_error,
            zero_attention_error=self._zero_error,
            stale_error=relative_error(stale, self._reference),
            requests=len(self.sample),
        )
        return result.judge(
            None
            if result.passed
            else f"scores differ from the fp32 reference by {error:.2e} (relative), allowed is {self.tolerance:.2e}"
        )
