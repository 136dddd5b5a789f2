"""Workloads: seeded traces of requests, from real behaviour or made up."""

from __future__ import annotations

from pathlib import Path

from grbench.workloads.config import CsvConfig, Ml100kConfig, RecBoleConfig, SyntheticConfig, WorkloadConfig
from grbench.workloads.trace import Trace


def build(config: WorkloadConfig, seed: int, latency_limit_ms: float) -> Trace:
    """The trace that `config` describes. Raises DataError (a ValueError) for data that can't be used."""
    from grbench.workloads import events, movielens, synthetic, trace

    match config:
        case SyntheticConfig():
            made, visits = synthetic.make_events(config, seed)
            return trace.build_trace(made, visits, config, seed, latency_limit_ms)
        case Ml100kConfig():
            loaded = events.load_recbole(movielens.ml_100k(), sort=True)  # the file is in no order of time
        case RecBoleConfig():
            loaded = events.load_recbole(Path(config.path).expanduser(), config.sort)
        case CsvConfig():
            loaded = events.load_csv(Path(config.path).expanduser(), config.format, config.sort)
        case _:
            raise TypeError(f"unknown workload {type(config).__name__}")
    return trace.build_trace(loaded, trace.find_visits(loaded, config), config, seed, latency_limit_ms)
