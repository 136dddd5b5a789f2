"""A live server that gets damaged calls by HTTP and gRPC: each is refused in one line, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from helpers.fuzz import altered, damaged, drawn, for_seconds
from helpers.serving import TINY, Serving, serving, tensors_of, tiny_trace
from hypothesis import given
from hypothesis import strategies as st

from grbench.serve import connections
from grbench.serve.protocol import DTYPES
from grbench.serve.rpc import SERVICE, messages
from grengines.remote.client import body_of

WAIT_S = 1.2  # for an answer; half of it for the server to wait for the rest of a call
PATHS = ("/v2/models/hstu_tiny/infer", "/v2/models/hstu_tiny/append", "/v2/models/x/infer", "/reload/", "/v2", "/%00")
CONTENT = {"inputs": [{"name": n, "shape": [1], "datatype": "INT64", "data": [1]} for n in ("USER_IDS", "TOKENS")],
           "parameters": {"deadline_ms": 9000}, "outputs": [{"name": "OUTPUT"}], "id": "a"}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "HEADERS_S", WAIT_S / 2)
        with serving(*TINY, "engine=hstu", "serve.max_body_mb=0.1", f"serve.body_timeout_s={WAIT_S / 2}") as running:
            yield running


@pytest.fixture(scope="module")
def good() -> tuple[bytes, dict[str, str]]:
    """A binary call that is right, and its headers."""
    request = tiny_trace()[1].requests[0]
    return body_of(tensors_of([request]), {"binary_data_output": True})


def statuses(port: int, data: bytes, wait_s: float = WAIT_S) -> list[int]:
    """Send bytes. Returns the status of each answer, until the server closes the connection or keeps it for more."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        with contextlib.suppress(ConnectionError):  # refused while it was sent: the answer says why
            connection.sendall(data)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := connection.recv(65536):
                found += part
    lines = [line for line in found.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return [int(line.split()[1]) for line in lines]


def scores(server: Serving) -> list[float]:
    """The scores of a right call."""
    status, answer, _ = server.infer(tensors_of(tiny_trace()[1].requests[:1]))
    assert status == 200
    found: list[float] = answer["outputs"][0]["data"]
    return found


def test_damaged_bytes_of_a_connection(server: Serving, good: tuple[bytes, dict[str, str]], seconds: float) -> None:
    body, headers = good
    lines = [f"POST {PATHS[0]} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}",
             *(f"{n}: {v}" for n, v in headers.items()), "connection: close", "", ""]  # fmt: skip
    whole = "\r\n".join(lines).encode() + body
    assert statuses(server.port, whole, 60.0) == [200]
    expected = scores(server)

    @given(damaged(whole))
    @drawn(seconds)
    def check(data: bytes) -> None:
        assert all(status < 500 for status in statuses(server.port, data))

    for_seconds(seconds, check)
    assert scores(server) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_damaged_bodies(server: Serving, good: tuple[bytes, dict[str, str]], seconds: float) -> None:
    expected = scores(server)

    @given(
        st.sampled_from(PATHS), damaged(good[0]), st.sampled_from([*good[1].values(), "0", "-1", "9" * 30, "x", None])
    )
    @drawn(seconds)
    def check(path: str, body: bytes, length: str | None) -> None:
        given_ = {} if length is None else {"inference-header-content-length": length}
        status, answer, headers = server.call(path, body, given_)
        assert status < 500
        if status >= 400 and headers.get("content-type") == "application/json":
            assert "\n" not in answer["error"] and len(answer["error"]) < 1000

    for_seconds(seconds, check)
    assert scores(server) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_altered_calls(server: Serving, seconds: float) -> None:
    expected = scores(server)

    @given(st.sampled_from(PATHS), altered(CONTENT))
    @drawn(seconds)
    def check(path: str, content: object) -> None:
        status, answer, headers = server.call(path, json.dumps(content).encode())
        assert status < 500, answer
        if status >= 400 and headers.get("content-type") == "application/json":
            assert "\n" not in answer["error"] and len(answer["error"]) < 1000

    for_seconds(seconds, check)
    assert scores(server) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not [e for e in server.events() if e["event"] == "defect"]


REFUSALS = {grpc.StatusCode[name] for name in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")}
METHODS = ("ModelInfer", "ModelInfer", "ModelMetadata", "ModelStatistics", "ServerLive", "RepositoryIndex")
SIZES = st.sampled_from([-(2**63), -1, 0, 1, 2, 2**31, 10**9, 2**62, 2**63 - 1])
NUMBERS = st.sampled_from([0, 1, -1, 2.5, -np.inf, np.inf, np.nan, 10**9, 2**31, 2**62, -(2**63)])
TEXTS = st.sampled_from(["", "OUTPUT", "USER_IDS", "INT64", "FP32", "BYTES", "fp32", "1", "\n", "\0", "é" * 300])


@pytest.fixture(scope="module")
def request_() -> Any:
    """A right call of gRPC."""
    made = messages()["inference.ModelInferRequest"](model_name="hstu_tiny", id="a")
    for name, tensor in tensors_of(tiny_trace()[1].requests[:2]).items():
        kind = "FP32" if tensor.dtype.kind == "f" else "INT64"
        made.inputs.add(name=name, datatype=kind, shape=tensor.shape)
        made.raw_input_contents.append(tensor.astype(DTYPES[kind]).tobytes())
    return made


@st.composite
def altered_request(draw: st.DrawFn, whole: Any) -> bytes:
    """Return the call with one to three of its parts replaced: types, shapes, values, sizes, names, parameters."""
    made = type(whole)()
    made.CopyFrom(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(made.inputs) - 1))
        tensor, raws = made.inputs[at], made.raw_input_contents
        match draw(
            st.sampled_from(["type", "shape", "cut", "values", "typed", "name", "twice", "drop", "set", "text"])
        ):
            case "type":
                tensor.datatype = draw(st.one_of(st.sampled_from(sorted(DTYPES)), TEXTS))
            case "shape":
                tensor.shape[:] = draw(st.lists(SIZES, max_size=3))
            case "cut" if at < len(raws):
                raws[at] = raws[at][: draw(st.integers(0, len(raws[at])))] + draw(st.binary(max_size=9))
            case "values":
                values = draw(st.lists(NUMBERS, max_size=9))
                with np.errstate(invalid="ignore", over="ignore"):
                    data = np.array(values).astype(DTYPES.get(tensor.datatype, np.int64))
                tensor.shape[:] = [len(data)]
                if at < len(raws):
                    raws[at] = data.tobytes()
            case "typed":
                del raws[:]
                getattr(
                    tensor.contents, draw(st.sampled_from(["int64_contents", "int_contents", "uint_contents"]))
                ).append(1)
                tensor.contents.fp32_contents.append(draw(NUMBERS))
                tensor.contents.bytes_contents.append(draw(st.binary(max_size=3)))
            case "name":
                tensor.name = draw(TEXTS)
            case "twice":
                made.inputs.add().CopyFrom(tensor)
            case "drop" if raws and len(made.inputs) > 1:
                del draw(st.sampled_from([raws, made.inputs]))[at % len(raws) :]
                if not made.inputs:
                    made.inputs.add()
            case "set":
                owner = draw(st.sampled_from([made, tensor, made.outputs.add(name="OUTPUT")]))
                key = draw(st.sampled_from(["deadline_ms", "timeout", "dedline_ms", "binary_data", "classification"]))
                kind = draw(st.sampled_from(["bool_param", "int64_param", "double_param", "string_param"]))
                values = {
                    "bool_param": st.booleans(),
                    "int64_param": SIZES,
                    "double_param": NUMBERS,
                    "string_param": TEXTS,
                }
                setattr(owner.parameters[key], kind, draw(values[kind]))
            case "text":
                setattr(made, draw(st.sampled_from(["model_name", "model_version", "id"])), draw(TEXTS))
            case _:
                made.outputs.add(name=draw(TEXTS))
    return bytes(made.SerializeToString())


def ask(channel: grpc.Channel, method: str, data: bytes) -> None:
    """Send the bytes of a message. Fails for an answer that is neither right nor a refusal in one line."""
    try:
        channel.unary_unary(f"/{SERVICE}/{method}", None, None)(data, timeout=20)
    except grpc.RpcError as e:
        assert e.code() in REFUSALS, e  # type: ignore[attr-defined]
        assert "\n" not in e.details() and len(e.details()) < 1000, e  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["altered", "damaged"])
def test_calls_by_grpc(server: Serving, request_: Any, kind: str, seconds: float) -> None:
    expected = scores(server)
    data = altered_request(request_) if kind == "altered" else damaged(request_.SerializeToString())
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        ask(channel, "ModelInfer", request_.SerializeToString())

        @given(st.sampled_from(METHODS), data)
        @drawn(seconds)
        def check(method: str, data: bytes) -> None:
            ask(channel, method, data)

        for_seconds(seconds, check)
    assert scores(server) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not [e for e in server.events() if e["event"] == "defect"]
