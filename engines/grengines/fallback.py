"""Fallback engines: another engine answers the batches that the first one was not built for.

The configuration names them, `engine.fallback=[hstu]`. Without it such a batch is an error.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from grengines.api import CachingEngine, Tier

if TYPE_CHECKING:
    from grengines.api import Ranker, RankResult, Request


class OutsideError(ValueError):
    """The engine was not built for these requests. The message names them, the engine's limits and a fix."""


class FallbackEngine:
    """An engine with others behind it. Satisfies grengines.api.Ranker and CachingEngine: each has its own cache.

    build: makes an engine by its name. It is called once for each name in `fallback`, at `prepare`. Only an
    OutsideError goes to the next engine: any other error stops the run.
    """

    def __init__(self, first: Ranker, fallback: Sequence[str], build: Callable[[str], Ranker]) -> None:
        self._engines, self._fallback, self._build = [first], list(fallback), build
        self._answered = [0] * (1 + len(fallback))  # requests, for each engine
        self._counting = threading.Lock()

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Prepare every engine. Raises what they raise."""
        self._engines[1:] = [self._build(name) for name in self._fallback]
        for engine in self._engines:
            engine.prepare(sample, max_batch)

    def rank(self, requests: Sequence[Request]) -> RankResult:
        """Return the answer of the first engine that was built for this batch. Raises OutsideError if none was."""
        for i, engine in enumerate(self._engines):
            try:
                result = engine.rank(requests)
            except OutsideError:
                if i == len(self._engines) - 1:
                    raise
                continue
            with self._counting:
                self._answered[i] += len(requests)
            result.details["fallback_requests"] = float(len(requests) if i else 0)
            result.fallback = self._fallback[i - 1] if i else ""
            return result
        raise AssertionError("there is at least one engine")

    def actual(self) -> dict[str, Any]:
        """Return the first engine's facts. `fallback` has those of the others and how many requests each answered."""
        others = zip(self._fallback, self._engines[1:], self._answered[1:], strict=False)
        fallback = {name: engine.actual() | {"answered": n} for name, engine, n in others}
        return self._engines[0].actual() | {"fallback": fallback}

    def reset_cache(self, keep: Tier = Tier.NONE) -> None:
        for engine in self._engines:
            engine.reset_cache(keep)

    def tier_of(self, user: int) -> Tier:
        """Return the fastest memory in which an engine has the user's state."""
        return min((engine.tier_of(user) for engine in self._caching()), default=Tier.NONE)

    def state_bytes(self) -> dict[Tier, int]:
        """Return the bytes that users' states take in all engines together, by tier."""
        taken: Counter[Tier] = Counter()
        for engine in self._caching():
            taken.update(engine.state_bytes())
        return dict(taken)

    def close(self) -> None:
        """Close every engine, whatever one of them raises."""
        with ExitStack() as closing:
            for engine in self._engines:
                closing.callback(engine.close)

    def _caching(self) -> list[CachingEngine]:
        return [engine for engine in self._engines if isinstance(engine, CachingEngine)]


def options_like(schema: type, first: Any) -> Any:
    """Return a fallback engine's default options, with the first engine's device and precision if it allows them."""
    options = schema()
    for name in ("device", "precision"):
        field = next((f for f in dataclasses.fields(schema) if f.name == name), None)
        wanted = getattr(first, name, None)
        if field is not None and wanted in field.metadata["allowed"].get("choices", ()):
            setattr(options, name, wanted)
    return options
