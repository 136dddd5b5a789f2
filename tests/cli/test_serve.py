"""The server over HTTP and gRPC: answers are right, wrong calls are refused in one line, Triton's clients work."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
import yaml
from helpers.checkout import ROOT
from helpers.command import Grbench
from helpers.forks import fork_command, printed_lines
from helpers.serving import (
    SEARCH,
    TINY,
    Serving,
    as_json,
    items_come_with_their_scores,
    misfit,
    serving,
    tensors_of,
    tiny_trace,
    wait_until,
)  # fmt: skip

from grbench.config.arguments import replaced
from grbench.execution.records import Status
from grbench.report.frame import read_cells
from grbench.serve.load import as_run
from grbench.serve.options import deployment_of
from grbench.serve.rpc import SERVICE
from grengines import registry
from grengines.api import Catalogue, Setup, UnavailableError
from grengines.hstu.engine import HSTUEngine
from grengines.remote.client import Client, ServerError
from grengines.remote.config import RemoteConfig
from grengines.remote.engine import RemoteRanker
from grengines.remote.served import differences, overrides, refusal
from grengines.runtime.native import native
from grkernels import registry as kernel_registry
from grkernels import timing

tritonhttp = pytest.importorskip("tritonclient.http")
tritongrpc = pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(*TINY, "engine=hstu", "serve.max_body_mb=0.1", "serve.body_timeout_s=2", "serve.gate_share=1") as s:
        yield s


@pytest.fixture(scope="module")
def trace() -> Any:
    return tiny_trace()


@pytest.fixture(scope="module")
def expected(trace: Any) -> list[np.ndarray]:
    """Scores of the fp32 reference for the first three requests."""
    from grengines.models.hstu.reference import RankingReference

    spec, made = trace
    return RankingReference(spec.model, made.catalogue, spec.seed, "cpu").scores(made.requests[:3])


def close_to(scores: np.ndarray, expected: list[np.ndarray]) -> None:
    right = np.concatenate(expected)
    assert scores.shape == right.shape
    assert np.linalg.norm(scores - right) < 1e-4 * np.linalg.norm(right)


def test_json_calls_get_the_scores_of_the_reference(server: Serving, trace: Any, expected: list[np.ndarray]) -> None:
    tensors = tensors_of(trace[1].requests[:3])
    status, answer, headers = server.call(
        "/v2/models/hstu_tiny/infer", {"id": "a1", "inputs": as_json(tensors)}, {"x-request-id": "r-77"}
    )
    outputs = {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}
    assert status == 200
    close_to(outputs["OUTPUT"], expected)
    assert outputs["OUTPUT_LENGTHS"].tolist() == [8, 8, 8]
    assert answer["id"] == "a1" and headers["x-request-id"] == "r-77"
    assert answer["parameters"]["strategy"] == "hstu" and answer["parameters"]["reason"] == "only"


@pytest.mark.parametrize("client", ["http", "http, JSON", "grpc"])
def test_tritonclient_gets_the_scores_of_the_reference(
    server: Serving, trace: Any, expected: list[np.ndarray], client: str
) -> None:
    module = tritongrpc if client == "grpc" else tritonhttp
    port = server.grpc_port if client == "grpc" else server.port
    form = {"binary_data": False} if client == "http, JSON" else {}
    inputs = []
    for name, tensor in tensors_of(trace[1].requests[:3]).items():
        inputs.append(module.InferInput(name, list(tensor.shape), "FP32" if tensor.dtype == np.float32 else "INT64"))
        inputs[-1].set_data_from_numpy(tensor, **form)
    with module.InferenceServerClient(f"127.0.0.1:{port}") as triton:
        assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("hstu_tiny", "1")
        outputs = [module.InferRequestedOutput("OUTPUT", **form)]
        answer = triton.infer("hstu_tiny", inputs, outputs=outputs, request_id="b2")
        close_to(answer.as_numpy("OUTPUT"), expected)
        assert answer.as_numpy("OUTPUT_LENGTHS") is None
        response = answer.get_response(as_json=True) if client == "grpc" else answer.get_response()
        assert response["id"] == "b2"
        facts = [triton.get_server_metadata(), triton.get_model_metadata("hstu_tiny"),
                 triton.get_model_config("hstu_tiny"), triton.get_inference_statistics("hstu_tiny")]  # fmt: skip
        words = ["binary_tensor_data", "TOKEN_LENGTHS", "TYPE_FP32", "compute_infer"]
        assert all(word in str(fact) for word, fact in zip(words, facts, strict=True))
    # Triton's gRPC client knows no parameters of a tensor: they stand in the bytes of the answer.
    content = facts[1].SerializeToString() if client == "grpc" else json.dumps(facts[1]["outputs"][0]["parameters"])
    assert "engagement,retention,monetisation" in (content.decode(errors="replace") if client == "grpc" else content)


def test_outputs_are_binary_where_the_call_asks_for_it(server: Serving, trace: Any) -> None:
    body = {
        "inputs": as_json(tensors_of(trace[1].requests[:1])),
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "OUTPUT"}, {"name": "OUTPUT_LENGTHS", "parameters": {"binary_data": False}}],
    }
    status, text, headers = server.call("/v2/models/hstu_tiny/versions/1/infer", body)
    content = json.loads(text[: int(headers["inference-header-content-length"])])
    assert status == 200 and not misfit("call", body) and not misfit("answer", content)
    assert [o.get("parameters") for o in content["outputs"]] == [{"binary_data_size": 96}, None]
    assert content["outputs"][1]["data"] == [8]


def test_the_schema_has_the_names_of_the_model_and_refuses_what_the_server_refuses(server: Serving) -> None:
    _, facts, _ = server.call("/v2/models/hstu_tiny")
    for tensor in facts["inputs"]:
        assert not misfit("call", {"inputs": [{**tensor, "shape": [1], "data": [1]}]})
    for wrong, where in [
        ({"input": base()}, "'inputs' is a required property"),
        ({"inputs": base(USERS=[1])}, "$.inputs[4].name: 'USERS' is not one of"),
        ({"inputs": base(TOKENS=[1, 2, 3, 4, "a"])}, "$.inputs[2].data[4]: 'a' is not of type 'number'"),
        ({"inputs": base(), "outputs": [{"name": "SCORES"}]}, "$.outputs[0].name: 'SCORES' is not one of"),
        ({"inputs": base(), "parameters": {"deadline_ms": 0}}, "$.parameters.deadline_ms: 0 is less than or equal"),
        ({"inputs": base(), "id": 5}, "$.id: 5 is not of type 'string'"),
    ]:
        assert where in misfit("call", wrong)
        assert server.call("/v2/models/hstu_tiny/infer", wrong)[0] == 400


def test_the_example_calls_of_perf_analyzer_are_answered(server: Serving) -> None:
    """Its input is a list of calls, with the contents and the shape of each tensor."""
    calls = json.loads(Path("examples/calls.json").read_text(encoding="utf-8"))["data"]
    config = server.call("/v2/models/hstu_tiny/config")[1]
    for call in calls:
        assert set(call) == {tensor["name"] for tensor in config["input"]}
        inputs = [
            {"name": name, "shape": tensor["shape"], "datatype": "FP32" if name == "WEIGHTS" else "INT64",
             "data": tensor["content"]}
            for name, tensor in call.items()
        ]  # fmt: skip
        status, answer, _ = server.call("/v2/models/hstu_tiny/infer", {"inputs": inputs})
        assert status == 200
        assert answer["outputs"][-1]["data"] == call["NUM_CANDIDATES"]["content"]


def base(**changes: Any) -> list[dict[str, Any]]:
    tensors = {"USER_IDS": [3], "TOKEN_LENGTHS": [5], "TOKENS": [1, 2, 3, 4, 5], "NUM_CANDIDATES": [2]} | changes
    return [{"name": n, "shape": [len(d)], "datatype": "FP32" if n == "WEIGHTS" else "INT64", "data": d}
            for n, d in tensors.items() if d is not None]  # fmt: skip


WRONG = [
    (b"{", 400, "body: not JSON"),
    (b"[1]", 400, "body: allowed is an object with the key inputs"),
    (b"[" * 90_000, 400, "body: not JSON"),
    (b"{}", 400, "inputs: missing; allowed is a list"),
    ({"inputs": []}, 400, "USER_IDS is missing; needed are USER_IDS, TOKEN_LENGTHS, TOKENS, NUM_CANDIDATES"),
    ({"inputs": [{"name": 3}]}, 400, "inputs[0].name: wrong"),
    ({"inputs": base() + base()}, 400, "inputs[4].name=USER_IDS: it is there twice"),
    ({"inputs": base(USER_IDS=None)}, 400, "USER_IDS is missing"),
    ({"inputs": base(USERS=[1])}, 400, "inputs: USERS: no such tensor; nearest: USER_IDS; allowed are USER_IDS"),
    ({"inputs": base(USER_IDS=[-1])}, 400, "USER_IDS[0]=-1: allowed is >= 0"),
    ({"inputs": base(USER_IDS=[2**63])}, 400, "USER_IDS.data: a number is outside INT64"),
    ({"inputs": base(USER_IDS=list(range(65)))}, 400, "USER_IDS: 65 users; allowed are 1 to 64"),
    ({"inputs": base(TOKENS=[1, 2, 3, 4, 500])}, 400, "TOKENS[4]=500: allowed is 0 to 499"),
    ({"inputs": base(TOKENS=[1, 2])}, 400, "TOKENS.shape=[2]: allowed is [5]"),
    ({"inputs": base(TOKENS=["a"] * 5)}, 400, "TOKENS.data: allowed are numbers of INT64"),
    ({"inputs": base(TOKENS=[1.5] * 5)}, 400, "TOKENS.data: allowed are numbers of INT64"),
    ({"inputs": base(TOKENS=[[1], [2, 3], 4, 5, 6])}, 400, "TOKENS.data: the rows have different lengths"),
    ({"inputs": base(NUM_CANDIDATES=None)}, 400, "NUM_CANDIDATES is missing"),
    ({"inputs": base(NUM_CANDIDATES=[0])}, 400, "NUM_CANDIDATES[0]=0: allowed is 1 to 4096"),
    ({"inputs": base(NUM_CANDIDATES=[10**9])}, 400, "NUM_CANDIDATES[0]=1000000000: allowed is 1 to 4096"),
    ({"inputs": base(NUM_CANDIDATES=[6])}, 400, "TOKEN_LENGTHS[0]=5: fewer than NUM_CANDIDATES[0]=6"),
    ({"inputs": base(NUM_CANDIDATES=[5])}, 400, "0 events of a history; allowed are 1 to 48"),
    ({"inputs": base(TOKEN_LENGTHS=[51], TOKENS=[1] * 51)}, 400, "49 events of a history; allowed are 1 to 48"),
    ({"inputs": base(ACTIONS=[1, 2, 99])}, 400, "ACTIONS[2]=99: allowed is 0 to"),
    ({"inputs": base(WEIGHTS=[1, 2, 2e4])}, 400, "WEIGHTS[2]=20000.0: allowed is -10000 to 10000"),
    ({"inputs": base(WEIGHTS=[1, 2, float("nan")])}, 400, "WEIGHTS[2]=NaN: not JSON; allowed are finite numbers"),
    ({"inputs": base(WEIGHTS=[[1, 2, -float("inf")]])}, 400, "WEIGHTS[0][2]=-Infinity: not JSON; allowed are finite"),
    ({"inputs": base(), "parameters": {"a": float("nan")}}, 400, "parameters.a=NaN: not JSON; allowed are finite"),
    (b'{"inputs": NaN', 400, "body: not JSON"),
    (b"Infinity", 400, "body=Infinity: not JSON"),
    (b'{"NaN": ' + b"[" * 90_000, 400, "body: not JSON"),
    ({"inputs": base(TIMESTAMPS=[1, 2, -3])}, 400, "TIMESTAMPS[2]=-3: allowed is >= 0"),
    ({"inputs": base(STATE_VERSIONS=[4])}, 404, "user 3 has no state here; append the history from version 0"),
    ({"inputs": [{"name": "USER_IDS", "shape": [1], "datatype": "BF16"}]}, 400, "USER_IDS.datatype=BF16: allowed are"),
    ({"inputs": [{"name": "USER_IDS", "shape": [-1], "datatype": "INT64"}]}, 400, "USER_IDS.shape=[-1]: allowed are"),
    ({"inputs": [{"name": "USER_IDS", "shape": [1 << 39], "datatype": "INT64", "data": [1]}]}, 400, "1 numbers; shape"),
    ({"inputs": base(), "outputs": [{"name": "SCORES"}]}, 400, "outputs: SCORES: no such output; allowed are OUTPUT"),
    ({"inputs": base(), "parameters": {"deadline_ms": -1}}, 400, "parameters.deadline_ms=-1: allowed is a number > 0"),
    ({"inputs": base(), "parameters": {"timeout": "x"}}, 400, 'parameters.timeout="x": allowed is a number > 0'),
    ({"inputs": base(), "parameters": {"deadline_ms": "5"}}, 400, 'parameters.deadline_ms="5": allowed is a number >'),
    (b"", 400, "body: empty; allowed is an object with the key inputs"),
    ({"input": base()}, 400, "body.input: no such field; nearest: inputs; allowed are id, parameters, inputs, outputs"),
    ({"inputs": [{"name": "TOKENS", "shape": [1], "dtype": "INT64"}]}, 400, "TOKENS.dtype: no such field; nearest: da"),
    ({"inputs": base(), "outputs": [{"nam": "OUTPUT"}]}, 400, "outputs[0].nam: no such field; nearest: name; allowed"),
    ({"inputs": base(), "parameters": {"dedline_ms": 5}}, 400, "parameters.dedline_ms: no such parameter; nearest: d"),
    ({"inputs": base(), "parameters": {"timeoutMs": 5}}, 400, "parameters.timeoutMs: no such parameter; nearest: tim"),
    (
        {"inputs": base(), "outputs": [{"name": "OUTPUT", "parameters": {"binary_dat": True}}]},
        400,
        "outputs[0].parameters.binary_dat: no such parameter; nearest: binary_data",
    ),
    (b" " * 100_001, 413, "body: more than 0.1 MB (serve.max_body_mb)"),
]  # fmt: skip


@pytest.mark.parametrize("body, status, words", WRONG)
def test_a_wrong_call_is_refused_in_one_line(server: Serving, body: Any, status: int, words: str) -> None:
    found, answer, headers = server.call("/v2/models/hstu_tiny/infer", body)
    assert found == status and words in answer["error"] and "\n" not in answer["error"]
    [logged] = [e for e in server.events() if e.get("request_id") == headers["x-request-id"]]
    assert (logged["level"], logged["status"]) == ("warning", status)
    assert server.call("/v2/models/foo/infer", body)[0] == (413 if status == 413 else 404)
    assert server.call("/v2/models/hstu_tiny/infer", {"inputs": base()})[0] == 200  # the server goes on


def test_an_output_that_there_is_not_is_refused_before_a_batch_runs(server: Serving) -> None:
    before = server.metric("nv_inference_exec_count")
    for outputs, status in (([{"name": "ITEMS"}], 400), ([{"name": "OUTPUT_LENGTHS"}], 200)):
        assert server.call("/v2/models/hstu_tiny/infer", {"inputs": base(), "outputs": outputs})[0] == status
    assert server.metric("nv_inference_exec_count") == before + 1


def test_parameters_of_a_clients_own_are_ignored_and_misspelled_ones_are_not(server: Serving) -> None:
    """The protocol lets clients send their own: those of Triton, and some that we have never heard of."""
    own = {"sequence_id": 3, "sequence_start": True, "priority": 1, "headers": "x", "tenant": "a", "user_id": 2}
    assert server.call("/v2/models/hstu_tiny/infer", {"inputs": base(), "parameters": own})[0] == 200
    status, answer, _ = server.call(
        "/v2/models/hstu_tiny/append", {"inputs": [], "parameters": {"user_ids": 3, "version": 0}}
    )
    assert status == 400 and "parameters.user_ids: no such parameter; nearest: user_id;" in answer["error"]
    inputs = [tritongrpc.InferInput(one["name"], one["shape"], "INT64") for one in base()]
    for tensor, one in zip(inputs, base(), strict=True):
        tensor.set_data_from_numpy(np.array(one["data"]))
    with tritongrpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        assert client.infer("hstu_tiny", inputs, parameters={"tenant": "a"}).as_numpy("OUTPUT") is not None
        with pytest.raises(Exception, match=r"parameters\.deadlinems: no such parameter; nearest: deadline_ms"):
            client.infer("hstu_tiny", inputs, parameters={"deadlinems": 5})


@pytest.mark.parametrize(
    "headers, body, status, words",
    [
        ({"inference-header-content-length": "9"}, b"{}", 400, "the body has 2 bytes; allowed is 1 to that"),
        ({"inference-header-content-length": "x"}, b"{}", 400, "inference-header-content-length=x: allowed is an int"),
        ({"content-encoding": "gzip"}, b"{}", 415, "content-encoding=gzip: bodies are taken as they are"),
    ],
)
def test_wrong_headers_are_refused(
    server: Serving, headers: dict[str, str], body: bytes, status: int, words: str
) -> None:
    found, answer, _ = server.call("/v2/models/hstu_tiny/infer", body, headers)
    assert found == status and words in answer["error"]


@pytest.mark.parametrize("size, words", [(8, "0 bytes are left in the body"), (0, "0 bytes; shape [1] of INT64")])
def test_a_truncated_binary_tensor_is_refused(server: Serving, size: int, words: str) -> None:
    one = {"name": "USER_IDS", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": size}}
    body = json.dumps({"inputs": [one]}).encode()
    headers = {"inference-header-content-length": str(len(body))}
    status, answer, _ = server.call("/v2/models/hstu_tiny/infer", body, headers)
    assert status == 400 and words in answer["error"]


def test_bytes_behind_the_tensors_are_refused(server: Serving) -> None:
    body = json.dumps({"inputs": base()}).encode()
    headers = {"inference-header-content-length": str(len(body))}
    status, answer, _ = server.call("/v2/models/hstu_tiny/infer", body + b"12345678", headers)
    assert status == 400 and "8 bytes are left behind the last input" in answer["error"]


def test_a_client_that_does_not_send_its_body_is_refused(server: Serving) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /v2/models/hstu_tiny/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n\r\n{")
        with slow.makefile() as lines:
            status, body = next(lines), lines.read(300)
    assert status.startswith("HTTP/1.1 408") and "serve.body_timeout_s" in body
    assert server.metric("grbench_body_bytes") == 0


def test_a_body_that_comes_slowly_uses_up_no_wait_for_company(trace: Any) -> None:
    body = json.dumps({"inputs": as_json(tensors_of(trace[1].requests[:1]))}).encode()
    head = f"POST /v2/models/hstu_tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    words = [*TINY, "engine=hstu", "scenario.max_wait_ms=300", "serve.grpc_port=null"]
    with serving(*words) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(head.encode())
        time.sleep(0.4)
        sent = time.perf_counter()
        slow.sendall(body)
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
        assert time.perf_counter() - sent >= 0.3


def test_other_models_and_versions_are_not_found(server: Serving) -> None:
    status, answer, _ = server.call("/v2/models/other/infer", {"inputs": base()})
    assert status == 404 and answer["error"] == "model other: not served here; the model is hstu_tiny"
    status, answer, _ = server.call("/v2/models/hstu_tiny/versions/2/infer", {"inputs": base()})
    assert status == 404 and "the version is 1" in answer["error"]


@pytest.mark.parametrize(
    "name, wrong, words",
    [("USER_IDS", np.array([-5]), "USER_IDS[0]=-5"), ("TOKENS", np.zeros(2, np.int64), "TOKENS.shape=[2]"),
     ("x" * 20_000, np.zeros(2, np.int64), ".name: wrong; allowed is a string of at most 1024 characters"),
     ("two\nlines", np.zeros(2, np.int64), "two lines: ")],
)  # fmt: skip
def test_grpc_refuses_in_one_line(server: Serving, name: str, wrong: np.ndarray, words: str) -> None:
    tensors = {one["name"]: np.array(one["data"]) for one in base()} | {name: wrong}
    inputs = [tritongrpc.InferInput(n, list(t.shape), "INT64").set_data_from_numpy(t) for n, t in tensors.items()]
    address = f"127.0.0.1:{server.grpc_port}"
    with tritongrpc.InferenceServerClient(address) as client, pytest.raises(Exception) as refused:
        client.infer("hstu_tiny", inputs)
    assert words in str(refused.value) and "INVALID_ARGUMENT" in str(refused.value)


def test_a_damaged_message_of_grpc_is_refused(server: Serving) -> None:
    """The server is not to blame, and its log has no traceback."""
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"/{SERVICE}/ModelInfer", None, None)(b"\xff")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert refused.value.details().startswith("message: ")  # type: ignore[attr-defined]


def test_appended_events_are_ranked_like_sent_ones(server: Serving, trace: Any) -> None:
    whole = trace[1].requests[5]
    tensors = tensors_of([whole])
    events = {n: tensors[n] for n in ("ACTIONS", "WEIGHTS", "TIMESTAMPS")} | {"TOKENS": whole.history_items}
    half = len(whole.history_items) // 2

    def append(version: int, part: slice) -> tuple[int, Any]:
        body = {"inputs": as_json({n: t[part] for n, t in events.items()}),
                "parameters": {"user_id": whole.user_id, "version": version}}  # fmt: skip
        return server.call("/v2/models/hstu_tiny/append", body)[:2]

    assert append(0, slice(half)) == (200, {"user_id": whole.user_id, "version": half, "repeated": False})
    assert append(0, slice(half)) == (200, {"user_id": whole.user_id, "version": half, "repeated": True})
    status, answer = append(half + 1, slice(half, None))
    assert status == 409 and f"has version {half}" in answer["error"]
    rest = {n: t[half:] for n, t in events.items()}
    known = {"USER_IDS": tensors["USER_IDS"], "NUM_CANDIDATES": tensors["NUM_CANDIDATES"],
             "REQUEST_TIMES": tensors["REQUEST_TIMES"], "STATE_VERSIONS": np.array([half]),
             "TOKEN_LENGTHS": tensors["TOKEN_LENGTHS"] - half}  # fmt: skip
    tokens = np.concatenate([rest.pop("TOKENS"), whole.candidates])
    status, answer, _ = server.infer(known | rest | {"TOKENS": tokens})
    assert status == 200
    assert answer["outputs"][0]["data"] == server.infer(tensors)[1]["outputs"][0]["data"]
    assert server.infer(known | rest | {"TOKENS": tokens, "STATE_VERSIONS": np.array([1])})[0] == 409


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"version": 0}, "parameters.user_id: missing; allowed is an integer >= 0"),
        ({"user_id": "3", "version": 0}, 'parameters.user_id="3": allowed is an integer >= 0'),
        ({"user_id": 3, "version": -1}, "parameters.version=-1: allowed is an integer >= 0"),
    ],
)
def test_a_wrong_append_is_refused_in_one_line(server: Serving, parameters: dict[str, Any], words: str) -> None:
    status, answer, _ = server.call("/v2/models/hstu_tiny/append", {"inputs": [], "parameters": parameters})
    assert (status, answer["error"]) == (400, words)


def test_metrics_have_the_names_of_the_field(server: Serving, trace: Any) -> None:
    before = server.metric("grbench_requests_total", status="200", strategy="hstu")
    server.infer(tensors_of(trace[1].requests[:2]))
    assert server.metric("grbench_requests_total", status="200", strategy="hstu") == before + 1
    for name in ("grbench_request_duration_seconds_count", "grbench_stage_duration_seconds_count",
                 "grbench_batch_size_count", "nv_inference_request_success", "nv_inference_count",
                 "nv_inference_exec_count", "nv_inference_compute_infer_duration_us",
                 "nv_inference_compute_output_duration_us"):  # fmt: skip
        assert server.metric(name) > 0, name
    _, metrics, _ = server.call("/metrics")
    assert 'le="5.0"' in metrics  # the limit
    loops = native().actual()["host_loops"].partition(":")[0]
    assert re.search(rf'grbench_host_loops_info{{loops="{loops}",reason=".*",strategy=".+"}} 1.0', metrics)
    assert server.metric("grbench_batch_seconds_total", part="flight") >= server.metric(
        "grbench_batch_seconds_total", part="compute"
    )
    answers_are_judged(server)


def test_cached_states_have_their_bytes_and_hits(trace: Any) -> None:
    with serving(*TINY, "engine=hstu", "cache=lru", "cache.memory_gb=0.001", "serve.grpc_port=null") as server:
        assert server.metric("grbench_state_bytes", strategy="hstu", tier="device") == 0
        cached = [server.infer(tensors_of(trace[1].requests[:1]))[1]["parameters"]["cached_tokens"] for _ in range(2)]
        assert cached[0] == 0 < cached[1]
        wait_until(lambda: server.metric("nv_cache_num_hits_per_model") == 1)
        assert server.metric("nv_cache_num_misses_per_model") == 1
        assert server.metric("grbench_state_hits_total", tier="device") == 1
        assert 0 < server.metric("grbench_state_bytes", strategy="hstu", tier="device") <= 1e6
        output = server.call("/v2/models/hstu_tiny/stats")[1]["model_stats"][0]["inference_stats"]["compute_output"]
        assert output["count"] == 2 and output["ns"] > 0


def answers_are_judged(server: Serving) -> None:
    wait_until(lambda: server.metric("grbench_gate_error_count", strategy="hstu") > 0)
    assert server.metric("grbench_gate_wrong_total", strategy="hstu") == 0
    assert server.metric("grbench_gate_unjudged_total", strategy="hstu") == 0


@pytest.mark.gpu
def test_answers_are_judged_on_a_stream_of_their_own(trace: Any) -> None:
    with serving(*TINY, "engine=hstu", "engine.device=cuda", "serve.gate_share=1", "serve.gate_load=1") as server:
        for _ in range(20):
            assert server.infer(tensors_of(trace[1].requests[:2]))[0] == 200
        answers_are_judged(server)
        assert server.metric("nv_gpu_power_usage") > 0 and server.metric("nv_gpu_memory_used_bytes") > 1e6


def test_the_status_says_what_runs(server: Serving) -> None:
    _, status, _ = server.call("/status")
    [strategy] = status["strategies"]
    assert (status["state"], strategy["state"], strategy["engine"]) == ("ready", "ready", "hstu")
    assert strategy["gate"]["error"] <= strategy["gate"]["tolerance"]
    assert strategy["costs"] and all(row["ms"] > 0 for row in strategy["costs"])
    said = {event["event"]: event for event in server.events()}
    parts = ("import", "prepare", "load", "graphs", "warm_up", "reference", "check", "costs")
    assert set(said["started"]["seconds"]) == set(parts) and min(said["started"]["seconds"].values()) >= 0
    assert 0 < said["listening"]["since_start_s"] <= said["ready"]["since_start_s"]
    assert said["ready"]["next"] == f"grbench load url={server.url}"


@pytest.mark.parametrize("engine", ["engine=hstu task=generate", "engine=pipeline engine@engine.retrieve=hstu"])
def test_items_come_with_their_scores(engine: str) -> None:
    items_come_with_their_scores(*engine.split())


def test_the_typed_client_gets_what_the_reference_finds(
    server: Serving, trace: Any, expected: list[np.ndarray]
) -> None:
    client = Client(server.url)
    answers = client.rank(trace[1].requests[:3], deadline_ms=5000)
    close_to(np.concatenate(answers.scores), expected)
    assert [len(s) for s in answers.scores] == [8, 8, 8]
    with pytest.raises(ServerError, match=r"USER_IDS\[0\]=-1: allowed is >= 0") as refused:
        client.rank([replace(trace[1].requests[0], user_id=-1)])
    assert refused.value.status == 400
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9: nothing listens there \(Connection") as refused:
        Client("http://127.0.0.1:9").wait_until_ready(60)  # it does not wait
    assert refused.value.status == 0
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as ending:
        threading.Thread(target=lambda: ending.accept()[0].close(), daemon=True).start()
        here = f"http://127.0.0.1:{ending.getsockname()[1]}"
        for url, why in ((here, "the server went away"), ("http://127.0.0.1:9", "nothing listens there")):
            engine = registry.build(RemoteConfig(url=url), trace[0].model, trace[0].kernel, trace[1].catalogue, 0)
            with pytest.raises(
                ServerError, match=rf"{url}: {why} \(.*\); look into the server's log, start it if it has"
            ):
                engine.rank(trace[1].requests[:1])
    with pytest.raises(ValueError, match="url=ftp://x: allowed is http://HOST:PORT"):
        Client("ftp://x")


@pytest.mark.usefixtures("forked_workers")
def test_a_server_is_measured_like_an_engine(server: Serving, grbench_here: Grbench) -> None:
    """`grbench load` gates the server, drives a scenario through the network, and keeps a record."""
    words = ["scenario=server", "scenario.queries=64", "scenario.target_qps=200", "tracking=none", "gate.measured=8"]
    done = grbench_here("load", f"url={server.url}", *TINY, *words)
    assert done.returncode == 0, done.stderr
    [(_, record)] = read_cells([Path("outputs")])
    assert record.status is Status.OK and record.metrics["samples"] >= 64
    assert record.gate["measured"]["wrong"] == 0 and record.actual["server"]["strategies"][0]["engine"] == "hstu"


@pytest.mark.usefixtures("forked_workers")
def test_several_servers_are_measured_together(server: Serving, grbench_here: Grbench) -> None:
    """A call goes to the server with the fewest requests, and the record counts the requests of each."""
    words = [*TINY, "scenario=offline", "scenario.queries=64", "tracking=none", "gate.measured=8"]
    with serving(*TINY, "engine=hstu", "serve.grpc_port=null") as other:
        done = grbench_here("load", f"url=[{server.url},{other.url}]", *words)
        assert done.returncode == 0, done.stderr
    [(_, record)] = read_cells([Path("outputs")])
    assert record.spec["scenario"]["in_flight"] == 2 * 64 and record.gate["measured"]["wrong"] == 0
    answered = [record.metrics[f"engine/server_{n}"] for n in (1, 2)]
    assert sum(answered) == record.metrics["samples"] and min(answered) >= 16
    with serving(*TINY, "engine=hstu", "engine.precision=bf16", "serve.grpc_port=null") as another:
        done = grbench_here("load", f"url={server.url}", f"url={another.url}", *words)
    assert done.returncode == 1
    assert f"{another.url} serves hstu (hstu, bf16) of hstu_tiny, and {server.url} serves hstu (hstu" in done.stdout


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Serving]:
    with serving(*TINY, *SEARCH, "engine=pipeline", "engine@engine.retrieve=hstu", "serve.grpc_port=null") as s:
        yield s


@pytest.mark.usefixtures("forked_workers")
def test_a_pipeline_is_measured_through_the_network(pipeline: Serving, grbench_here: Grbench) -> None:
    words = ["scenario=server", "scenario.queries=32", "scenario.target_qps=50", "tracking=none", "gate.measured=4"]
    done = grbench_here("load", f"url={pipeline.url}", "task=recommend", *TINY, *SEARCH, *words)
    assert done.returncode == 0, done.stderr
    [(_, record)] = read_cells([Path("outputs")])
    assert record.status is Status.OK and record.gate["error"] <= record.gate["tolerance"] == 1
    assert record.gate["measured"]["wrong"] == 0


def test_a_websocket_is_refused(server: Serving) -> None:
    """With 403 where uvicorn finds a package for WebSockets, and else with 405 as another GET."""
    lines = ["GET /v2/models/hstu_tiny/infer HTTP/1.1", "host: localhost", "connection: upgrade", "upgrade: websocket",
             "sec-websocket-version: 13", "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="]  # fmt: skip
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert connection.recv(100).split()[1] in (b"403", b"405")


def test_a_call_is_a_post(server: Serving) -> None:
    for path in ("hstu_tiny/infer", "hstu_tiny/append", "hstu_tiny/versions/1/infer", "hstu_tiny/versions/1/append"):
        status, _, headers = server.call(f"/v2/models/{path}")
        assert (status, headers["allow"]) == (405, "POST")


def test_a_server_of_other_items_is_refused(server: Serving) -> None:
    spec, trace = tiny_trace("workload.items=400")
    engine = registry.build(RemoteConfig(url=server.url), spec.model, spec.kernel, trace.catalogue, 0)
    asked = "a workload of 400 items; set workload=synthetic"
    serves = rf"engine.url: {server.url} serves task=rank on workload=synthetic with 500 items and 4 actions: hstu \("
    with pytest.raises(
        ValueError,
        match=rf"{serves}hstu, fp32\) of hstu_tiny, weights: .*\. Asked was {asked}",
    ):
        engine.prepare(trace.requests, 1)


SYNTHETIC = [  # the workload of TINY, in the order of the options
    "workload=synthetic", "workload.num_candidates=8", "workload.max_history=48", "workload.users=20",
    "workload.items=500", "workload.visits=40", "workload.history_median=12",
]  # fmt: skip
TASKS = "model.tasks=[engagement,retention,monetisation]"  # of hstu_tiny


@pytest.mark.parametrize(
    "words, asked, fixed",
    [
        (["workload.items=400"], "a workload of 400 items", SYNTHETIC),
        (
            ["workload=ml_100k"],
            "a workload of 1682 items and 2 actions, histories of up to 512 events",
            SYNTHETIC,
        ),
        (["workload.max_history=64"], "histories of up to 64 events", ["workload.max_history=48"]),
        (["model.tasks=[rated]"], "model.tasks=[rated]", [TASKS]),
        (["seed=3"], "weights: random, seed 3", ["seed=0"]),
        (["seed=3", "task=generate", *SEARCH], "task=generate, weights: random, seed 3", ["task=rank", "seed=0"]),
        (
            ["model=hstu_0p2b", "seed=3"],
            "model=hstu_0p2b, weights: random, seed 3",
            ["model=hstu_tiny", TASKS, "seed=0"],
        ),
        (["-m", "seed=0,3"], "weights: random, seed 3", ["seed=0"]),
    ],
)
def test_a_load_that_the_server_does_not_serve_is_refused_before_anything_runs(
    server: Serving, grbench_here: Grbench, tmp_path: Path, words: list[str], asked: str, fixed: list[str]
) -> None:
    same = [word for word in TINY if not word.startswith(("workload.", "model=")) or "ml_100k" not in " ".join(words)]
    same = [word for word in same if word.partition("=")[0] not in {typed.partition("=")[0] for typed in words}]
    done = grbench_here("load", f"url={server.url}", *same, *words)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    keys = {word.partition("=")[0] for word in fixed}
    typed = [word for word in [f"url={server.url}", *same, *words] if word.partition("=")[0] not in keys]
    command = shlex.join(["python", "-m", "grbench", "load", *typed, *fixed])
    assert done.stderr == (
        f"grbench load: engine.url: {server.url} serves task=rank on workload=synthetic with 500 items and 4 actions: "
        f"hstu (hstu, fp32) of hstu_tiny, weights: random, seed 0. Asked was {asked}; type {command}\n"
    )


def events(file: Path, items: int, columns: str = "user_id,item_id,timestamp", last: str = "") -> list[str]:
    """Write events of two users on N items, and return the overrides that read them."""
    rating = ",4" * columns.count("rating")
    lines = [f"{user},{item},{item * 5000}{rating}" for user in (1, 2) for item in range(items)]
    file.write_text("\n".join([columns, *lines, last, ""]))
    return ["workload=csv", f"workload.path={file}"]


QUICK = ["scenario=offline", "scenario.queries=16", "tracking=none", "latency_limit_ms=5000", "model=hstu_tiny"]


@pytest.mark.usefixtures("forked_workers")
def test_the_command_of_a_refused_load_runs(server: Serving, grbench_here: Grbench, tmp_path: Path) -> None:
    """Options that only the refused workload has are not in it."""
    words = [*events(tmp_path / "log.csv", 9), "workload.sort=true"]
    done = grbench_here("load", f"url={server.url}", *words, *QUICK)
    assert done.returncode == 2
    _, command = done.stderr.rstrip().split("; type python -m grbench ")
    assert "workload=csv" not in command and "workload.users=20" in command
    done = grbench_here(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    [(_, record)] = read_cells([Path("outputs")])
    assert record.status is Status.OK and record.spec["workload"]["name"] == "synthetic"


@pytest.mark.usefixtures("forked_workers")
def test_one_command_asks_a_server_for_all_of_its_trained_model(grbench_here: Grbench) -> None:
    """The weights, their tasks and the histories of the server, for one who has typed its URL alone."""
    weights = ROOT / "experiments/weights/ml_100k/ranker/weights.safetensors"
    trained = ["workload=ml_100k", "workload.max_history=50", "model.tasks=[rated,liked]", f"model.weights={weights}"]
    with serving("engine=hstu", *trained, "gate.requests=2", "serve.grpc_port=null") as server:
        done = grbench_here("load", f"url={server.url}", *QUICK, "gate.requests=2")
        assert done.returncode == 2
        asked, command = done.stderr.rstrip().split("; type python -m grbench ")
        assert asked.endswith(f"Asked was histories of up to 512 events, {TASKS}, weights: random, seed 0")
        assert {"workload.max_history=50", *trained[2:]} <= set(shlex.split(command))
        done = grbench_here(*shlex.split(command), "runner.output_root=untyped")
        assert done.returncode == 0 and "measuring quality" not in done.stderr, done.stdout + done.stderr
        done = grbench_here(*shlex.split(command), "gate.quality_requests=128")
        assert done.returncode == 0, done.stdout + done.stderr
    [(_, untyped)] = read_cells([Path("untyped")])
    assert untyped.status is Status.OK and "quality" not in untyped.gate
    [(_, record)] = read_cells([Path("outputs")])
    assert record.status is Status.OK and record.gate["quality"]["requests"] == 128
    steps = [line.rpartition(": ")[2].partition(" (")[0] for line in done.stderr.splitlines()]
    asked_of = ["measuring quality of the same model in fp32", "measuring quality"]
    assert [step for step in steps if step in asked_of] == asked_of


@pytest.mark.parametrize(
    "typed, added",
    [
        ([], True),
        (["gate.quality_requests=9"], False),
        (["scenario.mode=accuracy"], False),
        (["scenario.mode=performance"], True),
    ],
)
def test_a_load_evaluates_quality_only_where_that_is_typed(typed: list[str], added: bool) -> None:
    """Accuracy mode issues the requests that are evaluated."""
    words = as_run(["url=http://127.0.0.1:8000", *typed])
    assert ("gate.quality_requests=0" in words) is added and words[len(words) - len(typed) :] == typed


def test_a_load_of_other_actions_is_refused(server: Serving, grbench_here: Grbench, tmp_path: Path) -> None:
    """The items are as many as the server's, and each of its calls would be refused or wrong."""
    words = [*events(tmp_path / "log.csv", 500, "user_id,item_id,timestamp,rating"), "workload.max_history=48"]
    done = grbench_here("load", f"url={server.url}", *words, *QUICK)
    assert done.returncode == 2 and not (tmp_path / "outputs").exists()
    assert f". Asked was a workload of 2 actions; type python -m grbench load url={server.url} " in done.stderr


def test_a_load_of_a_file_that_is_not_readable_is_refused(
    server: Serving, grbench_here: Grbench, tmp_path: Path
) -> None:
    words = events(tmp_path / "log.csv", 9, last="1,3,soon")
    done = grbench_here("load", f"url={server.url}", *words, *QUICK)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"grbench load: {tmp_path}/log.csv: ")
    assert "soon" in done.stderr


def test_a_file_counts_for_each_server_of_a_load(server: Serving, grbench_here: Grbench, tmp_path: Path) -> None:
    """The first server has a file too, which leaves the comparison to the cell; the second has none."""
    words = events(tmp_path / "log.csv", 40)
    with serving(*words, "engine=hstu", *QUICK[3:], "gate.requests=2", "serve.grpc_port=null") as other:
        done = grbench_here("load", f"url={other.url}", f"url={server.url}", *words, *QUICK)
    assert done.returncode == 2 and not (tmp_path / "outputs").exists()
    assert f"grbench load: engine.more_urls: {server.url} serves task=rank on workload=synthetic with" in done.stderr


def test_a_status_of_an_older_server_is_enough(server: Serving) -> None:
    spec, trace = tiny_trace("workload.items=400")
    status = Client(server.url).status()
    for name in ("workload_overrides", "actions", "max_history", "tasks"):
        del status[name]
    asked = differences(status, "rank", trace.catalogue, 48, 0, spec.model, spec.retrieval)
    assert asked == [("a workload of 400 items", ["workload=synthetic"])]
    assert "serves task=rank on workload=synthetic with 500 items: hstu (" in refusal(server.url, status, asked)


def test_another_model_is_asked_for_with_its_weights(server: Serving) -> None:
    """A choice of `model` drops what was typed under it."""
    spec, trace = tiny_trace()
    status = Client(server.url).status()
    status["strategies"][0]["weights"] = "theirs.safetensors"
    model = replace(spec.model, name="hstu_0p2b", weights="mine.safetensors")
    asked = differences(status, "rank", trace.catalogue, 48, 0, model, spec.retrieval)
    fixed = ["model=hstu_tiny", TASKS, "model.weights=theirs.safetensors"]
    assert asked == [("model=hstu_0p2b", fixed)]
    typed = ["seed=0", "model=hstu_0p2b", "model.weights=mine.safetensors", "model.num_layers=2"]
    assert replaced(typed, overrides(asked)) == ["seed=0", *fixed]


def test_a_server_of_another_task_or_seed_is_refused(server: Serving) -> None:
    """Random weights are those of a seed. All are refused before the first call."""
    spec, trace = tiny_trace()

    def made(seed: int, weights: str | None = None, task: str = "rank") -> Any:
        model = replace(spec.model, weights=weights)
        return registry.build(RemoteConfig(url=server.url), model, spec.kernel, trace.catalogue, seed, task=task)

    with pytest.raises(ValueError, match=r"weights: random, seed 0\. Asked was weights: random, seed 3; set seed=0"):
        made(3).prepare(trace.requests, 1)
    with pytest.raises(ValueError, match=r"Asked was weights: trained\.safetensors; set seed=0 model\.weights=null"):
        made(0, "trained.safetensors").prepare(trace.requests, 1)
    engine = made(0)
    engine.prepare(trace.requests, 1)
    assert len(engine.rank(trace.requests[:2]).scores) == 2
    other = replace(spec.model, name="hstu_0p2b")
    with pytest.raises(ValueError, match=r"Asked was model=hstu_0p2b; set model=hstu_tiny"):
        registry.build(RemoteConfig(url=server.url), other, spec.kernel, trace.catalogue, 0).prepare(trace.requests, 1)
    for task in ("generate", "recommend"):
        with pytest.raises(ValueError, match=rf"serves task=rank on .*\. Asked was task={task}; set task=rank"):
            made(0, task=task).prepare(trace.requests, 1)


def test_a_pipeline_of_another_seed_is_refused(pipeline: Serving) -> None:
    """Both stages count: trained weights of one leave the other's seed."""
    spec, trace = tiny_trace()

    def made(seed: int, weights: str | None = None) -> Any:
        model = replace(spec.model, weights=weights)
        options = RemoteConfig(url=pipeline.url)
        return registry.build(options, model, spec.kernel, trace.catalogue, seed, task="recommend")

    with pytest.raises(ValueError, match=r"weights: random, seed 0\. Asked was weights: random, seed 3; set seed=0"):
        made(3).prepare(trace.requests, 1)
    with pytest.raises(ValueError, match=r"Asked was .* seed 3; ranker\.safetensors; set seed=0 model\.weights=null"):
        made(3, "ranker.safetensors").prepare(trace.requests, 1)
    made(0).prepare(trace.requests, 1)


def test_the_option_of_the_server_at_fault_is_named(server: Serving, pipeline: Serving) -> None:
    spec, trace = tiny_trace()
    for url, why in ((pipeline.url, "serves task=recommend on"), ("http://127.0.0.1:9", "nothing listens there")):
        options = RemoteConfig(url=server.url, more_urls=[url])
        engine = registry.build(options, spec.model, spec.kernel, trace.catalogue, 0)
        with pytest.raises((ValueError, UnavailableError), match=rf"^engine\.more_urls: {url}:? {why}"):
            engine.prepare(trace.requests, 1)


@pytest.mark.parametrize(
    "words, error",
    [
        (["engine=hstu", "serve.ports=1"], "serve.ports: no such key; nearest: port"),
        (["engine=hstu", "serve.http_port=1"], "serve.http_port: no such key; nearest: port"),
        (["engine=hstu", "serve.grcp_port=1"], "serve.grcp_port: no such key; nearest: grpc_port"),
        *(
            (
                ["engine=hstu", f"serve.api_key_file={path}"],
                f"{path}: ${{ refers to another option; for the text itself type 'serve.api_key_file=/d\\",
            )
            for path in ("/d${x}", "/d${")
        ),
        (["engine=hstu", "serve.port=-1"], "serve.port=-1: allowed is int >= 0 and <= 65535"),
        (["engine=hstuu"], "engine=hstuu: no such option"),
        (["engine=hstu", "retrieval.k=4"], "retrieval.k=4: task=rank searches for no items; set task=generate, or"),
        (
            ["engine=hstu", "engine.tensor_parallel=2", "serve.replicas=2"],
            "serve.replicas=2 and engine.tensor_parallel=2: a replica has one GPU; set one of them to 1",
        ),
        (["engine=hstu", "serve.host=0.0.0.0"], "serve.host=0.0.0.0: others could connect; give serve.api_key_file"),
        (["engine=hstu", "serve.tls_key_file=/dev/null"], "serve.tls_cert_file and serve.tls_key_file: give both"),
        (["deployment=none.yaml"], "none.yaml: No such file or directory; give a deployment file"),
        (["deployment=none.yaml", "engine=hstu"], "engine=hstu: deployment=FILE names the strategies"),
    ],
)
def test_a_wrong_command_is_refused(grbench_here: Grbench, words: list[str], error: str) -> None:
    done = grbench_here("serve", *words)
    assert done.returncode == 2
    assert error in done.stderr and done.stderr.count("\n") == 1


def test_what_a_cpu_lacks_is_refused_before_an_engine_starts_unless_another_strategy_serves(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    lacking = "this machine has no GPU, so device=auto is cpu: engine.precision=bf16 and engine.device=cpu: ONNX"
    bf16 = ["engine=onnxruntime", "engine.precision=bf16"]
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that no server starts
        port = f"serve.port={taken.getsockname()[1]}"

        def refusal(*words: str) -> str:
            done = grbench_here("serve", *words, port)
            assert done.returncode == 2 and done.stderr.count("\n") == 1
            return done.stderr

        assert refusal(*bf16).startswith(f"grbench serve: {lacking}")
        strategies: list[Any] = [{"name": "fast", "overrides": bf16}]
        deployment = {"version": 1, "task": "rank", "strategies": strategies}
        (tmp_path / "best.yaml").write_text(yaml.safe_dump(deployment))
        at = "grbench serve: best.yaml: strategies[0].overrides: "
        assert refusal("deployment=best.yaml").startswith(at + lacking)
        strategies.append({"name": "sure", "overrides": ["engine=hstu"]})
        (tmp_path / "best.yaml").write_text(yaml.safe_dump(deployment))
        assert port in refusal("deployment=best.yaml")
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        assert "with RAY_ADDRESS=10.0.0.1:6379 replicas are on" in refusal(*bf16, "serve.replicas=2")


def test_a_wrong_row_of_the_workload_ends_it_with_one_line(grbench_here: Grbench, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("userId,movieId,timestamp\n1,2,3\n1,x,soon\n")
    done = grbench_here(
        "serve", "engine=hstu", "workload=csv", "workload.path=e.csv", "serve.port=0", "serve.grpc_port=0"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("grbench serve: e.csv: row 3, column timestamp: 'soon' is not a")


def test_a_port_that_is_taken_is_named(grbench_here: Grbench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = grbench_here("serve", "engine=hstu", f"serve.port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "Address already in use; give another serve.port" in done.stderr


def counters(server: Serving) -> dict[str, float]:
    """The values of what may only rise: metrics with the names of counters and of Triton's counts and sums."""
    _, text, _ = server.call("/metrics")
    found = re.findall(r"^(\w+(?:_total|_count|_sum|_us)(?:{[^}]*})?) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found if "pending" not in name}


def test_signals_reload_and_end_it(tmp_path: Path) -> None:
    """SIGHUP reads the deployment again, SIGTERM ends it with 0; a request before, between and after is answered."""
    overrides = "".join(f"  - {word}\n" for word in [*TINY, "engine=hstu"])
    file = tmp_path / "best.yaml"
    text = f"version: 1\ntask: rank\nstrategies:\n- name: NAME\n  overrides:\n{overrides}"
    file.write_text(text.replace("NAME", "old"))
    process = fork_command(tmp_path, "serve", f"deployment={file}", "serve.port=0", "serve.grpc_port=null")
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(process.kill)
        lines = printed_lines(tmp_path / "err.txt", process)

        def until(event: str) -> dict[str, Any]:
            for line in lines:
                if (found := json.loads(line))["event"] == event:
                    return found  # type: ignore[no-any-return]
            raise AssertionError(f"it ended without {event}")

        server = Serving(until("listening")["port"], 0, None)  # type: ignore[arg-type]
        assert until("not certified")["strategies"] == ["old"]
        until("ready")
        assert server.call("/v2/models/hstu_tiny/infer", {"inputs": base()})[1]["parameters"]["strategy"] == "old"
        file.write_text(text.replace("NAME", "new"))
        os.kill(process.pid, signal.SIGHUP)
        counted = counters(server)
        until("reloaded")
        now = counters(server)
        assert counted['grbench_batches_total{strategy="old"}'] == 1
        assert not {name: value for name, value in counted.items() if now.get(name, 0.0) < value}
        assert server.call("/v2/models/hstu_tiny/infer", {"inputs": base()})[1]["parameters"]["strategy"] == "new"
        file.write_text("version: 3\ntask: rank\n")
        status, answer, _ = server.call("/reload", b"")
        assert status == 409 and "version=3: allowed is" in answer["error"] and "goes on" in answer["error"]
        assert server.call("/v2/models/hstu_tiny/infer", {"inputs": base()})[0] == 200
        os.kill(process.pid, signal.SIGTERM)
        until("ended")
        assert process.wait(60) == 0


@pytest.mark.usefixtures("forked_workers")
def test_a_deployment_of_ones_own_groups_is_served_from_another_folder(grbench_here: Grbench, tmp_path: Path) -> None:
    """A reload finds them too, and the line of a refused load names their folder."""
    own = tmp_path / "own"
    for group, base, options in (("workload", "synthetic", "items: 300"), ("model", "hstu", "layers: 1")):
        (own / group).mkdir(parents=True)
        text = f"defaults: [/schema/{group}/{base}@_here_, _self_]\nname: mine\n{options}\n"
        (own / group / "mine.yaml").write_text(text)
    words = [word for word in TINY if not word.startswith(("model=", "workload"))] + ["workload.visits=40"]
    words += ["model=mine", "workload=mine"]
    content = {"version": 1, "task": "rank", "strategies": [{"name": "a", "overrides": [*words, "engine=hstu"]}]}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(content | {"config_dir": str(own)}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    process = fork_command(elsewhere, "serve", "deployment=../best.yaml", "serve.port=0", "serve.grpc_port=null")
    try:
        said = map(json.loads, printed_lines(elsewhere / "err.txt", process))
        port = next(line["port"] for line in said if line["event"] == "listening")
        assert any(line["event"] == "ready" for line in said)
        served = Serving(port, 0, None, "mine")  # type: ignore[arg-type]
        assert served.call("/reload", b"")[0] == 200
        assert served.call("/status")[1]["config_dir"] == str(own)
        done = grbench_here("load", f"url={served.url}", *QUICK)
        assert done.returncode == 2 and "workload=mine" in done.stderr
        command = shlex.split(done.stderr.rstrip().split("; type python -m grbench ")[1])
        assert command[-2:] == ["--config-dir", str(own)]
        done = grbench_here(*command)
        assert done.returncode == 0, done.stderr
        [(_, record)] = read_cells([Path("outputs")])
        assert record.spec["workload"]["name"] == record.spec["model"]["name"] == "mine"
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_folder_of_ones_own_groups_is_typed_or_in_the_file(grbench_here: Grbench, tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("defaults: [/schema/model/hstu@_here_]\nname: mine\n")
    words = ["engine=hstu", "model=mine"]
    assert deployment_of(None, words, str(tmp_path / "own")).specs()["hstu"].model.name == "mine"
    done = grbench_here("serve", "--config-dir", "own", "deployment=best.yaml")
    folder = tmp_path / "own"
    said = f"--config-dir: deployment=FILE names the folder; write config_dir: {folder} into it"
    assert done.returncode == 2 and done.stderr == f"grbench serve: {said}\n"


def test_a_signal_ends_a_server_whose_engine_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may compile for minutes, on a thread that nothing can end."""
    monkeypatch.setattr(HSTUEngine, "prepare", lambda *given: time.sleep(600))
    process = fork_command(tmp_path, "serve", *TINY, "engine=hstu", "serve.port=0", "serve.grpc_port=null")
    try:
        lines = printed_lines(tmp_path / "err.txt", process)
        assert any(json.loads(line)["event"] == "starting" for line in lines)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
        assert [json.loads(line)["event"] for line in lines] == ["draining", "ended"]
    finally:
        process.kill()


def test_a_server_that_has_closed_its_engines_ends_at_once(tmp_path: Path) -> None:
    """Python's own end takes seconds in a process that has imported vLLM."""
    code = "import atexit, sys, time; from grbench.cli import main; atexit.register(time.sleep, 600); sys.exit(main())"
    words = ["serve", *TINY, "engine=hstu", "serve.port=0", "serve.grpc_port=null"]
    with subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, cwd=tmp_path) as process:
        try:
            assert process.stderr is not None
            assert any(json.loads(line)["event"] == "ready" for line in process.stderr)
            process.terminate()
            assert process.wait(60) == 0
            assert json.loads(process.stderr.readlines()[-1])["event"] == "ended"
        finally:
            process.kill()


def test_a_reload_times_no_kernels_beside_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_registry, "device_kind", lambda device: "cuda")
    asked = set()

    def times(*of: Any, known: bool) -> timing.Times:
        asked.add(known)
        return {"torch": 1.0}

    monkeypatch.setattr(timing, "times", times)
    with serving(*TINY, "engine=hstu", "engine.device=cpu") as s:
        assert asked == {False}
        asked.clear()
        assert s.call("/reload", b"")[0] == 200
        assert asked == {True}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text("a-long-secret\n")
    return file


@pytest.fixture(scope="module")
def locked(key: Path) -> Iterator[Serving]:
    with serving(*TINY, "engine=hstu", f"serve.api_key_file={key}") as s:
        yield s


def test_a_call_needs_the_key(locked: Serving, key: Path) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer"}):
        status, answer, _ = locked.call("/v2/models/hstu_tiny/infer", {"inputs": base()}, headers)
        assert status == 401 and answer["error"].startswith("authorization: allowed is")
    for path in ("/status", "/metrics", "/v2", "/v2/models/hstu_tiny"):
        assert locked.call(path)[0] == 401
    assert locked.call("/reload", b"")[0] == 401
    assert locked.call("/v2/health/ready")[0] == 200
    right = {"authorization": "Bearer a-long-secret"}
    assert locked.call("/v2/models/hstu_tiny/infer", {"inputs": base()}, right)[0] == 200
    with tritongrpc.InferenceServerClient(f"127.0.0.1:{locked.grpc_port}") as client:
        assert client.is_server_live()
        with pytest.raises(tritongrpc.InferenceServerException, match="UNAUTHENTICATED"):
            client.get_server_metadata()
        assert client.get_server_metadata(headers=right).name == "grbench"


def test_the_error_of_a_load_without_the_key_says_where_it_goes(locked: Serving) -> None:
    setup = cast(Setup, SimpleNamespace(catalogue=Catalogue(20, 500, 8), report=print))
    engine = RemoteRanker(RemoteConfig(url=f"http://127.0.0.1:{locked.port}"), setup)
    with pytest.raises(UnavailableError, match=r"set engine\.api_key_file=FILE, with one of its keys$"):
        engine.prepare([], 1)


@pytest.mark.parametrize("cache", ["none", "lru"])
def test_the_page_shows_strategies_latency_and_hits(trace: Any, cache: str) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or browser is None:
        pytest.skip("chromium or google-chrome, and chromedriver, are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    words = [*TINY, "engine=hstu", f"cache={cache}", "serve.grpc_port=null"]
    with serving(*words) as server, webdriver.Chrome(options, webdriver.ChromeService(driver)) as page:
        for _ in range(4):  # of one user, whose state is cached from the second call on
            assert server.infer(tensors_of(trace[1].requests[:1]))[0] == 200
        page.get(server.url)
        wait_until(lambda: page.find_element("id", "state").text == "ready")
        assert page.find_element("id", "model").text == "hstu_tiny, rank"
        assert page.find_element("id", "strategies").text.startswith("hstu ready hstu fp32 cpu")
        facts = page.find_element("id", "facts").text
        assert "calls answered 4\n" in facts and "p99" in facts
        assert f"state hits {'75.0% of 4' if cache == 'lru' else 'no cache'}\n" in facts
        assert page.find_element("id", "error").text == ""
