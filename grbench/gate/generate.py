"""The gate of generation: the engine's items are those of the fp32 reference search.

The gate checks the scores, the order, the best item, and how many of the k best items were found. Errors are absolute
differences of log-probabilities: a score is compared with the fp32 log-probability of the very item that was returned.

Scores that differ by less than twice the tolerance are a near-tie. The items of a near-tie may change places. An
expected item may be missing if its score, or the score of one of its prefixes, is a near-tie with the last beam's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.base import GateResult, batches, sample
from grengines import registry
from grengines.api import Catalogue, Float32Array, Generator, Int64Array, Request, Retrieval
from grengines.numerics import allowed_error
from grengines.semantic.search import Beams

# Sums of three log-probabilities of size up to some tens, in another order: some tens of ulp.
SCORE_FLOOR = 1e-4
OVERLAP = 0.95  # least share of the k best items in half precision; in fp32 all
PROBES = 32  # best items of a request at which the error of eager PyTorch is measured

Answers = list[tuple[Int64Array, Float32Array]]  # items and scores of each request, best first


@dataclass(kw_only=True)
class GenerateGateResult(GateResult):
    """Result of the gate. Errors are absolute differences of scores, which are log-probabilities."""

    overlap: float  # mean share of the expected items that were found
    near_ties: int  # expected items that are missing or out of place by less than the tolerance


@dataclass
class _Verdict:
    problem: str | None  # a difference that rounding does not explain
    error: float = float("inf")
    overlap: float = 0.0
    near_ties: int = 0


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
    ) -> None:
        self.sample = sample(requests, spec.gate.requests, spec.seed)
        self._items, self._exactly = catalogue.num_items, precision == "fp32"
        self.reference = reference = registry.reference(spec.model, spec.seed, retrieval, device)
        found = reference.search(self.sample)
        self._expected, self._cuts = _answers(found), found.cuts
        self._prefixes = [
            reference.prefix_scores(r, items) for r, (items, _) in zip(self.sample, self._expected, strict=True)
        ]
        wide = max(retrieval.beam_width, PROBES)
        eager = reference.search(self.sample, precision, width=wide, k=max(retrieval.k, PROBES))
        self._eager_error = self._error(_answers(eager))
        self._zero_error = self._error(_answers(reference.search(self.sample, blind=True)))
        self.tolerance = allowed_error(self._eager_error, spec.gate.max_error_ratio, SCORE_FLOOR)

    def check(self, engine: Generator, max_batch: int) -> GenerateGateResult:
        """Compare the engine's items and scores. Raises IncorrectError."""
        answers: Answers = []
        for batch in batches(self.sample, max_batch):
            result = engine.generate(batch)
            answers += zip(result.items, result.scores, strict=True)
        verdict = self._verdict(answers)
        stale = self._error(answers[1:] + answers[:1]) if verdict.problem is None else float("inf")
        return GenerateGateResult(
            passed=verdict.problem is None,
            error=verdict.error,
            tolerance=self.tolerance,
            eager_error=self._eager_error,
            zero_attention_error=self._zero_error,
            stale_error=stale,
            requests=len(self.sample),
            overlap=verdict.overlap,
            near_ties=verdict.near_ties,
        ).judge(verdict.problem)

    def _exact(self, answers: Answers) -> list[Float32Array]:
        """Return the fp32 scores of the items that were returned."""
        return [
            self.reference.prefix_scores(request, items)[:, -1]
            for request, (items, _) in zip(self.sample, answers, strict=True)
        ]

    def _error(self, answers: Answers) -> float:
        pairs = zip(answers, self._exact(answers), strict=True)
        return max(_difference(scores, exact) for (_, scores), exact in pairs)

    def _malformed(self, answers: Answers) -> str | None:
        """Return the first answer's problem that shows without the reference's scores: length, items."""
        for request, (items, _), (expected, _) in zip(self.sample, answers, self._expected, strict=True):
            which = f"request {request.request_id}"
            if len(items) != len(expected):
                return f"{which}: {len(items)} items, the fp32 reference finds {len(expected)}"
            if len(set(items.tolist())) < len(items):
                return f"{which}: an item was returned twice"
            if len(items) and not 0 <= items.min() <= items.max() < self._items:
                return f"{which}: an item that is not in the catalogue was returned"
        return None

    def _verdict(self, answers: Answers) -> _Verdict:
        if problem := self._malformed(answers):
            return _Verdict(problem)
        tolerance, tie = self.tolerance, 2 * self.tolerance
        error, near_ties = 0.0, 0
        found, sure = [], []
        for b, ((items, scores), exact) in enumerate(zip(answers, self._exact(answers), strict=True)):
            if not len(items):
                continue
            expected, best = self._expected[b]
            error = max(error, _difference(scores, exact))
            # How much better each expected item is than the worst returned one, and each of its prefixes than the
            # best that the search left out.
            margin = np.append(self._prefixes[b][:, :-1] - self._cuts[b, :-1], (best - exact.min())[:, None], axis=1)
            there = np.isin(expected, items)
            near = ~there & (margin.min(axis=1) <= tie)
            near_ties += int(near.sum()) + int((there & (items != expected)).sum())
            found.append(there.mean())
            sure.append((there | near).mean())
            which = f"request {self.sample[b].request_id}"
            if (np.diff(exact) > tie).any():
                return _Verdict(
                    f"{which}: items are out of order by {np.diff(exact).max():.2g}, a near-tie is {tie:.2g}"
                )
            if items[0] != expected[0] and not near[0] and best[0] - exact[0] > tie:
                return _Verdict(f"{which}: the best item is {items[0]}, the fp32 reference's is {expected[0]}")
        overlap, least = float(np.mean(sure or [1.0])), 1.0 if self._exactly else OVERLAP
        problem = None
        if error > tolerance:
            problem = (
                f"scores differ from the fp32 reference by {error:.2g} (log-probability), allowed is {tolerance:.2g}"
            )
        elif overlap < least:
            problem = (
                f"{overlap:.1%} of the fp32 reference's items, near-ties included; at least {least:.0%} must be found"
            )
        return _Verdict(problem, error, float(np.mean(found or [1.0])), near_ties)


def _difference(scores: Float32Array, exact: Float32Array) -> float:
    """Return the largest difference; NaN counts as infinite."""
    largest = float(np.abs(scores - exact).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def _answers(found: Beams) -> Answers:
    return [(i[i >= 0], s[i >= 0]) for i, s in zip(found.items, found.scores, strict=True)]
