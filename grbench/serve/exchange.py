"""The exchange of a call and its answer between a connection and the API.

A call with a body does not pass through ASGI. Uvicorn's and Starlette's objects for it took as long as its tensors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

if TYPE_CHECKING:
    from grbench.serve.connections import Connection


class HttpResponse(NamedTuple):
    """An answer to a client: status, body and headers."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


async def no_body(most: int, limit_s: float, came: Callable[[int], None]) -> bytes:
    """Return the body of a request that has none."""
    return b""


@dataclass(slots=True)
class HttpRequest:
    """A request: its headers, in lower case, and the names in its path. ident and client: set by the API."""

    headers: Mapping[str, str]
    names: Mapping[str, str]
    body: Callable[[int, float, Callable[[int], None]], Awaitable[bytes]] = no_body  # as `Exchange.read`
    ident: str = ""
    client: str = ""


Endpoint = Callable[[HttpRequest], Awaitable[HttpResponse]]


class Target(NamedTuple):
    """The endpoint of a call, and the names in its path."""

    endpoint: Endpoint
    names: Mapping[str, str]


def _nothing() -> None:
    """Do nothing."""


class Exchange(RequestResponseCycle):
    """One call of a connection, instead of uvicorn's own."""

    def __init__(self, connection: Connection, target: Target, keep_alive: bool) -> None:
        super().__init__(
            scope=connection.scope,
            transport=connection.transport,
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=connection.expect_100_continue,
            keep_alive=keep_alive,
            on_response=connection.on_response_complete,
        )
        self._target = target
        given = reversed(connection.headers)
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in given}
        self._task: asyncio.Task[None] | None = None  # while it answers

    def leave(self) -> None:
        """Stop answering, because the client has left: what waits for a batch takes no place in it."""
        if self._task is not None:
            self._task.cancel()

    async def run_asgi(self, app: Any) -> None:
        """Answer. Uvicorn calls it once the headers are there; the body may come later."""
        if self.disconnected:
            return
        self._task = asyncio.current_task()
        try:
            answer = await self._target.endpoint(HttpRequest(self._headers, self._target.names, self.read))
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            if not self.disconnected:
                self._write(answer)
        finally:
            if not self.response_complete:  # it is cancelled, or its client has left
                self.transport.close()
            # Else the last call of a connection would keep it until a full collection.
            self.on_response, self._task = _nothing, None

    def _write(self, answer: HttpResponse) -> None:
        lines = [STATUS_LINE[answer.status]]
        for name, value in self.default_headers:
            lines += (name, b": ", value, b"\r\n")
        given = "".join([f"{name}: {value}\r\n" for name, value in answer.headers.items()])
        if answer.headers.get("connection") == "close":
            self.keep_alive = False
        elif not self.keep_alive or (self.waiting_for_100_continue and self.more_body):
            self.keep_alive = False  # else the parser would take the next request for the body
            given += "connection: close\r\n"
        lines += (given.encode("latin-1"), b"content-length: %d\r\n\r\n" % len(answer.body), answer.body)
        self.transport.write(b"".join(lines))
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    async def read(self, most: int, limit_s: float, came: Callable[[int], None]) -> bytes:
        """Return the body, or as much as has come once that is more than `most` bytes.

        came: takes the number of bytes so far, and may refuse them. Raises TimeoutError after the limit.
        """
        if not self.more_body:
            came(len(self.body))
            return bytes(self.body)
        parts: list[bytes] = []
        size = 0
        async with asyncio.timeout(limit_s):
            while True:
                message: Any = await self.receive()
                parts.append(message["body"])
                size += len(parts[-1])
                came(size)
                if size > most or not message["more_body"]:
                    return b"".join(parts)
