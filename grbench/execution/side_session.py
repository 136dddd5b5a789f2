"""What the sessions of kernelbench and cachesim share: rows as files, in MLflow and on the screen."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.types import RunMode
from rich.console import Console

from grbench.execution import results
from grbench.tracking import where_to_look
from grbench.tracking.rows import RowTracker


class SideSession:
    """One command's jobs. A subclass runs them, and says what `ok` is and what the tables are.

    config: has `output_root` and `tracking`. suffix: of the MLflow experiment's name.
    """

    def __init__(self, config: Any, hydra: HydraConf, *, command: str, suffix: str) -> None:
        self._command = command
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

    def facts(self) -> dict[str, Any]:
        """The origin of a job that begins now, for its results file."""
        return results.origin(["python", "-m", f"grbench.{self._command}", *sys.argv[1:]])

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
