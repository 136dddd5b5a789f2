"""Connections of HTTP: how many there are, and how long one may say nothing."""

from __future__ import annotations

import asyncio
import struct
import termios
from fcntl import ioctl

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
        """Close an idle connection once its answers are sent, and let another end after its answer.

        TLS waits half a minute for the client's own goodbye, which a client that reads nothing meanwhile never sends.
        """
        if not self.transport.is_closing():
            super().shutdown()
        if self.transport.is_closing() and self.transport.get_extra_info("sslcontext"):
            self.loop.call_later(GOODBYE_S, self._abort_when_sent)

    def _abort_when_sent(self) -> None:
        """Abort when the client has everything. Beside the buffer of TLS there is one of the socket below it."""
        socket = self.transport.get_extra_info("socket")
        if socket is None or socket.fileno() < 0:  # it has ended
            return
        (in_socket,) = struct.unpack("i", ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)))
        if self.transport.get_write_buffer_size() or in_socket:
            self.loop.call_later(GOODBYE_S, self._abort_when_sent)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
