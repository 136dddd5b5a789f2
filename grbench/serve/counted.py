"""A call of either protocol from its beginning to its end: its metrics, its trace and its line in the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grbench.serve.errors import RefusedError
from grbench.serve.haproxy import OWNER_HEADER

if TYPE_CHECKING:
    from grbench.serve.service import Service

LEFT = 499  # status of a call whose client has left, which has no answer
WHY = {LEFT: "the client has left", 503: "the server has ended"}  # of a call that was cancelled


class Counted:
    """A call that is counted once it ends, however it does. begun: seconds, time.perf_counter.

    headers: of the call. ident: of the call, for its trace and the log.
    """

    def __init__(self, service: Service, headers: Mapping[str, str], ident: str) -> None:
        self.begun = self._computed = time.perf_counter()
        self._service, self._headers, self._ident = service, headers, ident
        self._facts: Mapping[str, Any] = {}

    def __enter__(self) -> Counted:
        metrics = self._service.metrics
        metrics.in_flight += 1
        if owner := self._headers.get(OWNER_HEADER):
            metrics.route(self._service.config.replica, owner)
        return self

    def answered(self, facts: Mapping[str, Any]) -> None:
        """Take what the engine's answer says of itself. What follows is the time of its encoding."""
        self._facts, self._computed = facts, time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        service, ended = self._service, time.perf_counter()
        service.metrics.in_flight -= 1
        status = status_of(error, service)
        strategy = self._facts["strategy"] if status == 200 else ""
        took_s, post_s = ended - self.begun, ended - self._computed
        loop = asyncio.get_running_loop()
        loop.call_soon(service.finished, status, strategy, took_s, post_s)  # once it is sent
        if service.traces is not None:
            facts = {**self._facts, "request_id": self._ident}
            loop.call_soon(service.traces.add, self._headers, took_s, post_s, status, facts)
        why = str(error) if isinstance(error, RefusedError) else "" if error is None else WHY.get(status, "")
        if why or service.config.log_requests:
            log = service.log
            refused = isinstance(error, RefusedError) and status < 500
            say = log.warning if refused else log.error if why else log.info
            say("call", request_id=self._ident, status=status, strategy=strategy, ms=round(took_s * 1e3, 3), error=why)


def status_of(error: BaseException | None, service: Service) -> int:
    """Return the HTTP status by which a call with this end is counted.

    A call is cancelled when its client leaves, or when the server ends.
    """
    if isinstance(error, asyncio.CancelledError):
        return 503 if service.draining else LEFT
    return 200 if error is None else error.status if isinstance(error, RefusedError) else 500
