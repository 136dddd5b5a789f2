"""The gate of ranking: the engine's scores are those of the fp32 reference.

The error is ||scores - reference|| / ||reference||: before and after the measurement over a few requests of the trace
together, the shortest and the longest history among them; of measured answers over each one alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.base import GateResult, in_batches, sample
from grbench.gate.form import Form
from grbench.gate.measured import Answer, Verdict
from grengines.api import Catalogue, Float32Array, Ranker, Request
from grengines.cache.config import EIGHT_BITS
from grengines.numerics import UNIT, allowed_error, relative_error, require_plausible

NO_FALLBACK: Mapping[str, str] = {}

ROUNDED = 16  # answers whose error of rounding is measured, if an answer is beyond what the check allowed
KEPT = 4096  # scores of requests that are kept for the next cells of an engine


class RankGate:
    """The reference's scores of a sample.

    precision: the engine's. fallback: the precisions of the engines behind it, by name. stored: int8 or fp8, if the
    engines keep the users' keys and values in 8 bits: rounding them is then part of what is allowed. fp8_attention: so
    is rounding the operands of attention to e4m3. keeps: False for a server, to which no request comes twice.
    """

    def __init__(
        self,
        spec: RunSpec,
        catalogue: Catalogue,
        requests: Sequence[Request],
        device: str,
        precision: str,
        fallback: Mapping[str, str] = NO_FALLBACK,
        stored: str = "",
        fp8_attention: bool = False,
        keeps: bool = True,
    ) -> None:
        from grengines.models.hstu.reference import RankingReference, zero_attention

        self._spec, self._requests, self._keeps = spec, requests, keeps
        self._known: dict[str | None, dict[Hashable, Float32Array]] = {}  # by precision, then as `_right` says
        self._precisions, self._stored = {"": precision, **fallback}, stored
        self._eight_bits: dict[str, Any] = {"stored": stored, "fp8_attention": fp8_attention}
        self.form = Form(len(spec.ranking_model.tasks))
        self.sample = sample(requests, spec.gate.requests, spec.seed)
        self._model = RankingReference(spec.ranking_model, catalogue, spec.seed, device)
        self._reference = np.concatenate(self._model.scores(self.sample))
        blind = np.concatenate(self._model.scores(self.sample, attention=zero_attention))
        self._zero_error = relative_error(blind, self._reference)
        rounded = np.concatenate(self._model.scores(self.sample, precision, **self._eight_bits))
        self._rounding_error = relative_error(rounded, self._reference)
        require_plausible(self._rounding_error, self._coarsest(precision), spec.ranking_model.layers)
        self.tolerance = allowed_error(self._rounding_error, spec.gate.max_error_ratio)

    @classmethod
    def of(
        cls,
        spec: RunSpec,
        catalogue: Catalogue,
        requests: Sequence[Request],
        actual: Mapping[str, Any],
        keeps: bool = True,
    ) -> RankGate:
        """Return the gate of an engine, or of a stage, that reports `actual`."""
        return cls(
            spec,
            catalogue,
            requests,
            actual["device"],
            actual["precision"],
            fallback_precisions(actual),
            stored_precision(actual),
            has_fp8_attention(actual),
            keeps,
        )

    def check(self, engine: Ranker, max_batch: int) -> GateResult:
        """Compare the engine's scores. Raises IncorrectError."""
        worst: GateResult | None = None
        rounds = in_batches(engine.rank, self.form, self.sample, self._requests, max_batch, self._spec.seed)
        for size, _, scores in rounds:
            error = relative_error(np.concatenate(scores), self._reference)
            stale = relative_error(np.concatenate(scores[1:] + scores[:1]), self._reference)
            result = GateResult(
                passed=error <= self.tolerance,
                error=error,
                tolerance=self.tolerance,
                rounding_error=self._rounding_error,
                zero_attention_error=self._zero_error,
                stale_error=stale,
                requests=len(self.sample),
            )
            result.judge(
                None
                if result.passed
                else f"in batches of {size} scores differ from the fp32 reference by {error:.2e} (relative), "
                f"allowed is {self.tolerance:.2e}"
            )
            worst = result if worst is None or result.error > worst.error else worst
        assert worst is not None, "there is at least one batch size"
        return worst

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Compare the scores of each answer with the reference's.

        Allowed is what the check before the measurement allowed. Rounding may cost a longer request more, so answers
        beyond are judged by what rounding costs the answers with the largest errors.
        """
        expected = self._right([a.request for a in answers])
        typical = float(np.sqrt(np.mean(np.concatenate([self._reference, *expected]) ** 2)))
        errors = [_error(a.scores, right, typical) for a, right in zip(answers, expected, strict=True)]
        verdicts = [Verdict(error, 0.0) for error in errors]
        for name in {a.fallback for a in answers}:
            mine = [i for i, answer in enumerate(answers) if answer.fallback == name]
            tolerance = self.tolerance  # of the first engine
            beyond = sum(errors[i] > tolerance for i in mine)
            if beyond or name:
                worst = sorted(mine, key=lambda i: -errors[i])[: max(beyond, ROUNDED)]
                requests, right = [answers[i].request for i in worst], [expected[i] for i in worst]
                tolerance = self._allowed(requests, right, typical, self._precisions[name])
            for i in mine:
                problem = f"scores differ from the reference by {errors[i]:.2e} (relative), allowed is {tolerance:.2e}"
                verdicts[i] = Verdict(errors[i], tolerance, None if errors[i] <= tolerance else problem)
        return verdicts

    def _right(self, requests: Sequence[Request], precision: str | None = None) -> list[Float32Array]:
        """Return the reference's scores. Those that an earlier cell of the same engine asked for are there already.

        They are kept by request and candidates: a pipeline may retrieve others for the same request. The number of a
        request is not enough, since LoadGen's accuracy mode counts its own from 0.
        """
        known = self._known.setdefault(precision, {}) if self._keeps else {}
        if len(known) > KEPT:
            known.clear()
        keys = [(r.request_id, r.user_id, r.timestamp, r.candidates.tobytes()) for r in requests]
        new = {key: r for key, r in zip(keys, requests, strict=True) if key not in known}
        if new:
            given = list(new.values())
            if precision is None:
                scores = self._model.scores(given)
            else:
                scores = self._model.scores(given, precision, **self._eight_bits)
            known |= zip(new, scores, strict=True)
        return [known[key] for key in keys]

    def _allowed(
        self, requests: Sequence[Request], expected: Sequence[Float32Array], typical: float, precision: str
    ) -> float:
        """Return a multiple of the largest error of rounding, at most half of the error of zero attention."""
        exact = precision == "fp32" and not self._stored
        rounded = expected if exact else self._right(requests, precision)
        pairs = zip(rounded, expected, strict=True)
        rounding_error = max(self._rounding_error, *(_error(a, b, typical) for a, b in pairs))
        require_plausible(rounding_error, self._coarsest(precision), self._spec.ranking_model.layers)
        return min(allowed_error(rounding_error, self._spec.gate.max_error_ratio), self._zero_error / 2)

    def _coarsest(self, precision: str) -> str:
        """Return the precision that costs most: of the engine, of its pages or of its attention."""
        attention = "fp8" if self._eight_bits["fp8_attention"] else precision
        return max(precision, self._stored or precision, attention, key=UNIT.__getitem__)


def fallback_precisions(actual: Mapping[str, Any]) -> dict[str, str]:
    """Return the precisions of the engines behind the first one, by name, from what the engine reports."""
    return {name: facts["precision"] for name, facts in actual.get("fallback", {}).items()}


def stored_precision(actual: Mapping[str, Any]) -> str:
    """Return int8 or fp8 if an engine that reports this keeps keys and values in pages of 8 bits, else ""."""
    precision: str = actual.get("cache_precision", "")
    return precision if precision in EIGHT_BITS else ""


def has_fp8_attention(actual: Mapping[str, Any]) -> bool:
    """Return True if an engine that reports this multiplies numbers in e4m3 in attention."""
    return actual.get("attention_precision") == "fp8"


def coarsest(actual: Mapping[str, Any]) -> str:
    """Return the precision that costs most: of the stages of an engine, its fallbacks, its pages and its attention."""
    stages = [actual[name] for name in ("retrieve", "rank") if name in actual] or [actual]
    found: list[str] = [stage["precision"] for stage in stages]
    for stage in stages:
        found += [*fallback_precisions(stage).values(), stored_precision(stage) or "fp32"]
        found.append("fp8" if has_fp8_attention(stage) else "fp32")
    return max(found, key=UNIT.__getitem__)


def _error(scores: Float32Array, reference: Float32Array, typical: float) -> float:
    """Return the relative error of one answer. Scores near zero are measured by the typical size of a score."""
    size = max(float(np.linalg.norm(reference)), typical * reference.size**0.5)
    return float(np.linalg.norm(scores - reference)) / size if size else 0.0
