"""The live gate: a sample of the answers is answered again by the fp32 reference, in the background.

It runs on one thread. An answer that comes while several wait is left out, so the check never holds requests up.
"""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

from grbench.serve.held import Done
from grbench.serve.metrics import Metrics
from grbench.serve.strategy import Strategy

MOST_WAITING = 4


class LiveGate:
    """Judges a share of the answers. Runs on the event loop, the reference on a thread."""

    def __init__(self, share: float, metrics: Metrics, seed: int = 0) -> None:
        self._share, self._metrics, self._random = share, metrics, random.Random(seed)
        self._thread = ThreadPoolExecutor(1, "live gate")
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, strategy: Strategy, done: Done) -> None:
        """Draw, and judge the answer if it is drawn."""
        if self._random.random() < self._share and len(self._tasks) < MOST_WAITING:
            task = asyncio.get_running_loop().create_task(self._judge(strategy, done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _judge(self, strategy: Strategy, done: Done) -> None:
        loop = asyncio.get_running_loop()
        try:
            [verdict] = await loop.run_in_executor(self._thread, strategy.checked.gate.judge, [done.as_answer()])
        except Exception:  # the reference has no answer to compare with, which is not the engine's fault
            self._metrics.gate_unjudged.labels(strategy.name).inc()
            return
        self._metrics.gate_error.labels(strategy.name).observe(verdict.error / verdict.tolerance)
        if verdict.problem is not None:
            self._metrics.gate_wrong.labels(strategy.name).inc()
            if done.generation == strategy.generation:  # else it has been checked since
                strategy.take_out("wrong", f"live gate: {verdict.problem}")

    def close(self) -> None:
        """Drop what waits."""
        for task in self._tasks:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
