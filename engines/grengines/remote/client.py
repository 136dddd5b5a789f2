"""A typed client of `grbench serve`, over HTTP with binary tensors. It needs NumPy and the standard library.

client = Client("http://127.0.0.1:8000")
[scores] = client.rank([request]).scores
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from grengines.api import Float32Array, Int64Array, Request
from grengines.options import URLS, is_url, names_user, user_refused

Tensors = dict[str, npt.NDArray[Any]]
HEADER_LENGTH = "inference-header-content-length"
USER_HEADER = "x-user-id"  # of the first user of a call: a proxy sends the user to the replica with their state
REPORT_S = 5.0
NO_ANSWER = 0
UNKNOWN_CALLER = 401  # HTTP's status of a call without one of the server's keys
FOREIGN = 404  # HTTP's status for a path that the server lacks
NOT_READY = 503  # HTTP's status of a server that loads its models
DTYPES = {"INT64": np.int64, "FP32": np.float32}


class ServerError(RuntimeError):
    """The server has refused a call, or there is none. status: of HTTP, or NO_ANSWER."""

    def __init__(self, status: int, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class NobodyListensError(ServerError):
    """Nothing listens at the URL: the connection was refused, or there is no such host. To wait would be in vain."""


@dataclass(frozen=True)
class Answers:
    """The answers to the requests of one call."""

    scores: list[Float32Array]  # for each request, as the task's result has them in grengines.api
    items: list[Int64Array]  # for each request; empty for the task rank
    parameters: dict[str, Any]  # what ran: strategy, reason, queue_ms, compute_ms, ...


class Client:
    """A server. Threads may share a client: each has a connection of its own, which stays open."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        """Raises ValueError for another URL than http://HOST:PORT or https://HOST:PORT."""
        if not is_url(url):
            raise ValueError(user_refused("url") if names_user(url) else f"url={url}: allowed is {URLS}")
        parts = urlsplit(url)
        self.url, self._host, self._port = url.rstrip("/"), parts.hostname or "", parts.port
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._of_thread = threading.local()
        self._model: str | None = None

    def wait_until_ready(self, timeout_s: float, report: Callable[[str], None] = lambda line: None) -> None:
        """Return once the server serves. Raises ServerError after the time, and at once where nothing listens.

        A server listens before it loads its models, and answers meanwhile that it is not ready. report: takes a line at
        once and every REPORT_S while it waits: what is wrong, and the time left.
        """
        end, said = time.monotonic() + timeout_s, -math.inf
        while True:
            try:
                self._call("GET", "/v2/health/ready")
                return
            except NobodyListensError:
                raise
            except ServerError as e:
                left = end - time.monotonic()
                if left > 0 and time.monotonic() - said >= REPORT_S:
                    said = time.monotonic()
                    why = "it answers that it is not ready" if e.status == NOT_READY else e
                    report(f"waiting for the server, {left:.0f} s left ({why})")
                if left < 0:
                    raise ServerError(e.status, f"{self.url}: not ready within {timeout_s:g} s: {e}") from None
            time.sleep(0.1)

    def status(self) -> dict[str, Any]:
        """Return the server's state: its model, task, strategies and figures. Raises ServerError."""
        data = self._call("GET", "/status")[0]
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not (isinstance(found, dict) and "strategies" in found):
            raise ServerError(FOREIGN, f"{self.url}: it is no server of grbench")
        return found

    @property
    def model(self) -> str:
        """The name of the server's model."""
        if self._model is None:
            self._model = str(self.status()["model"])
        return self._model

    def rank(self, requests: Sequence[Request], deadline_ms: float | None = None) -> Answers:
        """Score the candidates of every request. Raises ServerError."""
        return self._infer(requests, True, deadline_ms)

    def generate(self, requests: Sequence[Request], deadline_ms: float | None = None) -> Answers:
        """Find the most likely next items of every request. Raises ServerError."""
        return self._infer(requests, False, deadline_ms)

    def recommend(self, requests: Sequence[Request], deadline_ms: float | None = None) -> Answers:
        """Find and rank items for every request. Raises ServerError."""
        return self._infer(requests, False, deadline_ms)

    def append(self, request: Request, version: int) -> int:
        """Append the events of the request's history to the user's state of this version. Returns the new version.

        Raises ServerError; with status 409 its message has the server's version.
        """
        tensors: Tensors = {
            "TOKENS": request.history_items,
            "ACTIONS": request.history_actions,
            "WEIGHTS": request.history_weights,
            "TIMESTAMPS": request.history_timestamps,
        }
        body, headers = body_of(tensors, {"user_id": request.user_id, "version": version})
        headers[USER_HEADER] = str(request.user_id)
        answer = json.loads(self._call("POST", f"/v2/models/{self.model}/append", body, headers)[0])
        return int(answer["version"])

    def _infer(self, requests: Sequence[Request], rank: bool, deadline_ms: float | None) -> Answers:
        parameters: dict[str, Any] = {"binary_data_output": True}
        if deadline_ms is not None:
            parameters["deadline_ms"] = deadline_ms
        body, headers = body_of(tensors_of(requests, rank), parameters)
        headers[USER_HEADER] = str(requests[0].user_id)
        data, found = self._call("POST", f"/v2/models/{self.model}/infer", body, headers)
        outputs, facts = _read(data, int(found[HEADER_LENGTH]))
        ends = np.cumsum(outputs["OUTPUT_LENGTHS"])[:-1]
        items = np.split(outputs["ITEMS"], ends) if "ITEMS" in outputs else []
        return Answers(np.split(outputs["OUTPUT"], ends), items, facts)

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, Message]:
        """Send a request, once more if the server has closed a connection that was idle. Raises ServerError."""
        for again in (False, True):
            connection = getattr(self._of_thread, "connection", None)
            fresh = connection is None
            if connection is None:
                connection = self._of_thread.connection = self._connect(self._host, self._port, timeout=self._timeout_s)
            try:
                connection.request(method, path, body, {**self._headers, **(headers or {})})
                answer = connection.getresponse()
                data = answer.read()
                break
            except (OSError, http.client.HTTPException) as e:
                connection.close()
                self._of_thread.connection = None
                if again or fresh or isinstance(e, TimeoutError):
                    if isinstance(e, ConnectionRefusedError | socket.gaierror):
                        raise NobodyListensError(
                            NO_ANSWER, f"{self.url}: nothing listens there ({e.strerror})"
                        ) from None
                    if isinstance(e, ConnectionError):
                        why = f"the server went away ({e.strerror or e})"
                    else:
                        why = f"{type(e).__name__}: {e}"
                    raise ServerError(NO_ANSWER, f"{self.url}: {why}") from None
        if answer.status != 200:
            after = answer.headers.get("retry-after-ms")
            raise ServerError(answer.status, _error_of(data), None if after is None else float(after) / 1e3)
        return data, answer.headers


def tensors_of(requests: Sequence[Request], rank: bool) -> Tensors:
    """Return the tensors of a call for these requests."""
    tokens = [part for r in requests for part in ((r.history_items, r.candidates) if rank else (r.history_items,))]
    events = [len(r.history_items) for r in requests]
    candidates = [len(r.candidates) if rank else 0 for r in requests]
    tensors = {
        "USER_IDS": np.array([r.user_id for r in requests], np.int64),
        "TOKEN_LENGTHS": np.add(events, candidates, dtype=np.int64),
        "TOKENS": np.concatenate(tokens),
        "ACTIONS": np.concatenate([r.history_actions for r in requests]),
        "WEIGHTS": np.concatenate([r.history_weights for r in requests]),
        "TIMESTAMPS": np.concatenate([r.history_timestamps for r in requests]),
        "REQUEST_TIMES": np.array([r.timestamp for r in requests], np.int64),
    }
    return tensors | ({"NUM_CANDIDATES": np.array(candidates, np.int64)} if rank else {})


def body_of(tensors: Mapping[str, npt.NDArray[Any]], parameters: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Return a call with binary tensors, and its headers."""
    inputs, blobs = [], []
    for name, tensor in tensors.items():
        blobs.append(np.ascontiguousarray(tensor).tobytes())
        kind = "FP32" if tensor.dtype == np.float32 else "INT64"
        inputs.append(
            {
                "name": name,
                "datatype": kind,
                "shape": list(tensor.shape),
                "parameters": {"binary_data_size": len(blobs[-1])},
            }
        )
    text = json.dumps({"inputs": inputs, "parameters": dict(parameters)}, separators=(",", ":")).encode()
    return b"".join([text, *blobs]), {HEADER_LENGTH: str(len(text))}


def _read(data: bytes, length: int) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and parameters of an answer."""
    content, at, outputs = json.loads(data[:length]), length, {}
    for output in content["outputs"]:
        size = output["parameters"]["binary_data_size"]
        values = np.frombuffer(data, DTYPES[output["datatype"]], offset=at, count=size // np.dtype(
            DTYPES[output["datatype"]]).itemsize)  # fmt: skip
        outputs[output["name"]] = values.reshape(output["shape"])
        at += size
    return outputs, content["parameters"]


def _error_of(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(data[:200].decode(errors="replace").split())  # a proxy answers with a page
