"""MLflow runs of cache simulations: one parent a command, below it one run a policy and size.

They are in an experiment of their own, <tracking.experiment>-cachesim, because their metrics are not those of cells.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import sys
from pathlib import Path

from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.replay import Row
from grbench.environment import describe_environment
from grbench.records import RunRecord, Status
from grbench.tracking import one_line
from grbench.tracking.config import MlflowConfig, NoTrackingConfig
from grbench.tracking.store import Store


class SimTracker:
    """Logs the rows of one command. Never raises for what goes wrong in MLflow: it says so and logs no more."""

    def __init__(self, config: MlflowConfig | NoTrackingConfig, root: Path, name: str, facts: dict[str, str]) -> None:
        self._config, self._root, self._name, self._facts = config, root, name, facts
        self._store: _Store | None = None
        self._parent = ""
        self._off = isinstance(config, NoTrackingConfig)

    def log(self, row: Row, config: CacheSimConfig, results: Path) -> None:
        """Log a finished row; `results` has it too."""
        if self._off:
            return
        try:
            if self._store is None:
                assert isinstance(self._config, MlflowConfig)
                self._store = _Store(self._config.uri, f"{self._config.experiment}-cachesim", self._root)
                self._parent = self._store.sweep_run(self._name, self._facts)
            # Its files are with the parent: a folder that isn't there has none.
            self._store.log(_record(row, config), results.parent / row.policy, self._parent)
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
        print(f"grbench.cachesim: MLflow did not take the runs ({one_line(error)}); kept in {kept}", file=sys.stderr)


class _Store(Store):
    def finish(self, run_id: str, files: list[tuple[Path, str]], ok: bool) -> None:
        for path, folder in files:
            self._client.log_artifact(run_id, str(path), folder or None)
        self._client.set_terminated(run_id, "FINISHED" if ok else "FAILED")


def _record(row: Row, config: CacheSimConfig) -> RunRecord:
    """A row in the shape that the store logs: `spec` becomes params."""
    spec = {
        "cache": {"name": f"{row.policy}-{100 * row.size.share:.3g}pct"},
        "policy": row.policy,
        **dataclasses.asdict(row.size),
        "page": config.page,
        "precision": config.precision,
        "model": dataclasses.asdict(config.model),
        "workload": dataclasses.asdict(config.workload),
        "seed": config.seed,
    }
    begun = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=row.duration_s)
    return RunRecord(
        spec=spec,
        spec_hash=hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12],
        status=Status.OK,
        started_at=begun.isoformat(),
        duration_s=row.duration_s,
        environment=describe_environment(),
        metrics=row.metrics,
    )
