"""RunRecord: the facts and figures of one finished cell, as one JSON file.

A cell's folder holds `record.json`, `samples.parquet` (one row per request), `worker.log`, for LoadGen scenarios
LoadGen's own logs, and with trained weights `quality.parquet` (the quality in each resample of the users). Every cell
ends in a record. Its status says how the cell ended.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from grengines.runtime import atomic_io

RECORD_FILE = "record.json"
SAMPLES_FILE = "samples.parquet"
RESAMPLES_FILE = "quality.parquet"
LOG_FILE = "worker.log"
RESERVE_FILE = f".{RECORD_FILE}.reserve"  # is there from the beginning of a cell until its record is
JOB_FILE = "job.json"  # what the worker was given
CELLS_FILE = "cells.json"  # in a sweep's folder: the folders of its cells, also of those that it kept
ARTIFACTS = "mlartifacts"  # folder of MLflow's copies under an output root
SCHEMA_VERSION = 1
PARTS = ("queue_ms", "batch_ms", "transfer_ms", "compute_ms")  # of a request's latency, in order of time
SAMPLE_COLUMNS = ("request_id", "user_id", "arrival_s", *PARTS, "latency_ms", "batch_index", "batch_size")


IN_RUN = "throughput_rps/in_run"  # the interval of an offline run's rate by its own batches
BEFORE_GATE = ("workload/", "engine_start_s", "step_s/")  # names of the metrics that are known before the gate


class Status(StrEnum):
    """The end of a cell or a row. Only OK ones have figures to compare."""

    OK = "OK"
    UNAVAILABLE = "UNAVAILABLE"  # this machine lacks something; nothing was measured
    INCORRECT = "INCORRECT"  # the gate failed; nothing is reported as a speed
    OOM = "OOM"  # host or device memory ran out
    TIMEOUT = "TIMEOUT"  # the worker ran past runner.timeout_s and was stopped
    STOPPED = "STOPPED"  # the queue grew without end (scenario.stop_hopeless); there are no latencies
    KILLED = "KILLED"  # a signal ended the worker
    DISK_FULL = "DISK_FULL"
    INTERRUPTED = "INTERRUPTED"  # Ctrl-C or another signal ended the launcher while the cell ran
    ERROR = "ERROR"


@dataclass
class Outcome:
    """A worker's part of the record of its cell."""

    status: Status = Status.ERROR
    error: str | None = None
    actual: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ungated: dict[str, Any] = field(default_factory=dict)  # of RunRecord
    code: str | None = None  # digest of the code that ran
    waits: bool = False  # the worker has kept the engine, and waits for another cell


@dataclass
class LoggedRow:
    """One finished piece of work as MLflow logs it: what was asked for, what ran, on what, and what came out.

    A row of kernelbench or cachesim has no more than this; a cell's record is a RunRecord.
    """

    spec: dict[str, Any]  # the whole configuration; of a cell RunSpec.to_dict()
    spec_hash: str
    status: Status
    started_at: str  # ISO 8601, UTC
    duration_s: float
    error: str | None = None  # one line: what, where, and the fix
    actual: dict[str, Any] = field(default_factory=dict)  # what ran, e.g. device: cpu
    environment: dict[str, Any] = field(default_factory=dict)  # git sha, GPU, driver, versions
    gate: dict[str, Any] = field(default_factory=dict)  # errors, tolerance, errors of wrong answers
    metrics: dict[str, float] = field(default_factory=dict)  # "latency_ms/p50": 1.23
    intervals: dict[str, list[float]] = field(default_factory=dict)  # 95% confidence: [low, high], by metric
    sweep_id: str | None = None
    overrides: list[str] = field(default_factory=list)  # what the user typed for this cell

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


@dataclass
class RunRecord(LoggedRow):
    """One cell.

    There is no record with latencies or rates and without a passed gate: the constructor and `to_json` raise
    ValueError. Figures of a cell that ended before all of its answers were checked are in `ungated`, which no reader
    takes for a result.
    """

    requested: dict[str, Any] = field(default_factory=dict)  # what was asked of the machine, e.g. device: auto
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of each file that an option of the spec names
    notes: list[str] = field(default_factory=list)  # for the reader, e.g. why p99 is absent
    ungated: dict[str, Any] = field(default_factory=dict)  # metrics, intervals and notes of a whole measurement
    config_dir: str | None = None  # --config-dir, which the overrides need
    tracking: dict[str, str] = field(default_factory=dict)  # run_id and uri once logged
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        self._require_gate()

    def _require_gate(self) -> None:
        measured = [name for name in (*self.metrics, *self.intervals) if not name.startswith(BEFORE_GATE)]
        if measured and (passed := self.gate.get("passed")) is not True:
            raise ValueError(
                f"metrics: {measured[0]!r} needs a passed gate, gate.passed is {passed!r}; "
                f"without one only {' and '.join(BEFORE_GATE)} are allowed"
            )
        if self.ungated and self.status in (Status.OK, Status.INCORRECT):
            raise ValueError(f"ungated: a record that is {self.status} has no figures that were not checked")
        # A record from before gate.measured was an option has no such answers.
        if measured and "measured" in self.spec.get("gate", {}):
            sample = self.gate.get("measured")
            if not isinstance(sample, dict) or sample.get("passed") is not True:
                raise ValueError(
                    f"metrics: {measured[0]!r} needs measured answers that are right, gate.measured is {sample!r}"
                )

    def to_json(self) -> str:
        self._require_gate()  # metrics may have been added since
        # Few labelled requests can leave a figure without one: no positives among them, say.
        known = {name: ends for name, ends in self.intervals.items() if all(map(math.isfinite, ends))}
        return json.dumps(finite(asdict(self) | {"intervals": known}), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "record") -> RunRecord:
        """Read a record. Raises ValueError, with `where` and the key, for anything that is not one."""
        try:
            return _record(text)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None


def _record(text: str) -> RunRecord:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON (line {e.lineno}: {e.msg})") from None
    except RecursionError:
        raise ValueError("not a record (its JSON is nested too deeply)") from None
    if not isinstance(data, dict):
        raise ValueError("not a record (a JSON object is expected)")
    if {"findings", "cells"} <= data.keys():
        raise ValueError("the JSON of a report and not a record; give the folder of the cells that it is about")
    if data.get("schema_version") != SCHEMA_VERSION:
        version = data.get("schema_version")
        raise ValueError(f"schema_version is {version!r}, this grbench reads {SCHEMA_VERSION}; measure again")
    known = {f.name for f in fields(RunRecord)}
    required = {f.name for f in fields(RunRecord) if f.default is MISSING and f.default_factory is MISSING}
    if problem := sorted(required - data.keys()) or sorted(data.keys() - known):
        raise ValueError(f"missing or unknown key {problem[0]!r}")
    if data["status"] not in list(Status):
        raise ValueError(f"status {data['status']!r} is not one of {', '.join(Status)}")
    data["status"] = Status(data["status"])
    for name, kind in get_type_hints(RunRecord).items():
        if name in data:
            _check(data[name], kind, name)
    _check_parts(data)
    return RunRecord(**data)


def _check(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError for a value that is not of the type `kind`, a class or a type of dict, list and union."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (origin is UnionType and any(isinstance(value, arg) for arg in args)):
        return
    types: Any = (int, float) if origin is float else origin
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(
            getattr(arg, "__name__", str(arg)) for arg in (args if origin is UnionType else [origin])
        )
        raise ValueError(f"{where} is a {type(value).__name__}, expected is a {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, expected is a finite number")
    if isinstance(value, dict):
        for key, each in value.items():
            if each is not None or args[1] is not float:  # null: a figure that is not finite
                _check(each, args[1], f"{where}[{key!r}]")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            _check(each, args[0], f"{where}[{i}]")


def _check_parts(data: dict[str, Any]) -> None:
    """Raise ValueError for a part of a record that its readers rely on, where types do not say it."""
    for group in ("model", "engine", "workload", "scenario"):
        named = data["spec"].get(group)
        if not isinstance(named, dict) or not isinstance(named.get("name"), str):
            raise ValueError(f"spec.{group} has no name")
    if data["status"] is Status.OK and data.get("metrics", {}).get("throughput_rps", 0.0) is None:
        raise ValueError("metrics['throughput_rps'] is null, expected is a finite number in a record that is OK")
    for name, interval in data.get("intervals", {}).items():
        if len(interval) != 2:
            raise ValueError(f"intervals[{name!r}] has {len(interval)} ends, expected are 2")
    for name in ("error", "tolerance"):
        if data.get("gate", {}).get(name) is not None:
            _check(data["gate"][name], float, f"gate.{name}")
    environment = data.get("environment", {})
    for name, kind in {"cpu": str, "git_sha": str, "gpus": list[dict[str, Any]], "versions": dict[str, str]}.items():
        if environment.get(name) is not None:
            _check(environment[name], kind, f"environment.{name}")
    if not all(isinstance(gpu.get("name"), str) for gpu in environment.get("gpus") or []):
        raise ValueError("environment.gpus has a GPU without a name")
    try:
        datetime.datetime.fromisoformat(data["started_at"]).timestamp()
    except (ValueError, OverflowError):  # the second: a year that no clock has
        raise ValueError(f"started_at is {data['started_at']!r}, expected is a time as ISO 8601 writes it") from None


def save(record: RunRecord, folder: Path) -> Path:
    """Write `folder/record.json`, whole or not at all.

    It takes the space that `reserve` set aside, so that a disk that has filled up since does not lose the record.
    """
    path, spare = folder / RECORD_FILE, folder / RESERVE_FILE
    data = record.to_json().encode()
    with open(spare, "r+b" if spare.exists() else "wb") as f:  # noqa: PTH123  (r+b keeps the reserved blocks)
        f.write(data)
        f.truncate()
        f.flush()
        os.fsync(f.fileno())
    spare.replace(path)
    return path


def reserve(folder: Path, size: int = 256 * 1024) -> None:
    """Set aside disk space for the record before the work starts. Raises OSError if there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RESERVE_FILE).open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, size) if hasattr(os, "posix_fallocate") else f.write(b"\0" * size)


def full(folder: Path) -> bool:
    """Return whether the disk of a folder is full: what was written there may be cut."""
    return shutil.disk_usage(folder).free < 4096


def load(path: Path) -> RunRecord:
    """Read one record, given its file or its folder. Raises ValueError or OSError, with the path."""
    path = path / RECORD_FILE if path.is_dir() else path
    return RunRecord.from_json(path.read_text(errors="replace"), str(path))


def find(root: Path) -> Iterator[tuple[Path, RunRecord]]:
    """Yield every readable record under `root` with its folder, oldest first. `unreadable` names the others."""
    found = []
    for path in _files(root):
        with contextlib.suppress(ValueError, OSError):
            found.append((path.parent, load(path)))
    yield from sorted(found, key=by_start)


def by_start(cell: tuple[Path, RunRecord]) -> tuple[str, int, str]:
    """Order records by their start, which has whole seconds, then by their folder: cell 2 of a sweep is before 10."""
    folder = str(cell[0])
    return cell[1].started_at, len(folder), folder


def unreadable(roots: Sequence[Path]) -> list[str]:
    """Return one line for each record file under `roots` that can't be read: the file, the reason and the fix."""
    problems = []
    for path in sorted({path for root in roots for path in _files(root)}):
        try:
            load(path)
        except (ValueError, OSError) as e:
            problems.append(f"{e}; remove it or run its cell again")
    return problems


def without_record(root: Path) -> list[Path]:
    """Return the folders under `root` in which a cell began and has no record, in order."""
    return sorted(file.parent for file in _files(root, RESERVE_FILE) if not (file.parent / RECORD_FILE).exists())


def _files(root: Path, name: str = RECORD_FILE) -> Iterator[Path]:
    """Yield the files of a name under `root`, also behind links and of listed cells, without MLflow's copies.

    A folder is entered once.
    """
    entered = set()
    for folder, below, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in entered:
            below.clear()
            continue
        entered.add(place)
        if ARTIFACTS in below:
            below.remove(ARTIFACTS)
        if name in names:
            yield Path(folder, name)
        for cell in _listed(Path(folder)) if CELLS_FILE in names else ():
            if (place := os.path.realpath(cell)) not in entered and (cell / name).is_file():
                entered.add(place)
                yield cell / name


def list_cells(sweep: Path, cells: Iterable[Path]) -> None:
    """Write the folders of a sweep's cells into its folder, whole or not at all. Raises OSError.

    They are relative, so that an output root can be moved.
    """
    text = json.dumps([os.path.relpath(cell, sweep) for cell in cells], indent=1) + "\n"
    atomic_io.write(sweep / CELLS_FILE, text.encode())


def _listed(sweep: Path) -> list[Path]:
    """Return the folders of `list_cells`; none of a damaged list, which costs only the cells that were kept."""
    try:
        found = json.loads((sweep / CELLS_FILE).read_text())
    except (OSError, ValueError):
        return []
    names = found if isinstance(found, list) else []
    return [Path(os.path.normpath(sweep / name)) for name in names if isinstance(name, str)]


def without_superseded(cells: Iterable[tuple[Path, RunRecord]]) -> list[tuple[Path, RunRecord]]:
    """Return cells without those that were measured again with success, in the same order.

    A record is superseded if it is not OK and a later one of the same measurement and machine is, or if it was
    interrupted and there is a later one.
    """
    latest: dict[tuple[Any, ...], tuple[str, str]] = {}  # times of the last record, and of the last one that is OK
    cells = list(cells)
    for _, record in cells:
        last, last_ok = latest.get(_measurement(record), ("", ""))
        ok_at = record.started_at if record.ok else ""
        latest[_measurement(record)] = (max(last, record.started_at), max(last_ok, ok_at))

    def superseded(record: RunRecord) -> bool:
        last, last_ok = latest[_measurement(record)]
        counts = last if record.status is Status.INTERRUPTED else last_ok
        return not record.ok and counts > record.started_at

    return [(folder, record) for folder, record in cells if not superseded(record)]


def _measurement(record: RunRecord) -> tuple[Any, ...]:
    gpus = [gpu.get("name") for gpu in record.environment.get("gpus") or [] if isinstance(gpu, dict)]
    return record.spec_hash, record.environment.get("cpu"), *gpus


def spec_hash(spec: dict[str, Any]) -> str:
    """Return 12 hex digits over every value. They depend neither on the order of keys nor on the process."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def finite(value: Any) -> Any:
    """Return `value` for JSON. NaN and infinities, which are no JSON and no measurement, become null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def one_line(error: BaseException, most: int = 200, keep_end: bool = False) -> str:
    """Return an exception's message as one line of at most `most` characters, or its type's name.

    keep_end: of a longer one the end is kept, which of a traceback says what happened.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= most:
        return text
    return f"...{text[3 - most :]}" if keep_end else f"{text[: most - 3]}..."
