"""Measure the goodput of a server that gets more calls than it can answer, with refusals and without.

    grbench serve engine=hstu workload=synthetic                      # in another shell
    python experiments/overload.py --url http://127.0.0.1:8000 --limit-ms 200 --seconds 30

A third of the time goes to each of three loads of calls with one user each:

- capacity: 32 callers without a pause.
- refusing: twice that rate, and each call has the limit as its deadline, so the server refuses what would be late.
- answering all: the same rate with deadlines that refuse nothing.

Goodput counts the answers within the limit, from the time at which the call was due, for each second in which calls
were due. A call that is refused is not sent again. `of_capacity` is the goodput's share of the first load's rate: the
target is 0.9 for `refusing`. `lag_ms` is the p99 of how late this program sends calls. If it nears the limit while the
server refuses, the program is too slow, not the server. Where the server answers all, calls wait for one of the 256
callers as well.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import common
import numpy as np
from front_end import request

from grengines.remote.client import Client, ServerError

CALLERS, MOST_CALLERS, USERS = 32, 256, 1000
NO_LIMIT_MS = 60_000.0


def together(callers: int, call: Callable[[], bool]) -> float:
    """Run a function on many threads, each until it returns False. Returns the seconds. Raises what a call raises."""

    def repeat() -> None:
        while call():
            pass

    begun = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        for ended in [pool.submit(repeat) for _ in range(callers)]:
            ended.result()  # raises what a call has raised
    return time.perf_counter() - begun


def capacity(client: Client, seconds: float, events: int, candidates: int) -> float:
    """Return the answers a second that the server gives at most."""
    one, count, end = request(events, candidates), itertools.count(), time.perf_counter() + seconds

    def call() -> bool:
        client.rank([replace(one, user_id=next(count) % USERS)], NO_LIMIT_MS)
        return time.perf_counter() < end

    took_s = together(CALLERS, call)
    return next(count) / took_s


def overloaded(
    client: Client, rate: float, seconds: float, deadline_ms: float, events: int, candidates: int
) -> tuple[np.ndarray, int, float]:
    """Send calls at a rate. Returns the latencies of the answers, refusals, and the lag; times in milliseconds."""
    one, due, lock = request(events, candidates), itertools.count(), threading.Lock()
    latencies: list[float] = []
    lags: list[float] = []
    refused = 0
    begun, calls = time.perf_counter(), int(rate * seconds)

    def call() -> bool:
        nonlocal refused
        if (number := next(due)) >= calls:
            return False
        at = begun + number / rate
        time.sleep(max(at - time.perf_counter(), 0.0))
        lags.append((time.perf_counter() - at) * 1e3)
        try:
            client.rank([replace(one, user_id=number % USERS)], deadline_ms)
        except ServerError as e:
            if e.status != 429:
                raise
            with lock:
                refused += 1
        else:
            latencies.append((time.perf_counter() - at) * 1e3)
        return True

    together(MOST_CALLERS, call)
    return np.array(latencies or [np.inf]), refused, float(np.percentile(lags, 99))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the capacity, and the goodput of both ways."""
    parser = common.parser(__doc__ or "", overrides=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--limit-ms", type=float, default=200, help="latency that counts (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of all loads together (default: %(default)s)")
    parser.add_argument("--factor", type=float, default=2, help="rate, in capacities (default: %(default)s)")
    parser.add_argument("--events", type=int, default=400, help="of a history (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=400, help="of a call (default: %(default)s)")
    args = parser.parse_args(arguments)
    rows = common.Rows(args, __file__, arguments)
    client, each, sizes = common.server_at(parser, args.url), args.seconds / 3, (args.events, args.candidates)
    capacity(client, 1.0, *sizes)  # its costs settle
    most = capacity(client, each, *sizes)
    rows.add(load="capacity", rate_rps=most, goodput_rps=most, of_capacity=1.0)
    for load, deadline_ms in {"refusing": args.limit_ms, "answering all": NO_LIMIT_MS}.items():
        latencies, refused, lag_ms = overloaded(client, args.factor * most, each, deadline_ms, *sizes)
        good = float((latencies <= args.limit_ms).sum()) / each
        rows.add(
            load=load, rate_rps=args.factor * most, goodput_rps=good, of_capacity=good / most, refused=refused,
            late=int((latencies > args.limit_ms).sum()), p99_ms=float(np.percentile(latencies, 99)), lag_ms=lag_ms,
        )  # fmt: skip
    rows.close()


if __name__ == "__main__":
    common.run(main)
