"""Jobs of one invocation, one after another, with results on disk, in MLflow and on the screen."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator

from rich.console import Console

from grbench.cachesim.config import CacheSimConfig
from grbench.cachesim.output import line, print_table
from grbench.cachesim.replay import Replay, Row, to_dict
from grbench.cachesim.simulate import Progress
from grbench.config.jobs import Invocation, Job
from grbench.execution import results
from grbench.execution.environment import describe_environment
from grbench.execution.records import LoggedRow, Status, spec_hash
from grbench.execution.row_session import RowSession
from grbench.report.row_charts import misses


class CacheSession(RowSession):
    """Session that runs jobs and keeps their rows."""

    def __init__(self, first: Job, invocation: Invocation) -> None:
        super().__init__(first, invocation, command="cachesim", suffix="cachesim")
        self._tables: list[tuple[str, list[Row]]] = []

    @property
    def ok(self) -> bool:
        return True  # a wrong simulation is refused before its first row

    def print_tables(self) -> None:
        for title, rows in self._tables:
            print_table(Console(), title, rows)

    def run(self, job: Job) -> None:
        """Simulate one job. Results are on disk after every row. Raises ConfigError before the first."""
        config: CacheSimConfig = job.config
        replay = Replay(config)
        facts = replay.facts()
        title = (
            f"{config.workload.name}, {config.model.name}: {facts['requests']:,} requests of {facts['users']:,} users, "
            f"whose last states take {facts['footprint_gb']:.3g} GB; seed {config.seed}"
        )
        if config.replicas > 1:
            title += (
                f"; {config.replicas} replicas by {config.routing}, the busiest has {facts['busiest_replica']:.2f} of "
                f"the mean, {100 * facts['spilled_share']:.2f}% of the requests spill"
            )
        self.show(title)
        folder, rows = job.folder.absolute(), list[Row]()
        self._tables.append((title, rows))
        known = {
            "kind": "cachesim",
            **self.facts(),
            "title": title,
            "config": dataclasses.asdict(config),
            "trace": facts,
        }
        try:
            for row in replay.run(self._watch):
                rows.append(row)
                file = results.save(folder, known, [to_dict(done) for done in rows])
                self.show(line(row))
                self._tracker.log([_record(row, config)], file)
        finally:
            if rows:
                self.keep(file)
            title = f"Miss ratio, {config.workload.name}, {config.model.name}"
            if chart := misses(title, [to_dict(row) for row in rows]):
                chart.png(path := folder / "misses.png")
                self.keep(path)

    @contextlib.contextmanager
    def _watch(self, what: str, requests: int) -> Iterator[Progress]:
        """Show how far a simulation is."""
        with self.watch(what) as show:
            yield lambda done: show(done, requests)


def _record(row: Row, config: CacheSimConfig) -> LoggedRow:
    """Return a row as the store logs it: `spec` becomes params."""
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
    return LoggedRow(
        spec=spec,
        spec_hash=spec_hash(spec),
        status=Status.OK,
        started_at=begun.isoformat(),
        duration_s=row.duration_s,
        environment=describe_environment(),
        metrics=row.metrics,
    )
