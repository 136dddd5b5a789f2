"""One command: its jobs one after another, their results on disk, in MLflow and on the screen."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode
from rich.console import Console
from rich.progress import Progress as Bar

from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.output import line, plot, print_table, save
from grbench.cachesim.replay import Replay, Row
from grbench.cachesim.simulate import Progress
from grbench.environment import describe_environment
from grbench.records import RunRecord, Status
from grbench.tracking.rows import RowTracker


class Session:
    """Runs jobs and keeps what they gave. `close` prints the tables."""

    def __init__(self, config: CacheSimConfig, hydra: HydraConf) -> None:
        self._root = Path(config.output_root).absolute()
        self._screen = Console(stderr=True)
        self._tables: list[tuple[str, list[Row]]] = []
        self._files: list[tuple[Path, str]] = []
        self._sweep = hydra.mode is RunMode.MULTIRUN
        name = Path(hydra.sweep.dir if self._sweep else hydra.runtime.output_dir).name
        facts = {"overrides": " ".join(sys.argv[1:])}
        self._tracker = RowTracker(
            config.tracking, self._root, command="cachesim", suffix="cachesim", name=name, facts=facts
        )

    def run(self, config: CacheSimConfig, hydra: HydraConf) -> None:
        """Simulate one job; its results are on disk after every row. Raises ConfigError before any."""
        replay = Replay(config)
        facts = replay.facts()
        title = (
            f"{config.workload.name}, {config.model.name}: {facts['requests']:,} requests of {facts['users']:,} users, "
            f"whose last states take {facts['footprint_gb']:.3g} GB; seed {config.seed}"
        )
        self._say(title)
        folder, rows = Path(hydra.runtime.output_dir).absolute(), list[Row]()
        self._tables.append((title, rows))
        known = {"config": dataclasses.asdict(config), "trace": facts, "environment": describe_environment()}
        try:
            for row in replay.run(self._watch):
                rows.append(row)
                results = save(folder, known, rows)
                self._say(line(row))
                self._tracker.log([_record(row, config)], results)
        finally:
            prefix = folder.name if self._sweep else ""
            if rows:
                self._files.append((results, prefix))
            if path := plot(f"Miss ratio, {config.workload.name}, {config.model.name}", rows, folder / "misses.png"):
                self._files.append((path, prefix))

    def close(self, failed: bool = False, interrupted: bool = False) -> int:
        """Print the tables and end the parent run. Returns 0."""
        self._tracker.finish(self._files, not failed and not interrupted)
        for title, rows in self._tables:
            print_table(Console(), title, rows)
        if interrupted:
            self._say("interrupted; the rows above were finished and are kept")
        for path, _ in self._files:
            self._say(f"{'results' if path.suffix == '.json' else 'plot'}: {os.path.relpath(path)}")
        if self._files:
            self._say(f"compare: python -m grbench.tracking ui {os.path.relpath(self._root)}")
        return 0

    @contextlib.contextmanager
    def _watch(self, what: str, requests: int) -> Iterator[Progress]:
        """A progress bar while a simulation runs, on a terminal."""
        with Bar(console=self._screen, transient=True, disable=not self._screen.is_terminal) as bar:
            task = bar.add_task(what, total=requests)
            yield lambda done: bar.update(task, completed=done)

    def _say(self, text: str) -> None:
        self._screen.print(text, soft_wrap=True, markup=False, highlight=False)


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
