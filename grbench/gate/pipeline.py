"""Which gate a task has, and the one of the whole pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from grbench.config.schema import RunSpec
from grbench.gate.generate import BeamGate, BeamGateResult
from grbench.gate.rank import Gate, GateError, GateFigures, GateResult
from grbench.workloads.trace import Trace
from grengines.api import Retrieval
from grengines.pipeline.engine import as_many


class AnyGate(Protocol):
    def check(self, engine: Any, max_batch: int) -> GateFigures:
        """Compare the engine with the reference. Raises GateError when it, or the gate itself, is no good."""


def gate_for(spec: RunSpec, trace: Trace, retrieval: Retrieval | None, actual: dict[str, Any]) -> AnyGate:
    """The gate of a cell's task. actual: what the engine says of itself, for the device and the precision."""
    if retrieval is None:
        return Gate(spec, trace.catalogue, trace.requests, actual["device"], actual["precision"])
    if spec.task == "generate":
        return BeamGate(spec, trace.catalogue, trace.requests, retrieval, actual["device"], actual["precision"])
    return PipelineGate(spec, trace, retrieval, actual)


@dataclass
class PipelineGateResult:
    """Of both stages; `error` is the larger share of what was allowed, so 1 is the `tolerance`."""

    passed: bool
    error: float
    tolerance: float
    retrieve: BeamGateResult
    rank: GateResult

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PipelineGate:
    """Both stages by their own gates, then the whole: what is recommended is what was retrieved, in ranking order."""

    def __init__(self, spec: RunSpec, trace: Trace, retrieval: Retrieval, actual: dict[str, Any]) -> None:
        first, second = actual["retrieve"], actual["rank"]
        self._retrieve = BeamGate(spec, trace.catalogue, trace.requests, retrieval, first["device"], first["precision"])
        requests = [as_many(r, retrieval.k) for r in trace.requests]
        self._rank = Gate(spec, trace.catalogue, requests, second["device"], second["precision"])

    def check(self, engine: Any, max_batch: int) -> PipelineGateResult:
        retrieved = self._retrieve.check(engine.retriever, max_batch)
        ranked = self._rank.check(engine.ranker, max_batch)
        shares = [retrieved.error / retrieved.tolerance, ranked.error / ranked.tolerance]
        result = PipelineGateResult(True, max(shares), 1.0, retrieved, ranked)
        for request in self._retrieve.sample:
            found = engine.retriever.generate([request]).items[0]
            answer = engine.recommend([request])
            items, scores = answer.items[0], answer.scores[0]
            if sorted(items.tolist()) != sorted(found.tolist()) or (np.diff(scores[:, 0]) > 0).any():
                result.passed = False
                raise GateError(
                    f"request {request.request_id}: what is recommended is not what was retrieved, best first", result
                )
        return result
