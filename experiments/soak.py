"""Call a server for a long time at one rate, and find whether its memory grows, whether it leaks, and how late it is.

    grbench serve engine=hstu model=hstu_tiny workload=synthetic cache=lru cache.memory_gb=0.02 \
        serve.state_users=200                                          # in another shell
    python experiments/soak.py --rate 40 --minutes 25

Users of a fixed number come back. Their histories grow from visit to visit and begin again, so all lengths from 20 to
400 events come at all times: longer batches would need more memory. Every 50th call opens a new
connection, every 20th appends events, and every 100th is refused, because its shape is wrong.

With `--reload-every` the server also reads its deployment again so often, which should lose no call.

A row for each `--every` seconds has the server's memory (`rss_mb`, of the process that listens), its threads, file
descriptors and sockets, and the latencies of the window from the time at which a call was due. `heap_mb` is what the
server has allocated from the C library: the rest of `rss_mb` is code, Python's objects and free pages. The last row has
the growth of both: the slope of a line through the means of ten equal parts of the time, without the first fifth, in
which caches fill and allocators keep what they need. Its 95% interval is Student's, for ten values.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import common
import numpy as np
import psutil
from front_end import request
from replicas import listener
from scipy import stats

from grengines.api import Request
from grengines.remote.client import Client, ServerError

USERS, LEAST_EVENTS, MOST_EVENTS, CANDIDATES = 2000, 20, 400, 100
NEW_CONNECTION, APPEND, WRONG = 50, 20, 100  # one call of this number
CONNECTIONS = 4
PARTS, WARM = 10, 0.2
MB = 1e6


class Calls:
    """Calls of one kind after another. Threads may share it."""

    def __init__(self, url: str, deadline_ms: float) -> None:
        self._url, self._deadline_ms = url, deadline_ms
        self._client = Client(url)
        _ = self._client.model  # asked once, before the first call
        self._longest = request(MOST_EVENTS, CANDIDATES)

    def visit(self, number: int) -> Request:
        """Return a visit of a user whose history has grown since the visit before, or begins again."""
        user = number * 7919 % USERS
        events = LEAST_EVENTS + (user * 37 + number // USERS * 7) % (MOST_EVENTS - LEAST_EVENTS)
        return replace(common.first_events(self._longest, events), user_id=user, request_id=number)

    def call(self, number: int) -> str:
        """Make a call, and return what became of it: answered, refused, appended or wrong. Raises ServerError."""
        visit = self.visit(number)
        client = Client(self._url) if number % NEW_CONNECTION == 0 else self._client
        try:
            if number % APPEND == 1:
                client.append(replace(visit, user_id=USERS + number), 0)
                return "appended"
            if number % WRONG == 2:
                visit = replace(visit, history_weights=visit.history_weights[1:])
            client.rank([visit], self._deadline_ms)
            return "answered"
        except ServerError as e:
            if e.status == 400 and number % WRONG == 2:
                return "wrong"
            if e.status == 429:
                return "refused"
            return "lost"


def reload(url: str, every_s: float | None, ended: threading.Event) -> int:
    """Have the server read its deployment again until the end. Returns how often. Raises OSError if it refuses."""
    count = 0
    while not ended.wait(every_s):
        urllib.request.urlopen(f"{url}/reload", b"").close()
        count += 1
    return count


def heap_mb(url: str) -> float:
    """Return what the server has allocated from the C library. Ends the program if it does not say so."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    if (found := re.search(r"^grbench_heap_bytes (\S+)", text, re.MULTILINE)) is None:
        raise SystemExit("soak: the server has no grbench_heap_bytes, as where the C library is not glibc")
    return float(found[1]) / MB


def growth(seconds: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of values over time, in an hour, and half of its 95% interval. The first part is left out."""
    first = int(len(seconds) * WARM)
    parts = [np.mean(part) for part in np.array_split(np.array(values[first:]), PARTS)]
    times = [np.mean(part) / 3600 for part in np.array_split(np.array(seconds[first:]), PARTS)]
    line = stats.linregress(times, parts)
    return float(line.slope), float(line.stderr * stats.t.ppf(0.975, PARTS - 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Call, and print a row for each window and the growth."""
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server here (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=40, help="calls per second (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="how long to call (default: %(default)s)")
    parser.add_argument("--every", type=float, default=30, help="seconds of a row (default: %(default)s)")
    parser.add_argument("--limit-ms", type=float, default=80, help="latency that counts (default: %(default)s)")
    parser.add_argument("--reload-every", type=float, help="seconds between reloads (default: none)")
    args = parser.parse_args(arguments)
    if (rows_asked := args.minutes * 60 / args.every) * (1 - WARM) < PARTS:
        parser.error(f"--every {args.every:g}: {rows_asked:.0f} rows; allowed is at least {PARTS / (1 - WARM):g}")
    rows = common.Rows(args, __file__, arguments)
    common.server_at(parser, args.url)  # before its model is asked for: one that starts has another name
    calls = Calls(args.url, 30_000.0)
    server = psutil.Process(listener(urlsplit(args.url).port or 80))
    times: list[float] = []
    memory: list[float] = []
    heap: list[float] = []
    latencies: list[float] = []
    counts: Counter[str] = Counter()
    ended = threading.Event()
    begun, number = time.perf_counter(), 0

    def one(number: int) -> str:
        due = begun + number / args.rate
        time.sleep(max(due - time.perf_counter(), 0.0))
        outcome = calls.call(number)
        if outcome == "answered":
            latencies.append((time.perf_counter() - due) * 1e3)
        return outcome

    with ThreadPoolExecutor(CONNECTIONS + 1) as pool:
        reloading = pool.submit(reload, args.url, args.reload_every, ended)
        try:
            while number < args.minutes * 60 * args.rate:
                seen, end = len(latencies), number + int(args.every * args.rate)
                outcomes = Counter(pool.map(one, range(number, end)))
                counts, number = counts + outcomes, end
                window = np.array(latencies[seen:])
                if not window.size:
                    raise SystemExit(f"soak: of {outcomes.total()} calls none was answered; see the server's log")
                p50, p99 = np.percentile(window, [50, 99])
                times.append(time.perf_counter() - begun)
                memory.append(server.memory_info().rss / MB)
                heap.append(heap_mb(args.url))
                rows.add(
                    minute=times[-1] / 60, calls=number, lost=outcomes["lost"], refused=outcomes["refused"],
                    late=int((window > args.limit_ms).sum()), p50_ms=float(p50), p99_ms=float(p99), rss_mb=memory[-1],
                    heap_mb=heap[-1],
                    threads=server.num_threads(), files=server.num_fds(), sockets=len(server.net_connections()),
                )  # fmt: skip
        finally:
            ended.set()
    (slope, half), (heap_slope, heap_half) = growth(times, memory), growth(times, heap)
    all_ms = np.array(latencies)
    rows.add(
        minute=times[-1] / 60, calls=number, lost=counts["lost"], refused=counts["refused"],
        late=int((all_ms > args.limit_ms).sum()), p50_ms=float(np.percentile(all_ms, 50)),
        p99_ms=float(np.percentile(all_ms, 99)), appended=counts["appended"], wrong=counts["wrong"],
        reloads=reloading.result(), growth_mb_per_h=slope, growth_half_interval=half,
        heap_growth_mb_per_h=heap_slope, heap_growth_half_interval=heap_half,
    )  # fmt: skip
    rows.close()


if __name__ == "__main__":
    common.run(main)
