"""The memory of a server: what it keeps of users, calls and reloads has a bound."""

from __future__ import annotations

import gc
import json
import socket
import threading
import time
import types
from collections import deque
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as tritongrpc
from helpers.serving import TINY, Serving, as_json, serving, tensors_of, tiny_trace, wait_until

from grbench.serve import http, server
from grbench.serve import service as services
from grbench.serve import strategy as strategies
from grengines.cache import policies

FEW, CALLS = 8, 60
SHARED = types.ModuleType | type | types.CodeType | types.FrameType  # they lead to all objects of the process


def containers(root: object) -> list[tuple[Any, int]]:
    """The containers that an object leads to, each with its length. Of a function it follows what it is bound to."""
    seen, left, found = {id(root)}, [root], []
    while left:
        one = left.pop()
        if isinstance(one, dict | list | set | deque):
            found.append((one, len(one)))
        bound = isinstance(one, types.FunctionType)
        others = [one.__closure__, one.__defaults__, one.__kwdefaults__] if bound else gc.get_referents(one)
        for other in others:
            if id(other) not in seen and not isinstance(other, SHARED):
                seen.add(id(other))
                left.append(other)
    return found


def call_as(running: Serving, first: int) -> None:
    """Call as users that nobody has seen: ranks and appends that are answered, and calls that are refused."""
    for user in range(first, first + CALLS):
        tokens = np.arange(user, user + 10) % 500
        call = {"USER_IDS": np.array([user]), "TOKEN_LENGTHS": np.array([10]), "TOKENS": tokens}
        assert running.infer(call | {"NUM_CANDIDATES": np.array([4])})[0] == 200
        assert running.infer(call | {"NUM_CANDIDATES": np.array([11])})[0] == 400
        events = [{"name": "TOKENS", "datatype": "INT64", "shape": [10], "data": tokens.tolist()}]
        append = {"inputs": events, "parameters": {"user_id": user, "version": 0}}
        assert running.call(f"/v2/models/{running.model}/append", append)[0] == 200
        assert running.call(f"/v2/models/other_{user}/infer", {"inputs": events})[0] == 404


def test_users_and_calls_leave_nothing_beyond_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each user is new, and the reference judges each answer. A container without a bound would grow by each."""
    made: list[services.Service] = []

    class Seen(services.Service):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            made.append(self)

    monkeypatch.setattr(server, "Service", Seen)
    monkeypatch.setattr(strategies, "KNOWN_USERS", FEW)
    monkeypatch.setattr(services, "KEPT_LATENCIES", FEW)
    monkeypatch.setattr(policies.WhileItPays.__init__, "__defaults__", (FEW,))  # remembered users, of a million
    words = [
        "cache=lru",
        "cache.memory_gb=0.002",
        f"serve.state_users={FEW}",
        "serve.gate_share=1",
        "serve.gate_load=1",
    ]
    with serving("engine=hstu", *TINY, *words) as running:
        call_as(running, 1000)
        before = containers(made[0])
        call_as(running, 1000 + CALLS)
        judged = running.metric("grbench_gate_error_count")
    grown = [str(one)[:200] for one, length in before if len(one) >= length + CALLS / 4]
    assert not grown, f"{CALLS} users and calls more left these longer"
    assert judged > CALLS / 2, "the reference has judged few answers, so this says nothing about what it keeps"
    assert len(before) > 500, "it has looked at few containers"


def head(size: int | None) -> bytes:
    """The headers of a call whose body has this size. None: its client does not say."""
    length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
    return f"POST /v2/models/hstu_tiny/infer HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode()


def padded(size: int) -> bytes:
    """A call whose body has this size."""
    inputs = as_json(tensors_of(tiny_trace()[1].requests[:1]))
    return json.dumps({"inputs": inputs}).encode().ljust(size)


def held(running: Serving) -> float:
    return running.metric("grbench_body_bytes")


@pytest.mark.parametrize(
    "half", [head(90_000) + b"{", head(None) + b"15f90\r\n" + b" " * 90_000], ids=["length", "none"]
)
def test_bodies_have_one_bound_together(half: bytes) -> None:
    """Two halves fill it. A third call is refused until the clients of the halves have left."""
    words = ["serve.max_body_mb=0.1", "serve.max_bodies_mb=0.2", "serve.body_timeout_s=60"]
    with serving("engine=hstu", *TINY, *words) as running, ExitStack() as stack:
        halves = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port))) for _ in range(2)]
        for one in halves:
            one.sendall(half)
        wait_until(lambda: held(running) == 180_000)
        third = stack.enter_context(closing(HTTPConnection("127.0.0.1", running.port)))
        triton = stack.enter_context(tritongrpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}"))
        large = tritongrpc.InferInput("TOKENS", [3000], "INT64")
        large.set_data_from_numpy(np.zeros(3000, np.int64))

        def third_call(size: int) -> tuple[int, Any, Any]:
            third.request("POST", "/v2/models/hstu_tiny/infer", padded(size))
            answer = third.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers

        line = "body: all bodies in the server would have more than 0.2 MB (serve.max_bodies_mb)"
        status, answer, headers = third_call(30_000)
        assert (status, answer, headers["retry-after"]) == (503, {"error": line}, "1")
        assert third_call(0)[0] == 200  # a small one fits, on the same connection
        with pytest.raises(tritongrpc.InferenceServerException, match=r"UNAVAILABLE.*serve\.max_bodies_mb"):
            triton.infer("hstu_tiny", [large])
        assert running.metric("grbench_shed_total", reason="bodies") == 2
        assert running.metric("grbench_requests_total", status="503") == 2
        for one in halves:
            one.close()
        wait_until(lambda: held(running) == 0)
        assert third_call(90_000)[0] == 200
        with pytest.raises(tritongrpc.InferenceServerException, match="INVALID_ARGUMENT"):
            triton.infer("hstu_tiny", [large])
        assert held(running) == 0


def test_a_body_that_is_too_large_is_not_one_too_many() -> None:
    """It would be refused in an idle server too, so that a client is not to send it again."""
    words = ["serve.max_body_mb=0.1", "serve.max_bodies_mb=0.1", "serve.grpc_port=null"]
    with serving("engine=hstu", *TINY, *words) as running:
        for size in (100_001, 300_000):
            with closing(HTTPConnection("127.0.0.1", running.port)) as client:
                with suppress(ConnectionError):  # refused before its last bytes were sent
                    client.request("POST", "/v2/models/hstu_tiny/infer", iter([b" " * size]))
                answer = client.getresponse()
                assert answer.status == 413 and b"serve.max_body_mb" in answer.read()
        assert held(running) == 0


def test_the_body_of_a_client_that_has_left_counts_while_a_thread_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read, parse_call = threading.Event(), http.parse_call

    def slowly(body: bytes, length: str | None) -> Any:
        read.wait(60)
        return parse_call(body, length)

    monkeypatch.setattr(http, "parse_call", slowly)
    with serving("engine=hstu", *TINY, "serve.grpc_port=null") as running:
        with socket.create_connection(("127.0.0.1", running.port)) as leaves:
            leaves.sendall(head(150_000) + padded(150_000))
            wait_until(lambda: held(running) == 150_000)
        time.sleep(0.5)
        assert held(running) == 150_000
        read.set()
        wait_until(lambda: held(running) == 0)
        assert running.metric("grbench_requests_total", status="499") == 1
