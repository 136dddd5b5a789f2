"""The Python API: `grbench.run` measures cells, `grbench.frame` reads records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grbench.config.compose import plan_jobs, prepare_hydra
from grbench.config.unread import unread
from grbench.execution.files import require_files
from grbench.execution.ranks import require_gpus, to_spec_here
from grbench.execution.records import RunRecord
from grbench.execution.session import CellSession
from grengines.overrides import override

if TYPE_CHECKING:
    import pandas as pd


def run(
    overrides: Sequence[str] = (),
    *,
    sweep: bool = False,
    output_root: str | Path | None = None,
    progress: bool = False,
) -> list[RunRecord]:
    """Measure cells as `python -m grbench` does, and return their records in the order of the cells.

    Each cell runs in a worker process of its own. Its record, samples and log are kept under the output root. MLflow
    gets a run unless `tracking=none` is among the overrides. A cell that fails raises nothing: its record has the
    status and the error.

    Args:
        overrides: Hydra overrides, as on the command line: `["engine=hstu", "scenario=offline"]`.
        sweep: Take comma-separated values as a sweep, one cell for each combination, as `-m` does. A cell whose record
            is under the output root already is not measured again, unless `rerun=true` is among the overrides.
        output_root: Folder for records. None: `runner.output_root`, by default `outputs`.
        progress: Print the state of each cell on stderr.

    Returns:
        A record for each cell. With `runner.repeats` above 1, the first run of every cell comes before the second ones.

    Raises:
        grbench.ConfigError: An override is wrong, or a row of a workload's file. Nothing has run then, because all
            cells are checked first.
        KeyboardInterrupt: Ctrl-C, after the record of the running cell was kept.

    Example:
        ```python
        import grbench

        [record] = grbench.run(["engine=hstu", "scenario=offline"])
        print(record.status, record.metrics["throughput_rps"])

        records = grbench.run(["engine=hstu", "scenario.max_batch=1,4,16"], sweep=True, output_root="outputs/batches")
        for record in records:
            print(record.overrides, record.metrics.get("latency_ms/p99"), record.error)
        ```
    """
    root = [] if output_root is None else [override("runner.output_root", str(output_root))]
    prepare_hydra()

    def say(line: str) -> None:
        if progress:
            print(f"grbench: {line}", file=sys.stderr)

    invocation, jobs = plan_jobs("config", to_spec_here, [*overrides, *root], sweep, report=say, unread=unread)
    for line in invocation.skipped:
        say(f"left out: {line}")
    require_files(job.config[0] for job in jobs)
    gpus = require_gpus((job.config[0] for job in jobs), jobs[0].config[1].runner.cluster)
    session = CellSession(jobs[0].config[1], invocation, quiet=not progress, gpus=gpus)
    try:
        for job in jobs:
            session.run(job)
        session.finish()
    except BaseException:
        session.end(cut_short=True)
        raise
    session.end()
    return session.records


def frame(*roots: str | Path) -> pd.DataFrame:
    """Return the records under folders as a DataFrame with a row for each cell, oldest first.

    Args:
        roots: Folders with records. None given: `outputs`.

    Returns:
        Columns: `cell` (a short label), the settings that differ between the cells, `status`, every metric by its name
        with its 95% interval in `<metric>/low` and `<metric>/high`, `gate_error`, `gate_tolerance`, `error`,
        `spec_hash`, `started_at` and `folder`. Only OK cells have metrics. `attrs["left_out"]` has a line for each cell
        without a record that can be read, and a warning says it too.

    Raises:
        grbench.report.ReportError: A folder does not exist or holds no record.

    Example:
        ```python
        import grbench

        cells = grbench.frame("outputs")
        print(cells.loc[cells.status == "OK", ["cell", "latency_ms/p50", "latency_ms/p99"]])
        ```
    """
    from grbench.report.frame import load_frame

    return load_frame(*(roots or ("outputs",)))
