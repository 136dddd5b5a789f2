"""Measure the latency that the server's front end adds to its engine, and the processor time of both sides.

    grbench serve engine=hstu model=hstu_tiny workload=synthetic       # in another shell
    python experiments/front_end.py --url http://127.0.0.1:8000 --rate 100 --seconds 20

Calls of one user with 100 events are sent at fixed times, over each of `--connections` in turn, in each of these forms
for a time:

- echo: the binary call goes to a socket in another process, which answers with the bytes of the server's answer. It is
  what the network of this machine and the waking of two processes take.
- json, binary: calls whose bytes are made beforehand, so that little of the time is the client's.
- client: the typed client with binary tensors, which makes and reads each call.

Of each the program takes the round trip, less the server's own report of waiting and of the engine's call. What is left
is the network on this machine, the parsing, the choice, the event loop, the check of the answer, and the client.
`loop_ms` is the processor time of the server's event loop for each call, and `client_ms` that of this program.
`unnamed_ms` is the median of what the engine's call takes beside its parts `pack_ms`, `load_ms` and `compute_ms`.

With `--beside URL` binary calls go to that server and to that of `--url` in turn, such as to those of two commits. So
both have the same neighbours on a shared machine. The last row is the ratio of the medians with its 95% interval.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import common
import numpy as np

from grengines.api import Request
from grengines.remote.client import Tensors, body_of, tensors_of

PARTS, NAMED = ("queue_ms", "engine_ms"), ("pack_ms", "load_ms", "compute_ms")
DEADLINE = {"deadline_ms": 30_000}
Call = Callable[[], dict[str, float]]  # returns the parameters of the answer


def request(events: int = 100, candidates: int = 32) -> Request:
    """Return a request with random items."""
    rng = np.random.default_rng(0)
    history, weights = rng.integers(0, 1000, events), rng.random(events).astype(np.float32)
    times = np.arange(events) * 60
    wanted = rng.integers(0, 1000, candidates)
    return Request(0, 1, history, np.ones(events, np.int64), weights, times, 0, wanted, events * 60, 0.0, 0.0)


def inputs_of(tensors: Tensors) -> list[dict[str, object]]:
    """Return tensors as inputs of a JSON call."""
    kinds = {"f": "FP32", "i": "INT64"}
    return [
        {"name": n, "shape": list(t.shape), "datatype": kinds[t.dtype.kind], "data": t.tolist()}
        for n, t in tensors.items()
    ]


class Socket:
    """A connection that sends made bytes and reads an answer, with as little work as possible."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, call: bytes) -> bytes:
        """Return the whole answer to a call."""
        self._socket.sendall(call)
        answer = self._socket.recv(1 << 20)
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self._socket.recv(1 << 20)
        length = end + 4 + int(re.search(rb"(?i)content-length: *(\d+)", answer[:end])[1])  # type: ignore[index]
        while len(answer) < length:
            answer += self._socket.recv(1 << 20)
        return answer


def http_call(path: str, host: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return the bytes of a call."""
    given = {"host": host, "content-length": str(len(body)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def parameters_of(answer: bytes) -> dict[str, float]:
    """Return the parameters of an answer of the server. Ends the program if it refused, or does not say `engine_ms`."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head[:16]:
        raise SystemExit(f"front_end: the server answered {head.splitlines()[0].decode()}: {body[:300].decode()}")
    start = answer.index(b'"parameters":') + len(b'"parameters":')
    found: dict[str, float] = json.loads(answer[start : answer.index(b"}", start) + 1])
    if "engine_ms" not in found:
        raise SystemExit("front_end: the answer has no engine_ms, as with continuous batching; use another engine")
    return found


def echo(port: Connection, calls: int, answer: bytes) -> None:
    """Answer each call of this many bytes with the same bytes."""
    listener = socket.create_server(("127.0.0.1", 0))
    port.send(listener.getsockname()[1])
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    left = calls
    while data := connection.recv(1 << 20):
        left -= len(data)
        if left == 0:
            connection.sendall(answer)
            left = calls


def loop_s(url: str) -> float:
    """Return the processor time of the server's event loop."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return float(re.search(r"^grbench_front_end_cpu_seconds_total (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]


def sent(calls: Sequence[Call], rate: float, number: int) -> tuple[list[float], list[float]]:
    """Send this many calls at a rate, with a thread for each of the sequence.

    Returns what was added to the engine's calls, and what is in no part of these, milliseconds.
    """
    begun = time.perf_counter()

    def of_thread(first: int) -> list[tuple[float, float]]:
        found = []
        for i in range(first, number, len(calls)):
            time.sleep(max(begun + i / rate - time.perf_counter(), 0.0))
            sent = time.perf_counter()
            reported = calls[first]()
            added = (time.perf_counter() - sent) * 1e3 - sum(reported[part] for part in PARTS)
            found.append((added, reported["engine_ms"] - sum(reported.get(part, 0.0) for part in NAMED)))
        return found

    with ThreadPoolExecutor(len(calls)) as pool:
        both = [pair for found in pool.map(of_thread, range(len(calls))) for pair in found]
    return [added for added, _ in both], [unnamed for _, unnamed in both]


def in_turn(pair: Sequence[Call], rate: float, number: int) -> list[list[float]]:
    """Send this many calls to each of two servers, changing which is first. Returns what each added, milliseconds."""
    found: list[list[float]] = [[], []]
    begun = time.perf_counter()
    for i in range(2 * number):
        which = (i + i // 2) % 2
        time.sleep(max(begun + i / rate - time.perf_counter(), 0.0))
        sent = time.perf_counter()
        reported = pair[which]()
        found[which].append((time.perf_counter() - sent) * 1e3 - sum(reported[part] for part in PARTS))
    return found


def ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the second over that of the first, and its 95% interval by resampling."""
    rng = np.random.default_rng(0)
    a, b = np.array(first), np.array(second)
    drawn = [np.median(rng.choice(b, len(b))) / np.median(rng.choice(a, len(a))) for _ in range(1000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.median(b) / np.median(a)), float(low), float(high)


def compare(rows: common.Rows, urls: Sequence[str], call: bytes, rate: float, seconds: float) -> None:
    """Add a row for each of two servers, and one for their ratio."""
    sockets = [Socket(urlsplit(url).hostname or "", urlsplit(url).port or 80) for url in urls]
    pair: list[Call] = [lambda server=server: parameters_of(server.ask(call)) for server in sockets]  # type: ignore[misc]
    in_turn(pair, rate, 20)
    added = in_turn(pair, rate, int(rate * seconds / 2))
    for url, values in zip(urls, added, strict=True):
        p50, p99 = np.percentile(values, [50, 99])
        rows.add(server=url, calls=len(values), p50_ms=float(p50), p99_ms=float(p99))
    middle, low, high = ratio(*added)
    rows.add(server="ratio", calls=len(added[0]), p50_ratio=middle, low=low, high=high)
    rows.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Send every form, and print the percentiles of what the front end adds."""
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--beside", metavar="URL", help="of another server, which gets every other call")
    parser.add_argument("--rate", type=float, default=100, help="calls per second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="how long to call (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=32, help="candidates of a call (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=1, help="more for a high rate (default: %(default)s)")
    args = parser.parse_args(arguments)
    sys.setswitchinterval(0.0005)  # threads wait for each other at most so long
    rows = common.Rows(args, __file__, arguments)
    client, one = common.server_at(parser, args.url), request(candidates=args.candidates)
    parts = urlsplit(args.url)
    host, path = parts.hostname or "", f"/v2/models/{client.model}/infer"
    tensors = tensors_of([one], rank=True)
    as_json = json.dumps({"inputs": inputs_of(tensors), "parameters": DEADLINE}).encode()
    json_call = http_call(path, host, as_json, {})
    binary = http_call(path, host, *body_of(tensors, {"binary_data_output": True, **DEADLINE}))

    if args.beside:
        common.server_at(parser, args.beside)
        compare(rows, [args.url, args.beside], binary, args.rate, args.seconds)
        return
    nothing = dict.fromkeys(PARTS, 0.0)
    forms: dict[str, list[Call]] = {"echo": [], "json": [], "binary": [], "client": []}
    echoing = []
    for _ in range(args.connections):
        server = Socket(host, parts.port or 80)
        port, port_of_echo = multiprocessing.Pipe()
        words = (port_of_echo, len(binary), server.ask(binary))
        echoing.append(multiprocessing.Process(target=echo, args=words, daemon=True))
        echoing[-1].start()
        mirror = Socket("127.0.0.1", port.recv())
        forms["echo"].append(lambda mirror=mirror: nothing if mirror.ask(binary) else {})  # type: ignore[misc]
        forms["json"].append(lambda server=server: parameters_of(server.ask(json_call)))  # type: ignore[misc]
        forms["binary"].append(lambda server=server: parameters_of(server.ask(binary)))  # type: ignore[misc]
        forms["client"].append(lambda: client.rank([one], DEADLINE["deadline_ms"]).parameters)
    for name, calls in forms.items():
        calls[0]()
        number = int(args.rate * args.seconds / len(forms))
        begun, own_s, servers_s = time.perf_counter(), time.process_time(), loop_s(args.url)
        added, unnamed = sent(calls, args.rate, number)
        took_s = time.perf_counter() - begun
        own_s, servers_s = time.process_time() - own_s, loop_s(args.url) - servers_s
        p50, p99 = np.percentile(added, [50, 99])
        rows.add(
            form=name, calls=number, rate_rps=number / took_s, p50_ms=float(p50), p99_ms=float(p99),
            loop_ms=0.0 if name == "echo" else servers_s / number * 1e3, client_ms=own_s / number * 1e3,
            unnamed_ms=float(np.median(unnamed)),
        )  # fmt: skip
    for process in echoing:
        process.terminate()
    rows.close()


if __name__ == "__main__":
    common.run(main)
