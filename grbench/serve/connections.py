"""Connections of HTTP: how many there are, how long one may say nothing, and how much it may say beside a body."""

from __future__ import annotations

import asyncio
import math
import struct
import termios
from fcntl import ioctl
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from grbench.serve.exchange import Exchange, Target

KEEP_ALIVE_S = 75  # between two requests
HEADERS_S = 10.0  # to the end of a request's headers: from the connection, its first byte, or the answer before it
MOST_HEADERS = 65_536  # bytes of a request's headers, or of a body's trailers: the parser holds them however many come
GOODBYE_S = 1.0  # for an idle client to answer the end of its TLS session


class Connection(HttpToolsProtocol):
    """A connection that ends if a request's headers don't come in time. Uvicorn would wait for ever.

    A call whose path the application has a target for (`target`) goes to it without ASGI.
    It has one timer: to set and cancel some for each request took longer than to parse it.
    """

    _in_headers = False  # a request has begun, and its headers are not complete
    _is_beyond = False  # as many connections were open before as there may be
    _bare = 0  # bytes that came since a request began or a part of its body came, but not with it
    _parsed = 0  # bytes of the headers or trailers that the parser has found; `_bare` lacks those that came with others
    _found: tuple[bytes, Target | None] = b"", None  # the newest call's URL, which others have too, and its target
    _answered: Any = None  # the newest request that is being answered or was; others that have come wait for it
    _timer: asyncio.TimerHandle
    _ends: float  # the loop's time at which it is closed, unless something comes before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most, self.limit_concurrency = self.limit_concurrency, None  # uvicorn would refuse the earlier ones too
        self._is_beyond = most is not None and len(self.connections) > most
        self._ends = self.loop.time() + HEADERS_S
        self._look()

    def _look(self) -> None:
        """Close it if it is time to, or look again later."""
        if self.loop.time() >= self._ends:
            self.timeout_keep_alive_handler()
        else:
            self._timer = self.loop.call_later(HEADERS_S / 4, self._look)

    def data_received(self, data: bytes) -> None:
        self._bare += len(data)
        super().data_received(data)
        if self._bare > MOST_HEADERS:
            self._end_too_long()

    def _end_too_long(self) -> None:
        """End a connection whose headers or trailers are too long. There is no answer while another one is due."""
        if self.transport.is_closing():
            return
        if self._in_headers and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(STATUS_LINE[431] + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        """Count bytes of headers or trailers. Raises ValueError, which stops the parser, if they are too long."""
        self._parsed += size
        if self._parsed > MOST_HEADERS:
            self._end_too_long()
            raise ValueError(f"headers of more than {MOST_HEADERS} bytes")

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser does not take, unless that is refused already."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def on_body(self, body: bytes) -> None:
        self._bare = 0
        super().on_body(body)

    def on_message_begin(self) -> None:
        self._in_headers, self._bare, self._parsed = True, 0, 0
        if self.cycle is None or self.cycle.response_complete:
            self._ends = self.loop.time() + HEADERS_S
        else:  # the client has not waited for the answer before, whose end sets the limit
            self.flow.pause_reading()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers, self._parsed = False, 0
        self._ends = math.inf
        before = self.cycle
        if (target := self._target()) is None:
            self.headers = self.headers.copy()  # takes trailers of a chunked body, which are no headers of the request
            super().on_headers_complete()
            if self.expect_100_continue and self.cycle is not before:
                self.cycle.keep_alive = False  # nothing reads the body: the next request might be taken for it
            return
        is_kept = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self.cycle = Exchange(self, target, is_kept)
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:  # the client has not waited for the answer before
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _target(self) -> Target | None:
        """Return the target of a request; None: uvicorn handles the request.

        It passes the request to the application, or opens a WebSocket.
        """
        if self.parser.should_upgrade() and self._should_upgrade():
            return None
        method = self.parser.get_method()
        if method != b"POST" and not self._is_beyond:
            return None
        if self._is_beyond:
            return self.app.last_target(method, _path_of(self.url))  # type: ignore[no-any-return]
        if self.url != self._found[0]:
            self._found = self.url, self.app.target(_path_of(self.url))
        return self._found[1]

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._ends = self.loop.time() + (HEADERS_S if self._in_headers else KEEP_ALIVE_S)

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

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)
        if isinstance(self._answered, Exchange):
            self._answered.leave()


def _path_of(url: bytes) -> str:
    path = httptools.parse_url(url).path.decode("ascii")
    return unquote(path) if "%" in path else path
