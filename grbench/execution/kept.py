"""The engine that a worker keeps between cells, and the rule that says which cells may use it again.

Two cells may share a prepared engine if they differ only in how requests arrive, in what is compared with the
reference, and in what is done before and after the measurement. The engine never sees any of these. Its caches are
emptied before each measurement, and every cell is checked as if its engine were new.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grbench.config.schema import RunSpec

if TYPE_CHECKING:
    from grbench.gate.base import Gate
    from grbench.workloads.trace import Trace
    from grengines.api import Engine, Retrieval

GATE = ("requests", "max_error_ratio")  # options that the reference's answers depend on


@dataclass(frozen=True)
class Built:
    """A prepared engine, its trace, and the gate of its answers. cells: measured with it before."""

    trace: Trace
    retrieval: Retrieval | None
    engine: Engine
    start_s: float
    gate: Gate | None = None
    gate_mib: float = 0.0  # that the gate holds on the GPU
    cells: int = 0


class KeptEngine:
    """The engine of the cell before, if the worker waits for another cell. fit: it is idle, and may be used again."""

    def __init__(self) -> None:
        self._key = ""
        self._built: Built | None = None
        self.fit = False

    def of(self, spec: RunSpec, build: Callable[[], Built]) -> Built:
        """Return the kept engine if it is that of the cell, or a new one."""
        self.fit = False
        if self._built is not None and self._key == engine_key(spec):
            return self._built
        self.close()
        return build()

    def keep(self, spec: RunSpec, built: Built) -> None:
        """Keep the engine of a cell that has ended, and which is idle."""
        self._key, self._built, self.fit = engine_key(spec), replace(built, cells=built.cells + 1), True

    def close(self) -> None:
        """Close the engine that is kept."""
        if self._built is not None:
            self._built.engine.close()
            self._built = None


def engine_key(spec: RunSpec) -> str:
    """Return a key that is equal for cells that may share a prepared engine."""
    values = spec.to_dict() | {"files": spec.file_contents()}
    del values["warmup_batches"]
    max_batch = values.pop("scenario")["max_batch"]
    values["gate"] = {name: values["gate"][name] for name in GATE}
    return json.dumps([values, max_batch], sort_keys=True, default=str)
