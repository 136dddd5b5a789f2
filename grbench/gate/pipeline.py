"""The gate of the whole pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grbench.config.schema import RunSpec
from grbench.execution.engines import MOST_PREPARED
from grbench.gate.base import GateResult, batches
from grbench.gate.form import Form
from grbench.gate.generate import GenerateGate, GenerateGateResult
from grbench.gate.measured import Answer, Verdict
from grbench.gate.rank import RankGate
from grbench.workloads.trace import Trace
from grengines.api import Cached, Retrieval
from grengines.numerics import Comparison, IncorrectError
from grengines.pipeline.engine import Pipeline, as_many


@dataclass(kw_only=True)
class PipelineGateResult(Comparison):
    """Figures of both stages. `error` is the larger stage's share of its tolerance, so `tolerance` is 1.

    None: the engine shows only whole answers.
    """

    retrieve: GenerateGateResult | None = None
    rank: GateResult | None = None


class PipelineGate:
    """The gates of both stages. Then the whole: the retrieved items are recommended, in the order of their scores."""

    def __init__(
        self, spec: RunSpec, trace: Trace, retrieval: Retrieval, actual: dict[str, Any], keeps: bool = True
    ) -> None:
        """keeps: as in RankGate."""
        first, second = actual["retrieve"], actual["rank"]
        self.form = Form(len(spec.ranking_model.tasks), retrieval.k, trace.catalogue.num_items)
        self._retrieve = GenerateGate.of(spec, trace.catalogue, trace.requests, retrieval, first)
        requests = [as_many(r, retrieval.k) for r in trace.requests.some(MOST_PREPARED)]  # each of them is made
        self._rank = RankGate.of(spec, trace.catalogue, requests, second, keeps)

    def check(self, engine: Any, max_batch: int) -> PipelineGateResult:
        """Compare the answers of both stages, then of the whole. Raises IncorrectError."""
        if not isinstance(engine, Pipeline):
            return self._check_whole(engine, max_batch)
        retrieved = self._retrieve.check(engine.retriever, max_batch)
        ranked = self._rank.check(engine.ranker, max_batch)
        shares = [retrieved.error / retrieved.tolerance, ranked.error / ranked.tolerance]
        result = PipelineGateResult(passed=True, error=max(shares), tolerance=1.0, retrieve=retrieved, rank=ranked)
        for request in self._retrieve.sample:
            found = engine.retriever.generate([request]).items[0]
            answer = engine.recommend([request])
            items, scores = answer.items[0], answer.scores[0]
            if sorted(items.tolist()) != sorted(found.tolist()) or not _best_first(scores):
                result.passed = False
                raise IncorrectError(
                    f"request {request.request_id}: the recommended items are not the retrieved ones, best first",
                    result,
                )
        return result

    def _check_whole(self, engine: Any, max_batch: int) -> PipelineGateResult:
        """Judge the answers of an engine that does not show its stages."""
        answers: list[Answer] = []
        for batch in batches(self._retrieve.sample, max_batch):
            result = engine.recommend(list(batch))
            self.form.require(batch, result)
            answers += [
                Answer(request, items, scores, len(answers) + i, len(batch), i, Cached(), "")
                for i, (request, items, scores) in enumerate(zip(batch, result.items, result.scores, strict=True))
            ]
        verdicts = self.judge(answers)
        worst = max(v.error / v.tolerance for v in verdicts)
        problem = next((v.problem for v in verdicts if v.problem), None)
        checked = PipelineGateResult(passed=problem is None, error=worst, tolerance=1.0)
        if problem is not None:
            raise IncorrectError(problem, checked)
        return checked

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """Compare the items of each answer with those of the first stage's reference, the scores with the second's."""
        items = [a.items for a in answers if a.items is not None]
        requests = [a.request for a in answers]
        retrieved = self._retrieve.judge_items(requests, [(found, None) for found in items])
        candidates = [replace(r, candidates=found) for r, found in zip(requests, items, strict=True)]
        ranked = self._rank.judge([replace(a, request=r) for a, r in zip(answers, candidates, strict=True)])
        verdicts = []
        for answer, first, second in zip(answers, retrieved, ranked, strict=True):
            if first.problem:
                verdicts.append(replace(first, problem=f"stage retrieve: {first.problem}"))
            elif second.problem:
                verdicts.append(replace(second, problem=f"stage rank: {second.problem}"))
            elif not _best_first(answer.scores):
                verdicts.append(replace(second, problem="the items are not in the order of their scores"))
            else:
                verdicts.append(second)
        return verdicts


def _best_first(scores: np.ndarray) -> bool:
    return not (np.diff(scores[:, 0]) > 0).any()
