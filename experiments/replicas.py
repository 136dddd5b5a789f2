"""Measure replicas of a server on one machine: throughput of all against one, affinity, and the loss of a replica.

    python experiments/replicas.py --parts throughput --seconds 6 --processes 12 model=dlrm_v3 workload=synthetic_long
    python experiments/replicas.py --parts affinity,killed --seconds 6 --processes 12 model=wide_heads cache=lru \
        cache.memory_gb=45 workload=synthetic_long workload.users=400 workload.user_zipf=0 workload.num_candidates=256

Both together take about four minutes on two GPUs. Predicted for two H200s of one host, before they ran since the live
gate has a limit and a stream of its own (before: 586 to 625 requests/s, 55% of the engine's 1090 offline):

- one replica of the first command carries 850 to 1050 requests/s, in full batches (`batch` 15 or more), two of them
  `in_flight`, `gate` at most 0.02; the ratio stays at 1.9 or more. If `loop` is above 0.7 and `busy` below 0.9, the
  event loop and the launching thread wait for each other, and the engine needs a process of its own.
- of the second, both balances carry more than before with 20 GB (1018 and 848), and their p99 at 0.8 of it is below
  80 ms, since no batch waits for the reference any more. Users who stay have 80 to 85% hits, in turn 45 to 50%, and
  1.5 to 1.9 times the rate: 1.91 is the ratio of the operations that are left (docs/SERVER_SPEED.md).
- a killed replica is back after 18 to 21 s, as before; the parts of its start, in the row, say where they go.

The program starts `grbench serve` with these overrides and `--replicas`, and calls it with the visits of the workload,
binary tensors, from several processes. A user's visits come from one process, in order. A share `--new` of the visits
is made by users that were never seen.

- throughput: callers without a pause, at one replica's own port and at HAProxy, in turn. The callers of one replica
  wait on each replica. `of_one` is the rate over the mean rate of one replica, which has no HAProxy before it.
- affinity: HAProxy sends each user to one replica (`user`), or a call to the replica with the fewest (`fewest`: without
  the header `x-user-id`). Callers without a pause find the capacity, and then calls at random times the highest rate
  with p99 within the limit. The latency counts from the time at which a call was due.
- killed: `kill -9` of a replica under load. An answer is wrong if it differs from the one before the kill by over a
  tenth (norm of the difference over norm). A call is lost if its client gets an error. `recovered_s` is the time until
  HAProxy finds all replicas healthy. `listening_s` and `ready_s` are the age of the new process then, and the other
  seconds are the parts of its start.

Each row also has what the replicas' metrics say: the mean `batch`, a request's wait (`queue_ms`), of each batch the
wait behind another one, the packing, the copies and the computing (`behind_ms`, `pack_ms`, `load_ms`, `compute_ms`),
the mean number of batches `in_flight`, and the shares of the time in which the device computed (`busy`), the event loop
ran (`loop`) and the live gate's reference had the device (`gate`). All are of one replica.

`hit_rate` is the share of answers with cached events, `host_rate` the share of those from the host tier. `lag_ms` is
the p99 of how late this program sends calls, and `client_cores` what it takes of the machine: if `lag_ms` nears the
limit or `client_cores` the number of processes, the program is the limit.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.message import Message
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import numpy as np
import psutil
from overload import NO_LIMIT_MS, together
from prometheus_client.parser import text_string_to_metric_families

from grbench import workloads
from grbench.serve.options import ServeConfig, parse
from grengines.api import Float32Array, Request
from grengines.remote.client import USER_HEADER, Client, ServerError

PARTS = ("throughput", "affinity", "killed")
START_S, RECOVER_S = 240.0, 120.0  # for the replicas to serve; for a killed one to serve again
GRACE_S = 1.0  # for calls that are due to be sent after the end of a load
FIRST_NEW = 1 << 40  # number of the first user that was never seen
MOST_BYTES = 100_000  # of a call's history while a replica is killed: HAProxy sends a call again that fits its buffer
PART_LABELS = ("stage", "part", "tier")
EVENT_BYTES = 28  # item, actions, weight and time
WRONG = 0.1
FORK = multiprocessing.get_context("fork")


class Unnamed(Client):
    """A client that does not tell HAProxy the user, so that a call goes to the replica with the fewest."""

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, Message]:
        kept = {name: value for name, value in (headers or {}).items() if name != USER_HEADER}
        return super()._call(method, path, body, kept)


def differ(scores: Float32Array, known: Float32Array) -> bool:
    """Return whether an answer is another one than before. It is not the same bit by bit: batches differ."""
    return not np.linalg.norm(scores - known) <= WRONG * np.linalg.norm(known)  # true for NaN too


@dataclass
class Tally:
    """Figures of the clients of one process, or of all together."""

    latencies_ms: list[float] = field(default_factory=list)
    lags_ms: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # asked, hits, refused, lost, wrong, unsent
    processor_s: float = 0.0
    took_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Take the figures of another process."""
        self.latencies_ms += other.latencies_ms
        self.lags_ms += other.lags_ms
        self.counts += other.counts
        self.processor_s += other.processor_s
        self.took_s = max(self.took_s, other.took_s)

    def row(self) -> dict[str, float | int]:
        """Return the figures for a row."""
        answers, counts = len(self.latencies_ms), self.counts
        late = [*(self.latencies_ms or [np.inf]), *[np.inf] * counts["unsent"]]
        p50, p99 = np.percentile(late, [50, 99], method="higher")
        return {
            "rate_rps": answers / self.took_s, "took_s": self.took_s, "p50_ms": float(p50), "p99_ms": float(p99),
            "answers": answers,
            "hit_rate": counts["hits"] / max(answers, 1), "refused": counts["refused"], "lost": counts["lost"],
            "unsent": counts["unsent"], "lag_ms": float(np.percentile(self.lags_ms or [0.0], 99)),
            "client_cores": self.processor_s / self.took_s,
        }  # fmt: skip


@dataclass
class Load:
    """A load of one process. rate: calls a second at random times; None: each caller calls without a pause."""

    url: str
    callers: int
    rate: float | None
    is_named: bool
    end: Any  # a shared double: time.perf_counter of the last call
    expected: Mapping[int, Float32Array]  # answers by request_id; empty: none is known


def run(load: Load, visits: Iterator[Request], seed: int, result: Connection) -> None:
    """Call the server until the load's end, and send the Tally."""
    sys.setswitchinterval(0.0005)
    client = (Client if load.is_named else Unnamed)(load.url, timeout_s=60)
    _ = client.model  # asked once, before the first call
    tally, lock, random = Tally(), threading.Lock(), np.random.default_rng(seed)
    begun, own_s = time.perf_counter(), time.process_time()
    due = begun

    def call() -> bool:
        nonlocal due
        with lock:
            due = due + random.exponential(1 / load.rate) if load.rate else time.perf_counter()
            at, request = due, next(visits)
            tally.counts["asked"] += at <= load.end.value
        if at > load.end.value:
            return False
        time.sleep(max(at - time.perf_counter(), 0.0))
        if (now := time.perf_counter()) > load.end.value + GRACE_S:
            with lock:
                tally.counts["unsent"] += 1
            return True
        tally.lags_ms.append((now - at) * 1e3)
        try:
            answer = client.rank([request], NO_LIMIT_MS)
        except ServerError as e:
            with lock:
                tally.counts["refused" if e.status == 429 else "lost"] += 1
            return True
        tally.latencies_ms.append((time.perf_counter() - at) * 1e3)
        known = load.expected.get(request.request_id)
        with lock:
            tally.counts["hits"] += answer.parameters["cached_tokens"] > 0
            tally.counts["wrong"] += known is not None and differ(answer.scores[0], known)
        return True

    together(load.callers, call)
    tally.took_s, tally.processor_s = time.perf_counter() - begun, time.process_time() - own_s
    result.send(tally)


class Clients:
    """Processes of clients. Each has the visits of its own users, and goes on where the load before it ended."""

    def __init__(self, requests: Any, processes: int, new: float) -> None:
        self._requests, self._new = requests, new
        self._of = [np.flatnonzero(requests.users % processes == k) for k in range(processes)]
        self._next = [0] * processes
        self._seeds = itertools.count()

    def _visits(self, process: int) -> Iterator[Request]:
        random, own = np.random.default_rng(next(self._seeds)), self._of[process]
        for number in itertools.count(self._next[process]):
            request: Request = self._requests[int(own[number % len(own)])]
            if random.random() < self._new:
                request = replace(request, user_id=FIRST_NEW + number * len(self._of) + process)
            yield request

    def load(self, url: str, callers: int, seconds: float, rate: float | None = None, is_named: bool = True) -> Tally:
        """Call for a time from all processes. callers: of all processes together."""
        end = FORK.Value("d", time.perf_counter() + seconds, lock=False)
        visits = [self._visits(k) for k in range(len(self._of))]
        loads = [
            Load(url, -(-callers // len(self._of)), rate and rate * len(own) / len(self._requests), is_named, end, {})
            for own in self._of
        ]
        total = Tally()
        for process, tally in enumerate(gathered(loads, visits, next(self._seeds))):
            self._next[process] += tally.counts["asked"]
            total.add(tally)
        return total


def gathered(
    loads: Sequence[Load], visits: Sequence[Iterator[Request]], seed: int, meanwhile: Callable[[], None] = lambda: None
) -> list[Tally]:
    """Run each load in a process of its own, and return what they have seen."""
    ends = [FORK.Pipe(duplex=False) for _ in loads]
    processes = [
        FORK.Process(target=run, args=(load, own, 1000 * seed + k, result), daemon=True)
        for k, (load, own, (_, result)) in enumerate(zip(loads, visits, ends, strict=True))
    ]
    for process, (_, result) in zip(processes, ends, strict=True):
        process.start()
        result.close()  # so that a process that fails ends the wait for its result
    meanwhile()
    tallies = [found.recv() for found, _ in ends]
    for process in processes:
        process.join()
    return tallies


def metrics(port: int) -> str:
    """Return the metrics of HAProxy or a replica; an empty text if it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def healthy(config: ServeConfig) -> int:
    """Return how many replicas HAProxy finds healthy. It takes each for healthy before it has asked it once."""
    up = r'^haproxy_server_status\{proxy="replicas",.*state="UP".*\} 1$'
    return len(re.findall(up, metrics(config.stats_port), re.MULTILINE))


def is_ready(port: int) -> bool:
    """Return whether a replica says that it serves."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
    except OSError:
        return False
    return True


def last_start(log: Path) -> dict[str, float]:
    """Return the seconds that the last start of a replica took, and its parts, from the log of the command."""
    found: dict[str, float] = {}
    text, decoder = log.read_text(), json.JSONDecoder()
    for start in re.finditer(r'\{"time"', text):  # Ray may write the lines of two replicas into one
        event, _ = decoder.raw_decode(text, start.start())
        if event["event"] == "listening" and "since_start_s" in event:
            found = {"listening_s": event["since_start_s"]}
        elif event["event"] == "started":
            found |= {f"{part}_s": seconds for part, seconds in event["seconds"].items()}
        elif event["event"] == "ready":
            found |= {"ready_s": event["since_start_s"]}
    return found


class Served:
    """A server with replicas that runs: its options, its log, and where its replicas are."""

    def __init__(self, config: ServeConfig, log: Path) -> None:
        self.config, self.log, self.url = config, log, f"http://127.0.0.1:{config.port}"
        self.ports = [config.replica_port + 2 * n for n in range(config.replicas)]

    def totals(self) -> Counter[str]:
        """Return the sums of all replicas' metrics so far, by name and by the label of a part."""
        total: Counter[str] = Counter()
        for port in self.ports:
            for family in text_string_to_metric_families(metrics(port)):
                for sample in family.samples:
                    part = next((sample.labels[label] for label in PART_LABELS if label in sample.labels), "")
                    total[f"{sample.name} {part}".strip()] += sample.value  # type: ignore[assignment]
        return total


def inside(before: Mapping[str, float], after: Mapping[str, float], took_s: float, servers: int) -> dict[str, float]:
    """Return what happened within the servers between two totals of their metrics."""

    def rose(name: str, *parts: str) -> float:
        return sum(after.get(key, 0.0) - before.get(key, 0.0) for key in (f"{name} {part}".strip() for part in parts))

    batches, spent = rose("grbench_batches_total", "") or np.nan, "grbench_batch_seconds_total"
    stage, hits = "grbench_stage_duration_seconds", "grbench_state_hits_total"
    return {
        "batch": rose("nv_inference_count", "") / batches,
        "queue_ms": rose(f"{stage}_sum", "queue") / (rose(f"{stage}_count", "queue") or np.nan) * 1e3,
        **{f"{part}_ms": rose(spent, part) / batches * 1e3 for part in ("behind", "pack", "load", "compute")},
        "in_flight": rose(spent, "flight") / took_s / servers,
        "busy": rose(spent, "compute") / took_s / servers,
        "loop": rose("grbench_front_end_cpu_seconds_total", "") / took_s / servers,
        "gate": rose("grbench_gate_seconds_total", "") / took_s / servers,
        "host_rate": rose(hits, "host") / (rose(hits, "host", "device", "miss") or np.nan),
    }


@contextmanager
def served(words: Sequence[str], folder: Path) -> Iterator[Served]:
    """Start `grbench serve`, wait until all replicas serve, and end it. Raises RuntimeError with the end of its log."""
    config, _, _ = parse(words)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "grbench", "serve", *words]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START_S
        started = Served(config, log)
        while healthy(config) < config.replicas or not all(map(is_ready, started.ports)):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{config.replicas} replicas do not serve; {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield started
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def throughput(rows: common.Rows, server: Served, clients: Clients, seconds: float, callers: int) -> None:
    """Measure each replica alone and all together, twice, in turn."""
    alone = {f"replica {n} alone": f"http://127.0.0.1:{port}" for n, port in enumerate(server.ports, 1)}
    clients.load(server.url, callers * len(alone), min(seconds, 3.0))  # kernels for new lengths
    rates: dict[str, list[float]] = {"all": []}
    for name, url in alone.items():
        for load, where, many in ((name, url, 1), ("all", server.url, len(alone))):
            before = server.totals()
            row = clients.load(where, callers * many, seconds).row()
            rates.setdefault(load, []).append(float(row["rate_rps"]))
            one = np.mean([rate for known in alone for rate in rates.get(known, [])])
            of_one = float(np.mean(rates["all"]) / one) if many > 1 else 1.0
            rows.add(
                part="throughput",
                load=load,
                **row,
                of_one=of_one,
                **inside(before, server.totals(), row["took_s"], many),
            )


def affinity(
    rows: common.Rows, server: Served, clients: Clients, seconds: float, callers: int, limit_ms: float, probes: int
) -> None:
    """Find the highest rate within the limit with users that stay at a replica, and without it."""
    best: dict[str, float] = {}
    many = callers * len(server.ports)
    for balance, is_named in {"user": True, "fewest": False}.items():
        clients.load(server.url, many, min(seconds, 5.0), is_named=is_named)  # states settle
        before = server.totals()
        row = clients.load(server.url, many, seconds, is_named=is_named).row()
        found = inside(before, server.totals(), row["took_s"], len(server.ports))
        rows.add(part="affinity", load="capacity", balance=balance, **row, **found)
        low, high, rate = 0.0, np.inf, 0.8 * float(row["rate_rps"])
        for _ in range(probes):
            row = clients.load(server.url, max(4 * many, 256), seconds, rate, is_named).row()
            is_in_time = row["p99_ms"] <= limit_ms and not row["refused"] + row["lost"]
            rows.add(part="affinity", load="random times", balance=balance, asked_rps=rate, in_time=is_in_time, **row)
            low, high = (rate, high) if is_in_time else (low, rate)
            rate = low * 1.12 if high == np.inf else high * 0.6 if low == 0 else (low + high) / 2
        best[balance] = low
        rows.add(part="affinity", load="highest in time", balance=balance, asked_rps=low)
    rows.add(part="affinity", load="user over fewest", ratio=best["user"] / (best["fewest"] or np.nan))


def killed(rows: common.Rows, server: Served, requests: Sequence[Request], callers: int) -> None:
    """Kill the first replica under load, and wait until all serve again."""
    most = MOST_BYTES // EVENT_BYTES
    asked = [replace(common.first_events(request, most), request_id=n, user_id=n) for n, request in enumerate(requests)]
    client = Client(server.url)
    expected = {request.request_id: client.rank([request]).scores[0] for request in asked}
    end = FORK.Value("d", np.inf, lock=False)
    times: dict[str, float] = {}

    def kill() -> None:
        time.sleep(2.0)
        os.kill(listener(server.ports[0]), signal.SIGKILL)
        begun = time.perf_counter()
        while healthy(server.config) == len(server.ports) and time.perf_counter() < begun + 10:
            time.sleep(0.05)  # HAProxy asks twice a second
        while healthy(server.config) < len(server.ports) and time.perf_counter() < begun + RECOVER_S:
            time.sleep(0.1)
        times["recovered"] = time.perf_counter() - begun if healthy(server.config) == len(server.ports) else np.inf
        end.value = time.perf_counter() + 2.0

    load = Load(server.url, callers, None, True, end, expected)
    [tally] = gathered([load], [itertools.cycle(asked)], 0, kill)
    rows.add(
        part="killed", load="kill -9", **tally.row(), asked=tally.counts["asked"], wrong=tally.counts["wrong"],
        slowest_ms=max(tally.latencies_ms), recovered_s=times["recovered"], **last_start(server.log),
    )  # fmt: skip


def listener(port: int) -> int:
    """Return the process that listens at a port."""
    return next(int(c.pid) for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN")


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the server, and measure the parts."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="of the server (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="of each load (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="of clients (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="of each replica, together (default: %(default)s)")
    parser.add_argument("--limit-ms", type=float, default=80, help="p99 of the affinity (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=3, help="rates tried for each balance (default: %(default)s)")
    parser.add_argument("--new", type=float, default=0.1, help="share of visits by new users (default: %(default)s)")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts {wrong[0]}: allowed are {', '.join(PARTS)}")
    if args.replicas < 2:
        parser.error(f"--replicas {args.replicas}: allowed is 2 or more, since one has no HAProxy before it")
    overrides = [word for word in args.overrides if not word.startswith("serve.")]
    [spec] = common.specs_of(parser, ["engine=hstu"], overrides, multirun=False)
    rows = common.Rows(args, __file__, arguments)
    requests = workloads.build(spec.workload, spec.seed, spec.latency_limit_ms).requests
    clients = Clients(requests, args.processes, args.new)
    words = ["engine=hstu", *args.overrides, f"serve.replicas={args.replicas}", "serve.grpc_port=null"]
    with tempfile.TemporaryDirectory() as folder, served(words, args.out or Path(folder)) as server:
        if "throughput" in parts:
            throughput(rows, server, clients, args.seconds, args.callers)
        if "affinity" in parts:
            affinity(rows, server, clients, args.seconds, args.callers, args.limit_ms, args.probes)
        if "killed" in parts:
            killed(rows, server, requests[:32], args.callers // 4)
    rows.close()


if __name__ == "__main__":
    common.run(main)
