"""The Open Inference Protocol over HTTP, with metrics, the page and the reload."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import orjson
from prometheus_client.exposition import choose_encoder
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from grbench import __version__
from grbench.serve import describe
from grbench.serve.describe import EXTENSIONS, PLATFORM, VERSION
from grbench.serve.errors import RefusedError
from grbench.serve.keys import client_of
from grbench.serve.protocol import HEADER_LENGTH, Call, json_length, parse_call, render, shown
from grbench.serve.service import Service

INLINE = 100_000  # bytes of JSON that the event loop reads itself; more would hold other calls up
LAST_REPLICA = "x-grbench-last"  # HAProxy's header: number of the replica that had the user's last call
Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The routes of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._keys = service.config.api_keys
        self._page = files("grbench.serve").joinpath("page.html").read_text(encoding="utf-8")

    def app(self) -> ASGIApp:
        """Return the ASGI application. It takes calls without the router, which compares their paths with patterns."""
        model = "/v2/models/{model}"
        prefixes = (model, f"{model}/versions/{{version}}")
        routes = [
            *(self._route(f"{prefix}/infer", self._infer, "POST") for prefix in prefixes),
            self._route("/v2/health/live", self._live, open_to_all=True),
            self._route("/v2/health/ready", self._ready, open_to_all=True),
            self._route("/v2", self._server),
            self._route("/metrics", self._metrics),
            self._route("/status", self._status),
            self._route("/", self._show, open_to_all=True),
            self._route("/reload", self._reload, "POST"),
            self._route(f"{model}/append", self._append, "POST"),
        ]
        for prefix in prefixes:
            routes += [
                self._route(f"{prefix}/ready", self._model_ready),
                self._route(f"{prefix}/config", self._config),
                self._route(f"{prefix}/stats", self._stats),
                self._route(prefix, self._model),
            ]
        router, infer = Router(routes), self._guarded(self._infer)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            parts = scope["path"].split("/")
            is_post = scope["type"] == "http" and scope["method"] == "POST"  # a WebSocket has no method
            if is_post and len(parts) == 5 and parts[1:3] == ["v2", "models"] and parts[4] == "infer":
                scope["path_params"] = {"model": parts[3]}
                await infer(scope, receive, send)
            else:
                await router(scope, receive, send)

        return app

    def _route(self, path: str, endpoint: Endpoint, method: str = "GET", open_to_all: bool = False) -> Route:
        return Route(path, self._guarded(endpoint, open_to_all), methods=[method])

    def _guarded(self, endpoint: Endpoint, open_to_all: bool = False) -> _Asgi:
        """Return an application whose refusals are one line of JSON, and which needs the key unless it is open."""

        async def guarded(request: Request) -> Response:
            ident = (request.headers.get("x-request-id") or f"{random.getrandbits(128):032x}")[:128]
            request.state.ident = ident
            try:
                self._check_origin(request)
                request.state.client = "" if open_to_all else self._client_of(request)
                return await endpoint(request)
            except RefusedError as e:
                return refusal(e, ident)
            except Exception as e:
                line = " ".join(f"{type(e).__name__}: {e}".split())
                self._service.log.error("defect", request_id=ident, error=line, where=traceback.format_exc())
                return refusal(RefusedError(500, f"a defect of the server; its log has request {ident}"), ident)

        return _Asgi(guarded)

    def _check_origin(self, request: Request) -> None:
        """Refuse what a page of another site sends, directly or under a name that it points here.

        Where a key is needed, such a page lacks the key.
        """
        if self._keys is not None:
            return
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not _is_local(host):
            raise RefusedError(403, f"host: {shown(host)}: allowed are localhost and 127.0.0.1, or set an API key")
        if origin is not None and origin.partition("://")[2] != host:
            raise RefusedError(403, f"origin: {shown(origin)}: pages of other sites may not call; set an API key")

    def _client_of(self, request: Request) -> str:
        return client_of(request.headers.get("authorization", ""), self._keys)

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"ready": self._service.ready}, 200 if self._service.ready else 503)

    async def _server(self, request: Request) -> Response:
        return JSONResponse({"name": PLATFORM, "version": __version__, "extensions": EXTENSIONS})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(describe.model_metadata(self._service, *_names(request)))

    async def _model_ready(self, request: Request) -> Response:
        if self._service.ready:
            describe.model_metadata(self._service, *_names(request))
        return await self._ready(request)

    async def _config(self, request: Request) -> Response:
        return JSONResponse(describe.model_config(self._service, *_names(request)))

    async def _stats(self, request: Request) -> Response:
        return JSONResponse({"model_stats": [describe.model_statistics(self._service, *_names(request))]})

    async def _metrics(self, request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._service.metrics.registry), headers={"content-type": kind})

    async def _status(self, request: Request) -> Response:
        return JSONResponse(describe.status(self._service))

    async def _show(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html")

    async def _reload(self, request: Request) -> Response:
        return JSONResponse({"reload": await self._service.reload()})

    async def _append(self, request: Request) -> Response:
        status = 500
        try:
            answer = self._service.append(await self._call(request), request.path_params["model"])
            status = 200
            return JSONResponse(answer)
        except RefusedError as e:
            status = e.status
            raise
        except ClientDisconnect:
            status = 499
            return Response(status_code=499)
        finally:
            self._service.metrics.appends.labels(str(status)).inc()

    async def _call(self, request: Request) -> Call:
        """Read the call of a request. Raises RefusedError."""
        body, length = await self._body(request), request.headers.get(HEADER_LENGTH)
        text = len(body) if length is None else json_length(length)  # tensors behind it are only looked at
        call = parse_call(body, length) if text <= INLINE else await asyncio.to_thread(parse_call, body, length)
        call.client = request.state.client
        return call

    async def _infer(self, request: Request) -> Response:
        begun, service = time.perf_counter(), self._service
        computed = begun
        parameters: dict[str, Any] = {}
        ident, status, strategy, error = request.state.ident, 500, "", ""
        service.metrics.in_flight.inc()
        if last := request.headers.get(LAST_REPLICA):
            service.metrics.route(service.config.replica, last)
        try:
            call = await self._call(request)
            model, version = _names(request)
            tensors, parameters = await service.infer(call, model, version, begun)
            computed = time.perf_counter()
            body, headers = render(call, model, VERSION, tensors, parameters)
            service.metrics.stages.labels("post").observe(time.perf_counter() - computed)
            status, strategy = 200, parameters["strategy"]
            return Response(body, headers=headers | {"x-request-id": ident})
        except RefusedError as e:
            status, error = e.status, str(e)
            return refusal(e, ident)
        except ClientDisconnect:
            status, error = 499, "the client has left"
            return Response(status_code=499)
        finally:
            service.metrics.in_flight.dec()
            took_s = time.perf_counter() - begun
            loop = asyncio.get_running_loop()
            loop.call_soon(service.finished, status, strategy, took_s)  # once it is sent
            if service.traces is not None:
                post_s, facts = time.perf_counter() - computed, {**parameters, "request_id": ident}
                loop.call_soon(service.traces.add, request.headers, took_s, post_s, status, facts)
            if error or service.config.log_requests:
                say = service.log.error if error else service.log.info
                say("call", request_id=ident, status=status, strategy=strategy, ms=round(took_s * 1e3, 3), error=error)

    async def _body(self, request: Request) -> bytes:
        """Return the body. Raises RefusedError for one that is too large, too slow, or compressed."""
        config = self._service.config
        most = int(config.max_body_mb * 1e6)
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise RefusedError(415, f"content-encoding={encoding}: bodies are taken as they are; leave it out")
        too_large = RefusedError(413, f"body: more than {config.max_body_mb:g} MB (serve.max_body_mb)")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(config.body_timeout_s):
                more = True
                while more:
                    message = await request.receive()  # Starlette's stream would add a generator
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    parts.append(message["body"])
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    more = message["more_body"]
        except TimeoutError:
            raise RefusedError(
                408, f"body: it did not come within {config.body_timeout_s:g} s (serve.body_timeout_s)"
            ) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Asgi:
    """An endpoint without the layers that Starlette puts around functions: they took a fifth of a call's time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._endpoint(Request(scope, receive))
        await response(scope, receive, send)


def _names(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", VERSION)


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    """Return whether the header Host names this machine's own address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refusal(error: RefusedError, ident: str | None = None) -> Response:
    """Return the answer for a refused request."""
    headers = {"x-request-id": ident} if ident else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
        headers["retry-after-ms"] = f"{error.retry_after_s * 1e3:.0f}"
    if error.status in (408, 413):  # the rest of the body would be the next request
        headers["connection"] = "close"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = orjson.dumps({"error": str(error)})
    return Response(body, error.status, headers | {"content-type": "application/json"})
