"""The Open Inference Protocol over HTTP, with metrics, the page and the reload."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import random
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import orjson
from prometheus_client.exposition import choose_encoder
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from grbench import __version__
from grbench.execution.gpu import sample_gpu
from grbench.serve import describe
from grbench.serve.bodies import Held, on_thread
from grbench.serve.counted import Counted, status_of
from grbench.serve.describe import EXTENSIONS, PLATFORM, VERSION
from grbench.serve.errors import RefusedError
from grbench.serve.exchange import Endpoint, HttpRequest, HttpResponse, Target
from grbench.serve.keys import client_of
from grbench.serve.protocol import HEADER_LENGTH, INLINE, Call, json_length, parse_call, render, shown
from grbench.serve.service import Service

JSON = {"content-type": "application/json"}


class Api:
    """The endpoints of one server. Calls come from `Connection`, and requests without a body by ASGI."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._keys = service.config.api_keys
        self._page = files("grbench.serve").joinpath("page.html").read_bytes()
        self._calls = {"infer": self._guarded(self._infer), "append": self._guarded(self._append)}
        self._health = {
            "/v2/health/live": self._guarded(self._live, open_to_all=True),
            "/v2/health/ready": self._guarded(self._ready, open_to_all=True),
        }
        model = "/v2/models/{model}"
        routes = [
            *(Route(path, _Asgi(endpoint), methods=["GET"]) for path, endpoint in self._health.items()),
            self._route("/v2", self._server),
            self._route("/metrics", self._metrics),
            self._route("/status", self._status),
            self._route("/", self._show, open_to_all=True),
            self._route("/reload", self._reload, "POST"),
        ]
        for prefix in (model, f"{model}/versions/{{version}}"):
            routes += [
                # `target` finds these for POST. The routes answer 405 to other methods.
                self._route(f"{prefix}/infer", self._infer, "POST"),
                self._route(f"{prefix}/append", self._append, "POST"),
                self._route(f"{prefix}/ready", self._model_ready),
                self._route(f"{prefix}/config", self._config),
                self._route(f"{prefix}/stats", self._stats),
                self._route(prefix, self._model),
            ]
        self._router = Router(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that has no body, by ASGI."""
        await self._router(scope, receive, send)

    def target(self, path: str) -> Target | None:
        """Return what answers a call at this path; None: it is no call."""
        parts = path.split("/")
        if len(parts) not in (5, 7) or parts[:3] != ["", "v2", "models"]:
            return None
        endpoint = self._calls.get(parts[-1])
        if endpoint is None or (len(parts) == 7 and parts[4] != "versions"):
            return None
        return Target(endpoint, {"model": parts[3], "version": parts[5] if len(parts) == 7 else VERSION})

    def last_target(self, method: bytes, path: str) -> Target:
        """Return what answers a request of a connection beyond those that may be open, which then ends.

        It refuses whatever is no health check.
        """
        answering = self._health.get(path, self._refuse) if method == b"GET" else self._refuse

        async def last(asked: HttpRequest) -> HttpResponse:
            answer = await answering(asked)
            return answer._replace(headers={**answer.headers, "connection": "close"})

        return Target(last, {})

    async def _refuse(self, asked: HttpRequest) -> HttpResponse:
        self._service.metrics.shed.labels("connections").inc()
        most, queue = self._service.config.most_connections, self._service.config.max_queue
        line = f"{most} connections are open already (serve.max_queue={queue} and {most - queue} more)"
        return refusal(RefusedError(503, line, 1.0), _ident(asked))  # HAProxy tries another replica

    def _route(self, path: str, endpoint: Endpoint, method: str = "GET", open_to_all: bool = False) -> Route:
        return Route(path, _Asgi(self._guarded(endpoint, open_to_all)), methods=[method])

    def _guarded(self, endpoint: Endpoint, open_to_all: bool = False) -> Endpoint:
        """Return an endpoint whose refusals are one line of JSON, and which needs the key unless it is open."""

        async def guarded(asked: HttpRequest) -> HttpResponse:
            asked.ident = ident = _ident(asked)
            try:
                self._check_origin(asked)
                asked.client = "" if open_to_all else client_of(asked.headers.get("authorization", ""), self._keys)
                return await endpoint(asked)
            except RefusedError as e:
                return refusal(e, ident)
            except Exception as e:
                line = " ".join(f"{type(e).__name__}: {e}".split())
                self._service.log.error("defect", request_id=ident, error=line, where=traceback.format_exc())
                return refusal(RefusedError(500, f"a defect of the server; its log has request {ident}"), ident)

        return guarded

    def _check_origin(self, asked: HttpRequest) -> None:
        """Refuse what a page of another site sends, directly or under a name that it points here.

        Where a key is needed, such a page lacks the key.
        """
        if self._keys is not None:
            return
        host, origin = asked.headers.get("host", ""), asked.headers.get("origin")
        if not _is_local(host):
            raise RefusedError(403, f"host: {shown(host)}: allowed are localhost and 127.0.0.1, or set an API key")
        if origin is not None and origin.partition("://")[2] != host:
            raise RefusedError(403, f"origin: {shown(origin)}: pages of other sites may not call; set an API key")

    async def _live(self, asked: HttpRequest) -> HttpResponse:
        return _json({"live": True})

    async def _ready(self, asked: HttpRequest) -> HttpResponse:
        return _json({"ready": self._service.ready}, 200 if self._service.ready else 503)

    async def _server(self, asked: HttpRequest) -> HttpResponse:
        return _json({"name": PLATFORM, "version": __version__, "extensions": EXTENSIONS})

    async def _model(self, asked: HttpRequest) -> HttpResponse:
        return _json(describe.model_metadata(self._service, *_names(asked)))

    async def _model_ready(self, asked: HttpRequest) -> HttpResponse:
        if self._service.ready:
            describe.model_metadata(self._service, *_names(asked))
        return await self._ready(asked)

    async def _config(self, asked: HttpRequest) -> HttpResponse:
        return _json(describe.model_config(self._service, *_names(asked)))

    async def _stats(self, asked: HttpRequest) -> HttpResponse:
        return _json({"model_stats": [describe.model_statistics(self._service, *_names(asked))]})

    async def _metrics(self, asked: HttpRequest) -> HttpResponse:
        encode, kind = choose_encoder(asked.headers.get("accept", ""))
        metrics = self._service.metrics
        metrics.gpu = await asyncio.to_thread(sample_gpu)  # NVML may take milliseconds
        return HttpResponse(200, encode(metrics.registry), {"content-type": kind})

    async def _status(self, asked: HttpRequest) -> HttpResponse:
        return _json(describe.status(self._service))

    async def _show(self, asked: HttpRequest) -> HttpResponse:
        return HttpResponse(200, self._page, {"content-type": "text/html; charset=utf-8"})

    async def _reload(self, asked: HttpRequest) -> HttpResponse:
        return _json({"reload": await self._service.reload()})

    async def _append(self, asked: HttpRequest) -> HttpResponse:
        service = self._service
        try:
            with service.bodies.held() as held:
                answer = _json(service.append(await self._call(asked, held), *_names(asked)))
        except BaseException as e:
            service.metrics.appends.labels(str(status_of(e, service))).inc()
            raise
        service.metrics.appends.labels("200").inc()
        return answer

    async def _call(self, asked: HttpRequest, held: Held) -> Call:
        """Read the call of a request. held: counts its body. Raises RefusedError."""
        body, length = await self._body(asked, held), asked.headers.get(HEADER_LENGTH)
        self._service.serving(*_names(asked))  # a wrong name counts before a wrong body
        came = time.perf_counter()  # the time in which a client sends the body is no wait for company
        text = len(body) if length is None else json_length(length)  # tensors behind it are only looked at
        call = parse_call(body, length) if text <= INLINE else await on_thread(parse_call, body, length)
        call.client, call.came = asked.client, came
        return call

    async def _infer(self, asked: HttpRequest) -> HttpResponse:
        with Counted(self._service, asked.headers, asked.ident) as counted, self._service.bodies.held() as held:
            call = await self._call(asked, held)
            model, version = _names(asked)
            tensors, parameters = await self._service.infer(call, model, version, counted.begun)
            counted.answered(parameters)
            body, headers = render(call, model, VERSION, tensors, parameters)
            headers["x-request-id"] = asked.ident
            return HttpResponse(200, body, headers)

    async def _body(self, asked: HttpRequest, held: Held) -> bytes:
        """Return the body. Raises RefusedError for one that is too large, slow, compressed, or one too many.

        The length that a client gives counts at once, so that a body that begins to come is not refused half-way.
        Without one the bytes count as they come. The connection drops what still comes of a refused body.
        """
        config = self._service.config
        most = int(config.max_body_mb * 1e6)
        if (encoding := asked.headers.get("content-encoding", "identity")) != "identity":
            raise RefusedError(415, f"content-encoding={encoding}: bodies are taken as they are; leave it out")
        length, body = asked.headers.get("content-length", "0"), b""
        is_large = not length.isdigit() or int(length) > most
        if not is_large:
            held.reach(int(length))
            try:
                # One that is too large gets 413, and not the status of one too many.
                body = await asked.body(most, config.body_timeout_s, lambda size: held.reach(min(size, most)))
            except TimeoutError:
                raise RefusedError(
                    408, f"body: it did not come within {config.body_timeout_s:g} s (serve.body_timeout_s)"
                ) from None
        if is_large or len(body) > most:
            raise RefusedError(413, f"body: more than {config.max_body_mb:g} MB (serve.max_body_mb)")
        return body


class _Asgi:
    """An endpoint as an application of ASGI."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._endpoint(HttpRequest(Headers(scope=scope), scope["path_params"]))
        await Response(answer.body, answer.status, answer.headers)(scope, receive, send)


def _ident(asked: HttpRequest) -> str:
    """Return the id that the client gave a request, or a new one."""
    return (asked.headers.get("x-request-id") or f"{random.getrandbits(128):032x}")[:128]


def _names(asked: HttpRequest) -> tuple[str, str]:
    return asked.names["model"], asked.names.get("version", VERSION)


def _json(content: Mapping[str, Any], status: int = 200) -> HttpResponse:
    return HttpResponse(status, orjson.dumps(content), JSON)


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    """Return whether the header Host names this machine's own address."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refusal(error: RefusedError, ident: str) -> HttpResponse:
    """Return the answer for a refused request."""
    headers = {**JSON, "x-request-id": ident}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
        headers["retry-after-ms"] = f"{error.retry_after_s * 1e3:.0f}"
    if error.status in (408, 413):  # else the rest of the body, of any size or never to end, would be read and dropped
        headers["connection"] = "close"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return HttpResponse(error.status, orjson.dumps({"error": str(error)}), headers)
