"""The gate of tasks that generate: the engine's items are those of the fp32 reference search.

Held to account are the scores, the order, the best item and how many of the k best items were found. A score is checked
on its own, against the fp32 log-probability of the very item that was returned. Allowed is a small multiple of the
error that plain PyTorch makes in the same precision. Scores that differ by less than twice that are a near-tie: they
may change places, and an expected item may be missing where its score, or a prefix's, was that near to the last beam's.
The gate must be able to fail: a search without attention and stale answers must both lie outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.rank import GateError, pick
from grengines import registry
from grengines.api import Catalogue, Float32Array, Generator, Int64Array, Request, Retrieval

# Sums of three log-probabilities of size up to some tens, in another order: some tens of ulp.
SCORE_FLOOR = 1e-4
OVERLAP = 0.95  # of the k best items, in half precision; in fp32 all
PROBES = 32  # of a request's best items: where plain PyTorch's error is measured

Answers = list[tuple[Int64Array, Float32Array]]  # of each request items and scores, best first


@dataclass
class BeamGateResult:
    """Errors are of scores: log-probabilities, absolute."""

    passed: bool
    error: float
    tolerance: float
    plain_error: float  # of plain torch in the engine's precision
    overlap: float  # mean share of the expected items that were found
    near_ties: int  # expected items that are missing or out of place by less than the tolerance
    zero_attention_error: float
    stale_error: float
    requests: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Verdict:
    problem: str | None  # what no rounding explains
    error: float = float("inf")
    overlap: float = 0.0
    near_ties: int = 0


class BeamGate:
    """Holds the reference's answers for a sample of a trace, so that an engine can be checked more than once."""

    def __init__(
        self,
        spec: RunSpec,
        catalogue: Catalogue,
        requests: Sequence[Request],
        retrieval: Retrieval,
        device: str,
        precision: str,
    ) -> None:
        self.sample = pick(requests, spec.gate.requests, spec.seed)
        if len(self.sample) < 2:
            raise ValueError("the workload has one request; the gate needs two to tell stale answers from right ones")
        self._items, self._exactly = catalogue.num_items, precision == "fp32"
        self._reference = reference = registry.reference(spec.model, spec.seed, retrieval, device)
        found = reference.search(self.sample)
        self._expected: Answers = [
            (items[items >= 0], scores[items >= 0]) for items, scores in zip(found.items, found.scores, strict=True)
        ]
        self._cuts = found.cuts
        self._prefixes = [
            reference.prefix_scores(r, items) for r, (items, _) in zip(self.sample, self._expected, strict=True)
        ]
        wide = max(retrieval.beam_width, PROBES)
        plain = reference.search(self.sample, precision, width=wide, k=max(retrieval.k, PROBES))
        self._plain_error = self._error(_answers(plain))
        self._tolerance = max(spec.gate.max_error_ratio * self._plain_error, SCORE_FLOOR)
        self._zero_error = self._error(_answers(reference.search(self.sample, blind=True)))

    def check(self, engine: Generator, max_batch: int) -> BeamGateResult:
        """Compare the engine with the reference. Raises GateError when it, or the gate itself, is no good."""
        answers: Answers = []
        for start in range(0, len(self.sample), max_batch):
            result = engine.generate(self.sample[start : start + max_batch])
            answers += zip(result.items, result.scores, strict=True)
        verdict = self._judge(answers)
        outcome = BeamGateResult(
            passed=verdict.problem is None,
            error=verdict.error,
            tolerance=self._tolerance,
            plain_error=self._plain_error,
            overlap=verdict.overlap,
            near_ties=verdict.near_ties,
            zero_attention_error=self._zero_error,
            stale_error=self._error(answers[1:] + answers[:1]) if verdict.problem is None else float("inf"),
            requests=len(self.sample),
        )
        if verdict.problem is not None:
            raise GateError(verdict.problem, outcome)
        if min(outcome.zero_attention_error, outcome.stale_error) <= 2 * self._tolerance:
            raise GateError(
                f"the gate can't tell right from wrong here: without attention scores are off by "
                f"{outcome.zero_attention_error:.2g}, stale ones by {outcome.stale_error:.2g}, "
                f"allowed is {self._tolerance:.2g}; use a higher precision or other requests",
                outcome,
            )
        return outcome

    def _exact(self, answers: Answers) -> list[Float32Array]:
        """The fp32 scores of the items that were returned."""
        return [
            self._reference.prefix_scores(request, items)[:, -1]
            for request, (items, _) in zip(self.sample, answers, strict=True)
        ]

    def _error(self, answers: Answers) -> float:
        pairs = zip(answers, self._exact(answers), strict=True)
        return max(_difference(scores, exact) for (_, scores), exact in pairs)

    def _judge(self, answers: Answers) -> _Verdict:
        for request, (items, _), (expected, _) in zip(self.sample, answers, self._expected, strict=True):
            which = f"request {request.request_id}"
            if len(items) != len(expected):
                return _Verdict(f"{which}: {len(items)} items, the fp32 reference finds {len(expected)}")
            if len(set(items.tolist())) < len(items):
                return _Verdict(f"{which}: an item was returned twice")
            if len(items) and not 0 <= items.min() <= items.max() < self._items:
                return _Verdict(f"{which}: an item that is not in the catalogue was returned")
        tolerance, tie = self._tolerance, 2 * self._tolerance
        error, near_ties = 0.0, 0
        found, sure = [], []
        for b, ((items, scores), exact) in enumerate(zip(answers, self._exact(answers), strict=True)):
            if not len(items):
                continue
            expected, best = self._expected[b]
            error = max(error, _difference(scores, exact))
            # By how much each expected item is better than what was returned, and each of its prefixes than what the
            # search left out.
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
    """The largest; NaN counts as infinite."""
    largest = float(np.abs(scores - exact).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def _answers(found: Any) -> Answers:
    return [(i[i >= 0], s[i >= 0]) for i, s in zip(found.items, found.scores, strict=True)]
