"""Jobs of one invocation, in order. Results go to disk, to MLflow and to the screen."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from grbench.config.jobs import Invocation, Job
from grbench.config.schema import ConfigError
from grbench.execution import results
from grbench.execution.environment import describe_environment
from grbench.execution.records import LoggedRow, Status, one_line, spec_hash
from grbench.execution.row_session import RowSession
from grbench.kernelbench.bench import Bench, DeviceLostError, Row
from grbench.kernelbench.config import KernelBenchConfig, device_of
from grbench.kernelbench.output import line, print_tables
from grbench.report.row_charts import roofline


class KernelSession(RowSession):
    """Runner of jobs that keeps their rows."""

    def __init__(self, first: Job, invocation: Invocation) -> None:
        super().__init__(first, invocation, command="kernels", suffix="kernels")
        self._rows: list[Row] = []
        self._lost: DeviceLostError | None = None

    @property
    def ok(self) -> bool:
        return not any(row.status in (Status.INCORRECT, Status.ERROR) for row in self._rows)

    def print_tables(self) -> None:
        print_tables(Console(), self._rows)

    def run(self, job: Job) -> None:
        """Measure one job, and write its results after every shape. Raises ConfigError before the first measurement."""
        if self._lost:
            return
        config: KernelBenchConfig = job.config
        device = device_of(config)
        folder = job.folder.absolute()
        done: list[Row] = []
        try:
            bench = Bench(config, device, self.show)
        except Exception as e:
            raise ConfigError(f"device={device}: its ceilings can't be measured ({one_line(e)})") from e
        roofs = bench.ceilings
        self.show(f"{config.dtype} on {device}: matmul {roofs.tflops:.4g} TFLOP/s, copy {roofs.tbps:.3g} TB/s")
        facts = {
            "kind": "kernels",
            **self.facts(),
            "config": dataclasses.asdict(config),
            "device": device,
            "ceilings": roofs.to_dict(),
        }
        try:
            for rows in bench.run():
                done += rows
                self._rows += rows
                file = results.save(folder, facts, [dataclasses.asdict(row) for row in done])
                for row in rows:
                    self.show(line(row))
                # UNAVAILABLE rows would hide the others.
                ran = [_record(row, device) for row in rows if row.status is not Status.UNAVAILABLE]
                self._tracker.log(ran, file)
        except DeviceLostError as e:
            self._lost = e
            self.show(f"{e}; nothing more is run in this process")
        finally:
            if done:
                self.keep(file)
            saved = [dataclasses.asdict(row) for row in done]
            for family in dict.fromkeys(row.family for row in done):
                if chart := roofline(family, saved, roofs.to_dict()):
                    chart.png(path := folder / f"{chart.key}.png")
                    self.keep(path)


def _record(row: Row, device: str) -> LoggedRow:
    """Return a row as the store logs it: `spec` becomes params."""
    spec = {"family": row.family, "variant": row.variant, "shape": row.shape, "dtype": row.dtype}
    return LoggedRow(
        spec={"kernel": {"name": "-".join(spec.values())}, **spec, "peer": row.peer},
        spec_hash=spec_hash(spec),
        status=row.status,
        started_at=row.started_at,
        duration_s=row.duration_s,
        error=row.reason,
        actual={"device": device, "tuning": [f"{e['key']}: {e['config']} ({e['source']})" for e in row.tuning]},
        environment=describe_environment(),
        metrics=row.metrics,
    )
