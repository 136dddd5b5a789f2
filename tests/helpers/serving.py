"""A server in this process, on a thread, and calls to it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from grbench.config.compose import compose_spec
from grbench.deployment import Deployment
from grbench.serve.logs import Log
from grbench.serve.options import deployment_of, parse
from grbench.serve.server import serve
from helpers.checkout import ROOT

TINY = [
    "model=hstu_tiny", "workload=synthetic", "workload.users=20", "workload.visits=40", "workload.items=500",
    "workload.history_median=12", "workload.max_history=48", "workload.num_candidates=8", "warmup_batches=1",
    "scenario.max_batch=4", "gate.requests=2", "latency_limit_ms=5000",
]  # fmt: skip
SEARCH = ["retrieval.k=4", "retrieval.beam_width=8"]  # of a task that searches
START_S = 120.0


@cache
def _schema() -> dict[str, Any]:
    return dict(json.loads((ROOT / "docs" / "serving.schema.json").read_text(encoding="utf-8")))


def misfit(name: str, content: Any) -> str:
    """Say where a call, answer or refusal is not as docs/serving.schema.json has it; nothing if it is."""
    error = best_match(Draft202012Validator(_schema() | {"$ref": f"#/$defs/{name}"}).iter_errors(content))
    return f"{error.json_path}: {error.message}" if error else ""


@dataclass
class Serving:
    """A server that runs: its addresses, its log, and the name of its model."""

    port: int
    grpc_port: int
    log: io.StringIO
    model: str = "hstu_tiny"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Send a request; a body makes it a POST. Returns the status, the JSON or text, and the headers."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=200)) as connection:
            with contextlib.suppress(ConnectionError):  # refused while it was sent: the answer says why
                connection.request("GET" if data is None else "POST", path, data, dict(headers or {}))
            response = connection.getresponse()
            status, text, found = response.status, response.read(), response.headers
        if found.get("content-type") != "application/json":
            return status, text.decode(errors="replace"), found
        answer = json.loads(text)
        if path.endswith("/infer"):  # every call of a test, and its answer, are as the schema for clients says
            if status == 200 and isinstance(body, dict):
                assert not misfit("call", body)
            assert not misfit("answer" if status == 200 else "refusal", answer)
        return status, answer, found

    def infer(self, tensors: Mapping[str, np.ndarray], **parameters: Any) -> tuple[int, Any, Mapping[str, str]]:
        return self.call(f"/v2/models/{self.model}/infer", {"inputs": as_json(tensors), "parameters": parameters})

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 if there is none with these labels."""
        _, text, _ = self.call("/metrics")
        for line in text.splitlines():
            key, _, value = line.rpartition(" ")
            if key.partition("{")[0] == name and all(f'{k}="{v}"' in key for k, v in labels.items()):
                return float(value)
        return 0.0

    def events(self) -> list[dict[str, Any]]:
        """The log so far."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def as_json(tensors: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Tensors as inputs of a JSON call."""
    kinds = {"i": "INT64", "f": "FP32"}
    return [
        {"name": n, "shape": list(a.shape), "datatype": kinds[a.dtype.kind], "data": a.ravel().tolist()}
        for n, a in tensors.items()
    ]


def tensors_of(requests: Sequence[Any], task: str = "rank") -> dict[str, np.ndarray]:
    """Requests of a trace as the tensors of one call."""
    rank = task == "rank"
    tokens = [np.concatenate([r.history_items, r.candidates]) if rank else r.history_items for r in requests]
    tensors = {
        "USER_IDS": np.array([r.user_id for r in requests]),
        "TOKEN_LENGTHS": np.array([len(t) for t in tokens]),
        "TOKENS": np.concatenate(tokens),
        "ACTIONS": np.concatenate([r.history_actions for r in requests]),
        "WEIGHTS": np.concatenate([r.history_weights for r in requests]),
        "TIMESTAMPS": np.concatenate([r.history_timestamps for r in requests]),
        "REQUEST_TIMES": np.array([r.timestamp for r in requests]),
    }
    return tensors | ({"NUM_CANDIDATES": np.array([len(r.candidates) for r in requests])} if rank else {})


@contextlib.contextmanager
def serving(*words: str, deployment: Deployment | None = None, port: int = 0) -> Iterator[Serving]:
    """Serve one strategy of overrides, or a deployment, until the block ends. It waits until the server is ready."""
    config, file, overrides = parse(["serve.port=0", "serve.grpc_port=0", *words])
    served = deployment or deployment_of(file, overrides)
    listener = socket.create_server(("127.0.0.1", port))
    log, failed = io.StringIO(), []
    loop_of: dict[str, Any] = {}

    async def run() -> None:
        loop_of["ended"], loop_of["loop"] = asyncio.Event(), asyncio.get_running_loop()
        await serve(served, file, config, Log(log), listener, lambda: served, loop_of["ended"])

    def target() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the command does
                runner.run(run())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    running = Serving(listener.getsockname()[1], 0, log)
    try:
        wait_until(lambda: bool(failed) or any(e["event"] == "ready" for e in running.events()), START_S)
        if failed:
            raise failed[0]
        running.grpc_port = next(e["grpc_port"] for e in running.events() if e["event"] == "listening")
        yield running
    finally:
        loop_of["loop"].call_soon_threadsafe(loop_of["ended"].set)
        thread.join(60)
        listener.close()


def wait_until(true: Any, limit_s: float = 120.0) -> None:
    """Wait until a condition holds. Fails after the limit."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, f"it was not so within {limit_s:g} s"
        time.sleep(0.02)


def tiny_trace(*words: str) -> Any:
    """The spec and the trace of the tiny workload."""
    from grbench import workloads

    spec, _ = compose_spec([*TINY, "engine=hstu", *words])
    return spec, workloads.build(spec.workload, spec.seed, spec.latency_limit_ms)


def items_come_with_their_scores(*engine: str) -> None:
    """Serve a retriever or a pipeline, ask for two users' items, and check the form of the answer."""
    spec, trace = tiny_trace()
    task = "generate" if "task=generate" in engine else "recommend"
    with serving(*TINY, *SEARCH, *engine, "serve.grpc_port=null") as server:
        status, answer, _ = server.infer(tensors_of(trace.requests[:2], task))
        assert status == 200
        outputs = {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}
        assert outputs["OUTPUT_LENGTHS"].tolist() == [4, 4]
        assert outputs["ITEMS"].shape == (8,) and len(set(outputs["ITEMS"][:4].tolist())) == 4
        assert outputs["OUTPUT"].shape == ((8,) if task == "generate" else (8, len(spec.ranking_model.tasks)))
        best = outputs["OUTPUT"][:4] if task == "generate" else outputs["OUTPUT"][:4, 0]
        assert (np.diff(best) <= 0).all()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Files with a certificate for localhost, which signs itself, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key
