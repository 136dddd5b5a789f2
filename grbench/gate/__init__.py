"""Correctness gates: no figure without answers that agree with the fp32 reference.

`base` has the idea that all gates share, `form` and `measured` the checks of what is measured, the other modules a gate
each.
"""

from __future__ import annotations

from typing import Any

from grbench.config.schema import RunSpec
from grbench.gate.base import Gate
from grbench.workloads.trace import Trace
from grengines.api import Retrieval


def gate_for(
    spec: RunSpec, trace: Trace, retrieval: Retrieval | None, actual: dict[str, Any], keeps: bool = True
) -> Gate:
    """Return the gate of a cell's task.

    actual: what the engine reports; its device and precision are used. keeps: whether the reference's answers are kept
    for another measurement of the same requests.
    """
    from grbench.gate.rank import RankGate

    if retrieval is None:
        return RankGate.of(spec, trace.catalogue, trace.requests, actual, keeps)
    if spec.task == "generate":
        from grbench.gate.generate import GenerateGate

        return GenerateGate.of(spec, trace.catalogue, trace.requests, retrieval, actual)
    from grbench.gate.pipeline import PipelineGate

    return PipelineGate(spec, trace, retrieval, actual, keeps)
