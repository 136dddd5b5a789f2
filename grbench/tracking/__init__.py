"""MLflow runs of records. Only the parent process logs, one cell at a time.

The record on disk comes first. If MLflow is down, locked or full, nothing is lost, and `python -m grbench import`
logs the missing records later.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grbench.execution import records
from grbench.execution.records import RunRecord, Status, one_line
from grbench.tracking.config import MlflowConfig, NoTrackingConfig

if TYPE_CHECKING:  # workers import this package, and report's drawing takes them half a second
    from grbench.report.cells import Cell


class CellTracker:
    """Logger of the cells of one invocation. It reports errors of MLflow on stderr and never raises them."""

    def __init__(self, config: MlflowConfig | NoTrackingConfig, output_root: Path) -> None:
        self._config, self._root = config, output_root.absolute()
        self._store: Any = None
        self._sweep: tuple[str, dict[str, str]] | None = None
        self._parent: str | None = None
        self._kept: list[tuple[RunRecord, Path]] = []  # cells that have a run already

    def start_sweep(self, sweep_id: str, facts: dict[str, str]) -> None:
        """Make further cells children of one run, which the first of them creates or finds."""
        self._sweep = (sweep_id, facts)

    def log(self, record: RunRecord, folder: Path, kept: bool = False) -> bool:
        """Log one cell and store its run in the record. Return False, after printing the reason, if that fails.

        kept: the cell was measured earlier. It is logged only if the store does not have it.
        """
        if isinstance(self._config, NoTrackingConfig):
            return False
        try:
            store = self._open()
            if found := store.find(record) if kept else {}:
                self._kept.append((record, folder))
            if not found and self._sweep and self._parent is None:
                self._parent = store.sweep_run(*self._sweep)
            _note(record, folder, found or store.log(record, folder, self._parent))
        except Exception as e:
            self._say(f"MLflow did not take the run ({one_line(e)})")
            later = import_command(self._root, self._config)
            self._say(f"its record is kept in {folder}; `{later}` logs it later")
            return False
        return True

    def end_sweep(
        self, cells: list[Cell], cut_short: bool = False, answer: str = "", files: Sequence[Path] = ()
    ) -> None:
        """Close the sweep's run with counts of its cells and the page that compares them.

        answer: Markdown of what the cells answer together. files: the pages that show it, attached as artifacts.
        cut_short: the sweep did not reach its last cell. Its run is closed at once then, without the page.
        """
        try:
            if not cut_short:
                self._share()
            if self._parent is None:
                return
            self._open().end_sweep(self._parent, cells, cut_short, answer, files)
        except Exception as e:
            self._say(f"MLflow did not close the sweep's run ({one_line(e)})")

    def _share(self) -> None:
        """Give the sweep's run a child for each kept cell that has a run under another sweep.

        If all cells were kept and belong to one earlier sweep, that sweep's run shows them already.
        """
        if self._sweep is None or (self._parent is None and len({record.sweep_id for record, _ in self._kept}) < 2):
            return
        store = self._open()
        self._parent = self._parent or store.sweep_run(*self._sweep)
        for record, folder in self._kept:
            if not store.find(record, parent=self._parent):
                store.log(record, folder, self._parent)

    def _open(self) -> Any:
        if self._store is None:
            from grbench.tracking.store import Store

            assert isinstance(self._config, MlflowConfig)
            self._store = Store(self._config.uri, self._config.experiment, self._root)
        return self._store

    @staticmethod
    def _say(line: str) -> None:
        print(f"grbench: {line}", file=sys.stderr)


def _note(record: RunRecord, folder: Path, run: dict[str, str]) -> None:
    """Store the run in the record's file. A file that can't be written costs nothing: the store knows its runs."""
    if record.tracking != run:
        record.tracking = run
        with contextlib.suppress(OSError):
            records.save(record, folder)


def import_command(root: Path, config: MlflowConfig) -> str:
    """Return the command that logs the records under `root` to this store."""
    words = ["python", "-m", "grbench", "import", str(root)]
    words += ["--uri", config.uri] if config.uri else []
    words += ["--experiment", config.experiment] if config.experiment != MlflowConfig.experiment else []
    return shlex.join(words)


def import_records(root: Path, uri: str | None = None, experiment: str | None = None) -> tuple[int, int, int]:
    """Log every record under `root` that has no run in that store yet.

    experiment: None: new runs are logged to the default one, and a run in any experiment counts. Returns the numbers of
    records that were logged, had a run already, and failed, those that can't be read among them. Raises ValueError if
    there is none.
    """
    from grbench.tracking.store import Store

    logged = known = failed = 0
    parents: dict[str, str] = {}
    sweeps: dict[str, list[Cell]] = {}
    store: Store | None = None
    for line in records.unreadable([root]):
        failed += 1
        print(f"grbench: {line}", file=sys.stderr)
    cells = [(folder, record) for folder, record in records.find(root) if record.status is not Status.INTERRUPTED]
    for folder, record in cells:
        if record.sweep_id:
            sweeps.setdefault(record.sweep_id, []).append((folder, record))
    for folder, record in cells:
        try:
            store = store or Store(uri, experiment or MlflowConfig.experiment, root.absolute())
            if found := store.find(record, anywhere=experiment is None):
                _note(record, folder, found)
                known += 1
                continue
            if record.sweep_id and record.sweep_id not in parents:
                facts = {"overrides": _sweep_words([record for _, record in sweeps[record.sweep_id]])}
                parents[record.sweep_id] = store.sweep_run(record.sweep_id, facts)
            _note(record, folder, store.log(record, folder, parents.get(record.sweep_id or "")))
            logged += 1
        except Exception as e:
            failed += 1
            print(f"grbench: {folder}: not logged ({one_line(e)})", file=sys.stderr)
            if store is None:
                break  # the store cannot be opened, for the others neither
    for sweep_id, run in parents.items():
        assert store is not None
        try:
            store.end_sweep(run, sweeps[sweep_id])
        except Exception as e:
            print(f"grbench: MLflow did not close the run of sweep {sweep_id} ({one_line(e)})", file=sys.stderr)
    if not logged + known + failed:
        raise ValueError(f"{root}: no records found; `python -m grbench` writes them under outputs/")
    return logged, known, failed


def _sweep_words(cells: Sequence[RunRecord]) -> str:
    """Return the options of a sweep from those of its cells, as `engine=hstu,onnxruntime scenario=server`."""
    values: dict[str, dict[str, None]] = {}
    for record in cells:
        for word in record.overrides:
            key, _, value = word.partition("=")
            values.setdefault(key, {})[value] = None
    return " ".join(f"{key}={','.join(found)}" for key, found in values.items())


def where_to_look(config: MlflowConfig | NoTrackingConfig, root: Path) -> str | None:
    """Return the address of the logged runs, or the command that opens it, or None without tracking."""
    if isinstance(config, NoTrackingConfig):
        return None
    if config.uri is None:
        return f"python -m grbench ui {shlex.quote(os.path.relpath(root))}"
    return config.uri if config.uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(config.uri)}"
