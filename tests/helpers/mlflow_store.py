"""Empty MLflow databases for tests that do not test how one is made: MLflow takes three seconds for its migrations."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from helpers import kept


def _migrate(folder: Path) -> None:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    MlflowClient(f"sqlite:///{folder / 'mlruns.db'}").search_experiments()


@cache
def _empty() -> bytes:
    return (kept.folder_of("mlflow", _migrate, ["tests/helpers/mlflow_store.py"]) / "mlruns.db").read_bytes()


def new_database(folder: Path, name: str = "mlruns.db") -> str:
    """Put an empty database into a folder, and return its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(_empty())
    return f"sqlite:///{folder / name}"
