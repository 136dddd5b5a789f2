"""Empty MLflow databases for tests that do not test how one is made: MLflow takes two seconds for its migrations."""

from __future__ import annotations

import logging
import tempfile
from functools import cache
from pathlib import Path


@cache
def _empty() -> bytes:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlruns.db"
        MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def new_database(folder: Path, name: str = "mlruns.db") -> str:
    """Put an empty database into a folder, and return its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(_empty())
    return f"sqlite:///{folder / name}"
