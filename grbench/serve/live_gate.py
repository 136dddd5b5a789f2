"""The live gate: a sample of the answers is answered again by the fp32 reference, in the background.

It runs on one thread, and on a GPU on a stream of its own. The reference computes on the engine's device, and one
answer may take it as long as the engine takes for fifty. So it rests after each answer, for a time in proportion to
what the answer took, and a drawn answer that comes meanwhile is left out.
"""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

from grbench.gate.measured import Verdict
from grbench.serve.held import Done
from grbench.serve.metrics import Metrics
from grbench.serve.strategy import Strategy

MOST_WAITING = 4


class LiveGate:
    """Judges a share of the answers, in at most a part `load` of the time.

    Runs on the event loop, the reference on a thread.
    """

    def __init__(self, share: float, load: float, metrics: Metrics) -> None:
        self._share, self._load, self._metrics, self._random = share, load, metrics, random.Random(0)
        self._rests_until = 0.0  # time.perf_counter
        self._thread = ThreadPoolExecutor(1, "live gate")
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, strategy: Strategy, done: Done) -> None:
        """Draw, and judge the answer if it is drawn, unless the reference rests or several answers wait for it."""
        if self._random.random() >= self._share:
            return
        if time.perf_counter() >= self._rests_until and len(self._tasks) < MOST_WAITING:
            task = asyncio.get_running_loop().create_task(self._judge(strategy, done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _judge(self, strategy: Strategy, done: Done) -> None:
        loop = asyncio.get_running_loop()
        try:
            verdict = await loop.run_in_executor(self._thread, self._compare, strategy, done)
        except Exception:  # the reference has no answer to compare with, which is not the engine's fault
            self._metrics.gate_unjudged.labels(strategy.name).inc()
            return
        self._metrics.gate_error.labels(strategy.name).observe(verdict.error / verdict.tolerance)
        if verdict.problem is not None:
            self._metrics.gate_wrong.labels(strategy.name).inc()
            if done.generation == strategy.generation:  # else it has been checked since
                strategy.take_out("wrong", f"live gate: {verdict.problem}")

    def _compare(self, strategy: Strategy, done: Done) -> Verdict:
        """Return the reference's verdict, and rest afterwards. The thread calls it."""
        begun = time.perf_counter()
        try:
            return strategy.checked.judge(done.as_answer())
        finally:
            ended = time.perf_counter()
            self._metrics.gate_seconds.inc(ended - begun)
            self._rests_until = max(ended, self._rests_until) + (ended - begun) * (1 / self._load - 1)

    def close(self) -> None:
        """Drop what waits."""
        for task in self._tasks:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
