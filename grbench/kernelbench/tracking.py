"""MLflow runs of kernel benchmarks: one parent a command, below it one run a family, shape, variant and dtype.

They are in an experiment of their own, <tracking.experiment>-kernels, because their metrics are not those of cells.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from grbench.environment import describe_environment
from grbench.kernelbench.bench import Row
from grbench.records import RunRecord, Status
from grbench.tracking import one_line
from grbench.tracking.config import MlflowConfig, NoTrackingConfig
from grbench.tracking.store import Store


class KernelTracker:
    """Logs the rows of one command. Never raises for what goes wrong in MLflow: it says so and logs no more."""

    def __init__(self, config: MlflowConfig | NoTrackingConfig, root: Path, name: str, facts: dict[str, str]) -> None:
        self._config, self._root, self._name, self._facts = config, root, name, facts
        self._store: _Store | None = None
        self._parent = ""
        self._off = isinstance(config, NoTrackingConfig)

    def log(self, rows: list[Row], device: str, results: Path) -> None:
        """Log finished rows; `results` has them too, and besides what is UNAVAILABLE, which would drown the others."""
        rows = [row for row in rows if row.status is not Status.UNAVAILABLE]
        if self._off or not rows:
            return
        try:
            if self._store is None:
                assert isinstance(self._config, MlflowConfig)
                self._store = _Store(self._config.uri, f"{self._config.experiment}-kernels", self._root)
                self._parent = self._store.sweep_run(self._name, self._facts)
            for row in rows:  # its files are with the parent: a folder that isn't there has none
                self._store.log(_record(row, device), results.parent / row.family, self._parent)
        except Exception as e:
            self._give_up(e, results)

    def finish(self, files: list[tuple[Path, str]], ok: bool) -> None:
        """Attach files (with the folder each goes into) to the parent run and end it."""
        if self._off or self._store is None:
            return
        try:
            self._store.finish(self._parent, files, ok)
        except Exception as e:
            self._give_up(e, self._root)

    def _give_up(self, error: Exception, kept: Path) -> None:
        self._off = True
        print(f"grbench.kernelbench: MLflow did not take the runs ({one_line(error)}); kept in {kept}", file=sys.stderr)


class _Store(Store):
    def finish(self, run_id: str, files: list[tuple[Path, str]], ok: bool) -> None:
        for path, folder in files:
            self._client.log_artifact(run_id, str(path), folder or None)
        self._client.set_terminated(run_id, "FINISHED" if ok else "FAILED")


def _record(row: Row, device: str) -> RunRecord:
    """A row in the shape that the store logs: `spec` becomes params."""
    spec = {"family": row.family, "variant": row.variant, "shape": row.shape, "dtype": row.dtype}
    return RunRecord(
        spec={"kernel": {"name": "-".join(spec.values())}, **spec, "peer": row.peer},
        spec_hash=hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12],
        status=row.status,
        started_at=row.started_at,
        duration_s=row.duration_s,
        error=row.reason,
        actual={"device": device, "tuning": [f"{e['key']}: {e['config']} ({e['source']})" for e in row.tuning]},
        environment=describe_environment(),
        metrics=row.metrics,
    )
