"""A server under load: a reload and an end lose no call, and memory stays."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers.command import Grbench
from helpers.serving import TINY, Serving, serving, tiny_trace, wait_until

from grbench.serve.load import as_run
from grengines.options import violations
from grengines.remote.client import Client, ServerError
from grengines.remote.config import RemoteConfig

WORDS = [*TINY, "engine=hstu", "cache=lru"]
CALLERS = 2
PAUSE_S = 0.02  # after each call: without it the callers take the core that the server reloads on


class Load:
    """Threads that call a server again and again. It has what was answered and what was not."""

    def __init__(self, server: Serving, requests: list[Any]) -> None:
        self._client, self._requests = Client(server.url), requests
        self._stop = threading.Event()
        self.answers: list[tuple[int, np.ndarray]] = []  # position of the request, scores
        self.errors: list[ServerError] = []
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(CALLERS)]

    def _run(self, position: int) -> None:
        while not self._stop.is_set():
            position = (position + CALLERS) % len(self._requests)
            try:
                scores = self._client.rank([self._requests[position]]).scores[0]
                self.answers.append((position, scores))
            except ServerError as e:
                self.errors.append(e)
            time.sleep(PAUSE_S)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)


@pytest.fixture(scope="module")
def requests() -> list[Any]:
    return list(tiny_trace()[1].requests[:40])


def right(load: Load, expected: list[np.ndarray]) -> bool:
    return all(np.allclose(scores, expected[i], rtol=1e-4, atol=1e-5) for i, scores in load.answers)


def test_a_reload_under_load_loses_no_call(requests: list[Any]) -> None:
    with serving(*WORDS) as server:
        expected = [Client(server.url).rank([r]).scores[0] for r in requests]
        load = Load(server, requests)
        with load.running():
            wait_until(lambda: len(load.answers) > 20)
            status, answer, _ = server.call("/reload", b"")
            after = len(load.answers)
            wait_until(lambda: len(load.answers) > after + 20)
        assert (status, answer) == (200, {"reload": "serving hstu"})
        assert load.errors == [] and right(load, expected)


def test_an_end_under_load_answers_what_it_has_taken(requests: list[Any]) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(*WORDS))
        expected = [Client(server.url).rank([r]).scores[0] for r in requests]
        load = Load(server, requests)
        with load.running():
            wait_until(lambda: len(load.answers) > 20)
            stack.close()
            wait_until(lambda: len(load.errors) > CALLERS)
        assert right(load, expected)
        events = [e["event"] for e in server.events()]
        assert events[-2:] == ["draining", "ended"] or events[-1] == "ended"
        # A call is refused in one line, or finds no server: none is cut off while it is answered.
        assert {e.status for e in load.errors} <= {0, 503}
        assert all("refused" in str(e) for e in load.errors if e.status == 0)


@pytest.mark.serial
def test_memory_stays_over_many_calls(requests: list[Any]) -> None:
    with serving(*WORDS, "serve.gate_share=0", "serve.state_users=50") as server:
        client, process = Client(server.url), psutil.Process()

        def call(times: int) -> int:
            for i in range(times):
                client.rank(requests[i % 8 : i % 8 + 16])
            return int(process.memory_info().rss)

        before = call(60)  # the caches fill, and the allocators keep what they need
        after = call(200)
        assert after - before < 8e6, f"{(after - before) / 1e6:.1f} MB more after 3200 requests"


@pytest.mark.parametrize("line", ["url=foo", "-m seed=0,1 url=foo", "seed=1 --config-dir . url=foo"])
def test_a_url_that_is_none_is_refused_before_anything_runs(grbench_here: Grbench, tmp_path: Path, line: str) -> None:
    done = grbench_here("load", *line.split())
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.rglob("record.json"))
    assert done.stderr.startswith(
        "grbench load: engine.url=foo: allowed is http://HOST:PORT or https://HOST:PORT, such as http://127.0.0.1:8000"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["load", "url=http://me:secret@127.0.0.1:8000"],
        ["load", "url=[http://127.0.0.1:8000,http://me:secret@127.0.0.1:8001]"],
        ["load", "url=http://me:#secret,@127.0.0.1:8000"],
        ["-m", "engine=remote", "engine.url=http://127.0.0.1:8000,http://me:secret@127.0.0.1:8001"],
        ["tune", "engine=remote", "engine.url=http://me:secret@127.0.0.1:8000"],
    ],
)
def test_a_url_with_a_password_is_refused_and_not_repeated(
    grbench_here: Grbench, tmp_path: Path, words: list[str]
) -> None:
    done = grbench_here(*words)
    assert done.returncode == 2 and "secret" not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "engine.api_key_file=FILE" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


def test_a_url_with_a_password_is_refused_where_it_is_not_typed() -> None:
    url = "http://me:secret@127.0.0.1:8000"
    for line in violations(RemoteConfig(url=url, more_urls=[url])):
        assert "api_key_file" in line and "secret" not in line
    assert len(list(violations(RemoteConfig(url=url, more_urls=[url])))) == 2
    with pytest.raises(ValueError, match="a URL with a user") as refused:
        Client(url)
    assert "secret" not in str(refused.value)


def load(grbench: Grbench, url: str, wait_s: float, *more: str) -> Any:
    """Measure a server that does not serve."""
    words = [f"url={url}", f"engine.timeout_s={wait_s}", "workload=synthetic", "workload.visits=60", "tracking=none"]
    return grbench("load", *words, "model=hstu_tiny", "scenario.queries=8", *more)


def test_a_server_that_never_answers_is_refused_before_anything_is_recorded(
    grbench_here: Grbench, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # it takes connections, and nothing else
        for port, wait_s, why in ((9, 600, "nothing listens there (Connection refused)"), (0, 0.2, "TimeoutError: ")):
            url = f"http://127.0.0.1:{port or deaf.getsockname()[1]}"
            done = load(grbench_here, url, wait_s)
            assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.rglob("record.json"))
            assert f"engine.url: {url}: {why}" in done.stderr
            assert done.stderr.endswith("; start one: grbench serve engine=hstu\n")


def test_what_is_no_server_of_grbench_is_refused(grbench_here: Grbench, tmp_path: Path) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        done = grbench_here("load", f"url=http://127.0.0.1:{other.server_port}")
        other.shutdown()
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert "it is no server of grbench; start one: grbench serve engine=hstu" in done.stderr


def test_what_a_server_does_not_serve_is_refused_once_it_has_loaded(grbench_here: Grbench, tmp_path: Path) -> None:
    """While it loads its models, it does not say what it serves. The refusal has the whole command."""

    class Loading(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            if self.path == "/v2/health/ready":
                Loading.asked += 1
                self.send_response(503 if Loading.asked == 1 else 200)
                self.end_headers()
                return
            ranker = {"name": "hstu", "engine": "hstu", "precision": "fp32", "weights": "/w.safetensors"}
            strategies = [ranker | {"model": "hstu_tiny"}] if Loading.asked > 1 else []
            status = {"task": "rank", "model": "hstu_tiny", "workload": "synthetic", "strategies": strategies}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(status).encode())

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Loading) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = load(grbench_here, url, wait_s=200)
        server.shutdown()
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.rglob("record.json"))
    waiting, refused = done.stderr.splitlines()
    assert re.match(r"grbench load: waiting for the server, \d+ s left", waiting)
    assert f"Asked was weights: random, seed 0; type python -m grbench load url={url} " in refused
    assert refused.endswith(" model.weights=/w.safetensors")


@pytest.mark.parametrize("has_status", [True, False])
def test_a_server_that_never_gets_ready_is_waited_for_once_in_words(
    grbench_forked: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_status: bool
) -> None:
    """A proxy has no status while none of its servers is ready."""

    class Starting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/status" or not has_status:
                self.send_error(503)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"strategies": []}).encode())

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.chdir(tmp_path)
    with HTTPServer(("127.0.0.1", 0), Starting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = load(grbench_forked, url, 2, "-m", "seed=0,1")
        server.shutdown()
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.rglob("record.json"))
    waiting, refused = done.stderr.splitlines()
    assert re.fullmatch(r"grbench load: waiting for the server, \d s left \(it answers that it is not ready\)", waiting)
    assert refused.startswith(f"grbench load: engine.url: {url}: not ready within 2 s: ")
    assert refused.endswith("; look into its log, set engine.timeout_s to wait longer, or start one: "
                            "grbench serve engine=hstu")  # fmt: skip


@pytest.mark.parametrize(
    "study, added",
    [
        ("latency_limit_ms: 9", ["scenario.max_batch=1", "scenario.in_flight=64", "gate.quality_requests=0"]),
        ("gate: {quality_requests: 128}", ["scenario.max_batch=1", "scenario.in_flight=64"]),  # as by default
        ("gate: {quality_requests: '${workload.visits}'}", ["scenario.max_batch=1", "scenario.in_flight=64"]),
        ("scenario: {mode: accuracy, max_batch: 8}", ["scenario.in_flight=64"]),
        (
            "hydra: {sweeper: {params: {scenario.in_flight: '1,2'}}}",
            ["scenario.max_batch=1", "gate.quality_requests=0"],
        ),
        (
            "defaults: [deeper@_global_: a]\nhydra: {sweeper: {params: {study/deeper@_global_: 'a,b'}}}",
            ["scenario.max_batch=1", "scenario.in_flight=64"],
        ),
    ],
)
def test_what_a_study_sets_stays_in_a_load(tmp_path: Path, study: str, added: list[str]) -> None:
    files = {"mine": study, "deeper/a": "seed: 1", "deeper/b": "gate: {quality_requests: 9}"}
    (tmp_path / "study" / "deeper").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "study" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    words = ["-m", "study=mine", "--config-dir", str(tmp_path), "seed=0"]
    assert as_run(["url=http://a:1", *words]) == ["engine=remote", "engine.url=http://a:1", *added, *words]
