"""Blame for a failure: one request of a batch, or the engine. Runs on the threads of the batcher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from grbench.gate.form import Form
from grengines.api import BatchResult, Cached, ContinuousEngine, Request
from grengines.numerics import IncorrectError

LOST = ("CUDA error", "AcceleratorError", "device-side assert", "NVML", "CUDA failure")  # the last: ONNX Runtime


@dataclass
class Mixed(BatchResult):
    """A batch in which some requests have an error instead of an answer.

    is_sure: the engine has answered a request that is known to be good, so it is not to blame.
    """

    scores: list[Any]
    items: list[Any]
    errors: list[Exception | None]
    is_sure: bool


class Guarded:
    """An engine with continuous batching that is watched while it works. Satisfies grengines.api.ContinuousEngine."""

    def __init__(self, engine: ContinuousEngine, guarding: Callable[[], AbstractContextManager[None]]) -> None:
        self._engine, self._guarding = engine, guarding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def admit(self, key: int, request: Request) -> None:
        """Begin one request. Raises ValueError for one that can never fit, which is not the engine's failure."""
        refused = None
        with self._guarding():
            try:
                self._engine.admit(key, request)
            except ValueError as e:
                refused = e
        if refused is not None:
            raise refused

    def step(self) -> Any:
        """Advance all requests by one step."""
        with self._guarding():
            return self._engine.step()


def one_by_one(answer: Callable[[Sequence[Request]], Any], requests: Sequence[Request]) -> BatchResult:
    """Answer each request alone. Those that fail have an error instead of an answer. Raises if the device is lost."""
    results: list[Any] = []
    errors: list[Exception | None] = []
    for request in requests:
        try:
            results.append(answer([request]))
            errors.append(None)
        except Exception as e:
            if device_is_lost(e):
                raise
            results.append(None)
            errors.append(e)
    good = [r for r in results if r is not None]
    totals = {f.name: sum(getattr(r, f.name) for r in good) for f in _summed()}
    return Mixed(
        **totals,
        scores=[r and r.scores[0] for r in results],
        items=[r.items[0] if r else None for r in results] if good and hasattr(good[0], "items") else [],
        cached=[r.cached[0] if r and r.cached else Cached() for r in results],
        fallback=good[0].fallback if good else "",
        errors=errors,
        is_sure=True,
    )


def judged_alone(form: Form, requests: Sequence[Request], result: Any) -> BatchResult:
    """Return the answers of a step. Those whose form is wrong have an error instead."""
    if form.problem(requests, result) is None:
        return result  # type: ignore[no-any-return]
    errors: list[Exception | None] = []
    for i, request in enumerate(requests):
        alone = dataclasses.replace(result, scores=[result.scores[i]], items=[result.items[i]])
        problem = form.problem([request], alone)
        errors.append(IncorrectError(problem) if problem else None)
    values = {f.name: getattr(result, f.name) for f in dataclasses.fields(BatchResult)}
    return Mixed(**values, scores=result.scores, items=result.items, errors=errors, is_sure=False)


def _summed() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(BatchResult) if f.default in (dataclasses.MISSING, 0.0)
            and f.default_factory is dataclasses.MISSING]  # fmt: skip


def device_is_lost(error: BaseException) -> bool:
    """Return whether an error means that the process can't use its GPU any more."""
    text = f"{type(error).__name__} {error}"
    return any(words in text for words in LOST) and "out of memory" not in text
