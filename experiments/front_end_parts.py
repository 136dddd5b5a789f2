"""Measure the processor time of the parts of a call in the server, without a network and without an engine.

    python experiments/front_end_parts.py

Each part runs many times in a row, so its code is in the caches: in a server, where a batch runs between two calls, it
takes two to three times as long.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import uvicorn
import uvloop
from front_end import DEADLINE, http_call, inputs_of, request
from uvicorn.server import ServerState

from grbench.serve.bodies import Bodies
from grbench.serve.connections import Connection
from grbench.serve.exchange import HttpRequest, HttpResponse, Target
from grbench.serve.http import Api
from grbench.serve.metrics import Metrics
from grbench.serve.protocol import parse_call, render
from grbench.serve.requests import Bounds, Reply, decode, encode
from grbench.serve.state import Histories
from grengines.api import Catalogue
from grengines.remote.client import HEADER_LENGTH, body_of, tensors_of

CALLS = 1000
TIMES = {"queue_ms": 0.03, "pack_ms": 0.1, "load_ms": 0.02, "compute_ms": 2.9, "engine_ms": 3.1}
FACTS = {"strategy": "hstu", "reason": "only", **TIMES, "cached_tokens": 0}


class _Silent(asyncio.Transport):
    """A transport that sends nothing. first: what was written first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 8000) if name in ("peername", "sockname") else default

    def write(self, data: Any) -> None:
        self.first = self.first or bytes(data)

    def is_closing(self) -> bool:
        return False

    def resume_reading(self) -> None:
        pass


class _Nothing:
    """An application that answers calls without looking at them."""

    def target(self, path: str) -> Target:
        return Target(self._answer, {})

    async def _answer(self, asked: HttpRequest) -> HttpResponse:
        return HttpResponse(200, b"{}")


def without_engine(infer: Callable[..., Any], metrics: Metrics) -> Any:
    """Return what stands for the service behind the endpoints, with this method `infer`."""
    config = SimpleNamespace(api_keys=None, max_body_mb=16, body_timeout_s=10, log_requests=False)
    nothing = {"traces": None, "serving": lambda *_: None, "finished": lambda *_: None}
    return SimpleNamespace(config=config, metrics=metrics, bodies=Bodies(16, metrics), infer=infer, **nothing)


def took_us(call: Callable[[], object]) -> float:
    """Return the processor time of a call: the least of several rounds."""
    rounds = []
    for _ in range(5):
        begun = time.thread_time()
        for _ in range(CALLS // 5):
            call()
        rounds.append((time.thread_time() - begun) / (CALLS // 5))
    return min(rounds) * 1e6


async def connection_us(app: Any, call: bytes) -> float:
    """Return the processor time of a call that comes over a connection to an application."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", http=Connection,
                            proxy_headers=False, interface="asgi3")  # fmt: skip
    config.load()
    connection = Connection(config=config, server_state=ServerState(), app_state={})
    transport = _Silent()
    connection.connection_made(transport)
    rounds = []
    for _ in range(5):
        begun = time.thread_time()
        for _ in range(CALLS // 5):
            connection.data_received(call)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        rounds.append((time.thread_time() - begun) / (CALLS // 5))
    if not transport.first.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"a call was not answered but refused: {transport.first[:200]!r}")
    return min(rounds) * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the parts."""
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--candidates", type=int, default=32, help="candidates of a call (default: %(default)s)")
    args = parser.parse_args(arguments)
    rows = common.Rows(args, __file__, arguments)
    one = request(candidates=args.candidates)
    tensors = tensors_of([one], rank=True)
    as_json = json.dumps({"inputs": inputs_of(tensors), "parameters": DEADLINE}).encode()
    binary, headers = body_of(tensors, {"binary_data_output": True, **DEADLINE})
    length = headers[HEADER_LENGTH]
    call, states = parse_call(binary, length), Histories(10, 4096)
    bounds = Bounds("rank", Catalogue(10, 1000, 8), 64, 4096, 4096)
    outputs = encode([Reply(np.zeros((args.candidates, 3), np.float32))])
    metrics = Metrics(0.08)

    async def infer(*_: Any) -> tuple[Any, Any]:
        return outputs, FACTS

    sent = http_call(f"/v2/models/{'m'}/infer", "127.0.0.1", binary, headers)
    alone = uvloop.run(connection_us(_Nothing(), sent))
    whole = uvloop.run(connection_us(Api(without_engine(infer, metrics)), sent))
    read, written = took_us(lambda: parse_call(binary, length)), took_us(lambda: render(call, "m", "1", outputs, FACTS))
    for part, us in {
        "connection and httptools": alone,
        "headers, body, answer": whole - alone - read - written,
        "tensors from bytes": read,
        "tensors from JSON": took_us(lambda: parse_call(as_json, None)),
        "checks of values, request": took_us(lambda: decode(call.tensors, bounds, states, 100.0)),
        "bytes of the answer": written,
        "metrics": took_us(lambda: (metrics.observe(1, 1, 1, 1), metrics.ended(200, "hstu", 0.01, 0.001))),
    }.items():
        rows.add(part=part, us=us)
    rows.close()


if __name__ == "__main__":
    common.run(main)
