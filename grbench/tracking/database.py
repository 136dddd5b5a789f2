"""MLflow's sqlite database: its address, its making, and the artifacts beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from grbench.execution.records import ARTIFACTS

if TYPE_CHECKING:
    from mlflow import MlflowClient

FILE = "mlruns.db"  # name of the database of an output root


def uri_of(path: Path) -> str:
    """Return the tracking URI of a database, with the characters escaped that a URI reserves."""
    from sqlalchemy import URL

    address = str(URL.create("sqlite", database=str(path)))
    if address == f"sqlite:///{path}":
        return address
    # MLflow makes the folder that "sqlite:///" names, and knows nothing of escaped characters.
    return address.replace("sqlite://", "sqlite+pysqlite://", 1)


def path_of(uri: str) -> Path | None:
    """Return the database that a tracking URI names, without links, or None for another kind of store.

    Raises ValueError for a URI of sqlite that names none.
    """
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database
    except ArgumentError:
        raise ValueError(f"{uri}: no URI of a database; allowed is such as sqlite:///outputs/mlruns.db") from None
    return Path(name).resolve() if name else None


def client(uri: str) -> MlflowClient:
    """Return MLflow's client of a store, also for a user without a home folder: MLflow's import asks for one."""
    homeless = "HOME" not in os.environ and os.path.expanduser("~") == "~"  # noqa: PTH111  (Path raises here)
    if homeless:
        os.environ["HOME"] = tempfile.gettempdir()
    try:
        from mlflow import MlflowClient
    finally:
        if homeless:
            del os.environ["HOME"]
    return MlflowClient(uri, registry_uri=uri)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[None]:
    """Hold the lock of a database that exists, can be opened, and has its artifacts beside it.

    Processes that make one database at once would each create its tables. Raises OSError or sqlite3.Error in seconds,
    where MLflow would try for minutes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make(path)
        check(path)
        _follow(path)
        yield


def check(path: Path) -> None:
    """Raise sqlite3.Error, with the path, for a database that can't be opened or read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            connection.execute("SELECT experiment_id FROM experiments LIMIT 1")
    except sqlite3.Error as e:
        fix = "move it away if it is damaged; `python -m grbench import` then logs the records to a new one"
        raise type(e)(f"{path}: {e}; {fix}") from None


def _make(path: Path) -> None:
    """Make the database completely or not at all. MLflow creates its tables one by one, which takes seconds."""
    new = path.with_name(f".{path.name}.new")
    for each in (new, new.with_name(f"{new.name}-journal")):  # of a process that ended too early
        each.unlink(missing_ok=True)
    client(uri_of(new)).search_experiments(max_results=1)
    new.replace(path)


def _follow(path: Path) -> None:
    """Correct the addresses of artifacts in a database that was moved or copied together with them."""
    folder = path.parent / ARTIFACTS
    here = folder.as_uri()
    with contextlib.closing(sqlite3.connect(path, timeout=5)) as connection, connection:
        places = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (there,) in places:
            if there == here or not there.startswith("file:") or not there.endswith(f"/{ARTIFACTS}"):
                continue
            inside = [len(there) + 1, f"{there}/"]
            run = connection.execute(
                "SELECT run_uuid FROM runs WHERE substr(artifact_uri, 1, ?) = ? LIMIT 1", inside
            ).fetchone()
            gone = not Path(unquote(urlsplit(there).path)).is_dir()
            if gone or (run is not None and (folder / run[0]).is_dir()):
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?",
                    [here, len(there) + 1, *inside],
                )
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", [here, there]
                )
