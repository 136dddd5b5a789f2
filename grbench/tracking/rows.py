"""MLflow runs of `grbench kernels` and `grbench cachesim`: a parent per command, and a run per row of its table.

They have an experiment of their own, because their metrics differ from those of cells.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grbench.execution.records import LoggedRow, one_line
from grbench.tracking.config import MlflowConfig, NoTrackingConfig
from grbench.tracking.store import Store


class RowTracker:
    """Logger of one command's rows, in the experiment <tracking.experiment>-<suffix>.

    It never raises an error of MLflow. It prints the error once, as `grbench <command>`, and then logs no more.
    """

    def __init__(
        self,
        config: MlflowConfig | NoTrackingConfig,
        root: Path,
        *,
        command: str,
        suffix: str,
        name: str,
        facts: dict[str, str],
    ) -> None:
        self._config, self._root, self._name, self._facts = config, root, name, facts
        self._command, self._suffix = command, suffix
        self._store: Store | None = None
        self._parent = ""
        self._off = isinstance(config, NoTrackingConfig)

    def log(self, rows: list[LoggedRow], results: Path) -> None:
        """Log finished rows; `results` has them too."""
        if self._off or not rows:
            return
        try:
            if self._store is None:
                assert isinstance(self._config, MlflowConfig)
                self._store = Store(
                    self._config.uri, f"{self._config.experiment}-{self._suffix}", self._root, cells=False
                )
                self._parent = self._store.sweep_run(self._name, self._facts)
            for row in rows:  # the parent has the files, so this folder does not exist
                self._store.log(row, results.parent / "none", self._parent)
        except Exception as e:
            self._give_up(e, results)

    def finish(self, files: list[tuple[Path, str]], ok: bool) -> None:
        """Attach files, each with its folder, to the parent run and end it."""
        if self._off or self._store is None:
            return
        try:
            self._store.end_rows(self._parent, files, ok)
        except Exception as e:
            self._give_up(e, self._root)

    def _give_up(self, error: Exception, kept: Path) -> None:
        self._off = True
        why = f"MLflow did not take the runs ({one_line(error)}); kept in {kept}"
        print(f"grbench {self._command}: {why}", file=sys.stderr)
