"""The gate of generation: the engine's items are those of the fp32 reference search.

The gate checks the scores, the order, the best item, and how many of the k best items were found. Errors are absolute
differences of log-probabilities: a score is compared with the fp32 log-probability of the very item that was returned.

Scores that differ by less than twice the tolerance are a near-tie. The items of a near-tie may change places. An
expected item may be missing if its score, or the score of one of its prefixes, is a near-tie with the last beam's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.base import GateResult, in_batches, sample
from grbench.gate.form import Form
from grbench.gate.measured import Answer, Verdict
from grbench.gate.rank import stored_precision
from grengines import registry
from grengines.api import Catalogue, Float32Array, Generator, Int64Array, Request, Retrieval
from grengines.models.reference import GenerationReference
from grengines.numerics import UNIT, allowed_error, require_plausible
from grengines.semantic.search import Beams

# Sums of three log-probabilities of size up to some tens, in another order: some tens of ulp.
SCORE_FLOOR = 1e-4
OVERLAP = 0.95  # least share of the k best items in half precision or 8 bits, of all answers; in fp32 all
OVERLAP_OF_ONE = 0.5  # of one answer
PROBES = 32  # best items of a request at which the error of rounding is measured

Answers = list[tuple[Int64Array, Float32Array]]  # items and scores of each request, best first


@dataclass(kw_only=True)
class GenerateGateResult(GateResult):
    """Result of the gate. Errors are absolute differences of scores, which are log-probabilities."""

    overlap: float  # mean share of the expected items that were found
    near_ties: int  # expected items that are missing or out of place by less than the tolerance


@dataclass
class _Finding:
    """The comparison of one answer."""

    problem: str | None  # a difference that rounding does not explain
    error: float = float("inf")
    found: float = 1.0  # share of the expected items
    sure: float = 1.0  # share of them, near-ties included
    near_ties: int = 0


@dataclass
class _Expected:
    """Items that the fp32 reference finds for one request."""

    reference: GenerationReference[Any]
    request: Request
    items: Int64Array
    scores: Float32Array
    cut: Float32Array  # [levels]: the best score that the search left out at each level

    @cached_property
    def prefixes(self) -> Float32Array:
        """Scores of each prefix of the items [items, levels]. Few answers need them, and they cost a search."""
        scores: Float32Array = self.reference.prefix_scores(self.request, self.items)
        return scores


class GenerateGate:
    """The reference's items and scores for a sample."""

    def __init__(
        self,
        spec: RunSpec,
        catalogue: Catalogue,
        requests: Sequence[Request],
        retrieval: Retrieval,
        device: str,
        precision: str,
        stored: str = "",
    ) -> None:
        """Find them. stored: int8 or fp8, if the engine keeps prompts in 8 bits: rounding them is then allowed."""
        self._spec, self._requests, self._retrieval = spec, requests, retrieval
        self._precision, self._stored = precision, stored
        self._exactly = precision == "fp32" and not stored
        self.sample = sample(requests, spec.gate.requests, spec.seed)
        self.form = Form(None, retrieval.k, catalogue.num_items)
        self.reference = registry.reference(spec.model, spec.seed, retrieval, device)
        self._expected = self._find(self.sample)
        rounded = self._rounded(self.sample)
        self._rounding_error = _largest(rounded)
        self._size = max(_mean_square(np.concatenate([e.scores for e in self._expected])), 1.0)
        self._require_plausible(rounded)
        blind = _answers(self.reference.search(self.sample, blind=True))
        self._zero_error = _largest(self._errors(self.sample, blind))
        self.tolerance = self._allowed(self._rounding_error)

    @classmethod
    def of(
        cls,
        spec: RunSpec,
        catalogue: Catalogue,
        requests: Sequence[Request],
        retrieval: Retrieval,
        actual: Mapping[str, Any],
    ) -> GenerateGate:
        """Return the gate of an engine, or of a stage, that reports `actual`."""
        stored = stored_precision(actual)
        return cls(spec, catalogue, requests, retrieval, actual["device"], actual["precision"], stored)

    def check(self, engine: Generator, max_batch: int) -> GenerateGateResult:
        """Compare the engine's items and scores. Raises IncorrectError."""
        worst: GenerateGateResult | None = None
        rounds = in_batches(engine.generate, self.form, self.sample, self._requests, max_batch, self._spec.seed)
        for size, items, scores in rounds:
            answers = list(zip(items, scores, strict=True))
            findings = [self._compare(e, r, *a) for e, r, a in zip(self._expected, self.sample, answers, strict=True)]
            problem = next((f.problem for f in findings if f.problem), None) or self._too_few(findings)
            result = GenerateGateResult(
                passed=problem is None,
                error=max(f.error for f in findings),
                tolerance=self.tolerance,
                rounding_error=self._rounding_error,
                zero_attention_error=self._zero_error,
                stale_error=_largest(self._errors(self.sample, answers[1:] + answers[:1])),
                requests=len(self.sample),
                overlap=float(np.mean([f.found for f in findings])),
                near_ties=sum(f.near_ties for f in findings),
            ).judge(problem and f"in batches of {size}: {problem}")
            worst = result if worst is None or result.error > worst.error else worst
        assert worst is not None, "there is at least one batch size"
        return worst

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Compare the items and the scores of each answer."""
        given = [(a.items, a.scores) for a in answers if a.items is not None]
        return self.judge_items([a.request for a in answers], given)

    def judge_items(
        self, requests: Sequence[Request], answers: Sequence[tuple[Int64Array, Float32Array | None]]
    ) -> list[Verdict]:
        """Compare the items and, if given, the scores of each answer. Without scores the items may be in any order.

        Rounding may cost a request more than it costs the sample. So a score that differs by more than the tolerance is
        compared once more, with what rounding costs this request. Raises IncorrectError if that is not plausible.
        """
        expected = self._find(requests)
        findings = [self._compare(e, r, *a) for e, r, a in zip(expected, requests, answers, strict=True)]
        allowed = [self.tolerance] * len(findings)
        for i, finding in enumerate(findings):
            if self._exactly or finding.error <= self.tolerance:
                continue
            allowed[i] = self._own_tolerance(requests[i])
            findings[i] = self._compare(expected[i], requests[i], *answers[i], tolerance=allowed[i])
        verdicts = [Verdict(f.error, tolerance, f.problem) for f, tolerance in zip(findings, allowed, strict=True)]
        if (problem := self._too_few(findings)) and all(v.problem is None for v in verdicts):
            worst = min(range(len(findings)), key=lambda i: findings[i].sure)
            verdicts[worst].problem = problem
        return verdicts

    def _find(self, requests: Sequence[Request]) -> list[_Expected]:
        found = self.reference.search(requests)
        return [
            _Expected(self.reference, request, items, scores, cut)
            for request, (items, scores), cut in zip(requests, _answers(found), found.cuts, strict=True)
        ]

    def _rounded(self, requests: Sequence[Request]) -> Float32Array:
        """Return the errors of the reference's own scores, rounded as the engine rounds."""
        wide, many = max(self._retrieval.beam_width, PROBES), max(self._retrieval.k, PROBES)
        found = self.reference.search(requests, self._precision, stored=self._stored, width=wide, k=many)
        return self._errors(requests, _answers(found))

    def _allowed(self, rounding_error: float) -> float:
        return allowed_error(rounding_error, self._spec.gate.max_error_ratio, SCORE_FLOOR)

    def _own_tolerance(self, request: Request) -> float:
        """Return what rounding allows the answer to a request, at most half of the error of zero attention."""
        rounded = self._rounded([request])
        self._require_plausible(rounded)
        return min(max(self._allowed(_largest(rounded)), self.tolerance), self._zero_error / 2)

    def _require_plausible(self, rounded: Float32Array) -> None:
        """Raise IncorrectError for errors that rounding alone can't explain.

        Their norm counts, as of a ranker's scores: the largest of many differences says less about the precision.
        """
        coarsest = max(self._precision, self._stored or self._precision, key=UNIT.__getitem__)
        require_plausible((_mean_square(rounded) / self._size) ** 0.5, coarsest, self._spec.model.layers)

    def _errors(self, requests: Sequence[Request], answers: Answers) -> Float32Array:
        """Return each score's difference from the fp32 log-probability of its item, of all requests in one array."""
        exact = [self.reference.prefix_scores(r, items)[:, -1] for r, (items, _) in zip(requests, answers, strict=True)]
        return np.concatenate([scores - right for (_, scores), right in zip(answers, exact, strict=True)])

    def _exact(self, expected: _Expected, request: Request, items: Int64Array) -> Float32Array:
        """Return the fp32 log-probability of each item, float32 [n]. Those of the expected items are known."""
        known = dict(zip(expected.items.tolist(), expected.scores.tolist(), strict=True))
        if len(others := items[~np.isin(items, expected.items)]):
            found = self.reference.prefix_scores(request, others)[:, -1]
            known |= dict(zip(others.tolist(), found.tolist(), strict=True))
        return np.array([known[item] for item in items.tolist()], np.float32)

    def _compare(
        self,
        expected: _Expected,
        request: Request,
        items: Int64Array,
        scores: Float32Array | None,
        tolerance: float | None = None,
    ) -> _Finding:
        """Compare one answer. scores: None if only the items are known, in any order."""
        which = f"request {request.request_id}"
        if len(items) != len(expected.items):
            return _Finding(f"{which}: {len(items)} items, the fp32 reference finds {len(expected.items)}")
        if len(set(items.tolist())) < len(items):
            return _Finding(f"{which}: an item was returned twice")
        if not len(items):
            return _Finding(None, 0.0)
        tolerance = tolerance or self.tolerance
        tie, least = 2 * tolerance, 1.0 if self._exactly else OVERLAP_OF_ONE
        exact = self._exact(expected, request, items)
        if scores is None:
            order = np.argsort(-exact, kind="stable")
            items, exact, scores = items[order], exact[order], exact[order]
        there = np.isin(expected.items, items)
        near = ~there
        if near.any():
            # How much better each expected item is than the worst returned one, and each of its prefixes than the best
            # that the search left out.
            last = (expected.scores - exact.min())[:, None]
            margin = np.append(expected.prefixes[:, :-1] - expected.cut[:-1], last, axis=1)
            near &= margin.min(axis=1) <= tie
        finding = _Finding(
            None,
            _largest(scores - exact),
            found=float(there.mean()),
            sure=float((there | near).mean()),
            near_ties=int(near.sum()) + int((there & (items != expected.items)).sum()),
        )
        best = expected.scores[0] - exact[0]
        if finding.error > tolerance:
            finding.problem = (
                f"{which}: scores differ from the fp32 reference by {finding.error:.2g} (log-probability), "
                f"allowed is {tolerance:.2g}"
            )
        elif (np.diff(exact) > tie).any():
            finding.problem = f"{which}: items are out of order by {np.diff(exact).max():.2g}, a near-tie is {tie:.2g}"
        elif items[0] != expected.items[0] and not near[0] and best > tie:
            finding.problem = f"{which}: the best item is {items[0]}, the fp32 reference's is {expected.items[0]}"
        elif finding.sure < least:
            finding.problem = f"{which}: {_share(finding.sure, least)}"
        return finding

    def _too_few(self, findings: Sequence[_Finding]) -> str | None:
        """Return a problem if the answers together have too few of the expected items."""
        found, least = float(np.mean([f.sure for f in findings])), 1.0 if self._exactly else OVERLAP
        return _share(found, least) if found < least else None


def _share(found: float, least: float) -> str:
    return f"{found:.1%} of the fp32 reference's items, near-ties included; at least {least:.0%} must be found"


def _largest(errors: Float32Array) -> float:
    """Return the largest size of an error; NaN counts as infinite."""
    largest = float(np.abs(errors).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def _mean_square(values: Float32Array) -> float:
    return float(np.square(values, dtype=np.float64).mean()) if len(values) else 0.0


def _answers(found: Beams) -> Answers:
    return [(i[i >= 0], s[i >= 0]) for i, s in zip(found.items, found.scores, strict=True)]
