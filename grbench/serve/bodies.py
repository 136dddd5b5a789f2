"""The bytes of the bodies that the server holds: one bound for all calls together, of both protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from grbench.serve.errors import RefusedError
from grbench.serve.metrics import Metrics

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Bodies:
    """Bytes of the bodies that are being read, or whose calls are not answered yet.

    most_mb: their bound, 10^6 bytes. Runs on the event loop.
    """

    def __init__(self, most_mb: float, metrics: Metrics) -> None:
        self._most_mb, self._bytes, self._shed = most_mb, 0, metrics.shed
        metrics.body_bytes.set_function(lambda: self._bytes)

    def held(self) -> Held:
        """Return what counts the body of one call."""
        return Held(self)

    def take(self, size: int) -> None:
        """Count bytes. Raises RefusedError if they are too many with those before, and then counts none."""
        if self._bytes + size > self._most_mb * 1e6:
            self._shed.labels("bodies").inc()
            line = f"body: all bodies in the server would have more than {self._most_mb:g} MB (serve.max_bodies_mb)"
            raise RefusedError(503, line, 1.0)  # HAProxy tries another replica
        self._bytes += size

    def release(self, size: int) -> None:
        """Count these bytes no more."""
        self._bytes -= size


class Held:
    """The bytes of one call's body. They count until the block ends."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self._size = bodies, 0

    def reach(self, size: int) -> None:
        """Count a body of this size, of which a part may count already. Raises RefusedError as `Bodies.take`."""
        if size > self._size:
            self._bodies.take(size - self._size)
            self._size = size

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._bodies.release(self._size)


async def on_thread(work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Return the result of work on a body, done on a thread.

    A call that is cancelled meanwhile ends only when the work does: the thread holds the body until then.
    """
    future = asyncio.get_running_loop().run_in_executor(None, partial(work, *args, **kwargs))
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.exception()  # asyncio would log an error that nobody asks for
        raise
    return future.result()
