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
    names, (start, stop) = trace.events.action_names, trace.own[index]
    if not set(tasks) <= set(names):
        return None
    done = trace.events.actions[start:stop, None] >> np.array([names.index(task) for task in tasks]) & 1 == 1
    labels: Labels = (trace.requests[index].candidates[:, None] == trace.events.items[start:stop]) @ done
    return labels
