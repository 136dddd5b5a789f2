"""Replicas behind HAProxy: a user comes back to one replica, and one that is lost harms no call."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as tritonhttp
import yaml
from helpers.command import Grbench
from helpers.properties import PROFILE
from helpers.ray_cluster import LOCAL_ONLY
from helpers.serving import TINY, Serving, certificate, serving, tensors_of, tiny_trace, wait_until
from tritonclient.utils import InferenceServerException

from grbench.config.arguments import CommandError
from grbench.serve import replicas
from grbench.serve.haproxy import OWNER_HEADER, Address, Proxy, configuration
from grbench.serve.options import ServeConfig, parse
from grbench.serve.replicas import Replica, words_of
from grengines.remote.client import Client

ROOT = Path(__file__).parents[2]
needs_haproxy = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
WORDS = [*TINY, "engine=hstu"]
USERS = 200
BUFFER = 131072  # bytes of a call that HAProxy takes before it chooses a replica


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


class _Named(http.server.BaseHTTPRequestHandler):
    """Answers with its port and what HAProxy says about the user's replica."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers
    held: queue.SimpleQueue[int] = queue.SimpleQueue()  # ports of the servers that a call at /held keeps busy

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/held":
            self.held.put(self.server.server_address[1])
            self.server.released.wait(120)  # type: ignore[attr-defined]
        status = 503 if self.path == f"/not_at/{self.server.server_address[1]}" else 200
        self._answer(f"{self.server.server_address[1]} {self.headers[OWNER_HEADER]}".encode(), status)

    def _answer(self, body: bytes, status: int = 200) -> None:
        with contextlib.suppress(ConnectionError):  # a health check does not wait for it
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def named() -> Iterator[list[Address]]:
    """Three small servers."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Named) for _ in range(3)]
    for server in servers:
        server.daemon_threads = True
        server.released = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [Address(i, "127.0.0.1", s.server_address[1], None) for i, s in enumerate(servers, 1)]
    for server in servers:
        server.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def proxied(folder: Path, addresses: list[Address]) -> Iterator[tuple[Proxy, ServeConfig]]:
    port, grpc_port, stats = free_ports(3)
    config = ServeConfig(port=port, grpc_port=grpc_port if addresses[0].grpc_port else None, stats_port=stats)
    proxy = Proxy(folder / "haproxy.cfg", configuration(config, addresses))
    try:
        wait_until(lambda: up(config) == len(addresses))
        yield proxy, config
    finally:
        proxy.close(5)


def up(config: ServeConfig) -> int:
    """Return how many replicas HAProxy finds healthy, by its metrics."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{config.stats_port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    except OSError:
        return 0
    return sum(
        line.startswith('haproxy_server_status{proxy="replicas"') and 'state="UP"' in line and line.endswith(" 1")
        for line in text.splitlines()
    )


def in_flight(config: ServeConfig, backend: str) -> int:
    """Return the calls that the servers of a backend have, by HAProxy's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{config.stats_port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    name = f'haproxy_server_current_sessions{{proxy="{backend}",'
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))


def routed(reason: str, *servers: Serving) -> int:
    """Return the calls that servers count for this reason."""
    return int(sum(server.metric("grbench_route_total", reason=reason) for server in servers))


def placed(config: ServeConfig) -> dict[int, tuple[str, str]]:
    """Return for each user the server that answers, and the number of the user's replica."""
    wait_until(lambda: in_flight(config, "replicas") == 0)  # a thread of HAProxy may not have ended the last call yet
    connection, found = http.client.HTTPConnection("127.0.0.1", config.port, timeout=120), {}
    for user in range(USERS):
        connection.request("POST", "/", b"x", {"x-user-id": str(user)})
        server, before = connection.getresponse().read().decode().split()
        found[user] = server, before
    return found


@needs_haproxy
def test_a_user_stays_and_few_move_when_a_replica_joins(tmp_path: Path, named: list[Address]) -> None:
    numbers = {str(a.port): str(a.number) for a in named}
    with proxied(tmp_path, named[:2]) as (proxy, config):
        first, again = placed(config), placed(config)
        assert [server for server, _ in first.values()] == [server for server, _ in again.values()]
        assert {before for _, before in first.values()} == {"0"}
        assert all(numbers[server] == before for server, before in again.values())
        assert {numbers[server] for server, _ in first.values()} == {"1", "2"}
        proxy.replace(configuration(config, named))
        wait_until(lambda: up(config) == 3)
        later = placed(config)
        moved = [user for user in range(USERS) if later[user][0] != first[user][0]]
        assert USERS / 6 < len(moved) < USERS / 2  # a third of them, within chance
        assert {numbers[later[user][0]] for user in moved} == {"3"}


@needs_haproxy
def test_a_user_may_be_named_in_the_url(tmp_path: Path, named: list[Address]) -> None:
    """The header counts where both are there, and an empty name is none."""
    with proxied(tmp_path, named) as (_, config):
        by_header = placed(config)
        connection = http.client.HTTPConnection("127.0.0.1", config.port, timeout=20)
        for path, headers, place in (
            *((f"/?a=b&x-user-id={user}", {}, by_header[user][0]) for user in range(40)),
            *((f"/?x-user-id={user + 1}", {"x-user-id": str(user)}, by_header[user][0]) for user in range(20)),
            *(("/?x-user-id=", {}, "") for _ in range(3)),
        ):
            connection.request("POST", path, b"x", headers)
            server, before = connection.getresponse().read().decode().split()
            assert server == (place or server) and (before == "None") is (place == "")


@needs_haproxy
def test_a_call_without_a_user_goes_to_the_replica_with_the_fewest_calls(tmp_path: Path, named: list[Address]) -> None:
    with proxied(tmp_path, named[:2]) as (_, config), contextlib.ExitStack() as stack:

        def post(path: str) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection("127.0.0.1", config.port, timeout=120)
            connection.request("POST", path, b"x")
            return stack.enter_context(contextlib.closing(connection))

        post("/held")
        busy = _Named.held.get(timeout=120)
        for _ in range(6):
            found = int(post("/").getresponse().read().split()[0])
            assert found in {address.port for address in named[:2]} - {busy}
            wait_until(lambda: in_flight(config, "any_replica") == 1)  # HAProxy has ended the call too


@needs_haproxy
@pytest.mark.parametrize("headers", [{}, {"x-user-id": "7"}])
def test_a_call_that_gets_503_is_answered_by_another_replica(
    tmp_path: Path, named: list[Address], headers: dict[str, str]
) -> None:
    with proxied(tmp_path, named[:2]) as (_, config):
        ports = [address.port for address in named[:2]]
        for refusing, other in (ports, ports[::-1]):
            connection = http.client.HTTPConnection("127.0.0.1", config.port, timeout=120)
            with contextlib.closing(connection):
                connection.request("POST", f"/not_at/{refusing}", b"x", headers)
                answer = connection.getresponse()
                assert (answer.status, int(answer.read().split()[0])) == (200, other)


@needs_haproxy
def test_users_of_a_lost_replica_are_answered_and_come_back(tmp_path: Path) -> None:
    _, trace = tiny_trace()
    requests = list(trace.requests[:24])
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(*WORDS, "serve.replica=1"))
        lost = contextlib.ExitStack()
        second = lost.enter_context(serving(*WORDS, "serve.replica=2"))
        addresses = [Address(i, "127.0.0.1", s.port, s.grpc_port) for i, s in enumerate((first, second), 1)]
        _, config = stack.enter_context(proxied(tmp_path, addresses))
        client = Client(f"http://127.0.0.1:{config.port}")

        def answers() -> list[np.ndarray]:
            return [client.rank([request]).scores[0] for request in requests]

        expected = answers()
        over_grpc = triton.InferenceServerClient(f"127.0.0.1:{config.grpc_port}")
        wait_until(lambda: _is_ready(over_grpc))
        users = {r.user_id for r in requests}
        assert routed("new", first, second) == len(users)
        answers()
        assert routed("moved", first, second) == routed("spill", first, second) == 0
        assert routed("owner", first) and routed("owner", second)
        before = routed("owner", first, second)
        _rank_by_grpc(over_grpc, requests[0])
        assert routed("owner", first, second) == before + 1  # a user's replica is the same by HTTP and gRPC
        over_grpc.close()
        _rank_by_http(config.port, requests[0])
        assert routed("owner", first, second) == before + 2
        lost.close()  # while HAProxy still holds connections to it
        for found, known in zip(answers(), expected, strict=True):
            np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-6)
        assert routed("moved", first) > 0
        second = stack.enter_context(serving(*WORDS, "serve.replica=2", port=second.port))
        wait_until(lambda: up(config) == 2)
        answers()
        assert routed("moved", second) > 0  # its users are back


@needs_haproxy
def test_a_replica_with_its_share_of_the_calls_passes_the_rest_on(tmp_path: Path) -> None:
    """Calls of one user whose bodies do not end keep the user's replica busy."""
    _, trace = tiny_trace()
    request = trace.requests[0]
    with contextlib.ExitStack() as stack:
        words = [*WORDS, "serve.grpc_port=null", "serve.body_timeout_s=60"]
        servers = [stack.enter_context(serving(*words, f"serve.replica={i}")) for i in (1, 2)]
        addresses = [Address(i, "127.0.0.1", s.port, None) for i, s in enumerate(servers, 1)]
        _, config = stack.enter_context(proxied(tmp_path, addresses))
        client = Client(f"http://127.0.0.1:{config.port}")
        client.rank([request])
        [own] = [s for s in servers if routed("new", s)]
        [other] = [s for s in servers if s is not own]
        held = contextlib.ExitStack()
        for count in (1, 2, 3):  # of three calls at least two go to the user's replica
            connection = socket.create_connection(("127.0.0.1", config.port))
            held.callback(connection.close)
            size = 2 * BUFFER
            head = f"POST /v2/models/hstu_tiny/infer HTTP/1.1\r\nhost: localhost\r\nx-user-id: {request.user_id}\r\n"
            connection.sendall(f"{head}content-length: {size}\r\n\r\n".encode() + b" " * (size - 1))
            wait_until(lambda count=count: in_flight(config, "replicas") == count)
        counted = {reason: routed(reason, *servers) for reason in ("owner", "spill", "moved")}
        expected = client.rank([request]).scores[0]
        changed = {reason: routed(reason, *servers) - before for reason, before in counted.items()}
        assert routed("spill", other) >= 1 and not routed("spill", own) and changed["moved"] == 0
        assert changed["owner"] + changed["spill"] == 1
        held.close()
        wait_until(lambda: in_flight(config, "replicas") == 0)
        before = routed("owner", own)
        np.testing.assert_allclose(client.rank([request]).scores[0], expected, rtol=1e-5, atol=1e-6)
        assert routed("owner", own) == before + 1 and routed("moved", *servers) == 0  # the user has stayed its own


def test_a_replica_has_ports_of_its_own() -> None:
    words = ["engine=hstu", "serve.replicas=2", "serve.port=9000", "serve.tls_cert_file=c", "serve.max_queue=5"]
    given = words_of([*words, "serve.host=0.0.0.0"], ServeConfig(replica_port=8100, grpc_port=8001), 2)
    config, _, overrides = parse(given)
    assert (config.port, config.grpc_port, config.replica, config.replicas) == (8102, 8103, 2, 1)
    assert config.max_queue == 5 and config.tls_cert_file is None and overrides == ["engine=hstu"]


@pytest.mark.parametrize("is_spread, host", [(False, "127.0.0.1"), (True, "10.0.0.5")])
def test_a_replica_listens_where_haproxy_reaches_it_and_reads_its_words_once(
    monkeypatch: pytest.MonkeyPatch, is_spread: bool, host: str
) -> None:
    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.5")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(util=util))
    reads: list[Sequence[str]] = []
    monkeypatch.setattr(replicas, "parse", lambda words: (reads.append(words), parse(words))[1])
    replica = Replica(1, words_of(["serve.host=0.0.0.0"], ServeConfig(), 1), None, is_spread)
    assert replica.address() == replica.address() == Address(1, host, 8100, 8101) and len(reads) == 1


@pytest.mark.parametrize(
    "outcome, restarted, ends",
    [(0, False, False), (1, False, True), (RuntimeError("no GPU"), True, True), (RuntimeError("no GPU"), False, None)],
)
def test_the_process_of_a_replica_ends_where_another_one_may_serve(
    monkeypatch: pytest.MonkeyPatch, outcome: int | RuntimeError, restarted: bool, ends: bool | None
) -> None:
    """Ray then starts another. An error of the first start is the command's, and ends it."""
    known = SimpleNamespace(was_current_actor_reconstructed=restarted)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: known)
    monkeypatch.setitem(sys.modules, "ray", ray)

    async def serve(*given: Any) -> int:
        if isinstance(outcome, RuntimeError):
            raise outcome
        return outcome

    codes: list[int] = []
    monkeypatch.setattr("grbench.serve.server.serve", serve)
    monkeypatch.setattr(os, "_exit", codes.append)
    [port] = free_ports(1)
    words = words_of(["engine=hstu"], ServeConfig(replica_port=port, grpc_port=None), 1)
    with pytest.raises(RuntimeError, match="no GPU") if ends is None else contextlib.nullcontext():
        asyncio.run(Replica(1, words, None, False).run())
    assert codes == ([1] if ends else [])


def test_a_replica_finds_ones_own_groups(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [/schema/model/hstu@_here_]\nname: mine\nlayers: 1\n")
    [port] = free_ports(1)
    words = [*TINY, "engine=hstu", "model=mine"]
    replica = Replica(1, words_of(words, ServeConfig(replica_port=port, grpc_port=None), 1), str(tmp_path), False)
    client = Client(f"http://127.0.0.1:{port}")

    async def run() -> None:
        running = asyncio.create_task(replica.run())
        asked = asyncio.create_task(asyncio.to_thread(client.wait_until_ready, 60))
        await asyncio.wait([running, asked], return_when=asyncio.FIRST_COMPLETED)
        replica.end()
        await running

    asyncio.run(run())


@pytest.mark.parametrize(
    "words, said",
    [([], "serve.host=127.0.0.1: with RAY_ADDRESS=10.0.0.1:6379 replicas are on other machines"),
     (["serve.host=::1"], "serve.host=::1: with RAY_ADDRESS"),
     (["serve.host=0.0.0.0", "serve.api_key_file={keys}", "serve.tls_cert_file={cert}", "serve.tls_key_file={key}"],
      "without TLS; unset RAY_ADDRESS, or leave TLS out")],
)  # fmt: skip
def test_options_that_do_not_fit_several_machines_are_refused(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    (tmp_path / "keys").write_text("a-long-secret")
    cert, key = certificate(tmp_path)
    files = {"cert": cert, "key": key, "keys": tmp_path / "keys"}
    result = grbench_here("serve", *WORDS, "serve.replicas=2", *(word.format(**files) for word in words))
    assert result.returncode == 2 and said in result.stderr


class _Ray:
    """A stand-in for Ray. What an actor's method returns is a thing that `wait` finds done, unless it is None."""

    exceptions = SimpleNamespace(RayActorError=LookupError)
    remote: Any

    def __init__(self, *nodes: dict[str, float]) -> None:
        self.nodes = lambda: [{"Alive": True, "Resources": resources} for resources in nodes]
        self.waits = 0

    def wait(self, asked: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        time.sleep(0.02 * (None in asked))
        return [one for one in asked if one is not None], [one for one in asked if one is None]

    def get(self, asked: Any) -> Any:
        if isinstance(asked, Exception):
            raise asked
        return asked


def actors(*answers: Any) -> list[Any]:
    """Return a stand-in for each replica, which answers this when it is asked for its address."""
    return [SimpleNamespace(address=SimpleNamespace(remote=lambda answer=answer: answer)) for answer in answers]


@pytest.mark.parametrize("resources, what", [({"CPU": 2.0}, "processors"), ({"CPU": 8.0, "GPU": 2.0}, "GPUs")])
def test_more_replicas_than_the_cluster_has_room_for_are_refused(resources: dict[str, float], what: str) -> None:
    with pytest.raises(CommandError, match=f"serve.replicas=3: each takes one of the {what}, and there are 2"):
        replicas._actor(_Ray(resources, {"memory": 1.0}), 3)


def test_replicas_on_nodes_of_different_sizes_have_room_and_equal_cores() -> None:
    ray, asked = _Ray({"CPU": 8.0}, {"CPU": 4.0}), dict[str, Any]()
    ray.remote = lambda replica: SimpleNamespace(options=lambda **options: asked.update(options))
    replicas._actor(ray, 2)
    assert (asked["num_cpus"], asked["num_gpus"]) == (4, 0)  # six would fit on one node only
    with_gpus = _Ray({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 2.0})
    with_gpus.remote = ray.remote
    replicas._actor(with_gpus, 2)
    assert (asked["num_cpus"], asked["num_gpus"]) == (0, 1)
    assert asked["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"  # Ray may take any of the GPUs


def test_a_replica_that_does_not_start_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    first, ending = Address(1, "127.0.0.1", 8100, 8101), threading.Event()
    second = Address(2, "127.0.0.1", 8102, 8103)
    assert replicas._started(_Ray(), actors(second, first), ending) == [first, second]
    monkeypatch.setattr(replicas, "START_S", 0.01)
    with pytest.raises(CommandError, match="1 of 2 replicas have not started"):
        replicas._started(_Ray(), actors(first, None), ending)
    ending.set()
    assert replicas._started(_Ray(), actors(None, None), ending) == []


def test_replicas_are_asked_together_and_one_that_restarts_stays_where_it_was() -> None:
    before = [Address(n, "10.0.0.1", 8098 + 2 * n, None) for n in (1, 2, 3)]
    moved, ray = Address(1, "10.0.0.2", 8100, None), _Ray()
    assert replicas._now(ray, actors(moved, None, LookupError()), before) == [moved, *before[1:]]
    assert ray.waits == 1


@needs_haproxy
def test_a_reload_of_one_replica_is_refused(tmp_path: Path, named: list[Address]) -> None:
    with proxied(tmp_path, named) as (_, config):
        for path in ("/reload", "/%72eload", "/reload?now"):
            connection = http.client.HTTPConnection("127.0.0.1", config.port, timeout=120)
            with contextlib.closing(connection):  # HAProxy ends once no connection is open
                connection.request("POST", path, b"")
                answer = connection.getresponse()
                assert answer.status == 403 and "send SIGHUP" in json.loads(answer.read())["error"]


PROXY = """
import sys, time
from pathlib import Path
from grbench.serve.haproxy import Address, Proxy, configuration
from grbench.serve.options import ServeConfig
port, stats = map(int, sys.argv[2:])
config = ServeConfig(port=port, grpc_port=None, stats_port=stats)
proxy = Proxy(Path(sys.argv[1]), configuration(config, [Address(1, "127.0.0.1", 1, None)]))
print("started", flush=True)
time.sleep(60)
"""


@needs_haproxy
def test_haproxy_ends_with_its_launcher(tmp_path: Path) -> None:
    ports = free_ports(2)
    command = [sys.executable, "-c", PROXY, str(tmp_path / "haproxy.cfg"), *map(str, ports)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "started\n"
        wait_until(lambda: _is_open(ports[0]))
        launcher.kill()
    wait_until(lambda: not _is_open(ports[0]))


@needs_haproxy
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.0.0.2"])
def test_haproxy_takes_grpc_and_tls(tmp_path: Path, host: str) -> None:
    cert, key = certificate(tmp_path)
    pem = tmp_path / "both.pem"
    pem.write_bytes(cert.read_bytes() + key.read_bytes())
    text = configuration(ServeConfig(host=host), [Address(1, "127.0.0.1", 8100, 8101)], pem)
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    checked = subprocess.run(["haproxy", "-c", "-f", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0 and "Configuration file is valid" in checked.stdout + checked.stderr


@pytest.mark.parametrize(
    "missing, words",
    [("ray", "package ray is not installed, and it starts replicas; pip install 'grbench[ray]'"),
     ("haproxy", "haproxy is not installed, and it stands before replicas; apt-get install haproxy")],
)  # fmt: skip
def test_what_is_missing_is_named(
    grbench_here: Grbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, words: str
) -> None:
    if missing == "ray":
        monkeypatch.setitem(sys.modules, "ray", None)
        result = grbench_here("serve", *WORDS, "serve.replicas=2")
        assert result.returncode == 1 and words in result.stderr
    else:
        monkeypatch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(CommandError, match=words):
            Proxy(tmp_path / "haproxy.cfg", "")


def test_the_manifest_starts_a_replica_on_each_gpu() -> None:
    job, service = yaml.safe_load_all((ROOT / "deployment" / "ray.yaml").read_text())
    program, command, *words = job["spec"]["entrypoint"].split()
    config, file, _ = parse([w for w in words if not w.startswith(("serve.host=", "serve.api_key_file="))])
    cluster = job["spec"]["rayClusterSpec"]
    [gpus] = cluster["workerGroupSpecs"]
    containers = [g["template"]["spec"]["containers"][0] for g in (cluster["headGroupSpec"], gpus)]
    mounted = {m["mountPath"] for m in containers[0]["volumeMounts"]}
    assert (program, command) == ("grbench", "serve") and str(Path(file or "").parent) in mounted
    assert gpus["replicas"] * containers[1]["resources"]["limits"]["nvidia.com/gpu"] == config.replicas
    ports = {p["containerPort"] for p in containers[0]["ports"]}
    assert ports == {config.port, config.grpc_port} == {p["port"] for p in service["spec"]["ports"]}


@needs_haproxy
@pytest.mark.serial
@pytest.mark.timeout(420)
@pytest.mark.skipif(PROFILE != "long", reason="starts Ray; `make test-all` runs it")
def test_a_killed_replica_is_started_again(tmp_path: Path) -> None:
    """`kill -9` of a replica under load: no wrong answer, no lost call that was not in flight, recovered in time.

    One that can't start again, because its port is taken, harms nobody and is tried again.
    """
    port, stats, replica_port = free_ports(3)
    command = [sys.executable, "-m", "grbench", "serve", *WORDS, "serve.replicas=2", f"serve.port={port}",
               "serve.grpc_port=null", f"serve.stats_port={stats}", f"serve.replica_port={replica_port}"]  # fmt: skip
    config = ServeConfig(port=port, grpc_port=None, stats_port=stats)
    _, trace = tiny_trace()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        wait_until(lambda: up(config) == 2 or process.poll() is not None, 240)
        assert process.poll() is None, (tmp_path / "log").read_text()
        client = Client(f"http://127.0.0.1:{port}")
        client.wait_until_ready(120)
        wait_until(lambda: up(config) == 2, 120)  # HAProxy takes a replica for healthy until its first check has failed
        requests = list(trace.requests[:20])
        expected = [client.rank([r]).scores[0] for r in requests]
        killed = _listens_at(replica_port)
        os.kill(killed, signal.SIGKILL)
        begun, wrong, lost, asked = time.monotonic(), 0, 0, 0
        while time.monotonic() - begun < 60 and not (asked > 40 and up(config) == 2):
            for request, known in zip(requests, expected, strict=True):
                asked += 1
                try:
                    wrong += not np.allclose(client.rank([request]).scores[0], known, rtol=1e-4, atol=1e-5)
                except RuntimeError:
                    lost += 1
            time.sleep(0.05)
        assert up(config) == 2, (tmp_path / "log").read_text()
        assert wrong == 0 and lost <= 1
        assert _listens_at(replica_port) != killed
        print(json.dumps({"recovered_s": time.monotonic() - begun, "asked": asked, "lost": lost}))
        os.kill(_listens_at(replica_port), signal.SIGKILL)
        wait_until(lambda: not _is_open(replica_port))
        with socket.create_server(("127.0.0.1", replica_port)):
            wait_until(lambda: "not started again" in (tmp_path / "log").read_text())
            np.testing.assert_allclose(client.rank([requests[0]]).scores[0], expected[0], rtol=1e-4, atol=1e-5)
        wait_until(lambda: up(config) == 2)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@needs_haproxy
@pytest.mark.serial
@pytest.mark.timeout(420)
@pytest.mark.skipif(PROFILE != "long", reason="starts Ray; `make test-all` runs it")
def test_replicas_are_spread_over_the_nodes_of_a_cluster_and_one_moves_when_its_node_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three nodes of one processor: two have a replica each, and the third takes that of the node that is killed."""
    psutil = pytest.importorskip("psutil")
    port, stats, replica_port = free_ports(3)
    (tmp_path / "key").write_text("a-long-secret\n")
    start = [sys.executable, "-m", "helpers.ray_cluster", "1", "3"]
    cluster = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests")
    assert cluster.stdin is not None and cluster.stdout is not None
    for name, value in {"RAY_ADDRESS": cluster.stdout.readline().strip(), **LOCAL_ONLY}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "grbench", "serve", *WORDS, "serve.replicas=2", f"serve.port={port}",
               "serve.grpc_port=null", f"serve.stats_port={stats}", f"serve.replica_port={replica_port}",
               "serve.host=0.0.0.0", f"serve.api_key_file={tmp_path / 'key'}"]  # fmt: skip
    config = ServeConfig(port=port, grpc_port=None, stats_port=stats)
    requests = list(tiny_trace()[1].requests[:20])
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        wait_until(lambda: up(config) == 2 or process.poll() is not None, 240)
        assert process.poll() is None, (tmp_path / "log").read_text()
        client = Client(f"http://127.0.0.1:{port}", api_key="a-long-secret")
        client.wait_until_ready(120)
        wait_until(lambda: up(config) == 2, 120)

        def nodes() -> list[Any]:
            """Return the process of the node of each replica."""
            return [psutil.Process(_listens_at(replica_port + 2 * n)).parent() for n in range(2)]

        before = nodes()
        assert before[0].pid != before[1].pid and {node.name() for node in before} == {"raylet"}
        expected = [client.rank([r]).scores[0] for r in requests]
        lost = next(n for n in range(2) if "--head" not in before[n].cmdline())
        for one in [*before[lost].children(recursive=True), before[lost]]:
            one.kill()
        wait_until(lambda: up(config) == 1)
        wait_until(lambda: up(config) == 2)
        assert before[lost] not in nodes()
        for request, known in zip(requests, expected, strict=True):
            np.testing.assert_allclose(client.rank([request]).scores[0], known, rtol=1e-4, atol=1e-5)
    finally:
        process.send_signal(signal.SIGTERM)
        ended = process.wait(60)
        cluster.stdin.close()
        cluster.wait(60)
    assert ended == 0, (tmp_path / "log").read_text()


def _is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False


def _is_ready(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready())
    except InferenceServerException:  # HAProxy does not know a healthy replica yet
        return False


def _rank_by_grpc(client: triton.InferenceServerClient, request: Any) -> None:
    inputs = []
    for name, tensor in tensors_of([request]).items():
        inputs.append(triton.InferInput(name, list(tensor.shape), "FP32" if tensor.dtype == np.float32 else "INT64"))
        inputs[-1].set_data_from_numpy(tensor)
    client.infer("hstu_tiny", inputs, headers={"x-user-id": str(request.user_id)})


def _rank_by_http(port: int, request: Any) -> None:
    inputs = []
    for name, tensor in tensors_of([request]).items():
        kind = "FP32" if tensor.dtype == np.float32 else "INT64"
        inputs.append(tritonhttp.InferInput(name, list(tensor.shape), kind).set_data_from_numpy(tensor))
    with tritonhttp.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.infer("hstu_tiny", inputs, query_params={"x-user-id": str(request.user_id)})


def _listens_at(port: int) -> int:
    """Return the process that listens at a port."""
    psutil = pytest.importorskip("psutil")
    return next(c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN")
