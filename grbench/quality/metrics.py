"""Metrics of ranked answers and of scores, and 95% intervals over users by the bootstrap.

Intervals are percentiles of `RESAMPLES` Poisson resamples of the users: each user counts 0, 1, 2 or more times. All
requests of a user count together, because they are not independent. One seed gives two engines the same resamples, so
the interval of their difference is that of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grengines.api import Float32Array

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 1000
CONFIDENCE = 0.95
NOT_FOUND = np.iinfo(np.int64).max // 2  # rank of an item that the answer does not have
CUTOFFS = (5, 10, 50)
_NUMBERS = 1 << 20  # in one block of resamples, so that a block stays in the processor's cache


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95% interval, and the figure of each resample that the interval is of."""

    value: float
    low: float
    high: float
    drawn: Floats = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    @property
    def interval(self) -> list[float]:
        return [self.low, self.high]


def ranks_of(answers: Sequence[Ints], targets: Ints) -> Ints:
    """Return the place of each target in its answer, from 0; NOT_FOUND if the answer does not have it."""
    ranks = np.full(len(targets), NOT_FOUND, np.int64)
    for i, (answer, target) in enumerate(zip(answers, targets, strict=True)):
        if (places := np.flatnonzero(answer == target)).size:
            ranks[i] = places[0]
    return ranks


def hit(ranks: Ints, k: int) -> Floats:
    """Return 1 for each target among the first k, else 0. The mean is HR@k, which is recall@k for one target."""
    return (ranks < k).astype(np.float64)


def gain(ranks: Ints, k: int) -> Floats:
    """Return 1 / log2(2 + rank) for each target among the first k, else 0. The mean is NDCG@k for one target."""
    return np.where(ranks < k, 1.0 / np.log2(2.0 + ranks), 0.0)


def reciprocal(ranks: Ints, k: int) -> Floats:
    """Return 1 / (1 + rank) for each target among the first k, else 0. The mean is MRR@k."""
    return np.where(ranks < k, 1.0 / (1.0 + ranks), 0.0)


def list_figures(ranks: Ints, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, Floats]:
    """Return the figures of each user by name: hr5, ndcg5, mrr5 and so on for each cutoff."""
    kinds = {"hr": hit, "ndcg": gain, "mrr": reciprocal}
    return {f"{name}{k}": figure(ranks, k) for name, figure in kinds.items() for k in cutoffs}


def means(figures: Mapping[str, Floats], seed: int = 0) -> dict[str, Estimate]:
    """Return the mean over users of each figure, one value a user. All figures have the same resamples."""
    drawn = _resampled_means(list(figures.values()), seed)
    return {name: estimate_of(float(its.mean()), d) for (name, its), d in zip(figures.items(), drawn, strict=True)}


def relative_losses(
    figures: Mapping[str, Floats], reference: Mapping[str, Floats], seed: int = 0
) -> dict[str, Estimate]:
    """Return the share of each of the reference's means that is lost, over the same users; below 0 it is a gain."""
    theirs = [reference[name] for name in figures]
    drawn = _resampled_means([*figures.values(), *theirs], seed)
    lost = 1.0 - drawn[: len(theirs)] / np.maximum(drawn[len(theirs) :], 1e-12)
    return {
        name: estimate_of(1.0 - float(ours.mean()) / max(float(its.mean()), 1e-12), d)
        for (name, ours), its, d in zip(figures.items(), theirs, lost, strict=True)
    }


def _resampled_means(figures: Sequence[Floats], seed: int) -> Floats:
    """Return each figure's mean in each resample, [figures, RESAMPLES]: the weights, which take longest, drawn once."""
    if not figures:
        return np.empty((0, RESAMPLES))
    columns = np.stack(figures, axis=1)  # [users, figures]
    blocks = [w @ columns / w.sum(1, keepdims=True) for w in resamples(len(columns), seed)]
    drawn: Floats = np.concatenate(blocks).T
    return drawn


@dataclass(frozen=True)
class Scored:
    """Scores of labelled candidates, of one task: all candidates of all requests, one after another."""

    scores: Floats  # logits
    positive: Bools
    requests: Ints  # number of each candidate's request, from 0
    users: Ints  # number of each candidate's user, from 0

    @classmethod
    def of(cls, scores: Sequence[Float32Array], positive: Sequence[Bools], users: Sequence[int]) -> Scored:
        """Join requests. scores, positive: [candidates] of each; users: the user of each."""
        lengths = [len(s) for s in scores]
        owners = np.unique(np.asarray(users), return_inverse=True)[1]
        return cls(
            np.concatenate(scores).astype(np.float64),
            np.concatenate(positive),
            np.repeat(np.arange(len(lengths)), lengths),
            np.repeat(owners, lengths),
        )

    def figures(self) -> dict[str, float]:
        """Return auc, gauc (within requests), ne (He et al., ADKDD 2014) and accuracy.

        ne is the log loss over that of always predicting the share of positives. Without both labels auc is 0.5 and ne
        is 1. accuracy is the share of candidates whose probability is on the right side of 0.5, as in MLPerf.
        """
        return {name: float(values[0]) for name, values in self._weighted()(np.ones((1, self._owners))).items()}

    def estimates(self, seed: int = 0) -> dict[str, Estimate]:
        """Return the figures with their intervals over users."""
        drawn = self.resampled(seed)
        return {name: estimate_of(value, drawn[name]) for name, value in self.figures().items()}

    def losses(self, reference: Scored, seed: int = 0) -> dict[str, Estimate]:
        """Return the share of each of the reference's figures that is lost; of ne, whose best is 0, what is added."""
        ours, theirs = (s.figures() for s in (self, reference))
        drawn, expected = (s.resampled(seed) for s in (self, reference))
        return {
            name: estimate_of(
                float(_loss(name, np.array(ours[name]), np.array(theirs[name]))),
                _loss(name, drawn[name], expected[name]),
            )
            for name in ours
        }

    def resampled(self, seed: int) -> dict[str, Floats]:
        """Return each figure of each resample."""
        weighted, found = self._weighted(), dict[str, list[Floats]]()
        for users in resamples(self._owners, seed):
            for name, values in weighted(users).items():
                found.setdefault(name, []).append(values)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    @property
    def _owners(self) -> int:
        return int(self.users.max()) + 1

    def _weighted(self) -> Callable[[Floats], dict[str, Floats]]:
        """Return a function from weights [R, users] to the figures of each row.

        All but the AUC are made of sums over a user's candidates, so no row is as long as there are candidates.
        """
        z, count = np.where(self.positive, -self.scores, self.scores), self._owners
        right = self.positive == (self.scores > 0)
        first = np.flatnonzero(np.r_[True, np.diff(self.requests) != 0])
        inner, both = _areas_within(self.scores, self.positive, self.requests)
        sums = np.stack(
            [
                *(np.bincount(self.users, x, count) for x in (None, self.positive, np.logaddexp(0.0, z), right)),
                *(np.bincount(self.users[first][both], x, count) for x in (None, inner[both])),
            ],
            axis=1,
        )
        above = self._above()

        def figures(w: Floats) -> dict[str, Floats]:
            total, positives, losses, rights, requests, areas = (w @ sums).T
            pairs = positives * (total - positives)
            share = positives / total
            mixed = (share > 0) & (share < 1)
            p = np.where(mixed, share, 0.5)
            base = -(p * np.log(p) + (1 - p) * np.log(1 - p))
            return {
                "auc": np.where(pairs > 0, above(w) / np.maximum(pairs, 1e-12), 0.5),
                "gauc": areas / np.maximum(requests, 1e-12) if both.any() else np.full(len(w), 0.5),
                "ne": np.where(mixed, losses / total / base, 1.0),
                "accuracy": rights / total,
            }

        return figures

    def _above(self) -> Callable[[Floats], Floats]:
        """Return a function from weights [R, users] to the negatives below each positive in each row, ties as halves.

        Scores are sorted once. A row then takes a running sum over the negatives, and with more rows than users one of
        each user alone is enough, from which every row is a sum over pairs of users.
        """
        order = np.argsort(self.scores, kind="stable")
        scores, positive, users = self.scores[order], self.positive[order], self.users[order]
        winners, losers, count = users[positive], users[~positive], self._owners
        low, high = (np.searchsorted(scores[~positive], scores[positive], side) for side in ("left", "right"))

        def below(weights: Floats) -> np.ndarray:
            """Return the weight of the negatives below each user's positives."""
            running = np.r_[0.0, weights[losers].cumsum()]
            return np.bincount(winners, (running[low] + running[high]) / 2, count)

        def above(w: Floats) -> Floats:
            its = w @ np.stack([*map(below, np.eye(count))]) if len(w) > count else np.stack([*map(below, w)])
            counted: Floats = (its * w).sum(1)
            return counted

        return above


def area_under_curve(scores: npt.ArrayLike, positive: Bools) -> float:
    """Return the chance that a positive ranks above a negative, half for a tie; 0.5 if all labels are the same."""
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return 0.5
    values, place, equal = np.unique(scores, return_inverse=True, return_counts=True)
    if np.isnan(values[-1]):
        return np.nan
    ranks = (equal.cumsum() - (equal - 1) / 2)[place]  # ties have their mean rank, as in scipy.stats.rankdata
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def resamples(users: int, seed: int) -> Iterator[Floats]:
    """Yield blocks of weights [some, users], RESAMPLES rows in all."""
    rng = np.random.default_rng([seed, 3])
    size = max(min(_NUMBERS // users, RESAMPLES), 1)
    for begin in range(0, RESAMPLES, size):
        weights = rng.poisson(1.0, (min(size, RESAMPLES - begin), users)).astype(np.float64)
        weights[weights.sum(1) == 0] = 1.0  # nobody was drawn, which happens to very few users only
        yield weights


def estimate_of(value: float, drawn: Floats) -> Estimate:
    """Return a figure with the interval of its resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), drawn)


def _loss(name: str, found: Floats, reference: Floats) -> Floats:
    """Return the share that is lost: of ne, whose best is 0, what is added."""
    lost: Floats = (found - reference) / reference
    return lost if name == "ne" else -lost


def _areas_within(scores: Floats, positive: Bools, requests: Ints) -> tuple[Floats, Bools]:
    """Return the AUC within each request, and whether it has positives and negatives, without which there is none."""
    order = np.lexsort((scores, requests))
    scores, positive, requests = scores[order], positive[order], requests[order]
    place = np.arange(len(scores))
    tied = np.r_[False, (np.diff(scores) == 0) & (np.diff(requests) == 0)]
    equal = np.bincount(group := (~tied).cumsum() - 1)
    ranks = (place[~tied] + (equal - 1) / 2)[group]  # of all requests together, from 0
    counts, p = np.bincount(requests), np.bincount(requests, positive)
    n = counts - p
    first = counts.cumsum() - counts
    above = np.bincount(requests, ranks * positive) - p * first - p * (p - 1) / 2
    both = (p > 0) & (n > 0)
    return np.where(both, above / np.maximum(p * n, 1), 0.5), both
