"""What the sessions of kernelbench and cachesim share: rows as files, in MLflow and on the screen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.types import RunMode
from rich.console import Console

from grbench.execution.records import finite
from grbench.tracking import where_to_look
from grbench.tracking.rows import RowTracker

RESULTS_FILE = "results.json"
SCHEMA_VERSION = 1


class SideSession:
    """One command's jobs. A subclass runs them, and says what `ok` is and what the tables are.

    config: has `output_root` and `tracking`. suffix: of the MLflow experiment's name.
    """

    def __init__(self, config: Any, hydra: HydraConf, *, command: str, suffix: str) -> None:
        self._root = Path(config.output_root).absolute()
        self._screen = Console(stderr=True)
        self._files: list[tuple[Path, str]] = []  # of all jobs, and where in the MLflow run each goes
        self._sweep = hydra.mode is RunMode.MULTIRUN
        self._tracking = config.tracking
        self._tracker = RowTracker(
            config.tracking,
            self._root,
            command=command,
            suffix=suffix,
            name=Path(hydra.sweep.dir if self._sweep else hydra.runtime.output_dir).name,
            facts={"overrides": " ".join(sys.argv[1:])},
        )

    @property
    def ok(self) -> bool:
        """Whether no row went wrong."""
        raise NotImplementedError

    def print_tables(self) -> None:
        """What the rows come to, on standard output."""
        raise NotImplementedError

    def keep(self, path: Path) -> None:
        """Attach a file of a job's folder to the MLflow run at the end."""
        self._files.append((path, path.parent.name if self._sweep else ""))

    def say(self, text: str) -> None:
        """One line of progress."""
        self._screen.print(text, soft_wrap=True, markup=False, highlight=False)

    def close(self, cut_short: str = "") -> int:
        """Print the tables and end the parent run. Returns 0, or 1 if a row is wrong. cut_short: what ended the jobs
        early, in a word."""
        self._tracker.finish(self._files, self.ok and not cut_short)
        self.print_tables()
        if self._files:
            if cut_short:
                self.say(f"{cut_short}; the rows above were finished and are kept")
            for folder in dict.fromkeys(path.parent for path, _ in self._files):
                self.say(f"results and plots: {os.path.relpath(folder)}")
            if there := where_to_look(self._tracking, self._root):
                self.say(f"compare: {there}")
        return 0 if self.ok else 1


def save_results(folder: Path, facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """Write results.json whole or not at all; an earlier one, with fewer rows, is replaced."""
    path, new = folder / RESULTS_FILE, folder / f".{RESULTS_FILE}.new"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema_version": SCHEMA_VERSION, **facts, "rows": list(rows)}
    new.write_text(json.dumps(finite(content), indent=1) + "\n")
    new.replace(path)
    return path
