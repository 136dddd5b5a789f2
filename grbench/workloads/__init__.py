"""Workloads: seeded traces of requests, from recorded or synthetic behaviour."""

from __future__ import annotations

from pathlib import Path

from grbench.workloads.config import (
    CsvConfig,
    DrawnConfig,
    FileConfig,
    Ml100kConfig,
    RecBoleConfig,
    RecordedConfig,
    SyntheticConfig,
    WorkloadOptions,
    contradiction,
)
from grbench.workloads.events import Columns, Events
from grbench.workloads.trace import Trace
from grengines.api import Catalogue


def build(
    config: WorkloadOptions,
    seed: int,
    latency_limit_ms: float,
) -> Trace:
    """Return the trace that `config` describes. Raises DataError (a ValueError) for unusable data."""
    from grbench.workloads import synthetic, trace

    if isinstance(config, DrawnConfig):
        events, visits = synthetic.make_events(config, seed)
    else:
        events = load_events(config)
        visits = trace.find_visits(events, config)
    return trace.build_trace(events, visits, config, seed, latency_limit_ms)


def refusal(config: WorkloadOptions, seed: int) -> str | None:
    """Return None, or why a workload can't be: options that exclude each other, columns that its file does not have.

    Of a file it reads the first line only: other faults of the data show when `build` loads it.
    """
    from grbench.workloads import events, synthetic

    try:
        if isinstance(config, FileConfig):
            form = config.format if isinstance(config, CsvConfig) else "recbole"
            events.check_columns(Path(config.path), form, _columns(config))
        if isinstance(config, SyntheticConfig):
            synthetic.check_users(config, seed)
    except events.DataError as e:
        return str(e)
    return contradiction(config)


def catalogue(config: WorkloadOptions) -> Catalogue:
    """Return the users, items and actions of a workload, without its requests. Raises DataError as `build`."""
    if isinstance(config, DrawnConfig):
        from grbench.workloads.synthetic import ACTIONS

        return Catalogue(config.users, config.items, len(ACTIONS))
    events = load_events(config)
    return Catalogue(events.num_users, events.num_items, len(events.action_names))


def load_events(config: RecordedConfig) -> Events:
    """Return the recorded events that `config` describes. Raises DataError (a ValueError) for unusable data."""
    from grbench.workloads import events, movielens

    match config:
        case Ml100kConfig():
            return events.load_recbole(movielens.ml_100k(), sort=True)  # the file is not sorted by time
        case RecBoleConfig():
            return events.load_recbole(Path(config.path), config.sort, _columns(config))
        case CsvConfig():
            return events.load_csv(Path(config.path), config.format, config.sort, _columns(config))
    raise TypeError(f"unknown workload {type(config).__name__}")


def _columns(config: FileConfig) -> Columns:
    return Columns(config.user_column, config.item_column, config.time_column, config.rating_column, config.time_unit)
