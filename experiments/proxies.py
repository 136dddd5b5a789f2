"""Measure what stands before replicas adds to a call: HAProxy as `grbench serve` sets it up, and the ways of Ray Serve.

    python experiments/proxies.py --rounds 2000       # needs: pip install 'ray[serve]'; apt-get install haproxy
    python experiments/proxies.py --ingress           # Ray Serve with direct ingress, which is off by default

A call has a body that comes back. `direct` asks uvicorn by HTTP, `haproxy` asks it through HAProxy, and `direct, grpc`
asks a server of grpc.aio. A deployment of Ray Serve is asked through its HTTP proxy, through its gRPC proxy, by a
handle of this process, which needs no proxy, and with --ingress at the ports of its replica. Each has one connection,
and they take turns, so that all have the same neighbours on a shared machine. `added_ms` is the difference of the
medians to the direct way of the same protocol. A handle has none: its protocol is Ray's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import common
import grpc
import numpy as np
import numpy.typing as npt
import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from grbench.execution.records import one_line
from grbench.serve.haproxy import Address, Proxy, configuration
from grbench.serve.options import ServeConfig
from grengines.api import UnavailableError

QUIET = {"enable_access_log": False, "log_level": "ERROR"}  # of Ray Serve: a line a call would be its cost too
WARM_UP = 100  # calls of each before the first that counts
START_S = 60.0
HANDLE = "ray serve, handle"
METHOD = "/ray.serve.UserDefinedService/Method1"  # of the service that Ray Serve brings along for tests
SERVICE = "ray.serve.generated.serve_pb2_grpc.add_UserDefinedServiceServicer_to_server"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request with its body, by ASGI."""
    await Response(await Request(scope, receive).body())(scope, receive, send)


def run_echo(port: int) -> None:
    """Serve `echo` until the process is ended."""
    uvicorn.run(echo, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")


def run_grpc(port: int) -> None:
    """Serve METHOD, whose answer is the message, until the process is ended."""

    async def same(message: bytes, _: Any) -> bytes:
        return message

    async def serve() -> None:
        server = grpc.aio.server()
        _, service, method = METHOD.split("/")
        handlers = {method: grpc.unary_unary_rpc_method_handler(same)}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


class Echo:
    """Deployment of Ray Serve that answers with what it gets, by each way."""

    async def __call__(self, request: Request) -> Response:
        """Answer a request by HTTP."""
        return Response(await request.body())

    async def Method1(self, message: Any) -> Any:  # noqa: N802 - the service has this name
        """Answer a call by gRPC: `greeting` has the text of `name`."""
        return importlib.import_module("ray.serve.generated.serve_pb2").UserDefinedResponse(greeting=message.name)

    async def same(self, body: bytes) -> bytes:
        """Answer a call by a handle."""
        return body


def free_ports(count: int) -> list[int]:
    """Return ports that nothing has."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def http_caller(
    port: int, body: bytes, path: str = "/", headers: Mapping[str, str] = MappingProxyType({"x-user-id": "1"})
) -> Callable[[], bytes]:
    """Return a call over an HTTP connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)

    def call() -> bytes:
        try:
            connection.request("POST", path, body, dict(headers))
            return connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            connection.close()  # the next call opens it again
            raise

    return call


def grpc_caller(port: int, body: bytes) -> Callable[[], bytes]:
    """Return a call over a gRPC channel of its own, whose message has `body` as text; its answer has the same bytes."""
    call = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary(METHOD)
    messages = importlib.import_module("ray.serve.generated.serve_pb2")
    message = messages.UserDefinedMessage(name=body.decode()).SerializeToString()

    def ask() -> bytes:
        answer: bytes = call(message)
        return body if answer == message else answer

    return ask


def started(name: str, call: Callable[[], bytes], body: bytes) -> Callable[[], bytes]:
    """Return a call once it has the right answer, which each later one must have too. Raises UnavailableError."""
    end = time.monotonic() + START_S

    def checked() -> bytes:
        if (found := call()) != body:
            raise RuntimeError(f"answered {found[:80]!r}")
        return found

    while True:
        try:
            checked()
            return checked
        except Exception as e:
            if time.monotonic() > end:
                raise UnavailableError(f"{name}: no right answer within {START_S:g} s: {one_line(e)}") from None
            time.sleep(0.1)


def row_of(way: str, found: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Return the row of a way. found: p50 and p99 in milliseconds, of the ways that answered."""
    p50, p99 = found[way]
    row = {"way": way, "p50_ms": p50, "p99_ms": p99}
    direct = "direct, grpc" if way.endswith("grpc") else "direct"
    return row if way == HANDLE or direct not in found else row | {"added_ms": p50 - found[direct][0]}


def main(words: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = common.parser(__doc__ or "", rounds=2000, overrides=False)
    parser.add_argument("--kb", type=float, default=16.0, help="size of a body, 10^3 bytes (default: %(default)s)")
    parser.add_argument("--ingress", action="store_true", help="turn direct ingress on, and measure it too")
    args = parser.parse_args(words)
    rows = common.Rows(args, __file__, words)
    direct, proxied, stats, direct_grpc, ray_http, ray_grpc, ingress, ingress_grpc = free_ports(8)
    os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = str(int(args.ingress))  # the import reads this and the ports
    for protocol, port in {"HTTP": ingress, "GRPC": ingress_grpc}.items():
        os.environ[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(port)
        os.environ[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(port + 1)
    ray, serve = (importlib.import_module(name) for name in ("ray", "ray.serve"))
    body = np.random.default_rng(0).bytes(int(args.kb * 1e3) // 2).hex().encode()  # gRPC's message takes text only
    with contextlib.ExitStack() as running:
        for target, port in ((run_echo, direct), (run_grpc, direct_grpc)):
            server = multiprocessing.get_context("spawn").Process(target=target, args=(port,), daemon=True)
            server.start()
            running.callback(server.terminate)
        config = ServeConfig(port=proxied, grpc_port=None, stats_port=stats)
        folder = running.enter_context(tempfile.TemporaryDirectory())
        text = configuration(config, [Address(1, "127.0.0.1", direct, None)])
        running.callback(Proxy(Path(folder, "haproxy.cfg"), text).close, 5.0)
        ray.init(include_dashboard=False, logging_level="ERROR")
        running.callback(ray.shutdown)
        serve.start(
            http_options={"host": "127.0.0.1", "port": ray_http},
            grpc_options={"port": ray_grpc, "grpc_servicer_functions": [SERVICE]},
            logging_config=QUIET,
        )
        handle = serve.run(serve.deployment(Echo, logging_config=QUIET).bind(), route_prefix="/")
        running.callback(serve.shutdown)
        ways: dict[str, Callable[[], bytes]] = {
            "direct": http_caller(direct, body),
            "haproxy": http_caller(proxied, body),
            "direct, grpc": grpc_caller(direct_grpc, body),
            "ray serve, http": http_caller(ray_http, body),
            "ray serve, grpc": grpc_caller(ray_grpc, body),
            HANDLE: lambda: handle.same.remote(body).result(),
        }
        if args.ingress:
            ways["ray serve, direct ingress"] = http_caller(ingress, body)
            ways["ray serve, direct ingress, grpc"] = grpc_caller(ingress_grpc, body)
        cases = {}
        for name, call in ways.items():
            try:
                cases[name] = started(name, call, body)
            except UnavailableError as e:
                rows.fail(e, way=name)
        common.interleaved(cases, WARM_UP)
        calls = common.interleaved(cases, args.rounds)
    found = {name: np.percentile([call.ms for call in each], [50, 99]) for name, each in calls.items()}
    for name in found:
        rows.add(calls=args.rounds, **row_of(name, found))
    rows.note(f"Ray {ray.__version__}; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    rows.close()


if __name__ == "__main__":
    common.run(main)
