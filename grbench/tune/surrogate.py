"""The proposer of the search: a Gaussian process over the options, asked for the most expected improvement a second.

The expected improvement is divided by the expected cost of the first probe (Snoek, Larochelle and Adams, "Practical
Bayesian Optimization of Machine Learning Algorithms", 2012, section 3.2).

A space has thousands of configurations at most, so all open ones are weighed each time, and none is proposed twice. The
covariance of two configurations is a product over the options. Equal values count as 1, different ones as the option's
share of what they have in common; of numbers, near ones have more in common. The shares are those of the greatest
likelihood. A second process over failures weighs the improvement by the probability that the configuration runs.

Where little improvement is expected anywhere, the best one's neighbours come first: an interaction that the process has
smoothed away is most likely there, and people ask what one step of each option costs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.special import ndtr

from grbench.tune import rates
from grbench.tune.outcome import Configuration
from grbench.tune.proposers import Axes, Cost, equal, is_number, number_first

Floats = npt.NDArray[np.float64]
SHARES = (0.1, 0.4, 0.7, 0.9, 0.98)  # that values of one option may have in common
WIDTH = 0.25  # of the nearness of numbers, as a share of their list
NOISE = 1.0  # steps of the ladder
FAR = rates.steps(2)  # below the best, from which scores count as equal: else the process explains the worst ones
STARTUP = 4  # configurations before the process is asked; 6, and 8 at random, had a higher regret on measured grids
LITTLE = 0.1  # steps of expected improvement, 0.3% of a rate
PRIOR_SHARE = 0.7  # of each option, until the first likelihood


class Surrogate:
    """A `Proposer`. It takes the default first, then some that are unlike those before and those that failed."""

    def __init__(self, configurations: Sequence[Configuration], axes: Axes, seed: int = 0) -> None:
        """configurations: the default first. seed: decides between equally unlike ones."""
        self._all, self._random = list(configurations), random.Random(seed)
        self._place = {configuration: i for i, configuration in enumerate(self._all)}
        self._open = dict.fromkeys(configurations)
        self._taken: set[int] = set()
        self._scores: dict[int, float] = {}
        self._failed: set[int] = set()
        orders = {key: sorted(values, key=number_first) for key, values in axes.items() if len(values) > 1}
        self._near = [_nearness(values) for values in orders.values()]
        self._codes = np.array(
            [
                [
                    order.index(value) if (value := c.get(key)) is not None else len(order)
                    for key, order in orders.items()
                ]
                for c in self._all
            ],
            dtype=np.int64,
        ).reshape(len(self._all), len(orders))
        self._shares = [PRIOR_SHARE] * len(orders)

    def ask(self, cost: Cost = equal, most_unlike: int = STARTUP) -> Configuration | None:
        if not self._open:
            return None
        chosen = self._all[0]  # the losses of other models are measured against it
        if chosen not in self._open:
            costs = {self._place[c]: its for c in self._open if np.isfinite(its := cost(c))}
            if not costs:
                return None
            open_, least = np.array(list(costs)), min(costs.values())
            known = len(self._scores) + len(self._failed)
            early = known < min(STARTUP, most_unlike) or len(self._scores) < 3
            choose = self._unlike if early else self._improvement
            worth = choose(open_) * self._running(open_) / (np.array(list(costs.values())) / least)
            if early:
                chosen = self._all[int(self._random.choice(list(open_[worth > worth.max() - 1e-6])))]
            else:
                near = self._beside_best(open_)
                if worth.max() < LITTLE and near.any():
                    open_, worth = open_[near], worth[near]
                chosen = self._all[int(open_[np.argmax(worth)])]
        self.take(chosen)
        return chosen

    def take(self, configuration: Configuration) -> None:
        self.leave_out(configuration)
        self._taken.add(self._place[configuration])

    def leave_out(self, configuration: Configuration) -> None:
        del self._open[configuration]

    def tell(self, configuration: Configuration, score: float | None, violation: float) -> None:
        place = self._place[configuration]
        if score is None or violation > 0:
            self._failed.add(place)
        else:
            self._scores[place] = score

    def _unlike(self, open_: npt.NDArray[np.int64]) -> Floats:
        """Return how little the ones before say of open configurations: the deviation that they leave."""
        taken = np.array(sorted(self._taken))
        return self._predict(taken, np.zeros(len(taken)), 1e-6, open_)[1]

    def _improvement(self, open_: npt.NDArray[np.int64]) -> Floats:
        """Return the expected improvement of open configurations, in steps."""
        seen = np.array(list(self._scores))
        values = np.array(list(self._scores.values()))
        values = np.maximum(values, values.max() - FAR)
        middle, spread = float(values.mean()), max(float(values.std()), NOISE)
        y, noise = (values - middle) / spread, (NOISE / spread) ** 2
        self._fit(seen, y, noise)
        mean, deviation = self._predict(seen, y, noise, open_)
        best = float(y.max())
        z = (mean - best) / deviation
        improvement: Floats = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
        return spread * improvement

    def _beside_best(self, open_: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which open configurations differ from the best one in one option."""
        best = max(self._scores, key=lambda place: self._scores[place])
        beside: npt.NDArray[np.bool_] = np.count_nonzero(self._codes[open_] != self._codes[best], axis=1) == 1
        return beside

    def _running(self, at: npt.NDArray[np.int64]) -> Floats:
        """Return the probability that configurations run, by what has failed."""
        if not self._failed:
            return np.ones(len(at))
        both = np.array([*self._scores, *self._failed])
        failure = np.array([0.0] * len(self._scores) + [1.0] * len(self._failed))
        return 1 - np.clip(self._predict(both, failure, 0.1, at)[0], 0, 1)

    def _fit(self, seen: npt.NDArray[np.int64], y: Floats, noise: float) -> None:
        """Choose the share of each option in turn by the likelihood of what is known."""

        def likelihood(shares: list[float]) -> float:
            factor, low = cho_factor(self._covariance(seen, seen, shares) + noise * np.eye(len(seen)), lower=True)
            return float(-0.5 * y @ cho_solve((factor, low), y) - np.log(np.diag(factor)).sum())

        for i in range(len(self._shares)):
            options = [[*self._shares[:i], share, *self._shares[i + 1 :]] for share in SHARES]
            self._shares = max(options, key=likelihood)

    def _predict(
        self, seen: npt.NDArray[np.int64], y: Floats, noise: float, at: npt.NDArray[np.int64]
    ) -> tuple[Floats, Floats]:
        """Return the mean and the deviation at configurations."""
        factor = cho_factor(self._covariance(seen, seen, self._shares) + noise * np.eye(len(seen)), lower=True)
        across = self._covariance(at, seen, self._shares)
        mean = across @ cho_solve(factor, y)
        variance = 1.0 - np.einsum("ij,ji->i", across, cho_solve(factor, across.T))
        return mean, np.sqrt(np.maximum(variance, 1e-9))

    def _covariance(self, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64], shares: Sequence[float]) -> Floats:
        found = np.ones((len(one), len(other)))
        for i, (near, share) in enumerate(zip(self._near, shares, strict=True)):
            found *= share + (1 - share) * near[self._codes[one, i][:, None], self._codes[other, i][None, :]]
        return found


def _nearness(values: Sequence[str]) -> Floats:
    """Return how near the values of an option are, 1 for equal ones. The last row is for configurations without it."""
    count = len(values)
    near = np.eye(count + 1)
    if count > 2 and all(is_number(value) for value in values):
        places = np.arange(count) / (count - 1)
        near[:count, :count] = np.exp(-((places[:, None] - places[None, :]) ** 2) / (2 * WIDTH**2))
    return near
