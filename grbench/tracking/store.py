"""One MLflow store: a sqlite file or a server. The only module that imports mlflow to write."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from grbench.execution.energy import METRIC as JOULES
from grbench.execution.records import (
    ARTIFACTS,
    LOG_FILE,
    RECORD_FILE,
    RESAMPLES_FILE,
    SAMPLES_FILE,
    LoggedRow,
    RunRecord,
    Status,
    one_line,
)
from grbench.report.cells import Cell, flatten, label
from grbench.tracking import database
from grbench.tracking.config import VIEW_TAG
from grbench.tracking.describe import describe_cell, describe_row, describe_sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

SWEEP_TAG, HASH_TAG, NOTE_TAG = "sweep_id", "spec_hash", "mlflow.note.content"
LAUNCHER_TAG = "launcher"  # host, process id and start of the process that measures a sweep
MOST_NOTE, MOST_NAME = 5000, 250  # characters that a server accepts
FIRST_METRICS = ["latency_ms/p99", "throughput_rps", "latency_ms/p50", "goodput_rps", "cache/hit_rate"]
FIRST_METRICS += [JOULES, "quality/auc", "quality/hr10", "gate/error"]
CELLS_VIEW = {  # state of the page that `grbench ui` opens
    "selectedColumns": [f"metrics.`{name}`" for name in FIRST_METRICS] + ["tags.`status`"],
    "orderByKey": "metrics.`latency_ms/p99`",  # any metric: the cells of sweeps are rows then, and not folded
    "orderByAsc": True,
}
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}
MLFLOW_STATUS = {Status.OK: "FINISHED", Status.INTERRUPTED: "KILLED"}  # the others: FAILED


class Store:
    """An experiment in a tracking store. Every method may raise whatever MLflow raises."""

    def __init__(self, uri: str | None, experiment: str, root: Path, cells: bool = True) -> None:
        # A dead server or a locked file must fail in seconds; the record is safe on disk.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        for name in ("alembic", "mlflow"):  # they print a page of migrations on first use
            logging.getLogger(name).setLevel(logging.WARNING)
        file = database.path_of(uri) if uri else (root / database.FILE).resolve()
        self.uri = database.uri_of(file) if file else str(uri)
        if file is None:
            _check_server(self.uri)
        with database.opened(file) if file else contextlib.nullcontext():
            self._client = database.client(self.uri)
            self._experiment = self._find_or_create(experiment, file)
            end_abandoned(self._client, [self._experiment])
            if cells:
                self._client.set_experiment_tag(self._experiment, VIEW_TAG, json.dumps(CELLS_VIEW))

    def _find_or_create(self, name: str, file: Path | None) -> str:
        if found := self._client.get_experiment_by_name(name):
            if found.lifecycle_stage == "deleted":
                raise ValueError(f"experiment {name!r} is deleted; restore it or set tracking.experiment")
            return str(found.experiment_id)
        # Without a kind, MLflow 3 assumes language-model traces and opens an empty page.
        return self._client.create_experiment(
            name,
            (file.parent / ARTIFACTS).as_uri() if file else None,
            {"mlflow.experimentKind": "custom_model_development"},
        )

    def find(self, record: LoggedRow, anywhere: bool = False, parent: str | None = None) -> dict[str, str]:
        """Return what `log` returned for a row that the experiment has already, or nothing.

        anywhere: look in every experiment of the store. parent: the run that it must be a child of. A run that the user
        deleted counts, because it is not to come back. One that was never finished does not.
        """
        from mlflow.entities import ViewType

        where = [str(e.experiment_id) for e in self._client.search_experiments()] if anywhere else [self._experiment]
        begun, ended = _times(record)
        same = f"tags.{HASH_TAG} = {_quoted(record.spec_hash)} and attributes.start_time = {begun}"
        same += f" and attributes.end_time = {ended}"
        if parent is not None:
            same += f" and tags.mlflow.parentRunId = {_quoted(parent)}"
        found = self._client.search_runs(where, same, ViewType.ALL, max_results=1)
        return self._address(found[0].info) if found else {}

    def _address(self, run: RunInfo) -> dict[str, str]:
        return {"run_id": str(run.run_id), "uri": self.uri, "experiment_id": str(run.experiment_id)}

    def sweep_run(self, sweep_id: str, facts: dict[str, str]) -> str:
        """Return the parent run of a sweep. A resumed sweep finds its earlier one."""
        same = f"tags.{SWEEP_TAG} = {_quoted(sweep_id)} and tags.role = 'sweep'"
        if found := self._client.search_runs([self._experiment], filter_string=same, max_results=1):
            run_id = str(found[0].info.run_id)
            self._client.set_tag(run_id, LAUNCHER_TAG, launcher())
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        words = [word for word in facts.get("overrides", "").split() if not word.startswith("-")]
        name = " ".join([*words, f"({sweep_id})"]) if words else sweep_id
        run = self._client.create_run(
            self._experiment,
            run_name=name[:MOST_NAME],
            tags={SWEEP_TAG: sweep_id, "role": "sweep", LAUNCHER_TAG: launcher(), **facts},
        )
        return str(run.info.run_id)

    def end_sweep(
        self, run_id: str, cells: list[Cell], cut_short: bool = False, answer: str = "", files: Sequence[Path] = ()
    ) -> None:
        """Count the cells, attach the page that compares them, describe the run and end it.

        answer: Markdown that comes first in the description. files: further artifacts, files or folders.
        The run is FINISHED if there is an answer or all cells are OK, else FAILED. cut_short: it is KILLED and has no
        page, because who ended the sweep gives it only seconds.
        """
        records = [record for _, record in cells]
        ended = "KILLED"
        try:
            for status in sorted({record.status for record in records}):
                self._client.log_metric(run_id, f"cells/{status}", sum(r.status is status for r in records))
            pictures = [] if cut_short else self._log_comparison(run_id, cells)
            for path in () if cut_short else files:
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(run_id, str(path), *([path.name] if path.is_dir() else []))
            described = "\n\n".join(part for part in (answer, describe_sweep(records, run_id, pictures)) if part)
            self._client.set_tag(run_id, NOTE_TAG, described[:MOST_NOTE])
            if not cut_short:
                ended = "FINISHED" if answer or all(r.ok for r in records) else "FAILED"
        finally:  # whatever stops the description: a run that is still RUNNING would look alive
            self._client.set_terminated(run_id, ended)

    def _log_comparison(self, run_id: str, cells: list[Cell]) -> list[str]:
        """Attach the report page of the cells. Returns the artifact paths of its pictures."""
        from grbench.report.frame import ReportError
        from grbench.report.write import write_report

        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "comparison.md"
            try:
                written = write_report(cells, out, "Comparison")
            except (ReportError, OSError) as e:  # a damaged samples file costs only the page
                self._client.set_tag(run_id, "comparison", f"not written: {one_line(e)}")
                return []
            self._client.log_artifacts(run_id, folder)
            return [path.relative_to(folder).as_posix() for path in written if path.suffix == ".png"]

    def end_rows(self, run_id: str, files: list[tuple[Path, str]], ok: bool) -> None:
        """Attach files, each with its folder, to a parent run of rows and end it: FINISHED if `ok`."""
        for path, folder in files:
            self._client.log_artifact(run_id, str(path), folder or None)
        self._client.set_terminated(run_id, "FINISHED" if ok else "FAILED")

    def log(self, record: LoggedRow, folder: Path, parent: str | None) -> dict[str, str]:
        """Log one row: params, tags, metrics, artifacts. Returns what `RunRecord.tracking` holds."""
        from mlflow.entities import Metric, Param, RunTag

        begun, ended = _times(record)
        pictures = [path.name for path in _artifacts(folder) if path.suffix == ".png"]
        tags = {**_tags(record), **({"mlflow.parentRunId": parent} if parent else {})}
        run = self._client.create_run(self._experiment, start_time=begun, tags=tags, run_name=run_name(record))
        run_id = str(run.info.run_id)
        try:
            values = _metrics(record)
            metrics = [Metric(k, float(v), ended, 0) for k, v in values.items() if v is not None and math.isfinite(v)]
            params = [Param(key, str(value)[:6000]) for key, value in flatten(record.spec).items()]
            for start in range(0, max(len(metrics), len(params)), 100):  # a server takes 100 params at a time
                some = slice(start, start + 100)
                self._client.log_batch(run_id, metrics=metrics[some], params=params[some])
            note = describe_cell(record, run_id, pictures) if isinstance(record, RunRecord) else describe_row(record)
            self._client.log_batch(run_id, tags=[RunTag(NOTE_TAG, note[:MOST_NOTE])])
            self._client.log_text(run_id, OmegaConf.to_yaml(OmegaConf.create(record.spec)), "config.yaml")
            for path in _artifacts(folder):
                self._client.log_artifact(run_id, str(path))
            self._client.set_terminated(run_id, MLFLOW_STATUS.get(record.status, "FAILED"), ended)
        except BaseException:
            with contextlib.suppress(Exception):  # an incomplete run would look complete
                self._client.delete_run(run_id)
            raise
        return self._address(run.info)


def end_abandoned(client: MlflowClient, experiments: Sequence[str]) -> int:
    """End runs of sweeps whose process on this host is gone, as SIGKILL leaves them. Returns their number."""
    running = client.search_runs(list(experiments), "attributes.status = 'RUNNING' and tags.role = 'sweep'")
    gone = [run for run in running if LAUNCHER_TAG in run.data.tags and _is_gone(run.data.tags[LAUNCHER_TAG])]
    for run in gone:
        client.set_terminated(run.info.run_id, "KILLED")
    return len(gone)


def launcher(process: int | None = None) -> str:
    """Return the host, the id and the start of a process, by default this one; "" of one that is gone."""
    process = os.getpid() if process is None else process
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it is gone, or this is no Linux
        return ""
    return f"{socket.gethostname()} {process} {after_name[19]}"


def _is_gone(tag: str) -> bool:
    host, _, rest = tag.partition(" ")
    process = rest.partition(" ")[0]
    return host == socket.gethostname() and process.isdecimal() and launcher(int(process)) != tag


def run_name(record: LoggedRow) -> str:
    """Return the name of a cell, or of a row of `grbench kernels`, `grbench cachesim` or `grbench train`."""
    spec = record.spec
    if "engine" in spec:
        return label(record)
    return str(next(spec[part] for part in ("kernel", "cache", "training") if part in spec)["name"])


def _times(record: LoggedRow) -> tuple[int, int]:
    """Return the times at which a row began and ended, in milliseconds since 1970."""
    begun = int(datetime.datetime.fromisoformat(record.started_at).timestamp() * 1000)
    return begun, begun + int(record.duration_s * 1000)


def _quoted(text: str) -> str:
    """Return a value of a filter. MLflow has no escape for quotes, so those that it can't tell apart are left out."""
    return f'"{text}"' if "'" in text and '"' not in text else "'" + text.replace("'", "") + "'"


def _tags(record: LoggedRow) -> dict[str, str]:
    """Return the tags by which users filter runs. Everything else about a cell is in its record.json."""
    env, actual = record.environment, record.actual
    gpus = env.get("gpus") or []
    tags: dict[str, Any] = {
        "status": record.status,
        HASH_TAG: record.spec_hash,
        "role": "cell",
        SWEEP_TAG: record.sweep_id,
        "overrides": " ".join(record.overrides),
        "git_sha": env.get("git_sha"),
        "machine": gpus[0].get("name") if gpus else env.get("cpu"),
        "device": actual.get("device"),
        "precision": actual.get("precision"),
        "fallback": actual.get("fallback"),
    }
    return {k: (v if isinstance(v, str) else json.dumps(v))[:5000] for k, v in tags.items() if v not in (None, "")}


def _metrics(record: LoggedRow) -> dict[str, float | None]:
    """Return all figures, main ones first, because MLflow's comparison opens on the first metric.

    In `offline` that is the throughput: a latency is the time in a queue of all requests there. Figures have six
    significant digits, because MLflow's pages show every digit; record.json has all.
    """
    quality = (record.gate.get("quality") or {}).get("tasks") or {}
    offline = (record.spec.get("scenario") or {}).get("name") == "offline"
    figures: dict[str, float | None] = {"throughput_rps": None} if offline else {}
    figures |= dict.fromkeys(FIRST_METRICS)
    figures |= record.metrics
    figures |= {f"gate/{name}": record.gate.get(name) for name in ("error", "tolerance")}
    figures |= {"quality/auc": sum(task["auc"] for task in quality.values()) / len(quality)} if quality else {}
    figures |= _interval_metrics(record)
    measured = record.gate.get("measured") or {}
    figures |= {f"gate/measured/{name}": measured.get(name) for name in ("answers", "checked", "most_wrong_share")}
    for task, values in quality.items():
        numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
        figures |= {f"quality/{task}/{name}": value for name, value in numbers.items()}
    return {name: None if value is None else _rounded(value) for name, value in figures.items()}


def _rounded(value: float) -> float:
    """Return a number with six significant digits, a count with all."""
    return value if not math.isfinite(value) or value == int(value) else float(f"{value:.6g}")


def _interval_metrics(record: LoggedRow) -> dict[str, float]:
    """Return 95% intervals as metrics: latency_ms/p50 -> latency_ms/p50/ci95_low and ci95_high."""
    return {
        f"{name}/{end}": value
        for name, interval in record.intervals.items()
        for end, value in zip(("ci95_low", "ci95_high"), interval, strict=True)
    }


def _artifacts(folder: Path) -> list[Path]:
    names = [RECORD_FILE, SAMPLES_FILE, RESAMPLES_FILE, LOG_FILE]
    return [folder / name for name in names if (folder / name).is_file()] + sorted(folder.glob("*.png"))


def _check_server(uri: str) -> None:
    """Raise ConnectionError in seconds if nothing listens; the retries of MLflow take minutes."""
    parts = urlsplit(uri)
    port = parts.port or PORTS.get(parts.scheme.partition("+")[0])
    if not parts.hostname or port is None:
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=5).close()
    except OSError as e:
        raise ConnectionError(f"{uri}: {e.strerror or e}; start the server, or set tracking.uri") from None
