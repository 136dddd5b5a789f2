"""A chain of engines: what the first can't answer, because it was not built for it, the next one does.

Only where the configuration names the chain (`engine.fallback=[hstu]`); without it the error stands.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grengines.api import Ranker, RankResult, Request


class OutsideError(ValueError):
    """These requests are none that the engine was built for: which, what it was built for, what mends it."""


class FallbackEngine:
    """The first engine, and those that `fallback` names. Satisfies grengines.api.Ranker.

    build: makes the engine of a name; it is called once for each, at `prepare`. Only OutsideError goes on to the next
    engine: one that is unavailable, or wrong, stops the run as it would alone.
    """

    def __init__(self, first: Ranker, fallback: Sequence[str], build: Callable[[str], Ranker]) -> None:
        self._engines, self._fallback, self._build = [first], list(fallback), build
        self._answered = [0] * (1 + len(fallback))  # requests, by each engine
        self._counting = threading.Lock()

    def prepare(self, sample: Sequence[Request], max_batch: int) -> None:
        """Prepare every engine of the chain. Raises what they raise."""
        self._engines[1:] = [self._build(name) for name in self._fallback]
        for engine in self._engines:
            engine.prepare(sample, max_batch)

    def rank(self, requests: Sequence[Request]) -> RankResult:
        """The answer of the first engine that was built for this batch. Raises OutsideError where none was."""
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
            return result
        raise AssertionError("a chain has an engine")

    def actual(self) -> dict[str, Any]:
        """What the first engine says, and of the others under `fallback` what they say and how many requests each
        answered."""
        others = zip(self._fallback, self._engines[1:], self._answered[1:], strict=False)
        fallback = {name: engine.actual() | {"answered": n} for name, engine, n in others}
        return self._engines[0].actual() | {"fallback": fallback}

    def reset_cache(self, keep_host: bool = False) -> None:
        for engine in self._engines:
            engine.reset_cache(keep_host)

    def close(self) -> None:
        for engine in self._engines:
            engine.close()


def options_like(schema: type, first: Any) -> Any:
    """The options of a fallback engine: its defaults, on the first engine's device and in its precision where the
    engine has that."""
    options = schema()
    for name in ("device", "precision"):
        field = next((f for f in dataclasses.fields(schema) if f.name == name), None)
        wanted = getattr(first, name, None)
        if field is not None and wanted in field.metadata["allowed"].get("choices", ()):
            setattr(options, name, wanted)
    return options
