"""Connections of HTTP: how many there are, and how long one may say nothing."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BEYOND_QUEUE = 256  # connections beyond `serve.max_queue`, so that refusals and health checks get through
KEEP_ALIVE_S = 75  # between two requests
HEADERS_S = 10.0  # from the connection, or from the first byte of a later request, to the end of its headers
GOODBYE_S = 1.0  # for an idle client to answer the end of its TLS session


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

    def shutdown(self) -> None:
        """Close an idle connection, and let another end after its answer.

        TLS waits half a minute for the client's own goodbye, which a client that reads nothing meanwhile never sends.
        """
        if not self.transport.is_closing():
            super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(GOODBYE_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
