"""The proposer of the search: a Gaussian process over the options, asked for the most expected improvement.

A space has thousands of configurations at most, so all open ones are weighed each time, and none is proposed twice. The
covariance of two configurations is a product over the options. Equal values count as 1, different ones as the option's
share of what they have in common; of numbers, near ones have more in common. The shares are those of the greatest
likelihood. A second process over failures weighs the improvement by the probability that the configuration runs.
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
from grbench.tune.proposers import Axes, is_number, number_first

Floats = npt.NDArray[np.float64]
SHARES = (0.1, 0.4, 0.7, 0.9, 0.98)  # that values of one option may have in common
WIDTH = 0.35  # of the nearness of numbers, as a share of their list
NOISE = 1.0  # steps of the ladder
FAR = rates.steps(2)  # below the best, from which scores count as equal: else the process explains the worst ones
STARTUP = 6  # configurations before the process is asked; 8 at random had a higher regret on measured grids
PRIOR_SHARE = 0.7  # of each option, until the first likelihood


class Surrogate:
    """A `Proposer`. It takes the default first, then some that are unlike those before and those that failed."""

    def __init__(
        self, configurations: Sequence[Configuration], axes: Axes, seed: int = 0, startup: int = STARTUP
    ) -> None:
        """configurations: the default first. seed: decides between equally unlike ones. startup: how many these are."""
        self._all, self._random, self._startup = list(configurations), random.Random(seed), startup
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

    def ask(self) -> Configuration | None:
        if not self._open:
            return None
        known = len(self._scores) + len(self._failed)
        if self._all[0] in self._open:  # the losses of other models are measured against it
            chosen = self._all[0]
        elif known < self._startup or len(self._scores) < 3:
            chosen = self._most_unlike()
        else:
            chosen = self._most_promising()
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

    def _most_unlike(self) -> Configuration:
        """Return an open configuration of which the ones before say least: of great variance, and likely to run."""
        open_, taken = np.array([self._place[c] for c in self._open]), np.array(sorted(self._taken))
        worth = self._predict(taken, np.zeros(len(taken)), 1e-6, open_)[1] * self._running(open_)
        return self._all[int(self._random.choice(list(open_[worth > worth.max() - 1e-6])))]

    def _most_promising(self) -> Configuration:
        open_ = np.array([self._place[configuration] for configuration in self._open])
        seen = np.array(list(self._scores))
        values = np.array(list(self._scores.values()))
        values = np.maximum(values, values.max() - FAR)
        middle, spread = float(values.mean()), max(float(values.std()), NOISE)
        y, noise = (values - middle) / spread, (NOISE / spread) ** 2
        self._fit(seen, y, noise)
        mean, deviation = self._predict(seen, y, noise, open_)
        best = float(y.max())
        z = (mean - best) / deviation
        improvement = deviation * (z * ndtr(z) + np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
        return self._all[int(open_[int(np.argmax(improvement * self._running(open_)))])]

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
