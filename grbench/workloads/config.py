"""Options of the workloads: the source of the events, and how they become requests."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option

TRACES = 2  # raise it when the same options and seed give another trace than before


@dataclass
class WorkloadConfig:
    """Options of requests that all workloads share."""

    name: str = option("???", "name of the workload in records")
    num_candidates: int = option(32, "items to rank in each request", ge=1, le=1_000_000)
    min_history: int = option(1, "events before a visit for it to become a request", ge=1)
    max_history: int = option(512, "most events of a history; older ones are dropped", ge=1)
    stale_events: int = option(
        0, "newest events before a request that its history lacks, as where the user's state is this old; a history "
        "keeps at least `min_history` events", ge=0,
    )  # fmt: skip
    max_requests: int = option(0, "most requests of the trace; 0: all", ge=0)


@dataclass
class RecordedConfig(WorkloadConfig):
    """Recorded events, which are split into visits."""

    visit_gap_s: float = option(1800.0, "a visit ends after a pause this long", gt=0)
    visit_events: int = option(16, "a visit ends after this many events", ge=1)


@dataclass
class Ml100kConfig(RecordedConfig):
    """MovieLens-100K: 943 users, 1682 items, 100000 ratings with their times."""

    name: str = option("ml_100k", "name of the workload in records")


@dataclass
class FileConfig(RecordedConfig):
    """A file of recorded events."""

    path: str = option("???", "the file", file=True)
    sort: bool = option(False, "sort each user's events by time; false: refuse a file out of order")
    user_column: str | None = option(None, "column of the users; null: by its name, such as user_id")
    item_column: str | None = option(None, "column of the items; null: by its name, such as item_id")
    time_column: str | None = option(
        None, "column of the times; null: by its name, such as timestamp; none: the order of the file counts"
    )
    rating_column: str | None = option(
        None, "column of the ratings; null: by its name, such as rating, if there is one"
    )
    time_unit: str = option(
        "auto", "unit of times that are numbers; auto: the one that puts them between 1980 and 2100",
        choices=["auto", "s", "ms", "us", "ns"],
    )  # fmt: skip


@dataclass
class RecBoleConfig(FileConfig):
    """A RecBole `.inter` file: tab-separated, typed header."""

    name: str = option("recbole", "name of the workload in records")


@dataclass
class CsvConfig(FileConfig):
    """A table (.csv, .tsv, .parquet) of events, MovieLens `ratings.dat`, or lines of `user item item ...`."""

    name: str = option("csv", "name of the workload in records")
    format: str = option(
        "auto", "auto: by the first line of the file", choices=["auto", "table", "ratings_dat", "sequences"]
    )


@dataclass
class DrawnConfig(WorkloadConfig):
    """Synthetic users, drawn from a seed."""

    users: int = option(500, "users", ge=1, le=100_000_000)
    items: int = option(10_000, "items of the catalogue", ge=2, le=100_000_000)
    item_zipf: float = option(1.0, "popularity of an item falls with its rank to this power; 0: uniform", ge=0, le=4)
    visits_per_s: float = option(50.0, "mean arrival rate", gt=0)


@dataclass
class SyntheticConfig(DrawnConfig):
    """Synthetic users who return, drawn from a seed."""

    name: str = option("synthetic", "name of the workload in records")
    visits: int = option(2000, "requests of the trace", ge=1)
    user_zipf: float = option(0.8, "visits of a user fall with the user's rank to this power; 0: uniform", ge=0, le=4)
    revisit_rate: float | None = option(
        None, "share of visits by users seen before; null: as `users` and `user_zipf` make it", ge=0, le=1
    )
    history_median: int = option(128, "median history at a user's first visit, log-normal", ge=1)
    history_sigma: float = option(0.8, "spread of that history, in natural logarithms", ge=0, le=4)
    delta_mean: float = option(8.0, "mean number of new events between two visits of a user", ge=0)
    burstiness: float = option(0.0, "of arrivals (Goh and Barabasi); 0: Poisson", ge=0, le=0.9)


@dataclass
class StepsConfig(DrawnConfig):
    """Synthetic users who visit at most once in each time step, in one order, as MLPerf generates them for DLRM-v3."""

    name: str = option("steps", "name of the workload in records")
    steps_before: int = option(90, "time steps before the trace, of events alone", ge=0, le=10_000)
    steps: int = option(10, "time steps of the trace", ge=1, le=10_000)
    step_share: float = option(0.7, "probability that a user visits in a time step", gt=0, le=1)
    step_events: int = option(100, "mean new events of a visit, normal with a deviation of a quarter", ge=1)


WorkloadOptions = RecordedConfig | DrawnConfig


def contradiction(config: WorkloadConfig) -> str | None:
    """Return None, or which options of a workload exclude each other."""
    if config.min_history > config.max_history:
        return f"workload.min_history={config.min_history} is above workload.max_history={config.max_history}; lower it"
    if isinstance(config, DrawnConfig) and config.num_candidates > config.items:
        return f"workload.num_candidates={config.num_candidates}: workload.items={config.items}; ask for fewer"
    visits = config.visits if isinstance(config, SyntheticConfig) else 0
    if 1 in (config.max_requests, visits):
        option = "max_requests" if config.max_requests == 1 else "visits"
        return f"workload.{option}=1: the workload has one request, the gate needs two; set it to 2 or more"
    return None
