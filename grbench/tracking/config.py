"""Options of tracking: the store that runs are logged to."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from grengines.options import option

# MLflow's own feature for sharing a view: the page's address names it, and the state is a tag of the experiment.
VIEW, VIEW_TAG = "grbench", "mlflow.sharedViewState.grbench"


@dataclass
class MlflowConfig:
    """MLflow, in a local sqlite file or on a server."""

    name: str = option("mlflow", "name of the tracking in records")
    uri: str | None = option(None, "tracking URI, such as http://host:port; null: mlruns.db under the output root")
    experiment: str = option("grbench", "MLflow experiment of the runs")


def check_uri(key: str, uri: str | None) -> None:
    """Raise ValueError for no URI, and for one with a password or a token, which records, pages and logs would keep.

    key: the option that has the URI.
    """
    try:
        parts = urlsplit(uri or "")
    except ValueError as e:  # the line leaves the URI out, which may hold a password
        raise ValueError(f"{key}: {e}; allowed are such as http://host:5000 and sqlite:///mlruns.db") from None
    if parts.password or (parts.username and parts.scheme.startswith("http")) or "password" in parts.query.lower():
        raise ValueError(
            f"{key}: it holds a password, which records and pages would show; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment, and log to a database through `mlflow server`"
        )


@dataclass
class NoTrackingConfig:
    """Records on disk only."""

    name: str = option("none", "name of the tracking in records")
