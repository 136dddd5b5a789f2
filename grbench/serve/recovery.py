"""The way back of a strategy that went out: its engine is checked after a pause, then rebuilt, until it passes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from grbench.serve.checked import CheckedEngine
from grbench.serve.costs import Costs

FIRST_PAUSE_S, MOST_PAUSE_S = 1.0, 60.0  # before a strategy that went out is tried again
CALM_S = 60.0  # in service without a failure, after which the first pause is short again


class Recovery:
    """Brings one engine back. Runs on the event loop, the engine's part on a thread.

    back: called when the engine has passed, with its new costs if it was rebuilt. still_out: called with what failed,
    and whether that was the rebuilt engine.
    """

    def __init__(
        self, checked: CheckedEngine, back: Callable[[Costs | None], None], still_out: Callable[[Exception, bool], None]
    ) -> None:
        self._checked, self._back, self._still_out = checked, back, still_out
        self.has_failed = False  # a try, since the engine went out
        self._pause_s = FIRST_PAUSE_S
        self._begun = 0.0  # of the try, time.perf_counter
        self._task: asyncio.Task[None] | None = None
        self._trying: asyncio.Future[Costs | None] | None = None  # a check or a rebuild, on a thread

    def begin(self, served_s: float, is_free: Callable[[], bool]) -> None:
        """Begin after a failure.

        served_s: time in service before. is_free: returns False while a thread is still in the engine.
        """
        if served_s >= CALM_S:
            self._pause_s = FIRST_PAUSE_S
        self.has_failed = False
        self._task = asyncio.get_running_loop().create_task(self._recover(is_free))

    def stop(self) -> None:
        """Begin no further try."""
        if self._task is not None:
            self._task.cancel()

    @property
    def trying_s(self) -> float:
        """The time that the present try has taken so far; 0: there is none."""
        is_trying = self._trying is not None and not self._trying.done()
        return time.perf_counter() - self._begun if is_trying else 0.0

    async def has_ended(self, limit_s: float) -> bool:
        """Wait for a try that goes on, after `stop`. Returns True if it has ended within the limit."""
        if self._trying is not None:
            await asyncio.wait([self._trying], timeout=limit_s)
        return self._trying is None or self._trying.done()

    async def _recover(self, is_free: Callable[[], bool]) -> None:
        """Check the engine after a pause; from the second time on, rebuild it. The pause doubles each time."""
        rebuild = False
        while True:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, MOST_PAUSE_S)
            if not is_free():
                continue
            loop = asyncio.get_running_loop()
            self._begun = time.perf_counter()
            self._trying = loop.run_in_executor(None, self._checked.rebuild if rebuild else self._checked.check)
            try:
                self._back(await asyncio.shield(self._trying))
                return
            except Exception as e:
                self.has_failed = True
                self._still_out(e, rebuild)
                rebuild = True
