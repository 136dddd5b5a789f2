"""The data set of LoadGen's accuracy mode, and the quality of the answers in LoadGen's own log.

The data set are the requests that `quality/...` of the record is computed of, so both figures must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grbench.config.schema import ConfigError, RunSpec
from grbench.gate.quality import QualityFigures, lists_of, rankings_of
from grbench.quality.held_out import doubt_of_lists
from grbench.quality.lists import Lists
from grbench.quality.rankings import NONE_LATER, Rankings
from grbench.workloads.trace import Trace
from grengines.api import Request


@dataclass(frozen=True)
class DataSet:
    """Requests with a ground truth, numbered from 0 as LoadGen numbers its samples."""

    truth: Rankings | Lists
    requests: list[Request]

    @classmethod
    def of(cls, spec: RunSpec, trace: Trace) -> DataSet:
        """Return the data set of a cell. Raises ConfigError where nothing has a ground truth."""
        truth: Rankings | Lists | None
        if spec.task == "rank":
            truth = rankings_of(spec, trace)
            if truth is None and not set(spec.ranking_model.tasks) <= set(trace.events.action_names):
                raise ConfigError(
                    f"model.tasks=[{','.join(spec.ranking_model.tasks)}]: scenario.mode=accuracy needs labels; set "
                    f"'model.tasks=[{','.join(trace.events.action_names)}]', the workload's, or some of these"
                )
            if truth is None:
                raise ConfigError(f"model.weights={spec.ranking_model.weights}: {NONE_LATER}")
        else:
            if spec.task == "recommend" and (why := doubt_of_lists(spec.ranking_model.weights)):
                raise ConfigError(why)
            truth = lists_of(spec, trace)
        limit = spec.latency_limit_ms
        numbered = [replace(r, request_id=i, deadline_ms=limit) for i, r in enumerate(truth.requests)]
        return cls(truth, numbered)

    def figures(self, logged: Sequence[Any]) -> QualityFigures:
        """Return `quality/loadgen/...` of the answers that LoadGen logged."""
        found = {f"quality/loadgen/{name}": estimate for name, estimate in self.truth.estimates(logged).items()}
        note = (
            f"LoadGen's accuracy log has the answers to all {len(logged):,} requests, bit for bit as the engine gave "
            "them; quality/loadgen/... is computed from it. Latencies of an accuracy run are not to be compared"
        )
        return QualityFigures({n: e.value for n, e in found.items()}, {n: e.interval for n, e in found.items()}, [note])
