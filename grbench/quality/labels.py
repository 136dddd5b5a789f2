"""Labels of ranked candidates.

A task has labels if one of the workload's actions has its name (MovieLens: rated, liked). A candidate is positive if
the user took that action on it in the same visit. The other candidates are drawn (grbench/workloads/trace.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from grbench.workloads.trace import Trace

Labels = npt.NDArray[np.bool_]


def labels_of(trace: Trace, index: int, tasks: Sequence[str]) -> Labels | None:
    """Return bool [candidates, tasks] of a request; None if the workload does not label every task."""
    if not set(tasks) <= set(trace.events.action_names):
        return None
    candidates, (start, stop) = trace.requests[index].candidates, trace.own[index]
    items, actions = trace.events.items[start:stop], trace.events.actions[start:stop]
    columns = []
    for task in tasks:
        done = (actions >> trace.events.action_names.index(task)) & 1 == 1
        columns.append(np.isin(candidates, items[done]))
    return np.stack(columns, axis=1)
