"""Measure what a proxy before replicas adds to a call: HAProxy as `grbench serve` sets it up, and Ray Serve's.

    python experiments/proxies.py --rounds 2000       # needs: pip install 'ray[serve]'; apt-get install haproxy

A call is a POST whose body comes back. `direct` asks uvicorn, `haproxy` asks it through HAProxy, and `ray serve` asks a
deployment of Ray Serve through its HTTP proxy. Each has one connection, and they take turns, so that all have the same
neighbours on a shared machine. `added_ms` is the difference of the medians to `direct`.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import uvicorn
from starlette.requests import Request
from starlette.responses import Response

from grbench.serve.haproxy import Address, Proxy, configuration
from grbench.serve.options import ServeConfig

QUIET = {"enable_access_log": False, "log_level": "ERROR"}  # of Ray Serve: a line a call would be its cost too
WARM_UP = 100  # calls of each before the first that counts
START_S = 60.0


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer a request with its body, by ASGI."""
    await Response(await Request(scope, receive).body())(scope, receive, send)


def run_echo(port: int) -> None:
    """Serve `echo` until the process is ended."""
    uvicorn.run(echo, host="127.0.0.1", port=port, log_level="warning", access_log=False, lifespan="off")


class Echo:
    """Deployment of Ray Serve that does what `echo` does."""

    async def __call__(self, request: Request) -> Response:
        """Answer a request with its body."""
        return Response(await request.body())


def free_ports(count: int) -> list[int]:
    """Return ports that nothing has."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def caller(port: int, body: bytes) -> Callable[[], None]:
    """Return a call over a connection of its own. It waits until the server answers. Raises TimeoutError."""
    connection, end = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S), time.monotonic() + START_S

    def call() -> None:
        connection.request("POST", "/", body, {"x-user-id": "1"})
        answer = connection.getresponse()
        if (found := answer.read()) != body:
            raise RuntimeError(f"port {port} answered {answer.status}: {found[:80]!r}")

    while True:
        try:
            call()
            return call
        except (OSError, RuntimeError, http.client.HTTPException) as e:
            connection.close()
            if time.monotonic() > end:
                raise TimeoutError(f"port {port}: no right answer within {START_S:g} s: {e}") from None
            time.sleep(0.1)


def main(words: Sequence[str] | None = None) -> None:
    """Measure."""
    parser = common.parser(__doc__ or "", rounds=2000, overrides=False)
    parser.add_argument("--kb", type=float, default=16.0, help="size of a body, 10^3 bytes (default: %(default)s)")
    args = parser.parse_args(words)
    rows = common.Rows(args, __file__, words)
    ray, serve = (importlib.import_module(name) for name in ("ray", "ray.serve"))
    direct, proxied, stats, ray_port = free_ports(4)
    body = np.random.default_rng(0).bytes(int(args.kb * 1e3))
    with contextlib.ExitStack() as running:
        server = multiprocessing.get_context("spawn").Process(target=run_echo, args=(direct,), daemon=True)
        server.start()
        running.callback(server.terminate)
        config = ServeConfig(port=proxied, grpc_port=None, stats_port=stats)
        folder = running.enter_context(tempfile.TemporaryDirectory())
        text = configuration(config, [Address(1, "127.0.0.1", direct, None)])
        running.callback(Proxy(Path(folder, "haproxy.cfg"), text).close, 5.0)
        ray.init(include_dashboard=False, logging_level="ERROR")
        running.callback(ray.shutdown)
        serve.start(http_options={"host": "127.0.0.1", "port": ray_port}, logging_config=QUIET)
        serve.run(serve.deployment(Echo, logging_config=QUIET).bind(), route_prefix="/")
        running.callback(serve.shutdown)
        ports = {"direct": direct, "haproxy": proxied, "ray serve": ray_port}
        cases = {name: caller(port, body) for name, port in ports.items()}
        common.interleaved(cases, WARM_UP)
        calls = common.interleaved(cases, args.rounds)
    found = {name: np.percentile([call.ms for call in each], [50, 99]) for name, each in calls.items()}
    for name, (p50, p99) in found.items():
        rows.add(way=name, calls=args.rounds, p50_ms=p50, p99_ms=p99, added_ms=p50 - found["direct"][0])
    rows.close()


if __name__ == "__main__":
    common.run(main)
