"""Options of tracking: the store that runs are logged to."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class MlflowConfig:
    """MLflow, in a local sqlite file or on a server."""

    name: str = option("mlflow", "name of the tracking in records")
    uri: str | None = option(None, "tracking URI, such as http://host:port; null: mlruns.db under the output root")
    experiment: str = option("grbench", "MLflow experiment of the runs")


@dataclass
class NoTrackingConfig:
    """Records on disk only."""

    name: str = option("none", "name of the tracking in records")
