"""Records from MLflow: record.json, samples.parquet and quality.parquet of each run, downloaded."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from grbench.execution import records
from grbench.report.frame import ReportError
from grbench.tracking import database
from grbench.tracking.config import check_uri
from grkernels.nearest import nearest

if TYPE_CHECKING:
    from mlflow import MlflowClient


def download(uri: str, experiment: str, folder: Path) -> None:
    """Download the cells of `experiment` at the tracking `uri`, each to a subfolder of `folder`.

    Runs without a record (a sweep's parent) are skipped. Raises ReportError for an unreadable URI, an unknown
    experiment, or one without a record.
    """
    try:
        check_uri("--mlflow", uri)
        if (path := database.path_of(uri)) and not path.is_file():
            raise ReportError(f"--mlflow {uri}: no such file {path}; MLflow would create an empty database there")
        if path:
            database.check(path)
    except (ValueError, sqlite3.Error) as e:
        raise ReportError(str(e)) from None
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a wrong address must fail in seconds
    try:
        client = database.client(uri)
        found = client.get_experiment_by_name(experiment)
        known = [e.name for e in client.search_experiments()]
        runs = _download(client, found.experiment_id, folder) if found else 0
    except Exception as e:  # MLflow, SQLAlchemy, requests and OSError: each store has its own
        raise ReportError(
            f"--mlflow {uri}: cannot be read ({records.one_line(e)}); valid URIs: sqlite:///outputs/mlruns.db, http://host:5000"
        ) from None
    if not found:
        known_words = f"{nearest(experiment, known)}known: {', '.join(known) or 'none'}"
        raise ReportError(f"--experiment {experiment}: unknown at {uri}; {known_words}")
    if not runs:
        raise ReportError(f"--experiment {experiment}: none of its runs at {uri} has a {records.RECORD_FILE}")


def _download(client: MlflowClient, experiment_id: str, folder: Path) -> int:
    count, token = 0, None
    while True:
        page = client.search_runs([experiment_id], max_results=200, page_token=token)
        for run in page:
            names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
            if records.RECORD_FILE not in names:
                continue
            target = folder / run.info.run_id
            target.mkdir(parents=True)
            for name in {records.RECORD_FILE, records.SAMPLES_FILE, records.RESAMPLES_FILE} & names:
                client.download_artifacts(run.info.run_id, name, str(target))
            count += 1
        if not (token := page.token):
            return count
