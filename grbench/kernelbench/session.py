"""One command: its jobs one after another, their results on disk, in MLflow and on the screen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

from hydra.conf import HydraConf
from hydra.types import RunMode
from rich.console import Console

from grbench.config import ConfigError
from grbench.environment import describe_environment
from grbench.kernelbench.bench import Bench, DeviceLostError, Row
from grbench.kernelbench.config import KernelBenchConfig, device_of
from grbench.kernelbench.output import line, plot_roofline, print_tables, save
from grbench.records import RunRecord, Status
from grbench.tracking import one_line
from grbench.tracking.rows import RowTracker


class Session:
    """Runs jobs and keeps what they gave. `close` prints the tables and returns the exit code."""

    def __init__(self, config: KernelBenchConfig, hydra: HydraConf) -> None:
        self._root = Path(config.output_root).absolute()
        self._screen = Console(stderr=True)
        self._rows: list[Row] = []
        self._files: list[tuple[Path, str]] = []
        self._sweep = hydra.mode is RunMode.MULTIRUN
        name = Path(hydra.sweep.dir if self._sweep else hydra.runtime.output_dir).name
        facts = {"overrides": " ".join(sys.argv[1:])}
        self._tracker = RowTracker(
            config.tracking, self._root, command="kernelbench", suffix="kernels", name=name, facts=facts
        )
        self._lost: DeviceLostError | None = None

    def run(self, config: KernelBenchConfig, hydra: HydraConf) -> None:
        """Measure one job; its results are on disk after every shape. Raises ConfigError before measuring anything."""
        if self._lost:
            return
        device = device_of(config)
        folder = Path(hydra.runtime.output_dir).absolute()
        job: list[Row] = []
        try:
            bench = Bench(config, device, self._say)
        except Exception as e:
            raise ConfigError(f"device={device}: its ceilings can't be measured ({one_line(e)})") from e
        roofs = bench.ceilings
        self._say(f"{config.dtype} on {device}: matmul {roofs.tflops:.4g} TFLOP/s, copy {roofs.tbps:.3g} TB/s")
        facts = {
            "config": dataclasses.asdict(config),
            "device": device,
            "environment": describe_environment(),
            "ceilings": roofs.to_dict(),
        }
        try:
            for rows in bench.run():
                job += rows
                self._rows += rows
                results = save(folder, facts, job)
                for row in rows:
                    self._say(line(row))
                # What is UNAVAILABLE would drown the others.
                done = [_record(row, device) for row in rows if row.status is not Status.UNAVAILABLE]
                self._tracker.log(done, results)
        except DeviceLostError as e:
            self._lost = e
            self._say(f"{e}; nothing more is run in this process")
        finally:
            self._keep(folder, job, bench)

    def _keep(self, folder: Path, job: list[Row], bench: Bench) -> None:
        """Plots, and the list of files for MLflow."""
        prefix = folder.name if self._sweep else ""
        if job:
            self._files.append((folder / "results.json", prefix))
        for family in dict.fromkeys(row.family for row in job):
            if path := plot_roofline(family, job, bench.ceilings, folder / f"roofline_{family}.png"):
                self._files.append((path, prefix))

    def close(self, failed: bool = False, interrupted: bool = False) -> int:
        """Print the tables and end the parent run. Returns 0, or 1 if a row is INCORRECT or ERROR."""
        ok = not any(row.status in (Status.INCORRECT, Status.ERROR) for row in self._rows)
        self._tracker.finish(self._files, ok and not failed and not interrupted)
        print_tables(Console(), self._rows)
        if interrupted:
            self._say("interrupted; the shapes above were finished and are kept")
        for path, _ in self._files:
            if path.suffix == ".json":
                self._say(f"results: {os.path.relpath(path)}")
        if self._rows:
            self._say(f"compare: python -m grbench.tracking ui {os.path.relpath(self._root)}")
        return 0 if ok else 1

    def _say(self, text: str) -> None:
        self._screen.print(text, soft_wrap=True, markup=False, highlight=False)


def _record(row: Row, device: str) -> RunRecord:
    """A row in the shape that the store logs: `spec` becomes params."""
    spec = {"family": row.family, "variant": row.variant, "shape": row.shape, "dtype": row.dtype}
    return RunRecord(
        spec={"kernel": {"name": "-".join(spec.values())}, **spec, "peer": row.peer},
        spec_hash=hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12],
        status=row.status,
        started_at=row.started_at,
        duration_s=row.duration_s,
        error=row.reason,
        actual={"device": device, "tuning": [f"{e['key']}: {e['config']} ({e['source']})" for e in row.tuning]},
        environment=describe_environment(),
        metrics=row.metrics,
    )
