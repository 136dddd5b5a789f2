"""Synthetic behaviour: users who return by Zipf's law, or step by step as in MLPerf's DLRM-v3; their events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from grbench.workloads.config import DrawnConfig, StepsConfig, SyntheticConfig
from grbench.workloads.events import DataError, Events
from grbench.workloads.trace import Visits

Ints = npt.NDArray[np.int64]
START = 1_700_000_000  # seconds since 1970; an arbitrary fixed time
HISTORY_GAP_S = 3600.0  # mean time between the events of a history
ACTIONS = ("view", "like", "share", "buy")
ACTION_RATES = (1.0, 0.2, 0.05, 0.03)


@dataclass(frozen=True)
class Visitors:
    """Visits in order of arrival: their users, times and numbers of events."""

    visitor: Ints  # user of each visit
    arrivals: npt.NDArray[np.float64]  # seconds
    deltas: Ints  # events that each visit adds
    users: Ints  # users with at least one visit, ascending
    initial: Ints  # events of each of `users` before the trace


def draw_visitors(config: DrawnConfig, rng: np.random.Generator) -> Visitors:
    """Draw the visits of `make_events`. Raises DataError as it does."""
    match config:
        case SyntheticConfig():
            return _returning(config, rng)
        case StepsConfig():
            return _in_steps(config, rng)
    raise TypeError(f"not a drawn workload: {type(config).__name__}")


def make_events(config: DrawnConfig, seed: int) -> tuple[Events, Visits]:
    """Return sorted events and the visits between them.

    Each user has a history before the trace starts, and each visit adds new events. Raises DataError if `revisit_rate`
    needs more users than `users`, or nobody visits.
    """
    rng = np.random.default_rng(seed)
    drawn = draw_visitors(config, rng)
    visitor, arrivals, users = drawn.visitor, drawn.arrivals, drawn.users

    # Blocks of events, by user and then by time: a user's initial history, then the delta of each visit.
    block_user = np.concatenate([users, visitor])
    block_time = np.concatenate([np.full(len(users), -1.0), arrivals])
    block_size = np.concatenate([drawn.initial, drawn.deltas])
    order = np.lexsort((block_time, block_user))
    ends = np.empty(len(order), dtype=np.int64)
    ends[order] = np.cumsum(block_size[order])
    starts = ends - block_size

    n = int(block_size.sum())
    blocks = np.repeat(order, block_size[order])  # the block of each event
    before = rng.exponential(HISTORY_GAP_S, n)
    is_history = blocks < len(users)
    elapsed = np.cumsum(np.where(is_history, before, 0.0))
    block_end = elapsed[np.maximum(ends - 1, 0)]
    since_start = np.where(is_history, elapsed - block_end[blocks] - 1, np.floor(block_time[blocks]))

    actions = np.zeros(n, dtype=np.int64)
    for bit, rate in enumerate(ACTION_RATES):
        actions |= (rng.random(n) < rate).astype(np.int64) << bit
    events = Events(
        users=np.repeat(block_user[order], block_size[order]),
        items=_zipf(rng, config.items, config.item_zipf, n),
        actions=actions,
        weights=rng.beta(2.0, 2.0, n).astype(np.float32),
        timestamps=(START + since_start).astype(np.int64),
        num_users=config.users,
        num_items=config.items,
        action_names=ACTIONS,
    )
    visit_times = START + np.floor(arrivals).astype(np.int64)
    return events, Visits(starts[len(users) :], ends[len(users) :], visit_times, arrivals)


def _returning(config: SyntheticConfig, rng: np.random.Generator) -> Visitors:
    """Draw visits of users who return, with log-normal histories before the first one.

    They arrive as a renewal process with gamma intervals, which is Poisson for burstiness 0.
    """
    if config.revisit_rate is None:
        visitor = _zipf(rng, config.users, config.user_zipf, config.visits)
    else:
        visitor = _revisits(rng, config, config.revisit_rate)
    spread = (1 + config.burstiness) / (1 - config.burstiness)  # standard deviation over mean of the intervals
    intervals = rng.gamma(1 / spread**2, spread**2 / config.visits_per_s, config.visits)

    users = np.unique(visitor)
    lengths = rng.lognormal(np.log(config.history_median), config.history_sigma, len(users))
    initial = np.clip(lengths, config.min_history, config.max_history).astype(np.int64)
    return Visitors(visitor, np.cumsum(intervals), rng.poisson(config.delta_mean, config.visits), users, initial)


def _in_steps(config: StepsConfig, rng: np.random.Generator) -> Visitors:
    """Draw visits in time steps: in each, some users visit once, in the order of their ids.

    Before the trace each user has the events of one step, and of the steps before it in which the user took part.
    """
    taking_part = rng.random((config.steps, config.users)) < config.step_share
    visitor = np.nonzero(taking_part)[1]
    if not len(visitor):
        raise DataError(
            f"workload.step_share={config.step_share:g}: none of {config.users} users visits in {config.steps} steps; "
            "raise it"
        )
    users = np.unique(visitor)
    steps = 1 + rng.binomial(config.steps_before, config.step_share, len(users))
    arrivals = np.cumsum(rng.exponential(1 / config.visits_per_s, len(visitor)))
    deltas = _step_events(config, np.ones(len(visitor)), rng)
    return Visitors(visitor, arrivals, deltas, users, _step_events(config, steps, rng))


def _step_events(config: StepsConfig, steps: npt.NDArray[Any], rng: np.random.Generator) -> Ints:
    """Draw the events of this many steps. A sum of normal numbers is normal."""
    drawn = rng.normal(config.step_events * steps, config.step_events / 4 * np.sqrt(steps))
    events: Ints = np.maximum(np.round(drawn), 1).astype(np.int64)
    return events


def check_users(config: SyntheticConfig, seed: int) -> None:
    """Raise DataError if `revisit_rate` needs more users than `users` with this seed."""
    if config.revisit_rate is not None:
        _first_visits(np.random.default_rng(seed), config, config.revisit_rate)


def _first_visits(rng: np.random.Generator, config: SyntheticConfig, rate: float) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Draw which visits are a user's first one. Returns that and how many users were seen until each visit."""
    new = rng.random(config.visits) >= rate
    new[0] = True
    seen: Ints = np.cumsum(new, dtype=np.int64)
    if seen[-1] > config.users:
        raise DataError(
            f"workload.revisit_rate={rate} needs {seen[-1]} users for {config.visits} visits; "
            f"workload.users={config.users}: set it to {seen[-1]} or more"
        )
    return new, seen


def _revisits(rng: np.random.Generator, config: SyntheticConfig, rate: float) -> npt.NDArray[np.int64]:
    """Return the user of each visit: with probability `rate` one seen before, otherwise a new one.

    Of k users seen, the i-th returns with a probability that falls as i^-user_zipf (its continuous form).
    """
    new, seen = _first_visits(rng, config, rate)
    draw, exponent = rng.random(config.visits), 1.0 - config.user_zipf
    most = seen + 1.0  # ranks lie in [1, k + 1)
    logarithmic = abs(exponent) < 1e-9
    rank = most**draw if logarithmic else (1.0 + draw * (most**exponent - 1.0)) ** (1.0 / exponent)
    back = np.clip(rank.astype(np.int64), 1, seen) - 1
    users: npt.NDArray[np.int64] = rng.permutation(config.users)[np.where(new, seen - 1, back)].astype(np.int64)
    return users


def _zipf(rng: np.random.Generator, count: int, power: float, draws: int) -> npt.NDArray[np.int64]:
    """Return `draws` ids of 0..count-1. Popularity is shuffled, so that hot rows are not neighbours."""
    popularity = np.arange(1, count + 1, dtype=np.float64) ** -power
    cumulative = np.cumsum(popularity)
    ranks = np.searchsorted(cumulative, rng.random(draws) * cumulative[-1], side="right")
    items: npt.NDArray[np.int64] = rng.permutation(count)[np.minimum(ranks, count - 1)].astype(np.int64)
    return items
