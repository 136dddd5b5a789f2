"""Metrics of ranked answers and of scores, and 95% intervals over users by the bootstrap.

Intervals are percentiles of `RESAMPLES` Poisson resamples of the users: each user counts 0, 1, 2 or more times. All
requests of a user count together, because they are not independent. One seed gives two engines the same resamples, so
the interval of their difference is that of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

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
    blocks = [w @ columns / w.sum(1, keepdims=True) for w in resamples(len(columns), seed, 1)]
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
        return {name: float(value(np.ones((1, len(self.scores))))[0]) for name, value in self._weighted().items()}

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
        for users in resamples(int(self.users.max()) + 1, seed, len(self.scores)):
            for name, value in weighted.items():
                found.setdefault(name, []).append(value(users[:, self.users]))
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _weighted(self) -> dict[str, Callable[[Floats], Floats]]:
        """Return functions from weights [R, candidates] to the figure of each row."""
        z = np.where(self.positive, -self.scores, self.scores)
        losses, truth = np.logaddexp(0.0, z), self.positive.astype(np.float64)
        right = (self.positive == (self.scores > 0)).astype(np.float64)
        both = _with_both(self.positive, self.requests)
        inner = _areas_within(self.scores, self.positive, self.requests)
        first = np.flatnonzero(np.r_[True, np.diff(self.requests) != 0])

        def entropy_of(w: Floats) -> Floats:
            total = w.sum(1)
            share = w @ truth / total
            mixed = (share > 0) & (share < 1)
            p = np.where(mixed, share, 0.5)
            base = -(p * np.log(p) + (1 - p) * np.log(1 - p))
            return np.where(mixed, w @ losses / total / base, 1.0)

        def within(w: Floats) -> Floats:
            its = w[:, first[both]]
            return its @ inner[both] / np.maximum(its.sum(1), 1e-12) if both.any() else np.full(len(w), 0.5)

        def accuracy(w: Floats) -> Floats:
            share: Floats = w @ right / w.sum(1)
            return share

        order = np.argsort(self.scores, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(self.scores[order]) != 0])  # of each group of equal scores

        def area(w: Floats) -> Floats:
            ordered, positive = w[:, order], self.positive[order]
            p = np.add.reduceat(ordered * positive, starts, axis=1)
            n = np.add.reduceat(ordered * ~positive, starts, axis=1)
            above = (p * (n.cumsum(1) - 0.5 * n)).sum(1)
            pairs = p.sum(1) * n.sum(1)
            return np.where(pairs > 0, above / np.maximum(pairs, 1e-12), 0.5)

        return {"auc": area, "gauc": within, "ne": entropy_of, "accuracy": accuracy}


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


def resamples(users: int, seed: int, numbers: int) -> Iterator[Floats]:
    """Yield blocks of weights [some, users], RESAMPLES rows in all. numbers: that the caller has for each row."""
    rng = np.random.default_rng([seed, 3])
    size = max(min(_NUMBERS // max(users, numbers), RESAMPLES), 1)
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


def _with_both(positive: Bools, requests: Ints) -> Bools:
    """Return for each request whether it has positives and negatives."""
    counts, positives = np.bincount(requests), np.bincount(requests, positive)
    return (positives > 0) & (positives < counts)


def _areas_within(scores: Floats, positive: Bools, requests: Ints) -> Floats:
    """Return the AUC within each request."""
    bounds = np.searchsorted(requests, np.arange(int(requests[-1]) + 2))
    return np.array([area_under_curve(scores[a:b], positive[a:b]) for a, b in pairwise(bounds)])
