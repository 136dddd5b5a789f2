"""Options of tracking."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class MlflowConfig:
    """MLflow, in a local sqlite file or on a server."""

    name: str = "mlflow"
    uri: str | None = None  # null: sqlite in <runner.output_root>/mlruns.db; or http://host:port
    experiment: str = "grbench"


@dataclass
class NoTrackingConfig:
    """Records on disk only."""

    name: str = "none"
