"""Connections of HTTP: how many there are, and how long one may say nothing."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BEYOND_QUEUE = 256  # connections beyond `serve.max_queue`, so that refusals and health checks get through
KEEP_ALIVE_S = 75  # between two requests
HEADERS_S = 10.0  # from the connection, or from the first byte of a later request, to the end of its headers


class Connection(HttpToolsProtocol):
    """A connection that ends if a request's headers don't come in time. Uvicorn would wait for ever."""

    _timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADERS_S, self.timeout_keep_alive_handler)

    def on_message_begin(self) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(HEADERS_S, self.timeout_keep_alive_handler)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._timer.cancel()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
