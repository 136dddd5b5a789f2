"""A live server that gets damaged calls over its socket: each is refused in one line, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from helpers.fuzz import altered, damaged, drawn, for_seconds
from helpers.serving import TINY, Serving, serving, tensors_of, tiny_trace
from hypothesis import given
from hypothesis import strategies as st

from grbench.serve import connections
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
        status, answer, _ = server.call(path, json.dumps(content).encode())
        assert status < 500, answer

    for_seconds(seconds, check)
    assert scores(server) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not [e for e in server.events() if e["event"] == "defect"]
