"""Sessions whose results are rows of a table: as files, in MLflow and on the screen."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from grbench.config.jobs import Invocation, Job
from grbench.execution import results
from grbench.execution.folders import only_writer
from grbench.execution.watch import Show, watch
from grbench.tracking import where_to_look
from grbench.tracking.rows import RowTracker


class RowSession:
    """The jobs of one invocation. A subclass runs them and defines `ok` and the tables.

    first: the first job, whose `config` has `output_root` and `tracking`. command: as a user types it. suffix: appended
    to the name of the MLflow experiment.
    """

    def __init__(self, first: Job, invocation: Invocation, *, command: str, suffix: str) -> None:
        self._command = ["python", "-m", "grbench", command, *invocation.words]
        self._root = Path(first.config.output_root).absolute()
        self._holds = contextlib.ExitStack()
        self.hold(invocation.sweep or first.folder, "hydra.sweep.dir" if invocation.sweep else "hydra.run.dir")
        self._screen = Console(stderr=True)
        self._files: list[tuple[Path, str]] = []  # of all jobs, each with its folder in the MLflow run
        self._sweep = invocation.sweep is not None
        self._tracking = first.config.tracking
        self._tracker = RowTracker(
            self._tracking,
            self._root,
            command=command,
            suffix=suffix,
            name=(invocation.sweep or first.folder).name,
            facts={"overrides": " ".join(invocation.words)},
        )

    def hold(self, folder: Path, option: str) -> None:
        """Keep other commands out of a folder until `close`. Raises ConfigError if one writes there."""
        self._holds.enter_context(only_writer(folder, option))

    @property
    def ok(self) -> bool:
        """True if no row is wrong."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """The origin of a job that begins now, for its results file."""
        return results.origin(self._command)

    def finish(self) -> None:
        """Nothing comes after the last job."""

    def print_tables(self) -> None:
        """Print the results on standard output."""
        raise NotImplementedError

    def keep(self, path: Path) -> None:
        """Attach a file of a job's folder to the MLflow run at the end."""
        self._files.append((path, path.parent.name if self._sweep else ""))

    def show(self, text: str) -> None:
        """Print one line of progress."""
        self._screen.print(text, soft_wrap=True, markup=False, highlight=False)

    def watch(self, what: str, most_s: float = math.inf) -> contextlib.AbstractContextManager[Show]:
        """Show how far work is (`watch` of grbench/execution/watch.py)."""
        return watch(self._screen, what, most_s)

    def close(self, cut_short: str = "") -> int:
        """Print the tables and end the parent run. Returns 0, or 1 if a row is wrong.

        cut_short: what ended the jobs early, in one word.
        """
        self._holds.close()
        self._tracker.finish(self._files, self.ok and not cut_short)
        self.print_tables()
        if self._files:
            if cut_short:
                self.show(f"{cut_short}; the rows above were finished and are kept")
            for folder in dict.fromkeys(path.parent for path, _ in self._files):
                self.show(f"results and plots: {os.path.relpath(folder)}")
            if there := where_to_look(self._tracking, self._root):
                self.show(f"compare: {there}")
        return 0 if self.ok else 1
