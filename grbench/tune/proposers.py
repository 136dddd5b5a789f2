"""Rules that pick the configuration to try next. The search reports the score of each, and its failures."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from grbench.tune.outcome import Configuration

Axes = Mapping[str, Sequence[str]]
Cost = Callable[[Configuration], float]  # of the first probe of a configuration, in any unit; inf: it has no room
STARTUP = 8
TRIES = 60  # of Optuna's proposals that are no open configuration, before the first open one is taken


def equal(configuration: Configuration) -> float:
    """Return the same cost for every configuration."""
    return 1.0


class Proposer(Protocol):
    """A rule that picks configurations. Each is picked once."""

    def ask(self, cost: Cost = equal, most_unlike: int = STARTUP) -> Configuration | None:
        """Return the next configuration, or None when every one was picked or has no room.

        most_unlike: as many configurations at most are chosen because they are unlike those before.
        """

    def take(self, configuration: Configuration) -> None:
        """Pick this configuration."""

    def leave_out(self, configuration: Configuration) -> None:
        """Never pick this configuration. It was not measured."""

    def tell(self, configuration: Configuration, score: float | None, violation: float) -> None:
        """Take the result of a configuration.

        score: in steps of the ladder of rates, larger is better; None: it failed. violation: above 0 if a limit is
        broken at any load, by that share.
        """


class Listed:
    """The configurations in a given order: the first ones of a grid, or a random order."""

    def __init__(self, configurations: Sequence[Configuration], seed: int | None = None) -> None:
        self._open = list(configurations)
        if seed is not None:
            random.Random(seed).shuffle(self._open)

    def ask(self, cost: Cost = equal, most_unlike: int = STARTUP) -> Configuration | None:
        return self._open.pop(0) if self._open else None

    def take(self, configuration: Configuration) -> None:
        self._open.remove(configuration)

    def leave_out(self, configuration: Configuration) -> None:
        self.take(configuration)

    def tell(self, configuration: Configuration, score: float | None, violation: float) -> None:
        pass


class FromBest(Listed):
    """A rule that goes on from the best configuration so far."""

    _best: tuple[float, Configuration] | None = None

    def tell(self, configuration: Configuration, score: float | None, violation: float) -> None:
        if score is not None and violation <= 0 and (self._best is None or score > self._best[0]):
            self._best = (score, configuration)


class Neighbours(FromBest):
    """Hill climbing: all configurations within `radius` options and values of the best, then from the next best."""

    def __init__(self, configurations: Sequence[Configuration], axes: Axes, radius: int = 3, seed: int = 0) -> None:
        super().__init__(configurations, seed)
        self._axes, self._radius = axes, radius

    def ask(self, cost: Cost = equal, most_unlike: int = STARTUP) -> Configuration | None:
        if not self._open:
            return None
        if self._best is None:
            return self._open.pop(0)
        best = self._best[1]
        near = [c for c in self._open if self._distance(c, best) <= self._radius]
        chosen = min(near, key=lambda c: self._distance(c, best)) if near else self._open[0]
        self._open.remove(chosen)
        return chosen

    def _distance(self, one: Configuration, other: Configuration) -> int:
        """Return the number of steps along the lists of values that lie between two configurations."""
        total = 0
        for key in one.differs(other):
            mine, its = one.get(key), other.get(key)
            order = sorted(self._axes[key], key=number_first)
            total += abs(order.index(mine) - order.index(its)) if mine is not None and its is not None else 1
        return total


class OneAtATime(FromBest):
    """One option after another: all its values with the others held at the best so far."""

    def __init__(self, configurations: Sequence[Configuration], axes: Axes) -> None:
        super().__init__(configurations)
        self._axes, self._keys = axes, list(axes)

    def ask(self, cost: Cost = equal, most_unlike: int = STARTUP) -> Configuration | None:
        if not self._open:
            return None
        if self._best is None:
            return self._open.pop(0)
        while self._keys:
            for configuration in self._open:
                if set(configuration.differs(self._best[1])) == {self._keys[0]}:
                    self._open.remove(configuration)
                    return configuration
            self._keys.pop(0)
        self._keys = list(self._axes)  # another round, from the best of this one
        near = [c for c in self._open if len(c.differs(self._best[1])) == 1]
        if not near:
            return self._open.pop(0)
        self._open.remove(near[0])
        return near[0]


class OptunaProposer:
    """Optuna's TPE sampler by ask and tell, with the violation of limits as a constraint.

    Options whose values are numbers are ordered, others are categories. An option that a configuration
    lacks is reported with its first value. A proposal that is no open configuration is reported with the score of its
    twin, or as infeasible.
    """

    def __init__(
        self, configurations: Sequence[Configuration], axes: Axes, seed: int = 0, startup: int = STARTUP
    ) -> None:
        """startup: configurations that are drawn at random before the sampler learns."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._axes = {key: sorted(values, key=number_first) for key, values in axes.items() if len(values) > 1}
        self._open = dict.fromkeys(configurations)
        self._by_params = {}
        self._reported: dict[Configuration, tuple[float, float]] = {}
        for configuration in configurations:
            self._by_params[self._key(configuration)] = configuration
        self._worst = 0.0
        self._trials: dict[Configuration, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of these arguments are marked experimental
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, constraints_func=_violation
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._default = configurations[0]

    def ask(self, cost: Cost = equal, most_unlike: int = STARTUP) -> Configuration | None:
        if not self._open:
            return None
        if not self._reported and self._default in self._open:
            self.take(self._default)
            return self._default
        for _ in range(TRIES):
            trial = self._study.ask(self._distributions())
            configuration = self._by_params.get(self._canonical(trial.params))
            if configuration is None:
                self._finish(trial, self._worst, 1.0)
            elif configuration in self._reported:
                self._finish(trial, *self._reported[configuration])
            else:
                del self._open[configuration]
                self._trials[configuration] = trial
                return configuration
        configuration = next(iter(self._open))
        self.take(configuration)
        return configuration

    def take(self, configuration: Configuration) -> None:
        del self._open[configuration]
        self._study.enqueue_trial(self._params(configuration), skip_if_exists=False)
        self._trials[configuration] = self._study.ask(self._distributions())

    def leave_out(self, configuration: Configuration) -> None:
        self.take(configuration)
        self.tell(configuration, None, 1.0)

    def tell(self, configuration: Configuration, score: float | None, violation: float) -> None:
        if score is not None:
            self._worst = min(self._worst, score) if self._reported else score
        known = (self._worst if score is None else score, max(violation, 1.0) if score is None else violation)
        self._reported[configuration] = known
        self._finish(self._trials.pop(configuration), *known)

    def _finish(self, trial: Any, score: float, violation: float) -> None:
        trial.set_user_attr("violation", violation)
        self._study.tell(trial, score)

    def _distributions(self) -> dict[str, Any]:
        of = self._optuna.distributions
        return {
            key: of.IntDistribution(0, len(values) - 1)
            if all(is_number(value) for value in values)
            else of.CategoricalDistribution(values)
            for key, values in self._axes.items()
        }

    def _params(self, configuration: Configuration) -> dict[str, Any]:
        found = {}
        for key, values in self._axes.items():
            value = configuration.get(key)
            value = self._axes[key][0] if value is None else value
            found[key] = values.index(value) if all(is_number(v) for v in values) else value
        return found

    def _key(self, configuration: Configuration) -> tuple[tuple[str, Any], ...]:
        return tuple(self._params(configuration).items())

    def _canonical(self, params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """Return the key of proposed values, with the first value of each option that the configuration lacks."""
        for lacking in self._lacking:
            changed = {k: (self._first(k) if k in lacking else v) for k, v in params.items()}
            key = tuple((k, changed[k]) for k in self._axes)
            found = self._by_params.get(key)
            if found is not None and all(found.get(k) is None for k in lacking):
                return key
        return tuple((k, params[k]) for k in self._axes)

    @property
    def _lacking(self) -> list[frozenset[str]]:
        kinds = {frozenset(k for k in self._axes if c.get(k) is None) for c in self._by_params.values()}
        return sorted(kinds, key=len, reverse=True)

    def _first(self, key: str) -> Any:
        values = self._axes[key]
        return 0 if all(is_number(v) for v in values) else values[0]


def _violation(trial: Any) -> tuple[float]:
    return (float(trial.user_attrs.get("violation", 0.0)),)


def is_number(text: str) -> bool:
    """Return True for a value that is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def number_first(text: str) -> tuple[int, float, str]:
    """Return a key that sorts numbers by size, before other values."""
    return (0, float(text), text) if is_number(text) else (1, 0.0, "")
