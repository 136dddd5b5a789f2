"""Options of the workloads: the source of the events, and how they become requests."""

from __future__ import annotations

from dataclasses import dataclass

from grengines.options import option


@dataclass
class WorkloadConfig:
    """Options of requests that all workloads share."""

    name: str = "???"
    num_candidates: int = option(32, ge=1, le=1_000_000)  # items to rank in each request
    min_history: int = option(1, ge=1)  # a visit needs as many earlier events to become a request
    max_history: int = option(512, ge=1)  # events of a history; older ones are dropped
    max_requests: int = option(0, ge=0)  # requests of the trace; 0: all


@dataclass
class RecordedConfig(WorkloadConfig):
    """Recorded events, which are split into visits."""

    visit_gap_s: float = option(1800.0, gt=0)  # a longer pause ends a visit
    visit_events: int = option(16, ge=1)  # a visit ends after as many events


@dataclass
class Ml100kConfig(RecordedConfig):
    """MovieLens-100K: 943 users, 1682 items, 100000 ratings with their times."""


@dataclass
class FileConfig(RecordedConfig):
    """A file of recorded events."""

    path: str = "???"
    sort: bool = False  # sort each user's events by time; false: an unsorted file is refused


@dataclass
class RecBoleConfig(FileConfig):
    """A RecBole `.inter` file: tab-separated, typed header."""


@dataclass
class CsvConfig(FileConfig):
    """MovieLens `ratings.csv` or `ratings.dat`, or a KuaiRand log; `auto` recognises them by the first line."""

    format: str = option("auto", choices=["auto", "ratings_csv", "ratings_dat", "kuairand"])


@dataclass
class SyntheticConfig(WorkloadConfig):
    """Synthetic users who return, drawn from a seed."""

    users: int = option(500, ge=1, le=100_000_000)
    items: int = option(10_000, ge=2, le=100_000_000)
    visits: int = option(2000, ge=1)  # requests of the trace
    item_zipf: float = option(1.0, ge=0, le=4)  # item popularity falls with rank to this power; 0: uniform
    user_zipf: float = option(0.8, ge=0, le=4)  # visits of a user fall with rank to this power
    revisit_rate: float | None = option(None, ge=0, le=1)  # share of visits by known users; null: by users, user_zipf
    history_median: int = option(128, ge=1)  # history length at a user's first visit (log-normal)
    history_sigma: float = option(0.8, ge=0, le=4)  # spread of history_median, in natural logarithms
    delta_mean: float = option(8.0, ge=0)  # new events between a user's visits, on average
    visits_per_s: float = option(50.0, gt=0)  # mean arrival rate
    burstiness: float = option(0.0, ge=0, le=0.9)  # of arrivals (Goh and Barabasi): 0 is Poisson
