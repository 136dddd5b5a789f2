"""Records and samples as pandas frames."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grbench.execution import records
from grbench.execution.energy import METRIC as JOULES
from grbench.execution.folders import left_out
from grbench.report.cells import MISSING, Cell, flatten, knobs, labels, shown
from grengines.overrides import override

if TYPE_CHECKING:
    import pandas as pd

PERCENTILES = ["latency_ms/p50", "latency_ms/p90", "latency_ms/p99", "latency_ms/p99.9"]
PARTS = list(records.PARTS)  # as pandas takes columns
METRICS = [
    "throughput_rps",
    "goodput_rps",
    JOULES,
    "latency_ms/mean",
    *PERCENTILES,
    *(f"{part}/p50" for part in PARTS),
]


class ReportError(ValueError):
    """Missing or unreadable records or samples. The message is one line: what, where and the fix."""

    def _render_traceback_(self) -> list[str]:
        return [f"grbench: {self}"]  # notebooks show this line instead of a traceback


def read_cells(roots: Sequence[Path]) -> list[Cell]:
    """Read every record under `roots`, with its folder, oldest first.

    A record that is found twice (overlapping roots, MLflow's copy) counts once. One that is not OK and was measured
    again with success is left out. Raises ReportError for a root that is missing or holds no record.
    """
    found: dict[tuple[str, str, float], Cell] = {}
    for root in roots:
        make = shlex.join(["python", "-m", "grbench", override("runner.output_root", str(root))])
        if root.is_file():
            raise ReportError(f"{root}: it is a file; give the folder of a record, or one above it")
        if not root.is_dir():
            raise ReportError(f"{root}: no such folder; check the path, or make one: `{make}`")
        cells = list(records.find(root))
        if not cells:
            why = left_out([root])
            raise ReportError("; ".join(why) or f"no record found under {root}; `{make}` makes one")
        for folder, record in sorted(cells, key=lambda cell: len(cell[0].parts)):
            found.setdefault((record.spec_hash, record.started_at, record.duration_s), (folder, record))
    return records.without_superseded(sorted(found.values(), key=records.by_start))


def load_frame(*roots: Path | str) -> pd.DataFrame:
    """Return `cells_frame` of every record under `roots`. Raises ReportError if there is none.

    A warning names each cell that has no record that can be read, and `attrs["left_out"]` has them too.
    """
    paths = [Path(root) for root in roots]
    frame = cells_frame(read_cells(paths))
    frame.attrs["left_out"] = left_out(paths)
    for line in frame.attrs["left_out"]:
        warnings.warn(f"left out: {line}", stacklevel=2)
    return frame


def cells_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return a frame with one row per cell, numbered from 1 in the given order.

    Columns: `cell` (a short label), the options in which the cells differ (their keys are in
    `frame.attrs["knobs"]`), `status`, every metric of the records by its name with its
    95% interval in `<metric>/low` and `<metric>/high`, `gate_error`, `gate_tolerance`,
    `latency_limit_ms`, `error`, `spec_hash`, `started_at` and `folder`. Only OK cells have metrics.
    """
    import pandas as pd

    all_records = [record for _, record in cells]
    keys = knobs(all_records)
    rows = []
    for (folder, record), label in zip(cells, labels(all_records), strict=True):
        spec = flatten(record.spec)
        row = {
            "cell": label,
            **{key: _sortable(spec.get(key, MISSING)) for key in keys},
            "status": str(record.status),
        }
        if record.ok:
            row |= record.metrics
            row |= {f"{name}/low": low for name, (low, _) in record.intervals.items()}
            row |= {f"{name}/high": high for name, (_, high) in record.intervals.items()}
        row |= {
            "gate_error": record.gate.get("error"),
            "gate_tolerance": record.gate.get("tolerance"),
            "latency_limit_ms": spec.get("latency_limit_ms"),
            "error": record.error or ("" if record.ok else "no reason was recorded"),
            "spec_hash": record.spec_hash,
            "started_at": record.started_at,
            "folder": folder,
        }
        rows.append(row)
    intervals = [f"{name}/{end}" for name in PERCENTILES for end in ("low", "high")]
    frame = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="#"))
    absent = [name for name in [*METRICS, *intervals] if name not in frame]
    frame[absent] = float("nan")
    numbers = [*METRICS, *intervals, "gate_error", "gate_tolerance", "latency_limit_ms"]
    frame[numbers] = frame[numbers].astype(float)  # null in a record is NaN here
    frame.attrs["knobs"] = keys
    return frame


def _sortable(value: object) -> object:
    """Keep numbers and words, so that they sort and pivot, and turn everything else into text."""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else shown(value)


def has_samples(folder: Path | str) -> bool:
    """Return True if a cell's raw samples are beside its record."""
    return (Path(folder) / records.SAMPLES_FILE).is_file()


def damaged_samples(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each file of samples or resamples beside OK cells that is there and can't be read."""
    folders = [folder for folder, record in cells if record.ok]
    lines = [samples_problem(folder) for folder in folders if has_samples(folder)]
    return [line for line in [*lines, *map(resamples_problem, folders)] if line]


def samples_problem(folder: Path | str) -> str:
    """Return why the samples beside a record can't be read, or "" if they can."""
    try:
        load_samples(folder)
    except ReportError as e:
        return str(e)
    return ""


def resamples_problem(folder: Path | str) -> str:
    """Return why the resamples of the quality beside a record can't be read, or "" if they can or there are none."""
    path = Path(folder) / records.RESAMPLES_FILE
    try:
        if path.is_file():
            load_columns(path)
    except ReportError as e:
        return str(e)
    return ""


def load_samples(folder: Path | str) -> pd.DataFrame:
    """Read a cell's raw samples, one row per request: times in milliseconds, `arrival_s` in seconds.

    Raises ReportError, naming the file, if they are missing, unreadable, or lack a column of numbers. What reads many
    cells leaves out what needs the samples of such a cell, keeps its row, and shows the message as a note.
    """
    return load_columns(Path(folder) / records.SAMPLES_FILE, records.SAMPLE_COLUMNS)


def load_columns(path: Path, needed: Sequence[str] = ()) -> pd.DataFrame:
    """Read a table beside a record. Raises as `load_samples`. needed: columns of numbers that it must have."""
    import pandas as pd

    fix = "run the cell again with rerun=true"
    if not path.is_file():
        raise ReportError(f"{path}: no such file; {fix}")
    try:
        table = pd.read_parquet(path)
    except Exception as e:  # pyarrow has an exception of its own for each kind of damage
        raise ReportError(f"{path}: not readable as parquet ({records.one_line(e)}); {fix}") from None
    if missing := [name for name in needed if name not in table]:
        raise ReportError(f"{path}: column {missing[0]!r} is missing; {fix}")
    if words := [name for name in needed if not pd.api.types.is_numeric_dtype(table[name])]:
        raise ReportError(f"{path}: column {words[0]!r} is {table[words[0]].dtype}, expected are numbers; {fix}")
    if table.empty:
        raise ReportError(f"{path}: holds no rows; {fix}")
    return table


def time_parts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean milliseconds of each part of the latency, one row per OK cell (by label), from raw samples.

    Means add up to the mean latency, medians do not. `other_ms` is the remainder: the engine's own bookkeeping between
    the timed steps. A cell whose samples can't be read has NaN, a warning says why, and `attrs["notes"]` has it too.
    """
    import pandas as pd

    ok, notes = frame[frame["status"] == records.Status.OK], []
    columns = [*PARTS, "other_ms", "latency_ms"]
    parts = pd.DataFrame(index=pd.Index(ok["cell"], name="cell"), columns=columns, dtype=float)
    for place, folder in enumerate(ok["folder"]):
        try:
            parts.iloc[place] = pd.Series(mean_parts(folder))[columns]
        except ReportError as e:
            notes.append(str(e))
            warnings.warn(str(e), stacklevel=2)
    parts.attrs["notes"] = notes
    return parts


def mean_parts(folder: Path) -> dict[str, float]:
    """Return the mean milliseconds of each part of a cell's latency. `other_ms` is time between the timed steps."""
    means = load_samples(folder)[[*PARTS, "latency_ms"]].mean()
    parts = {str(name): float(value) for name, value in means.items()}
    return {**parts, "other_ms": max(parts["latency_ms"] - sum(parts[part] for part in PARTS), 0.0)}
