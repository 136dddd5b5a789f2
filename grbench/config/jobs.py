"""The jobs of a command line, and the session that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Invocation:
    """One call of a command: what was typed, how many jobs that makes, and the sweep's folder (None: no sweep).

    total: 0 if it is not known before.

    skipped: a line for each combination of the sweep that cannot be, and why. config_dir: the user's own YAML files.
    common: the overrides of every job of several, which no name of a job needs.
    """

    words: tuple[str, ...]
    total: int
    sweep: Path | None
    skipped: tuple[str, ...] = ()
    config_dir: Path | None = None
    common: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job:
    """One job of a command: its checked configuration, the folder for its results, and the overrides that made it."""

    config: Any
    folder: Path
    overrides: tuple[str, ...]


class Session(Protocol):
    """The jobs of one invocation and their results. Every command that Hydra configures has one class of this kind."""

    def run(self, job: Job) -> None:
        """Run one job; finished results are on disk whatever happens. Raises ConfigError for unusable data."""

    def finish(self) -> None:
        """Do what comes after the last job, before `close`."""

    def close(self, cut_short: str = "") -> int:
        """Print the tables and end the tracking. Returns the exit code. cut_short: what ended the jobs early."""
